"""Streamed batches, for sets larger than memory: one window of rows is used while threads read
the next.

The store's blocks come in random order, and the rows of a window in random order among themselves.
Rows lie in a window as they are stored; a batch is prepared when its turn comes, on a CPU by
threads that are a batch or two ahead. Where one window holds everything, it is read once and the
batches are those of resident data.

Legend: n rows used, B samples in a batch, C labels.
"""

import itertools
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmc.heads.ahead import ahead
from mmc.heads.batches import (
    ALONE,
    BLOCK_BYTES,
    BLOCKS_PER_WINDOW,
    READERS,
    WINDOWS,
    Preparer,
    Reader,
    Rows,
    Share,
    derive_seed,
    order_generator,
    reading_threads,
    stored_bytes,
)
from mmc.heads.models.base import Batch, Head
from mmc.heads.targets import Targets, as_targets

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

Blocks = list[tuple[int, int]]

_BLOCK_ORDER = 4


@dataclass
class Window:
    """Room for some rows as they are stored; filled again and again."""

    fields: Batch
    rows: Tensor
    """int64, which row of the data each one is."""
    ready: torch.cuda.Event | None = None
    """When the copies to a GPU will be through."""
    free: torch.cuda.Event | None = None
    """When the GPU will have read the last batch."""


