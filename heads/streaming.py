"""Streamed batches, for sets larger than memory: a window of rows is shuffled while threads read
the next one.

The store's blocks come in random order, and the rows of a window in random order among themselves.
Where one window holds everything, the batches are those of resident data.

Legend: n rows used, B samples in a batch, C labels.
"""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmc.heads.batches import (
    ALONE,
    BLOCK_BYTES,
    MOST_READERS,
    READERS,
    Gather,
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

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

WINDOWS = 2
"""In memory at a time: one that batches come from while the other is filled."""
BLOCKS_PER_WINDOW = 16
"""Blocks are made so small that a window mixes at least so many."""
HELD = WINDOWS * (1 + 1 / BLOCKS_PER_WINDOW) + MOST_READERS / BLOCKS_PER_WINDOW
"""Windows' worth of rows that are in memory: a window may be a block larger, and every thread that
reads holds a block. The same on every machine, since the order of the rows depends on it."""
_BLOCK_ORDER = 4


@dataclass
class Window:
    """Room for some prepared rows; filled again and again."""

    inputs: Batch
    targets: Tensor
    ready: torch.cuda.Event | None = None
    """When the copies to a GPU will be through."""
    free: torch.cuda.Event | None = None
    """When the GPU will have read the last batch."""


class StreamedData:
    """`Data` read from the store as it is needed (see :class:`mmc.heads.batches.Data`).

    Args:
        store: where the features are.
        features: role -> feature.
        rows: (n,) ascending.
        targets: of those rows, on ``device``.
        head: its ``prepare`` is applied to every block that is read.
        device: where windows lie.
        dtype: of prepared floats.
        window_rows: most rows in a window (a block more where blocks are larger), of all processes
            together.
        share: what this process reads of every block.
    """

    def __init__(
        self,
        store: "EmbeddingStore",
        features: Mapping[str, str],
        rows: Rows,
        targets: Tensor,
        head: Head,
        *,
        device: torch.device,
        dtype: torch.dtype,
        window_rows: int,
        share: Share = ALONE,
    ) -> None:
        self.targets, self.share = targets, share
        self.window_rows = window_rows
        self.device = device
        most = stored_bytes(store, features) * window_rows // BLOCKS_PER_WINDOW
        self.reader = Reader(store, features, rows, block_bytes=max(1, min(BLOCK_BYTES, most)))
        self.preparer = Preparer(head, device, dtype)

    def __len__(self) -> int:
        return len(self.targets)

    def batches(
        self, batch_size: int, *, seed: int, reads: Sequence[str] | None = None
    ) -> "StreamedBatches":
        """See :class:`mmc.heads.batches.Data`."""
        return StreamedBatches(self, min(batch_size, len(self)), seed=seed, reads=reads)

    def blocks(self) -> Iterator[Batch]:
        """See :class:`mmc.heads.batches.Data`; the next ones are read meanwhile."""
        ahead: deque[Future[Batch]] = deque()
        with reading_threads() as pool:
            for block in self.reader.blocks:
                ahead.append(pool.submit(self._prepared, block))
                if len(ahead) > READERS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _prepared(self, block: tuple[int, int]) -> Batch:
        stored = self.reader.read(block)
        prepared = self.preparer.room(block[1] - block[0], stored)
        self.preparer.put(stored, prepared, 0)
        return prepared


class StreamedBatches:
    """Shuffled batches of one window after the other; see :class:`mmc.heads.batches.Batches`."""

    def __init__(
        self, data: StreamedData, batch_size: int, *, seed: int, reads: Sequence[str] | None
    ) -> None:
        self.data, self.batch_size, self.seed, self.reads = data, batch_size, seed, reads
        self._windows: list[Window] = []

    def epoch(self, stage: int, epoch: int) -> Iterator[tuple[Batch, Tensor]]:
        """See :class:`mmc.heads.batches.Batches`."""
        generator = order_generator(self.seed, stage, epoch)
        gather: Gather | None = None
        # Rows of the batch so far, and those of them that are here.
        rows = filled = 0
        plan = self.plan(stage, epoch)
        with self._read_ahead(plan) as windows:
            for blocks, window in zip(plan, windows, strict=True):
                gather = gather or Gather(window.inputs, window.targets, self.batch_size)
                for index, size in self._parts(blocks, rows, generator):
                    gather.fill(filled, window.inputs, window.targets, index)
                    rows, filled = rows + size, filled + len(index)
                    if rows == self.batch_size:
                        yield gather.batch(filled)
                        rows = filled = 0
            if gather is not None and rows:
                yield gather.batch(filled)

    def _parts(
        self, blocks: list[tuple[int, int]], rows: int, generator: torch.Generator
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

    def plan(self, stage: int, epoch: int) -> list[list[tuple[int, int]]]:
        """The blocks of each window of an epoch, ascending within the window."""
        blocks = self.data.reader.blocks
        if len(self.data) <= self.data.window_rows:
            return [blocks]
        seed = derive_seed(self.seed, _BLOCK_ORDER, stage, epoch)
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
        windows: list[list[tuple[int, int]]] = [[]]
        room = self.data.window_rows
        for block in (blocks[index] for index in order.tolist()):
            size = block[1] - block[0]
            if windows[-1] and size > room:
                windows.append([])
                room = self.data.window_rows
            windows[-1].append(block)
            room -= size
        return [sorted(window) for window in windows]

    @contextmanager
    def _read_ahead(self, plan: list[list[tuple[int, int]]]) -> Iterator[Iterator[Window]]:
        """The windows of ``plan`` one after the other, the next one being read meanwhile."""
        free: queue.SimpleQueue[Window | None] = queue.SimpleQueue()
        full: queue.SimpleQueue[Window | BaseException] = queue.SimpleQueue()
        for window in self._room(plan):
            free.put(window)

        def read() -> None:
            try:
                for blocks in plan:
                    window = free.get()
                    if window is None:
                        return
                    self._fill(window, blocks, pool)
                    full.put(window)
            except BaseException as error:  # handed over: raised where the batches are used
                full.put(error)

        def windows() -> Iterator[Window]:
            for _ in plan:
                found = full.get()
                if isinstance(found, BaseException):
                    raise found
                if found.ready is not None:
                    found.ready.wait()
                yield found
                if found.ready is not None:
                    found.free = torch.cuda.Event()
                    found.free.record()
                free.put(found)

        thread = threading.Thread(target=read, name="mmc-read-ahead", daemon=True)
        with reading_threads() as pool:
            thread.start()
            try:
                yield windows()
            finally:
                free.put(None)
                # Windows that nobody asked for any more are in nobody's hands: wait for the reader.
                thread.join()

    def _room(self, plan: list[list[tuple[int, int]]]) -> list[Window]:
        """The windows' tensors, made once."""
        if not self._windows:
            largest = max(sum(last - first for first, last in blocks) for blocks in plan)
            # Windows of other epochs hold other blocks: up to one block more.
            largest = max(largest, min(self.data.window_rows, len(self.data)))
            blocks = self.data.reader.blocks
            largest = min(largest + max(last - first for first, last in blocks), len(self.data))
            # A share of a block may be a row larger than the others'.
            largest = min(largest, largest // self.data.share.count + len(blocks))
            sample = self.data.reader.sample()
            self._windows = [
                Window(
                    self.data.preparer.room(largest, sample, self.reads),
                    self.data.targets.new_empty((largest, *self.data.targets.shape[1:])),
                )
                for _ in range(min(WINDOWS, len(plan)))
            ]
        return self._windows

    def _fill(
        self, window: Window, blocks: list[tuple[int, int]], pool: ThreadPoolExecutor
    ) -> None:
        """Read and prepare ``blocks`` into ``window``, on a stream of its own on a GPU."""
        own = [block for block in map(self.data.share.block, blocks) if block[0] < block[1]]
        places = list(itertools.accumulate((last - first for first, last in own), initial=0))[:-1]
        if self.data.device.type != "cuda":
            list(pool.map(lambda block, place: self._copy(window, block, place), own, places))
            return
        stream = torch.cuda.Stream(self.data.device)
        if window.free is not None:
            window.free.wait(stream)

        def copy(block: tuple[int, int], place: int) -> None:
            with torch.cuda.stream(stream):
                self._copy(window, block, place)

        list(pool.map(copy, own, places))
        window.ready = torch.cuda.Event()
        window.ready.record(stream)
        # Tensors of the copies' way must live until they are through.
        stream.synchronize()

    def _copy(self, window: Window, block: tuple[int, int], place: int) -> None:
        first, last = block
        self.data.preparer.put(self.data.reader.read(block), window.inputs, place)
        window.targets[place : place + last - first] = self.data.targets[first:last]


def _places(blocks: list[tuple[int, int]], share: Share) -> Tensor:
    """Of every row of a window its place among those that are here, or -1; int64."""
    places = torch.full((sum(last - first for first, last in blocks),), -1)
    start = here = 0
    for block in blocks:
        first, last = (row - block[0] + start for row in share.block(block))
        places[first:last] = torch.arange(here, here + last - first)
        start, here = start + block[1] - block[0], here + last - first
    return places
