"""Loading what a head reads, and batches out of memory: a batch is an index.

Legend: n rows used, B samples in a batch, C labels.
"""

import itertools
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmc.heads.models.base import Batch, Head
from mmc.heads.targets import Targets, as_targets

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore
    from mmc.store.feature import Feature

BLOCK_BYTES = 8 << 20
"""Read at a time by one thread, of all fields together."""
MIN_BLOCK_ROWS = 16
TILE_BYTES = {"cpu": 1 << 20}
"""Prepared at a time, as float32. On a CPU it then stays in a core's cache, and the allocator uses
its memory again: larger tensors are mapped anew by every operation, which took four times as
long."""
TILE_BYTES_ELSEWHERE = 64 << 20
WINDOWS = 2
"""In memory at a time where rows are streamed: batches come from one while the other is filled."""
BLOCKS_PER_WINDOW = 16
"""Blocks are made so small that a window mixes at least so many."""
BLOCK_ROWS = 8192
"""Prepared rows that are scored at a time."""
MOST_READERS = 4
READERS = min(MOST_READERS, os.cpu_count() or 1)
"""Threads that read and prepare. One computes while another waits for the disk."""

Rows = npt.NDArray[np.int64]

# What a derived seed is for.
_ORDER, _DROPOUT = 1, 2


