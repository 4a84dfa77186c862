"""Where results go: a lane is one tower of one backbone, filled shard by shard."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmc.extract.backbones.base import Backbone
from mmc.extract.plan import Rows
from mmc.extract.transforms import Transform
from mmc.store import FieldSpec, Writer

NO_IMAGE = "no image"
NO_TEXT = "no text"
ABSENT = (NO_IMAGE, NO_TEXT)
"""Reasons of rows that lack what a tower reads: nothing went wrong with them."""


@dataclass
class Lane:
    """One tower of one backbone on its way into the store."""

    alias: str
    tower: str
    backbone: Backbone
    writer: Writer
    reader: Callable[[str, Rows], NDArray[Any]]
    """Committed values of a field for some rows, for copies of rows in earlier shards."""
    fields: tuple[FieldSpec, ...]
    batch_size: int
    pending: Rows
    """Rows to fill, ascending."""
    firsts: Rows
    """(N,) the row that computes each row's content (see `plan.first_rows`)."""
    pictures: Rows
    """(N,) the row that computes each row's picture: what batches of pictures are cut from."""
    failed: dict[int, str] = field(default_factory=dict)
    """Reasons of rows that failed, from earlier runs (first rows only) and from this one."""
    done: int = 0
    """Rows of this run that are settled in memory: embedded, copied or failed."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Guards ``done`` and the counts of the lane's shards."""

    @cached_property
    def geometry(self) -> Transform:
        """How pictures are decoded for it; backbones that only normalise differently share it."""
        transform = self.backbone.image_transform
        assert transform is not None
        return transform.geometry

    @property
    def label(self) -> str:
        return f"{self.alias}/{self.tower}"


class ShardWork:
    """Results of one lane for one shard, gathered from any number of threads, until committed.

    Workers call `put` and `fail` for rows that they alone hold, then `batch_done`; one committing
    thread calls `commit`, as often as it likes: what is ready goes out, the rest stays.
    """

    def __init__(self, lane: Lane, shard: int, rows: Rows) -> None:
        self.lane, self.shard, self.rows = lane, shard, rows
        firsts = lane.firsts[rows]
        self.copies = rows[firsts != rows]
        self.compute = rows[firsts == rows]
        """Rows to run through the network."""
        self._values = {
            spec.name: np.empty((len(rows), *spec.shape), spec.dtype) for spec in lane.fields
        }
        self._ready = np.zeros(len(rows), np.bool_)
        self._committed = np.zeros(len(rows), np.bool_)
        self._open_batches = 0
        self._lock = lane.lock
        self.complete = threading.Event()
        """Set when every batch has reported."""

    def wants(self, rows: Rows) -> NDArray[np.bool_]:
        """Which of ``rows`` are to run through the network."""
        if len(self.compute) == 0:
            return np.zeros(len(rows), np.bool_)
        places = np.searchsorted(self.compute, rows).clip(max=len(self.compute) - 1)
        wanted: NDArray[np.bool_] = self.compute[places] == rows
        return wanted

    def expect(self, batches: int) -> None:
        """Say how many batches will report `batch_done`."""
        self._open_batches = batches
        if batches == 0:
            self.complete.set()

    def put(self, rows: Rows, values: Mapping[str, NDArray[Any]]) -> None:
        """Take the results of ``rows``: each ``(len(rows), *shape)`` in the stored dtype."""
        if len(rows) == 0:
            return
        places = np.searchsorted(self.rows, rows)
        finite = np.ones(len(rows), np.bool_)
        for name, array in values.items():
            self._values[name][places] = array
            if np.issubdtype(array.dtype, np.floating):
                finite &= np.isfinite(array.reshape(len(rows), -1)).all(axis=1)
        for row in rows[~finite]:
            self.fail(int(row), "the backbone gave numbers that are not finite")
        self._settle(places)

    def fail(self, row: int, reason: str) -> None:
        """Row ``row`` cannot be embedded."""
        self.lane.failed[row] = reason
        self._settle(np.searchsorted(self.rows, [row]))

    def batch_done(self) -> None:
        """One of the expected batches has handed over all it will."""
        with self._lock:
            self._open_batches -= 1
            last = self._open_batches == 0
        if last:
            self.complete.set()

    def _settle(self, places: NDArray[np.int64]) -> None:
        with self._lock:
            self.lane.done += int(np.count_nonzero(~self._ready[places]))
            self._ready[places] = True

    def commit(self) -> int:
        """Write what is ready and not written yet; returns the number of rows written.

        Shards must be committed in order: a copy is read from the shard of its first row.
        """
        self._copy()
        with self._lock:
            places = np.flatnonzero(self._ready & ~self._committed)
        if len(places) == 0:
            return 0
        rows = self.rows[places]
        failed = {int(row): self.lane.failed[int(row)] for row in rows if row in self.lane.failed}
        good = np.array([int(row) not in failed for row in rows], np.bool_)
        values = {name: array[places[good]] for name, array in self._values.items()}
        self.lane.writer.commit(self.shard, self.lane.tower, rows[good], values, failed=failed)
        self._committed[places] = True
        return len(places)

    def _copy(self) -> None:
        """Fill rows that repeat the content of a row that is settled by now."""
        waiting = self.copies[~self._ready[np.searchsorted(self.rows, self.copies)]]
        if len(waiting) == 0:
            return
        firsts = self.lane.firsts[waiting]
        for row, first in zip(waiting, firsts, strict=True):
            if int(first) in self.lane.failed:
                self.fail(int(row), self.lane.failed[int(first)])
        alive = np.array([int(first) not in self.lane.failed for first in firsts], np.bool_)
        here = np.isin(firsts, self.rows)
        earlier = alive & ~here
        self._take_earlier(waiting[earlier], firsts[earlier])
        places = np.searchsorted(self.rows, firsts[alive & here])
        ready = self._ready[places]
        self._take_here(waiting[alive & here][ready], places[ready])

    def _take_here(self, rows: Rows, sources: NDArray[np.int64]) -> None:
        places = np.searchsorted(self.rows, rows)
        for array in self._values.values():
            array[places] = array[sources]
        self._settle(places)

    def _take_earlier(self, rows: Rows, firsts: Rows) -> None:
        """Rows whose first row is not computed in this shard now: it is in the store."""
        if len(rows) == 0:
            return
        places = np.searchsorted(self.rows, rows)
        for name, array in self._values.items():
            array[places] = self.lane.reader(name, firsts)
        self._settle(places)