class Buffer:
    """Room for a batch."""

    def __init__(self, inputs: Batch, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def batch(self, size: int) -> tuple[Batch, Tensor]:
        """The first ``size`` rows."""
        return {key: values[:size] for key, values in self.inputs.items()}, self.targets[:size]


class StreamedData:
    """`Data` read from the store as it is needed (see :class:`mmc.heads.batches.Data`).

    Args:
        store: where the features are.
        features: role -> feature.
        rows: (n,) ascending.
        targets: of those rows, on ``device``.
        head: its ``prepare`` is applied to every batch.
        device: where windows and batches lie.
        dtype: of prepared floats.
        window_rows: most rows in a window (or a block, where that is larger), of all processes
            together; 0: none is made, since only `blocks` is asked for.
        buffers: batches that there are at a time.
        block_bytes: read by a thread at a time; None: `BLOCK_BYTES`.
        tile_bytes: prepared at a time, as float32; None: what is fast on the device.
        share: what this process reads of every block.
    """

    def __init__(
        self,
        store: "EmbeddingStore",
        features: Mapping[str, str],
        rows: Rows,
        targets: Tensor | Targets,
        head: Head,
        *,
        device: torch.device,
        dtype: torch.dtype,
        window_rows: int = 0,
        buffers: int = 2,
        block_bytes: int | None = None,
        tile_bytes: int | None = None,
        share: Share = ALONE,
    ) -> None:
        self.targets, self.share = as_targets(targets), share
        self.window_rows, self.buffers = window_rows, buffers
        self.device = device
        most = BLOCK_BYTES if block_bytes is None else block_bytes
        if window_rows:
            most = min(most, stored_bytes(store, features) * window_rows // BLOCKS_PER_WINDOW)
        self.reader = Reader(store, features, rows, block_bytes=most)
        self.preparer = Preparer(head, device, dtype, tile_bytes)

    def __len__(self) -> int:
        return len(self.targets)

    def batches(
        self, batch_size: int, *, seed: int, reads: Sequence[str] | None = None
    ) -> "StreamedBatches":
        """See :class:`mmc.heads.batches.Data`."""
        return StreamedBatches(self, min(batch_size, len(self)), seed=seed, reads=reads)

    def blocks(self) -> Iterator[Batch]:
        """See :class:`mmc.heads.batches.Data`; the next ones are read meanwhile."""
        coming: deque[Future[Batch]] = deque()
        with reading_threads() as pool:
            for block in self.reader.blocks:
                coming.append(pool.submit(self._prepared, block))
                if len(coming) > READERS:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()

    def _prepared(self, block: tuple[int, int]) -> Batch:
        stored, index = self.reader.read(block)
        prepared = self.preparer.room(block[1] - block[0], stored)
        self.preparer.put(stored, prepared, 0, index)
        return prepared


class StreamedBatches:
    """Shuffled batches of one window after the other; see :class:`mmc.heads.batches.Batches`."""

    def __init__(
        self, data: StreamedData, batch_size: int, *, seed: int, reads: Sequence[str] | None
    ) -> None:
        self.data, self.batch_size, self.seed, self.reads = data, batch_size, seed, reads
        self._windows: list[Window] = []
        self._buffers: list[Buffer] = []
        self._complete = False
        """Whether the only window there is holds all rows already."""

    def epoch(self, stage: int, epoch: int) -> Iterator[tuple[Batch, Tensor]]:
        """See :class:`mmc.heads.batches.Batches`."""
        plan = self.plan(stage, epoch)
        generator = order_generator(self.seed, stage, epoch)
        buffers = self._room_for_batches()
        with ExitStack() as stack:
            readers = stack.enter_context(reading_threads())
            filled = self._filled(plan, self._room_for_windows(plan), readers)
            windows = stack.enter_context(ahead(filled, WINDOWS, "mmc-windows"))
            if self.data.device.type != "cpu":  # a GPU runs behind by itself
                yield from self._batches(plan, windows, generator, buffers[:1], None)
                return
            preparers = stack.enter_context(reading_threads())
            made = self._batches(plan, windows, generator, buffers, preparers)
            yield from stack.enter_context(ahead(made, len(buffers), "mmc-batches"))

    def plan(self, stage: int, epoch: int) -> list[Blocks]:
        """The blocks of each window of an epoch, ascending within the window."""
        blocks = self.data.reader.blocks
        if len(self.data) <= self.data.window_rows:
            return [blocks]
        seed = derive_seed(self.seed, _BLOCK_ORDER, stage, epoch)
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
        windows: list[Blocks] = [[]]
        room = self.data.window_rows
        for block in (blocks[index] for index in order.tolist()):
            size = block[1] - block[0]
            if windows[-1] and size > room:
                windows.append([])
                room = self.data.window_rows
            windows[-1].append(block)
            room -= size
        return [sorted(window) for window in windows]

    # -- windows -----------------------------------------------------------------------------------

    def _room_for_windows(self, plan: list[Blocks]) -> list[Window]:
        """The windows, made once."""
        if not self._windows:
            data, blocks = self.data, self.data.reader.blocks
            # Windows of other epochs hold other blocks, but never more rows.
            largest = max(data.window_rows, max(last - first for first, last in blocks))
            largest = min(largest, len(data))
            if data.share.count > 1:  # of a block it may be a row more than the others'
                most = max(len(window) for window in plan) + BLOCKS_PER_WINDOW
                largest = min(largest, -(-largest // data.share.count) + most)
            self._windows = [
                Window(
                    data.reader.room(largest, data.device),
                    torch.empty(largest, dtype=torch.int64, device=data.device),
                )
                for _ in range(min(WINDOWS, len(plan)))
            ]
        return self._windows

    def _filled(
        self, plan: list[Blocks], windows: list[Window], pool: ThreadPoolExecutor
    ) -> Generator[Window]:
        """The windows of ``plan``, read one after the other."""
        if self._complete:
            yield windows[0]
            return
        for blocks, window in zip(plan, itertools.cycle(windows), strict=False):
            self._fill(window, blocks, pool)
            self._complete = len(plan) == 1
            yield window

    def _fill(self, window: Window, blocks: Blocks, pool: ThreadPoolExecutor) -> None:
        """Read ``blocks`` into ``window``, on a stream of its own on a GPU."""
        own = [block for block in map(self.data.share.block, blocks) if block[0] < block[1]]
        places = list(itertools.accumulate((last - first for first, last in own), initial=0))
        rows = [torch.arange(first, last) for first, last in own]
        if self.data.device.type != "cuda":
            if rows:
                torch.cat(rows, out=window.rows[: places[-1]])
            list(pool.map(lambda block, place: self._read(window, block, place), own, places))
            return
        stream = torch.cuda.Stream(self.data.device)
        if window.free is not None:
            window.free.wait(stream)

        def read(block: tuple[int, int], place: int) -> None:
            with torch.cuda.stream(stream):
                self._read(window, block, place)

        with torch.cuda.stream(stream):
            for part, place in zip(rows, places, strict=False):
                window.rows[place : place + len(part)] = part.to(self.data.device)
        list(pool.map(read, own, places))
        window.ready = torch.cuda.Event()
        window.ready.record(stream)

    def _read(self, window: Window, block: tuple[int, int], place: int) -> None:
        end = place + block[1] - block[0]
        self.data.reader.read_into(
            block, {role: values[place:end] for role, values in window.fields.items()}
        )

    # -- batches -----------------------------------------------------------------------------------

    def _room_for_batches(self) -> list[Buffer]:
        """The buffers, made once."""
        if not self._buffers:
            data, sample = self.data, self.data.reader.sample()
            self._buffers = [
                Buffer(
                    data.preparer.room(self.batch_size, sample, self.reads),
                    data.targets.room(self.batch_size),
                )
                for _ in range(data.buffers if data.device.type == "cpu" else 1)
            ]
        return self._buffers

    def _batches(
        self,
        plan: list[Blocks],
        windows: Iterator[Window],
        generator: torch.Generator,
        buffers: list[Buffer],
        pool: ThreadPoolExecutor | None,
    ) -> Generator[tuple[Batch, Tensor]]:
        """Batches in the buffers, one after the other; prepared by ``pool`` if there is one."""
        turns = itertools.cycle(buffers)
        buffer = next(turns)
        # Rows of the batch so far, and those of them that are here.
        rows = filled = 0
        for blocks, window in zip(plan, windows, strict=True):
            if window.ready is not None:
                window.ready.wait()
            for index, size in self._parts(blocks, rows, generator):
                self._put(buffer, filled, window, index, pool)
                rows, filled = rows + size, filled + len(index)
                if rows == self.batch_size:
                    yield buffer.batch(filled)
                    buffer = next(turns)
                    rows = filled = 0
            if window.ready is not None:
                window.free = torch.cuda.Event()
                window.free.record()
        if rows:
            yield buffer.batch(filled)

    def _parts(
        self, blocks: Blocks, rows: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, int]]:
        """A window batch by batch: places of the rows that are here, and how many there are in all.

        Args:
            rows: that the first batch has already.
        """
        own = None if self.data.share == ALONE else _places(blocks, self.data.share)
        order = torch.randperm(sum(last - first for first, last in blocks), generator=generator)
        order = order.to(self.data.device) if own is None else order
        first = min(self.batch_size - rows, len(order))
        for part in (order[:first], *order[first:].split(self.batch_size)):
            index = part
            if own is not None:
                index = own[part]
                index = index[index >= 0].to(self.data.device)
            if len(part):
                yield index, len(part)

    def _put(
        self,
        buffer: Buffer,
        place: int,
        window: Window,
        index: Tensor,
        pool: ThreadPoolExecutor | None,
    ) -> None:
        """Prepare rows ``index`` of a window; they go to the places from ``place`` on."""
        data = self.data

        def put(index: Tensor, place: int) -> None:
            data.preparer.put(window.fields, buffer.inputs, place, index)
            rows = window.rows.index_select(0, index)
            data.targets.rows(rows, buffer.targets[place : place + len(index)])

        if pool is None:
            put(index, place)
            return
        step = max(-(-len(index) // READERS), 1)
        list(pool.map(put, index.split(step), range(place, place + len(index), step)))


def _places(blocks: Blocks, share: Share) -> Tensor:
    """Of every row of a window its place among those that are here, or -1; int64."""
    places = torch.full((sum(last - first for first, last in blocks),), -1)
    start = here = 0
    for block in blocks:
        first, last = (row - block[0] + start for row in share.block(block))
        places[first:last] = torch.arange(here, here + last - first)
        start, here = start + block[1] - block[0], here + last - first
    return places
