"""The samples that are looked at: their embeddings, block by block, and their labels.

Legend: n samples looked at, C labels, D values of all features together, b samples of a block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor

from mmc.heads.batches import raw_blocks
from mmc.heads.devices import pick_device
from mmc.heads.features import resolve
from mmc.heads.models.linear import Linear
from mmc.store.errors import InputError

if TYPE_CHECKING:
    from mmc.heads.artifact import Run
    from mmc.store import EmbeddingStore

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Progress = Callable[[str, int, int], None]
"""Told (stage, done, total)."""

BLOCK_ROWS = 8192
"""b at most: what is made of a block may have more values than it."""
SHOWN_IDS = 5
CENTRE_ROWS = 20_000
"""The mean embedding is taken over so many samples, evenly spaced."""


@dataclass(frozen=True)
class Known:
    """Labels of the n samples as compressed rows; a row of an unlabelled sample is empty."""

    indptr: Ints
    """(n + 1,)"""
    indices: Ints
    known: Bools
    """(n,) samples of which labels are known."""
    unknown_indptr: Ints
    """(n + 1,)"""
    unknown_indices: Ints
    """Single labels that are not known of such samples, in the same form."""

    def of(self, place: int) -> list[int]:
        """The labels of one sample."""
        return self.indices[self.indptr[place] : self.indptr[place + 1]].tolist()

    def unknown_of(self, place: int) -> list[int]:
        """The labels of one sample that are not known, where others are."""
        start, stop = self.unknown_indptr[place], self.unknown_indptr[place + 1]
        return self.unknown_indices[start:stop].tolist()


class Material:
    """A store as this package reads it.

    Args:
        spec: as ``--features``; empty: the run's pooled features, or all pooled ones.

    Raises:
        InputError: no such feature, or no sample has all of them in finite numbers.
    """

    def __init__(
        self,
        store: "EmbeddingStore",
        spec: Sequence[str] = (),
        *,
        run: "Run | None" = None,
        device: str = "auto",
    ) -> None:
        self.store, self.device = store, pick_device(device)
        if not spec and run is not None:
            used = run.resolve_features(store).values()
            spec = tuple(name for name in used if len(store[name].shape) == 2)
        self.features = tuple(resolve(store, spec, Linear, "mmc labels").values())
        rows = store.rows(features=self.features).astype(np.int64)
        if not len(rows):
            raise InputError(
                f"no sample of {store.path} has {' and '.join(self.features)}; run `mmc extract`"
            )
        bad = self._not_finite(rows)
        self.rows: Ints = rows[~np.logical_or.reduce([*bad.values()])]
        """Rows of the store, ascending (n,): those whose embeddings are all finite."""
        self.left_out = self._told(rows, bad)
        """A line on those that are not, which have no cosine to anything; empty: none."""
        if not len(self.rows):
            raise InputError(
                f"no embedding of {' and '.join(self.features)} in {store.path} is finite; make "
                "them again, or leave the feature out with --features"
            )
        self.label_set = store.label_set
        self.labels = _known(store, self.rows)
        self.split: list[str] = store.column("split").take(pa.array(self.rows)).to_pylist()
        names = np.array(self.split, dtype=object)
        marked = "train" if (names == "train").any() else ""
        self.train: Bools = names == marked
        """(n,) samples of the training split; those without a split where none is marked."""
        self._centre: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labelled(self) -> Ints:
        """Places of the labelled samples, ascending."""
        return np.flatnonzero(self.labels.known)

    @property
    def counted(self) -> Ints:
        """Places of the labelled samples of the training split; of all where it has none."""
        inside = np.flatnonzero(self.labels.known & self.train)
        return inside if len(inside) else self.labelled

    def vectors(
        self,
        places: Ints | None = None,
        progress: Callable[[int, int], None] | None = None,
        *,
        centred: bool = True,
    ) -> Iterator[tuple[int, Tensor]]:
        """(first, float32 (b, D)) of ascending ``places``, on the device, of length 1.

        Each feature has unit length around its mean, and all count alike. Not ``centred``: around
        zero, and a feature counts the more the nearer any two samples are by it, so that a product
        is the mean of their cosines on a common scale.
        """
        rows = self.rows if places is None else self.rows[places]
        centre = self._means()
        share = {name: 1 / len(centre) for name in centre}
        if not centred:
            near = {name: 1 / max(1 - float(c.square().sum()), 1e-6) for name, c in centre.items()}
            share = {name: value / sum(near.values()) for name, value in near.items()}
        for first, batch in raw_blocks(self.store, self._roles(), rows, self.device):
            size = len(next(iter(batch.values())))
            for i in range(0, size, BLOCK_ROWS):
                parts = []
                for name, values in batch.items():
                    unit = F.normalize(values[i : i + BLOCK_ROWS], dim=1)
                    if centred:
                        unit = F.normalize(unit - centre[name])
                    parts.append(unit * share[name] ** 0.5)
                yield first + i, parts[0] if len(parts) == 1 else torch.cat(parts, 1)
                if progress:
                    progress(first + i + len(parts[0]), len(rows))

    def gather(self, places: Ints, *, centred: bool = True) -> Tensor:
        """As `vectors`, in one piece; for some thousands of samples at most."""
        order = np.argsort(places, kind="stable")
        out: Tensor | None = None
        for first, block in self.vectors(places[order], centred=centred):
            if out is None:
                out = block.new_empty(len(places), block.shape[1])
            out[torch.from_numpy(order[first : first + len(block)]).to(out.device)] = block
        assert out is not None, "no places"
        return out

    def column(self, name: str, places: Ints) -> list[str]:
        """A text column of the store, "" for null."""
        values = self.store.column(name).take(pa.array(self.rows[places]))
        return pc.fill_null(values, "").to_pylist()

    def names(self, place: int) -> list[str] | None:
        """Names of a sample's labels; None: not known."""
        if not self.labels.known[place]:
            return None
        return [self.label_set[label] for label in self.labels.of(place)]

    def _not_finite(self, rows: Ints) -> dict[str, Bools]:
        """Feature -> which of ``rows`` hold NaN or infinity in it."""
        bad = {name: np.zeros(len(rows), bool) for name in self.features}
        for first, batch in raw_blocks(self.store, self._roles(), rows, self.device):
            for name, values in batch.items():
                found = ~values.isfinite().all(1)
                bad[name][first : first + len(values)] = found.cpu().numpy()
        return bad

    def _told(self, rows: Ints, bad: Mapping[str, Bools]) -> str:
        """How many of ``rows`` are left out, by which feature, and the ids of the first."""
        parts = []
        for name, found in bad.items():
            ids = self.store.column("id").take(pa.array(rows[found][:SHOWN_IDS])).to_pylist()
            more = ", ..." if found.sum() > len(ids) else ""
            if ids:
                parts.append(f"{int(found.sum()):,} by {name} ({', '.join(map(str, ids))}{more})")
        if not parts:
            return ""
        return f"embeddings that are not finite, whose samples are left out: {'; '.join(parts)}"

    def _roles(self) -> dict[str, str]:
        return {name: name for name in self.features}

    def _means(self) -> dict[str, Tensor]:
        if self._centre is None:
            some = spaced(self.rows, CENTRE_ROWS)
            total: dict[str, Tensor] = {}
            for _, batch in raw_blocks(self.store, self._roles(), some, self.device):
                for name, values in batch.items():
                    found = F.normalize(values, dim=1).double().sum(0)
                    total[name] = total[name] + found if name in total else found
            self._centre = {name: (value / len(some)).float() for name, value in total.items()}
        return self._centre


def spaced(values: Ints, most: int) -> Ints:
    """``most`` of them at most, evenly spaced."""
    return (
        values if len(values) <= most else values[np.linspace(0, len(values) - 1, most).astype(int)]
    )


def _known(store: "EmbeddingStore", rows: Ints) -> Known:
    labels = store.labels
    indptr, indices = labels.given(rows)
    counts = np.diff(indptr)
    known = labels.known[rows].copy()
    if store.task in ("binary", "multiclass"):
        known &= counts == 1
    kept = indices[np.repeat(known, counts)].astype(np.int64)
    indptr = np.concatenate([[0], np.cumsum(np.where(known, counts, 0))]).astype(np.int64)
    lacking = labels.unknown(rows)
    return Known(indptr, kept, known, lacking[0], lacking[1].astype(np.int64))
