"""Loading what a head reads, and batches out of memory: a batch is an index.

Legend: n rows used, B samples in a batch, C labels.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmc.heads.models.base import Batch, Head

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

BLOCK_BYTES = 64 << 20
"""Read at a time, of all fields together."""
MIN_BLOCK_ROWS = 256
BLOCK_ROWS = 8192
"""Prepared rows that are scored at a time."""

Rows = npt.NDArray[np.int64]

# What a derived seed is for.
_ORDER, _DROPOUT = 1, 2


class Reader:
    """Reads runs of rows of several features, float32 on ``device``."""

    def __init__(
        self,
        store: "EmbeddingStore",
        features: Mapping[str, str],
        rows: Rows,
        device: torch.device,
        *,
        block_bytes: int | None = None,
    ) -> None:
        self.rows, self.device = rows, device
        self._stored = {role: store[name] for role, name in features.items()}
        size = stored_bytes(store, features)
        step = max(MIN_BLOCK_ROWS, (block_bytes or BLOCK_BYTES) // max(size, 1))
        cuts = np.searchsorted(rows, np.arange(0, len(store) + step, step))
        self.blocks = [
            (int(first), int(last)) for first, last in itertools.pairwise(cuts) if first < last
        ]
        """(first, last) places in ``rows`` of each block, ascending, none empty."""

    def read(self, block: tuple[int, int]) -> Batch:
        """The fields of the rows of one block, whole runs, so that checksums are compared."""
        first, last = block
        low, high = int(self.rows[first]), int(self.rows[last - 1]) + 1
        wanted = torch.from_numpy(self.rows[first:last] - low)
        batch = {}
        for role, feature in self._stored.items():
            values = torch.from_numpy(feature.take(slice(low, high), missing="fill"))
            if len(wanted) < len(values):
                values = values[wanted]
            if self.device.type == "cuda":
                values = values.pin_memory()
            values = values.to(self.device, non_blocking=True)
            batch[role] = values.float() if values.is_floating_point() else values
        return batch


def stored_bytes(store: "EmbeddingStore", features: Mapping[str, str]) -> int:
    """Bytes of one row of all the features."""
    stored = [store[name] for name in features.values()]
    return sum(math.prod(feature.shape[1:]) * feature.dtype.itemsize for feature in stored)


def raw_blocks(
    store: "EmbeddingStore", features: Mapping[str, str], rows: Rows, device: torch.device
) -> Iterator[tuple[int, Batch]]:
    """The fields of ascending ``rows``, as (place in ``rows``, batch); one block is held."""
    reader = Reader(store, features, rows, device)
    for block in reader.blocks:
        yield block[0], reader.read(block)


def load_prepared(
    store: "EmbeddingStore",
    features: Mapping[str, str],
    rows: Rows,
    head: Head,
    device: torch.device,
    dtype: torch.dtype,
) -> Batch:
    """What ``head.score`` reads of ``rows``, resident on ``device``; floats as ``dtype``.

    There is never a second full copy: a block is read, prepared and put in its place.
    """
    resident: Batch = {}
    with torch.no_grad():
        for first, batch in raw_blocks(store, features, rows, device):
            for key, values in head.prepare(batch).items():
                if key not in resident:
                    kind = dtype if values.is_floating_point() else values.dtype
                    shape = (len(rows), *values.shape[1:])
                    resident[key] = torch.empty(shape, dtype=kind, device=device)
                resident[key][first : first + len(values)] = values
    return resident


@dataclass(frozen=True)
class Share:
    """What a process holds of a set that several train on."""

    index: int = 0
    count: int = 1

    def rows(self, rows: Rows) -> Rows:
        """Its rows: every ``count``-th from ``index`` on."""
        return rows[self.index :: self.count]

    def block(self, block: tuple[int, int]) -> tuple[int, int]:
        """Its part of a block of rows, (first, last), for sets that are read in blocks."""
        first, last = block
        cuts = [first + (last - first) * i // self.count for i in (self.index, self.index + 1)]
        return cuts[0], cuts[1]

    def batches(self, order: Tensor, batch_size: int, device: torch.device) -> Sequence[Tensor]:
        """Places among its rows, batch by batch of an order (n,) of all; some may be empty."""
        if self.count == 1:
            return order.to(device).split(batch_size)
        own = order % self.count == self.index
        ends = own.cumsum(0)[batch_size - 1 :: batch_size].tolist()
        places = (order[own] // self.count).to(device)
        return places.tensor_split(ends[: -(-len(order) // batch_size) - 1])


ALONE = Share()


class Batches(Protocol):
    """Where a stage's batches come from."""

    def epoch(self, stage: int, epoch: int) -> Iterator[tuple[Batch, Tensor]]:
        """Batches and targets (float (B, C) for multilabel, else int64 (B,)), every row once.

        Where several processes share the data, this one's part of each batch; it may be empty.
        The order follows from the seed, the stage and the epoch. The tensors of a batch are
        buffers that the next batch overwrites.
        """


