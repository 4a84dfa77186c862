"""What is true of the rows that a head is trained or validated on, read batch by batch.

A byte for every row and label would be 10 GB for a million rows of 10,000 labels, of which a few
are true of each. So large sets keep the labels that rows have, and those that they do not know; a
batch is written out when it is asked for.

Measured on one thread, 200,000 rows of 80 labels in batches of 2,000: 0.04 ms a batch as bytes, 0.3
ms otherwise, of a step of 16 ms; 100,000 rows of 10,000 labels: 14 and 9 ms, of a step of 2 s, and
1,000 MB against 3.

Legend: n rows, b rows of a batch, C labels.
"""

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmc.heads import splits

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore
    from mmc.store.samples import Labels

MOST_DENSE = 1 << 28
"""Bytes, one for every row and label, up to which targets are kept so."""

Rows = npt.NDArray[np.int64]


class Targets(Protocol):
    """Labels in {-1, 0, 1}, -1: unknown, (n, C) for several labels per row; else classes (n,)."""

    @property
    def device(self) -> torch.device:
        """Where they lie, and where rows are asked for."""

    @property
    def nbytes(self) -> int:
        """Memory that they take."""

    def __len__(self) -> int:
        """n."""

    def rows(self, index: Tensor, out: Tensor | None = None) -> Tensor:
        """The targets of some rows: int8 (b, C), or int64 (b,).

        Args:
            index: int64 (b,), on the device.
            out: tensor to put them into, of any type; None: a new one.
        """

    def whole(self) -> Tensor:
        """Those of all rows: int8 (n, C), or int64 (n,)."""

    def room(self, size: int) -> Tensor:
        """A tensor for ``size`` rows as losses take them: float32 (size, C), or int64 (size,)."""


class DenseTargets:
    """Targets that are kept as they are; see :class:`Targets`."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self.device, self.nbytes = values.device, values.nbytes

    def __len__(self) -> int:
        return len(self._values)

    def rows(self, index: Tensor, out: Tensor | None = None) -> Tensor:
        """See :class:`Targets`."""
        if out is None:
            return self._values.index_select(0, index)
        if out.dtype == self._values.dtype:
            return torch.index_select(self._values, 0, index, out=out)
        return out.copy_(self._values.index_select(0, index))

    def whole(self) -> Tensor:
        """See :class:`Targets`."""
        return self._values

    def room(self, size: int) -> Tensor:
        """See :class:`Targets`."""
        dtype = torch.float32 if self._values.ndim == 2 else self._values.dtype
        return self._values.new_empty((size, *self._values.shape[1:]), dtype=dtype)


class SparseTargets:
    """The labels that rows have and those that they do not know; see :class:`Targets`.

    Args:
        labels: of a store.
        rows: (n,) of it; of each some label is known.
        device: where they lie.
    """

    def __init__(self, labels: "Labels", rows: Rows, device: torch.device) -> None:
        self._size, self._width, self.device = len(rows), labels.num_labels, device
        lists = [(1, labels.given(rows))]
        lists += [(-1, labels.unknown(rows))] if labels.partly else []
        self._lists = [
            (value, torch.from_numpy(indptr).to(device), torch.from_numpy(indices).to(device))
            for value, (indptr, indices) in lists
        ]
        self.nbytes = sum(a.nbytes + b.nbytes for _, a, b in self._lists)

    def __len__(self) -> int:
        return self._size

    def rows(self, index: Tensor, out: Tensor | None = None) -> Tensor:
        """See :class:`Targets`."""
        if out is None:
            out = torch.empty(len(index), self._width, dtype=torch.int8, device=self.device)
        out.zero_()
        numbers = torch.arange(len(index), device=self.device)
        for value, indptr, indices in self._lists:
            first = indptr.index_select(0, index)
            counts = indptr.index_select(0, index + 1) - first
            ends = counts.cumsum(0)
            total = int(ends[-1]) if len(ends) else 0
            row = numbers.repeat_interleave(counts, output_size=total)
            # Place of each label: the start of its row plus 0, 1, 2 ...
            place = torch.arange(total, device=self.device)
            place += (first - (ends - counts)).index_select(0, row)
            out[row, indices.index_select(0, place).long()] = value
        return out

    def whole(self) -> Tensor:
        """See :class:`Targets`."""
        return self.rows(torch.arange(self._size, device=self.device))

    def room(self, size: int) -> Tensor:
        """See :class:`Targets`."""
        return torch.empty(size, self._width, device=self.device)


def as_targets(targets: Tensor | Targets) -> Targets:
    """Targets that may be given as a tensor, int8 (n, C) or int64 (n,)."""
    return DenseTargets(targets) if isinstance(targets, Tensor) else targets


def load_targets(store: "EmbeddingStore", rows: Rows, device: torch.device) -> Targets:
    """Those of labelled ``rows`` of a store, in the form that `nbytes_of` counts."""
    if _is_sparse(store, rows):
        return SparseTargets(store.labels, rows, device)
    return DenseTargets(splits.targets(store, rows).to(device))


def nbytes_of(store: "EmbeddingStore", rows: Rows) -> int:
    """What `load_targets` of ``rows`` takes."""
    if store.task != "multilabel":
        return 8 * len(rows)
    dense = len(rows) * len(store.label_set)
    return _sparse_bytes(store.labels, rows) if _is_sparse(store, rows) else dense


def _is_sparse(store: "EmbeddingStore", rows: Rows) -> bool:
    """Whether a set is so large that it is not kept as bytes, and would be smaller otherwise."""
    dense = len(rows) * len(store.label_set)
    if store.task != "multilabel" or dense <= MOST_DENSE:
        return False
    return _sparse_bytes(store.labels, rows) < dense


def _sparse_bytes(labels: "Labels", rows: Rows) -> int:
    lists = [(labels.indptr, labels.indices)]
    if labels.unknown_indptr is not None and labels.unknown_indices is not None:
        lists.append((labels.unknown_indptr, labels.unknown_indices))
    return sum(
        indptr.itemsize * (len(rows) + 1)
        + indices.itemsize * int((indptr[rows + 1] - indptr[rows]).sum())
        for indptr, indices in lists
    )