class Reader:
    """Reads runs of rows of several features."""

    def __init__(
        self,
        store: "EmbeddingStore",
        features: Mapping[str, str],
        rows: Rows,
        *,
        block_bytes: int | None = None,
    ) -> None:
        self.rows = rows
        self._stored = {role: store[name] for role, name in features.items()}
        size = max(stored_bytes(store, features), 1)
        most = BLOCK_BYTES if block_bytes is None else block_bytes
        step = max(MIN_BLOCK_ROWS, most // size)
        # Whole chunks where there is room for one: checksums are of chunks.
        chunk = max(feature.chunk_rows for feature in self._stored.values())
        step = step // chunk * chunk or step
        cuts = np.searchsorted(rows, np.arange(0, len(store) + step, step))
        self.blocks = [
            (int(first), int(last)) for first, last in itertools.pairwise(cuts) if first < last
        ]
        """(first, last) places in ``rows`` of each block, ascending, none empty."""
        runs = (int(rows[last - 1] - rows[first]) + 1 for first, last in self.blocks)
        self._longest = max(runs, default=0)
        self._local = threading.local()

    def read(self, block: tuple[int, int]) -> tuple[Batch, Tensor | None]:
        """The fields of a run of rows as they are stored, and which of them are those of the block.

        int64 places in the run, or None: all of them. Whole runs are read, so that checksums are
        compared. They lie in main memory, of the thread that reads: its next block overwrites it.
        """
        low, high, wanted = self._run(block)
        room = self._own_room("cpu")
        return {
            role: _take(feature, low, high, room[role]) for role, feature in self._stored.items()
        }, wanted

    def read_into(self, block: tuple[int, int], out: Batch) -> None:
        """The fields of the rows of one block, put into ``out``, so many rows of each.

        On a GPU they are copied by the current stream, which is waited for.
        """
        low, high, wanted = self._run(block)
        for role, feature in self._stored.items():
            place = out[role]
            if wanted is None and place.device.type == "cpu":
                _take(feature, low, high, place)
                continue
            room = self._own_room(place.device.type)[role]
            values = _take(feature, low, high, room).to(place.device, non_blocking=True)
            if wanted is None:
                place.copy_(values)
            else:
                torch.index_select(values, 0, wanted.to(place.device), out=place)
            if place.device.type == "cuda":
                torch.cuda.current_stream(place.device).synchronize()

    def sample(self) -> Batch:
        """The fields of the first row."""
        row = int(self.rows[0])
        return {
            role: torch.from_numpy(feature.take(slice(row, row + 1), missing="fill"))
            for role, feature in self._stored.items()
        }

    def room(self, rows: int, device: torch.device, *, pinned: bool = False) -> Batch:
        """Tensors for the fields of so many rows as they are stored, not yet filled."""
        return {
            role: torch.empty(
                (rows, *feature.shape[1:]),
                dtype=torch.from_numpy(np.empty(0, feature.dtype)).dtype,
                device=device,
                pin_memory=pinned,
            )
            for role, feature in self._stored.items()
        }

    def _own_room(self, device: str) -> Batch:
        """Room of this thread for the longest run: fresh pages cost more than the copy."""
        if not hasattr(self._local, "room"):
            pinned = device == "cuda"
            self._local.room = self.room(self._longest, torch.device("cpu"), pinned=pinned)
        room: Batch = self._local.room
        return room

    def _run(self, block: tuple[int, int]) -> tuple[int, int, Tensor | None]:
        """Its first row of the store, the one after its last, and which of them; None: all."""
        first, last = block
        low, high = int(self.rows[first]), int(self.rows[last - 1]) + 1
        if high - low == last - first:
            return low, high, None
        return low, high, torch.from_numpy(self.rows[first:last] - low)


def _take(feature: "Feature", low: int, high: int, room: Tensor) -> Tensor:
    """A run of rows, read into the first places of ``room``."""
    values = room[: high - low]
    feature.take(slice(low, high), missing="fill", out=values.numpy())
    return values


def tiles(
    stored: Batch, device: torch.device, most: int, index: Tensor | None = None
) -> Iterator[tuple[int, Batch]]:
    """Stored fields piece by piece on ``device``, as (first row, batch); floats as float32.

    Args:
        most: bytes of a piece.
        index: int64, which rows; None: all, in their order.
    """
    rows = len(next(iter(stored.values()))) if index is None else len(index)
    values = sum(math.prod(field.shape[1:]) for field in stored.values())
    step = max(1, most // (4 * max(values, 1)))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        batch = {}
        for role, field in stored.items():
            tile = field[part] if index is None else field.index_select(0, index[part])
            if device.type == "cuda" and tile.device.type == "cpu":
                tile = tile.pin_memory()
            tile = tile.to(device, non_blocking=True)
            batch[role] = tile.float() if tile.is_floating_point() else tile
        yield start, batch


def default_tile(device: torch.device) -> int:
    """Bytes, as float32, that are prepared at a time where nothing speaks against it."""
    return TILE_BYTES.get(device.type, TILE_BYTES_ELSEWHERE)


def stored_bytes(store: "EmbeddingStore", features: Mapping[str, str]) -> int:
    """Bytes of one row of all the features."""
    stored = [store[name] for name in features.values()]
    return sum(math.prod(feature.shape[1:]) * feature.dtype.itemsize for feature in stored)


def raw_blocks(
    store: "EmbeddingStore", features: Mapping[str, str], rows: Rows, device: torch.device
) -> Iterator[tuple[int, Batch]]:
    """The fields of ascending ``rows``, as (place in ``rows``, batch); one block is held."""
    reader = Reader(store, features, rows)
    for block in reader.blocks:
        stored, index = reader.read(block)
        for start, batch in tiles(stored, device, default_tile(device), index):
            yield block[0] + start, batch


class Preparer:
    """Puts what a head prepares of stored fields where it is asked to, on ``device``.

    Args:
        tile_bytes: prepared at a time; None: what is fast on the device.
    """

    def __init__(
        self,
        head: Head,
        device: torch.device,
        dtype: torch.dtype,
        tile_bytes: int | None = None,
    ) -> None:
        self._head, self._device, self._dtype = head, device, dtype
        self._most = tile_bytes or largest_tile(head, device)

    @torch.no_grad()
    def room(self, rows: int, stored: Batch, keys: Sequence[str] | None = None) -> Batch:
        """Tensors for so many prepared rows, not yet filled; floats as ``dtype``.

        Args:
            stored: fields of a row or more, to see what becomes of them.
            keys: of what the head prepares; None: all.
        """
        _, first = next(tiles({role: field[:1] for role, field in stored.items()}, self._device, 1))
        sample = self._head.prepare(first)
        return {
            key: sample[key].new_empty(
                (rows, *sample[key].shape[1:]),
                dtype=self._dtype if sample[key].is_floating_point() else None,
            )
            for key in (sample if keys is None else keys)
        }

    @torch.no_grad()
    def put(self, stored: Batch, out: Batch, place: int, index: Tensor | None = None) -> None:
        """Prepare stored fields; their rows go to the places of ``out`` from ``place`` on.

        Args:
            index: int64, where the fields are, which rows in which order; None: all.
        """
        for start, batch in tiles(stored, self._device, self._most, index):
            prepared = self._head.prepare(batch)
            for key, room in out.items():
                values = prepared[key]
                room[place + start : place + start + len(values)] = values


def largest_tile(head: Head, device: torch.device) -> int:
    """Bytes, as float32, that ``head`` prepares at a time where nothing speaks against it."""
    return TILE_BYTES_ELSEWHERE if head.prepares_by_network else default_tile(device)


@contextmanager
def reading_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads to read and prepare in, each of which computes by itself.

    A thread that starts takes over the number that was set last, in whichever thread: it is set
    back in the end.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(READERS, "mmc-read", torch.set_num_threads, (1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def load_prepared(
    store: "EmbeddingStore",
    features: Mapping[str, str],
    rows: Rows,
    head: Head,
    device: torch.device,
    dtype: torch.dtype,
    *,
    block_bytes: int | None = None,
    tile_bytes: int | None = None,
) -> Batch:
    """What ``head.score`` reads of ``rows``, resident on ``device``; floats as ``dtype``.

    There is never a second full copy: a block is read, prepared and put in its place.

    Args:
        block_bytes: read at a time by one thread; None: `BLOCK_BYTES`.
        tile_bytes: prepared at a time; None: what is fast on the device.
    """
    reader = Reader(store, features, rows, block_bytes=block_bytes)
    if not reader.blocks:
        return {}
    preparer = Preparer(head, device, dtype, tile_bytes)
    resident = preparer.room(len(rows), reader.sample())

    def load(block: tuple[int, int]) -> None:
        stored, index = reader.read(block)
        preparer.put(stored, resident, block[0], index)

    with reading_threads() as pool:
        # Asked for its results, so that an error is raised here.
        list(pool.map(load, reader.blocks))
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
    def targets(self) -> Tensor | Targets:
        """int8 (n, C) for multilabel, else int64 (n,), on the device; or what gives them."""

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
    targets: Tensor | Targets
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

    def __init__(self, inputs: Batch, targets: Targets, batch_size: int) -> None:
        self._inputs = {
            key: values.new_empty((batch_size, *values.shape[1:])) for key, values in inputs.items()
        }
        self._targets = targets.room(batch_size)

    def fill(self, place: int, inputs: Batch, targets: Targets, index: Tensor) -> None:
        """Copy the rows ``index`` to the places from ``place`` on."""
        end = place + len(index)
        for key, buffer in self._inputs.items():
            torch.index_select(inputs[key], 0, index, out=buffer[place:end])
        targets.rows(index, self._targets[place:end])

    def batch(self, size: int) -> tuple[Batch, Tensor]:
        """The first ``size`` places."""
        batch = {key: buffer[:size] for key, buffer in self._inputs.items()}
        return batch, self._targets[:size]


class ResidentBatches:
    """Shuffled batches out of resident tensors; see :class:`Batches`."""

    def __init__(
        self,
        inputs: Batch,
        targets: Tensor | Targets,
        batch_size: int,
        *,
        seed: int,
        reads: Sequence[str] | None = None,
        share: Share = ALONE,
        size: int | None = None,
    ) -> None:
        self.inputs = {key: inputs[key] for key in reads} if reads is not None else dict(inputs)
        self.targets = as_targets(targets)
        self.share, self.size = share, len(targets) if size is None else size
        self.batch_size = min(batch_size, self.size)
        self.seed = seed
        self._gather = Gather(self.inputs, self.targets, self.batch_size)

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