class Data(Protocol):
    """Rows to train or validate on."""

    @property
    def targets(self) -> Tensor:
        """int8 (n, C) for multilabel, else int64 (n,), on the device."""

    def __len__(self) -> int:
        """n."""

    def batches(self, batch_size: int, *, seed: int, reads: Sequence[str] | None) -> Batches:
        """Shuffled batches of the keys in ``reads`` (None: all) of what the head prepared."""

    def blocks(self) -> Iterator[Batch]:
        """What the head prepared, in the order of the rows."""


@dataclass(frozen=True, kw_only=True)
class ResidentData:
    """`Data` that lies in the device's memory."""

    inputs: Batch
    targets: Tensor
    share: Share = ALONE
    """Of the rows, those that are here."""
    size: int | None = None
    """Rows that all processes hold together; None: there is one."""

    def __len__(self) -> int:
        return len(self.targets) if self.size is None else self.size

    def batches(
        self, batch_size: int, *, seed: int, reads: Sequence[str] | None = None
    ) -> "ResidentBatches":
        """See :class:`Data`."""
        return ResidentBatches(
            self.inputs,
            self.targets,
            batch_size,
            seed=seed,
            reads=reads,
            share=self.share,
            size=len(self),
        )

    def blocks(self) -> Iterator[Batch]:
        """See :class:`Data`."""
        for start in range(0, len(self), BLOCK_ROWS):
            yield {key: values[start : start + BLOCK_ROWS] for key, values in self.inputs.items()}


class Gather:
    """The buffers of a batch.

    Gathering into a buffer takes a third of the time of `tensor[index]` on a CPU: fresh pages cost
    more than the copy.
    """

    def __init__(self, inputs: Batch, targets: Tensor, batch_size: int) -> None:
        self._inputs = {
            key: values.new_empty((batch_size, *values.shape[1:])) for key, values in inputs.items()
        }
        self._targets = targets.new_empty((batch_size, *targets.shape[1:]))
        self._floats = self._targets.float() if targets.ndim == 2 else None

    def fill(self, place: int, inputs: Batch, targets: Tensor, index: Tensor) -> None:
        """Copy the rows ``index`` to the places from ``place`` on."""
        end = place + len(index)
        for key, buffer in self._inputs.items():
            torch.index_select(inputs[key], 0, index, out=buffer[place:end])
        torch.index_select(targets, 0, index, out=self._targets[place:end])

    def batch(self, size: int) -> tuple[Batch, Tensor]:
        """The first ``size`` places."""
        batch = {key: buffer[:size] for key, buffer in self._inputs.items()}
        targets = self._targets[:size]
        return batch, targets if self._floats is None else self._floats[:size].copy_(targets)


class ResidentBatches:
    """Shuffled batches out of resident tensors; see :class:`Batches`."""

    def __init__(
        self,
        inputs: Batch,
        targets: Tensor,
        batch_size: int,
        *,
        seed: int,
        reads: Sequence[str] | None = None,
        share: Share = ALONE,
        size: int | None = None,
    ) -> None:
        self.inputs = {key: inputs[key] for key in reads} if reads is not None else dict(inputs)
        self.targets = targets
        self.share, self.size = share, len(targets) if size is None else size
        self.batch_size = min(batch_size, self.size)
        self.seed = seed
        self._gather = Gather(self.inputs, targets, self.batch_size)

    def __len__(self) -> int:
        """Batches per epoch; the last may be short."""
        return -(-self.size // self.batch_size)

    def epoch(self, stage: int, epoch: int) -> Iterator[tuple[Batch, Tensor]]:
        """See :class:`Batches`."""
        generator = order_generator(self.seed, stage, epoch)
        order = torch.randperm(self.size, generator=generator)
        for index in self.share.batches(order, self.batch_size, self.targets.device):
            self._gather.fill(0, self.inputs, self.targets, index)
            yield self._gather.batch(len(index))


def order_generator(seed: int, stage: int, epoch: int) -> torch.Generator:
    """What draws the order of an epoch."""
    return torch.Generator().manual_seed(derive_seed(seed, _ORDER, stage, epoch))


def derive_seed(seed: int, *place: int) -> int:
    """A seed that depends on every number given, so that nothing random needs to be stored."""
    state = np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)
    return int(state[0]) >> 1


def dropout_seed(seed: int, stage: int, epoch: int, process: int = 0) -> int:
    """The seed of everything random within an epoch except its order."""
    return derive_seed(seed, _DROPOUT, stage, epoch, *([process] if process else []))
