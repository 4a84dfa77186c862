"""Resident batches: what a head reads lies in the device's memory, and a batch is an index.

Legend: n rows used, B samples in a batch, C labels.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

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

# What a derived seed is for.
_ORDER, _DROPOUT = 1, 2


def raw_blocks(
    store: "EmbeddingStore",
    features: Mapping[str, str],
    rows: npt.NDArray[np.int64],
    device: torch.device,
) -> Iterator[tuple[int, Batch]]:
    """The fields of ascending ``rows``, float32 on ``device``, as (place in ``rows``, batch).

    Reads whole runs of rows, which compares their checksums, and holds one run at a time.
    """
    stored = {role: store[name] for role, name in features.items()}
    row_bytes = sum(int(np.prod(f.shape[1:])) * f.dtype.itemsize for f in stored.values())
    step = max(MIN_BLOCK_ROWS, BLOCK_BYTES // max(row_bytes, 1))
    for start in range(0, len(store), step):
        first, last = np.searchsorted(rows, (start, start + step))
        if first == last:
            continue
        low, high = int(rows[first]), int(rows[last - 1]) + 1
        wanted = torch.from_numpy(rows[first:last] - low)
        batch = {}
        for role, feature in stored.items():
            values = torch.from_numpy(feature.take(slice(low, high), missing="fill"))
            if len(wanted) < len(values):
                values = values[wanted]
            values = values.to(device)
            batch[role] = values.float() if values.is_floating_point() else values
        yield int(first), batch


def load_prepared(
    store: "EmbeddingStore",
    features: Mapping[str, str],
    rows: npt.NDArray[np.int64],
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


class ResidentBatches:
    """Shuffled batches out of resident tensors; every row once per epoch.

    The tensors of a batch are buffers that the next batch overwrites.
    """

    def __init__(
        self,
        inputs: Batch,
        targets: Tensor,
        batch_size: int,
        *,
        seed: int,
        reads: Sequence[str] | None = None,
    ) -> None:
        self.inputs = {key: inputs[key] for key in reads} if reads is not None else dict(inputs)
        self.targets = targets
        self.batch_size = min(batch_size, len(targets))
        self.seed = seed
        self.device = targets.device
        # Gathering into a buffer takes a third of the time of `tensor[index]` on a CPU: fresh
        # pages cost more than the copy.
        self._buffers = {
            key: values.new_empty((self.batch_size, *values.shape[1:]))
            for key, values in self.inputs.items()
        }
        self._targets = targets.new_empty((self.batch_size, *targets.shape[1:]))
        multilabel = targets.ndim == 2
        self._float_targets = self._targets.float() if multilabel else None

    def __len__(self) -> int:
        """Batches per epoch; the last may be short."""
        return -(-len(self.targets) // self.batch_size)

    def epoch(self, stage: int, epoch: int) -> Iterator[tuple[Batch, Tensor]]:
        """Batches and targets (float (B, C) for multilabel, else int64 (B,)) in seeded order."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, _ORDER, stage, epoch))
        order = torch.randperm(len(self.targets), generator=generator).to(self.device)
        for start in range(0, len(order), self.batch_size):
            yield self._gather(order[start : start + self.batch_size])

    def _gather(self, index: Tensor) -> tuple[Batch, Tensor]:
        size = len(index)
        batch = {}
        for key, values in self.inputs.items():
            batch[key] = self._buffers[key][:size]
            torch.index_select(values, 0, index, out=batch[key])
        targets = self._targets[:size]
        torch.index_select(self.targets, 0, index, out=targets)
        if self._float_targets is None:
            return batch, targets
        return batch, self._float_targets[:size].copy_(targets)


def derive_seed(seed: int, *place: int) -> int:
    """A seed that depends on every number given, so that nothing random needs to be stored."""
    state = np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)
    return int(state[0]) >> 1


def dropout_seed(seed: int, stage: int, epoch: int) -> int:
    """The seed of everything random within an epoch except its order."""
    return derive_seed(seed, _DROPOUT, stage, epoch)
