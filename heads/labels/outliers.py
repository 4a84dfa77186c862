"""Samples that are far from the others of every label that they have.

Of two ways to measure (around zero, around the mean), around zero found the more of foreign texts
that were mixed in: around the mean what lies far outside is as long as all else.

Legend: n samples, m samples of a label, D values.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmc.heads.labels.material import Ints, Material, Progress, spaced

COLUMNS = ("rank", "id", "split", "label", "score", "cosine", "usual", "labels", "image", "text")
REFERENCES = 500
"""A sample is compared with so many others of a label at most, evenly spaced."""
REFERENCE_VALUES = 1 << 25
"""Of all labels that are looked at in one pass over the embeddings."""
NEAREST_SHARE, NEAREST = 0.1, 3
"""A sample is as far as the mean of so many of a label is, the nearest, and three at least: a
handful that is odd alike does not hide."""
LEAST_SAMPLES = 5
"""A label with fewer has no usual distance."""
FLOOR = 3.0
"""Deviations from the usual cosine from which a sample is an outlier."""
LEAST_LISTED = 10
"""Listed for comparison where there are fewer outliers."""
BLOCK = 1 << 24

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Label:
    """A label (-1: of all samples, where none is labelled) and its samples' cosines."""

    label: int
    places: Ints
    """(m,) ascending."""
    cosines: Floats
    """(m,) to the nearest others."""
    references: Ints
    """Positions in ``places``."""


def outliers(material: Material, limit: int, progress: Progress) -> list[dict[str, Any]]:
    """Rows of `outliers.csv`, the farthest first.

    ``score`` is how many deviations the cosine to the nearest others of a label is below what is
    usual there, of the label of the sample to which it is nearest so measured.
    """
    n = len(material)
    score = np.full(n, np.inf, np.float32)
    nearest, cosine, usual = np.full(n, -1), np.zeros(n, np.float32), np.zeros(n, np.float32)
    labels = _labels(material)
    for number, group in enumerate(_groups(labels, material), 1):
        _fill(
            material,
            group,
            lambda done, of, number=number: progress(
                f"outliers, part {number}" if len(labels) > 1 else "outliers", done, of
            ),
        )
        for found in group:
            median = float(np.median(found.cosines))
            far = (median - found.cosines) / max(_spread(found.cosines, median), 1e-6)
            closer = far < score[found.places]
            at = found.places[closer]
            score[at], cosine[at] = far[closer], found.cosines[closer]
            nearest[at], usual[at] = found.label, median
    score[np.isinf(score)] = -1
    chosen = np.argsort(-score, kind="stable")[:limit]
    listed = max(int((score[chosen] >= FLOOR).sum()), LEAST_LISTED)
    chosen = chosen[:listed][score[chosen[:listed]] > 0]
    columns = {name: material.column(name, chosen) for name in ("id", "image", "text")}
    return [
        {
            "rank": at + 1,
            "id": columns["id"][at],
            "split": material.split[place],
            "label": "" if nearest[place] < 0 else material.label_set[nearest[place]],
            "score": float(score[place]),
            "cosine": float(cosine[place]),
            "usual": float(usual[place]),
            "labels": material.names(place),
            "image": columns["image"][at],
            "text": columns["text"][at],
            "_row": int(material.rows[place]),
        }
        for at, place in enumerate(chosen.tolist())
    ]


def _spread(cosines: Floats, median: float) -> float:
    """How far below the median is usual, as a standard deviation: of the lower half alone."""
    return float(median - np.quantile(cosines, 0.1587))


def _labels(material: Material) -> list[_Label]:
    """The labels with enough samples; one of all samples where nothing is labelled."""
    known = material.labels
    if not known.known.any():
        every = [(-1, np.arange(len(material)))]
    else:
        sample = np.repeat(np.arange(len(material)), np.diff(known.indptr))
        order = np.argsort(known.indices, kind="stable")
        cuts = np.searchsorted(known.indices[order], np.arange(len(material.label_set) + 1))
        every = [
            (label, sample[order[cuts[label] : cuts[label + 1]]])
            for label in range(len(material.label_set))
        ]
    return [
        _Label(
            label,
            places,
            np.empty(len(places), np.float32),
            spaced(np.arange(len(places)), REFERENCES),
        )
        for label, places in every
        if len(places) >= LEAST_SAMPLES
    ]


def _groups(labels: list[_Label], material: Material) -> list[list[_Label]]:
    """Labels whose references are held together."""
    width = sum(material.store[name].shape[1] for name in material.features)
    groups: list[list[_Label]] = []
    room = 0
    for found in labels:
        if len(found.references) > room:
            groups.append([])
            room = max(REFERENCE_VALUES // width, len(found.references))
        groups[-1].append(found)
        room -= len(found.references)
    return groups


def _fill(material: Material, group: list[_Label], progress: Any) -> None:
    """The cosines of the samples of some labels, in one pass over their embeddings."""
    held = np.unique(np.concatenate([found.places[found.references] for found in group]))
    base = material.gather(held, centred=False)
    references = [
        base[torch.from_numpy(np.searchsorted(held, found.places[found.references]))]
        for found in group
    ]
    wanted = np.unique(np.concatenate([found.places for found in group]))
    for first, block in material.vectors(wanted, progress, centred=False):
        low, high = wanted[first], wanted[first + len(block) - 1]
        for found, others in zip(group, references, strict=True):
            start, stop = np.searchsorted(found.places, [low, high + 1])
            if start < stop:
                at = np.searchsorted(wanted, found.places[start:stop]) - first
                own = np.searchsorted(found.references, np.arange(start, stop))
                own[own == len(found.references)] = 0
                mine = found.references[own] == np.arange(start, stop)
                found.cosines[start:stop] = _near(
                    block[torch.from_numpy(at)], others, np.where(mine, own, -1)
                )


def _near(block: Tensor, references: Tensor, own: Ints) -> Floats:
    """float32 (b,): mean cosine to the nearest references, but that at ``own`` (-1: none)."""
    count = max(NEAREST, round(NEAREST_SHARE * len(references)))
    count = min(count, len(references) - 1)
    parts = []
    step = max(1, BLOCK // len(references))
    for i in range(0, len(block), step):
        cosines = block[i : i + step] @ references.T
        rows = np.flatnonzero(own[i : i + step] >= 0)
        cosines[torch.from_numpy(rows), torch.from_numpy(own[i : i + step][rows])] = -2
        parts.append(cosines.topk(count, dim=1).values.mean(1))
    found: Floats = torch.cat(parts).cpu().numpy()
    return found
