"""Samples that are the same, or nearly: by content hash, and by the cosine of their embeddings.

Legend: n samples, k neighbours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from mmc.heads.labels.around import Around
from mmc.heads.labels.material import Ints, Material, spaced
from mmc.heads.leakage import NEAR_SHARE, random_distance
from mmc.store.schema import TOWER_CONTENT

COLUMNS = (
    "group",
    "kind",
    "size",
    "leak",
    "labels_differ",
    "cosine",
    "id",
    "split",
    "labels",
    "image",
    "text",
)
GROUPS_AT_ONCE = 4096
THRESHOLD_ROWS = 5000
"""Samples, evenly spaced, that the distance of random ones is measured on."""


@dataclass(frozen=True)
class Groups:
    """Sets of samples that are the same by one kind of likeness."""

    kind: str
    """``image``, ``text`` (content hashes) or ``near FEATURE``."""
    members: list[Ints]
    """Places of each group, ascending; two or more."""
    threshold: float | None = None
    cosines: npt.NDArray[np.float32] | None = None
    """(n,) to the nearest other of its group; None for exact ones."""


def exact_groups(material: Material, content: str) -> Groups:
    """Samples with the same ``image`` or ``text`` hash."""
    code = _codes(material, content)
    return Groups(content, _collected(code, code >= 0))


def near_groups(material: Material, by: Around, threshold: float | None = None) -> Groups:
    """Samples that are linked by cosines of at least ``threshold`` (None: `near_threshold`)."""
    limit = near_threshold(material, by.feature) if threshold is None else threshold
    with np.errstate(invalid="ignore"):
        close = (by.cosines >= limit) & (by.places >= 0)
    one, column = np.nonzero(close)
    n = len(material)
    links = csr_array(
        (np.ones(len(one), np.int8), (one, by.places[one, column].astype(np.int64))), shape=(n, n)
    )
    _, group = connected_components(links, directed=False)
    linked = np.zeros(n, bool)
    linked[one] = linked[by.places[one, column]] = True
    cosines = np.full(n, -1, np.float32)
    for side in (one, by.places[one, column]):
        np.maximum.at(cosines, side, by.cosines[one, column])
    found = _collected(group, linked)
    contents = TOWER_CONTENT[material.store[by.feature].tower]
    keys = [_codes(material, content) for content in contents]
    # What is exactly the same throughout is listed as such already.
    found = [g for g in found if any(len(np.unique(k[g])) > 1 or k[g[0]] < 0 for k in keys)]
    return Groups(f"near {by.feature}", found, limit, cosines)


def near_threshold(material: Material, feature: str) -> float:
    """The cosine from which two samples are near-identical, by how far random ones are apart."""
    some = spaced(material.rows, THRESHOLD_ROWS)
    return 1 - NEAR_SHARE * random_distance(material.store[feature], some)


def leaks(material: Material, members: Ints) -> bool:
    """Whether a group has samples of training and of another split."""
    train = material.train[members]
    return bool(train.any() and not train.all())


def duplicate_rows(material: Material, found: Sequence[Groups]) -> Iterator[dict[str, Any]]:
    """Rows of `duplicates.csv`: leaking groups first, then exact ones, then large ones."""
    listed = [(groups, members) for groups in found for members in groups.members]
    listed.sort(
        key=lambda item: (
            not leaks(material, item[1]),
            item[0].threshold is not None,
            -len(item[1]),
            int(item[1][0]),
        )
    )
    for first in range(0, len(listed), GROUPS_AT_ONCE):
        part = listed[first : first + GROUPS_AT_ONCE]
        places = np.concatenate([members for _, members in part])
        columns = {name: iter(material.column(name, places)) for name in ("id", "image", "text")}
        for number, (groups, members) in enumerate(part, first + 1):
            names = [material.names(place) for place in members.tolist()]
            differ, leak = int(_differ(material, members)), int(leaks(material, members))
            for at, place in enumerate(members.tolist()):
                yield {
                    "group": number,
                    "kind": groups.kind,
                    "size": len(members),
                    "leak": leak,
                    "labels_differ": differ,
                    "cosine": None if groups.cosines is None else float(groups.cosines[place]),
                    "id": next(columns["id"]),
                    "split": material.split[place],
                    "labels": names[at],
                    "image": next(columns["image"]),
                    "text": next(columns["text"]),
                    "_row": int(material.rows[place]),
                }


def _differ(material: Material, members: Ints) -> bool:
    """Whether one sample has a label that another is known not to have."""
    known = [int(place) for place in members if material.labels.known[place]]
    given = [set(material.labels.of(place)) for place in known]
    every = set().union(*given)
    return any(
        every - own - set(material.labels.unknown_of(place))
        for place, own in zip(known, given, strict=True)
    )


def _codes(material: Material, content: str) -> Ints:
    """int64 (n,): the same number for the same content, -1 for none."""
    keys = material.store.column(f"{content}_key").take(pa.array(material.rows)).combine_chunks()
    codes = pc.dictionary_encode(keys).indices
    return pc.fill_null(codes, -1).to_numpy(zero_copy_only=False).astype(np.int64)


def _collected(group: npt.NDArray[Any], wanted: npt.NDArray[np.bool_]) -> list[Ints]:
    """Places of each group that has two or more wanted ones."""
    places = np.flatnonzero(wanted)
    order = places[np.argsort(group[places], kind="stable")]
    cuts = np.flatnonzero(np.diff(group[order])) + 1
    return [part.astype(np.int64) for part in np.split(order, cuts) if len(part) > 1]
