"""One array of embeddings: gathering rows, reading runs of them, and never telling a lie."""

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mmc.store.aliases import Status, read_layout, read_record, read_status_chunk, status_key
from mmc.store.errors import DamagedStoreError, InputError, MmcError, RowsNotDoneError
from mmc.store.files import Files
from mmc.store.mapped import MANY_SHARDS, Rows, Shard, open_shard
from mmc.store.schema import DONE, FAILED, MISSING, AliasRecord, fill_value
from mmc.store.shards import Array

Missing = Literal["raise", "fill"]

_DENSE = 0.5
"""Share of a shard's rows from which a gather counts as reading it whole: checksums compared."""

_ATTEMPTS = 100


_THREADS = min(4, os.cpu_count() or 1)
_WORTH_THREADS = 32 << 20
"""Bytes from which starting threads costs nothing to speak of."""


class _Entry(NamedTuple):
    """A shard (None: nothing in it is done) and its status at the moment it was opened."""

    shard: Shard | None
    status: Status
    unchanged: bool
    """Whether that is what the feature saw when it was asked for."""


class Feature:
    """One field of one backbone, (N, ...).

    It shows what was done when the feature was asked for; ask the store again to see later
    commits. A shard is opened when it is first needed: a row that was reset or failed by then
    counts as not done. Several threads may read from one feature.
    """

    def __init__(
        self,
        files: Files,
        prefix: str,
        alias: str,
        record: AliasRecord,
        field: str,
        status: npt.NDArray[np.uint8],
    ) -> None:
        spec = record.fields[field]
        self.alias = alias
        self.name = f"{alias}/{field}"
        self.tower = spec.tower
        self.fingerprint = record.provenance.fingerprint
        self.shape = (len(status), *spec.shape)
        self._files = files
        self._prefix = prefix
        self._record = record
        self._signature: Hashable = "not looked at"
        # The record was read before: what lies in the folder now has to be what it describes.
        self._check_same_alias()
        try:
            self._layout = read_layout(files, prefix, field)
        except DamagedStoreError:
            self._check_same_alias()
            raise
        self._folder = f"{prefix}/{field}"
        self._status = status
        self._shards: OrderedDict[int, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        self.dtype: np.dtype[Any] = self._layout.dtype
        if self._layout.row_shape != spec.shape or self.dtype != np.dtype(spec.dtype):
            raise DamagedStoreError(
                f"{files.where(self._folder)}/zarr.json does not fit the record of {alias}; "
                "extract with --overwrite"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"Feature({self.name!r}, shape={self.shape}, dtype={self.dtype})"

    @property
    def done(self) -> npt.NDArray[np.bool_]:
        """(N,) which rows held an embedding when the feature was asked for."""
        result: npt.NDArray[np.bool_] = self._status == DONE
        return result

    @property
    def chunk_rows(self) -> int:
        """Rows that share a checksum; reads that start and end at a multiple of it are fastest."""
        return self._layout.chunk_rows

    def take(
        self,
        rows: npt.ArrayLike | slice,
        *,
        missing: Missing = "raise",
        out: Array | None = None,
        check: bool | None = None,
    ) -> Array:
        """The embeddings of ``rows``, (n, ...), in the order given; rows may repeat.

        A slice or an unbroken ascending run compares the checksum of every chunk it touches, and
        so does a gather of half a shard or more; a sparse gather checks structure only.

        Args:
            rows: integers in [0, N), a boolean mask of (N,), or a slice.
            missing: what to do about rows that hold no embedding: "raise", or "fill" them with
                NaN (False or 0 where the type has no NaN).
            out: C-contiguous array of the result's shape and dtype to fill; with a buffer that
                is used again a gather takes about a third of the time.
            check: compare the checksum of every chunk touched; None does so as said above.

        Raises:
            RowsNotDoneError: rows hold no embedding, and ``missing`` is "raise".
            DamagedStoreError: the bytes of a shard are not what was committed.
            InputError: rows outside the store, or an ``out`` that does not fit.
        """
        if missing not in ("raise", "fill"):
            raise InputError(f"missing={missing!r}: choose 'raise' or 'fill'")
        wanted = self._as_rows(rows)
        result = self._output(len(wanted), out)
        if isinstance(wanted, range) and check is not False:
            self._read(wanted.start, wanted.stop, result, missing)
        else:
            self._gather(np.asarray(wanted, np.int64), result, missing, check)
        return result

    def __getitem__(self, key: int | slice | npt.ArrayLike) -> Array:
        """``feature[5]`` is one row without a row axis; slices, rows and masks as in ``take``."""
        if isinstance(key, (int, np.integer)):
            row = int(key) + len(self) if key < 0 else int(key)
            result: Array = self.take([row])[0]
            return result
        return self.take(key)

    def blocks(
        self, rows_per_block: int, *, missing: Missing = "raise"
    ) -> Iterator[tuple[int, Array]]:
        """All rows in order as (first row, block), checksums compared; the last may be shorter.

        Raises:
            RowsNotDoneError, DamagedStoreError: as :meth:`take` does.
        """
        if rows_per_block < 1:
            raise InputError(f"rows_per_block={rows_per_block} must be 1 or more")
        for start in range(0, len(self), rows_per_block):
            yield start, self.take(slice(start, start + rows_per_block), missing=missing)

    def _as_rows(self, rows: npt.ArrayLike | slice) -> Rows | range:
        """Checked rows; a range when they are an unbroken ascending run."""
        if isinstance(rows, slice):
            run = range(len(self))[rows]
            if run.step == 1:
                return range(run.start, max(run.start, run.stop))
            return np.arange(run.start, run.stop, run.step)
        array = np.asarray(rows)
        if array.ndim != 1:
            raise InputError(f"rows have shape {array.shape}; one dimension is needed")
        if array.dtype == np.bool_:
            if len(array) != len(self):
                raise InputError(f"a mask of {len(array)} rows for a store of {len(self)}")
            return np.flatnonzero(array)
        if array.size and array.dtype.kind not in "iu":
            raise InputError(f"rows have dtype {array.dtype}; integers are needed")
        wanted = array.astype(np.int64, copy=False)
        if not len(wanted):
            return range(0)
        low, high = int(wanted.min()), int(wanted.max())
        if low < 0 or high >= len(self):
            raise InputError(f"row {low if low < 0 else high} is outside the store's {len(self)}")
        unbroken = high - low + 1 == len(wanted) and bool((np.diff(wanted) == 1).all())
        return range(low, high + 1) if unbroken else wanted

    def _output(self, count: int, out: Array | None) -> Array:
        shape = (count, *self.shape[1:])
        if out is None:
            return np.empty(shape, self.dtype)
        if out.shape != shape or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise InputError(
                f"out has shape {out.shape} and dtype {out.dtype}; {self.name} needs a contiguous "
                f"{shape} of {self.dtype}"
            )
        return out

    def _gather(self, rows: Rows, out: Array, missing: Missing, check: bool | None) -> None:
        items = _items(out, self._layout.row_bytes)
        wanted = self._done(rows, self._status[rows], missing)
        # A stable sort of small integers is a radix sort: 0.1 ms for 32,768 rows.
        small = np.uint16 if self._layout.num_shards <= 1 << 16 else np.int64
        numbers = (rows // self._layout.shard_rows).astype(small)
        order = np.argsort(numbers, kind="stable")
        if not wanted.all():
            out[~wanted] = fill_value(self.dtype)
            order = order[wanted[order]]
        if not len(order):
            return
        cuts = np.flatnonzero(np.diff(numbers[order])) + 1
        for places in np.split(order, cuts):
            self._gather_shard(rows[places], places, out, items, missing, check)

    def _gather_shard(
        self,
        rows: Rows,
        places: Rows,
        out: Array,
        items: Array,
        missing: Missing,
        check: bool | None,
    ) -> None:
        """Put ``rows``, all of one shard, at ``places`` of ``out``."""
        number = int(rows[0]) // self._layout.shard_rows
        entry = self._entry(number)
        start, stop = self._layout.bounds(number)
        if not entry.unchanged:
            wanted = self._done(rows, entry.status[rows - start], missing)
            out[places[~wanted]] = fill_value(self.dtype)
            rows, places = rows[wanted], places[wanted]
        if entry.shard is None or not len(places):
            return
        if check is None:
            check = len(places) >= _DENSE * (stop - start)
        entry.shard.take(rows - start, items, places, check=check)

    def _read(self, start: int, stop: int, out: Array, missing: Missing) -> None:
        """Fill ``out`` with an unbroken run of rows, several shards at a time when it is long."""
        self._done(range(start, stop), self._status[start:stop], missing)
        size = self._layout.shard_rows
        numbers = range(start // size, -(-stop // size))

        def read(number: int) -> None:
            first, last = max(start, number * size), min(stop, (number + 1) * size)
            self._read_shard(first, last, out[first - start : last - start], missing)

        threads = min(_THREADS, len(numbers)) if out.nbytes >= _WORTH_THREADS else 1
        if threads == 1:
            for number in numbers:
                read(number)
        else:
            # One thread's copy by the kernel goes on while another computes checksums.
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(read, numbers))

    def _read_shard(self, first: int, last: int, out: Array, missing: Missing) -> None:
        """Fill ``out`` with a run of rows of one shard."""
        if not (self._status[first:last] == DONE).any():
            out[...] = fill_value(self.dtype)
            return
        number = first // self._layout.shard_rows
        entry = self._entry(number)
        start = number * self._layout.shard_rows
        # Done when the feature was asked for, and still so.
        then, now = self._status[first:last], entry.status[first - start : last - start]
        status = np.where(then == DONE, now, then)
        wanted = self._done(range(first, last), status, missing)
        if entry.shard is not None and wanted.any():
            # Up to the last row that is done: what lies behind it may not be written.
            end = first + int(np.flatnonzero(wanted)[-1]) + 1
            part = out[: end - first].reshape(-1).view(np.uint8)
            entry.shard.read(first - start, end - start, part)
        if not wanted.all():
            out[~wanted] = fill_value(self.dtype)

    def _done(self, rows: Rows | range, status: Status, missing: Missing) -> npt.NDArray[np.bool_]:
        """Which of ``rows`` are done, by their ``status``.

        Raises:
            RowsNotDoneError: some are not, and ``missing`` is "raise".
        """
        done: npt.NDArray[np.bool_] = status == DONE
        if missing == "raise" and not done.all():
            bad, where = np.unique(np.asarray(rows)[~done], return_index=True)
            first = ", ".join(map(str, bad[:5].tolist())) + (" …" if len(bad) > 5 else "")
            failed = int((status[~done][where] == FAILED).sum())
            raise RowsNotDoneError(
                f"{self.name}: {len(bad)} of the rows asked for hold no embedding ({first}; "
                f"{len(bad) - failed} missing, {failed} failed); run `mmc extract` again, or "
                "ask for the rows that are done: store.rows(features=[…])"
            )
        return done

    def _entry(self, number: int) -> "_Entry":
        """An open shard with its status; the least recently used ones are closed."""
        with self._lock:
            entry = self._shards.get(number)
            if entry is not None:
                self._shards.move_to_end(number)
                return entry
        # Not under the lock: two threads may open one shard, but none waits for another's disk.
        entry = self._open(number)
        with self._lock:
            self._shards[number] = entry
            if len(self._shards) > MANY_SHARDS:
                self._shards.popitem(last=False)
        return entry

    def _open(self, number: int) -> "_Entry":
        """Open a shard together with the status that belongs to it.

        A writer may replace shard and status at any moment (shard first). What is read between
        two looks at an unchanged status file belongs together.
        """
        key = f"{self._folder}/{self._layout.key(number)}"
        status_file = status_key(self._prefix, self.tower, number)
        size = self._record.shard_rows
        for _ in range(_ATTEMPTS):
            before = self._files.signature(status_file)
            status = read_status_chunk(self._files, self._prefix, self.tower, number, size)
            if status is None:
                status = np.full(size, MISSING, np.uint8)
            shard: Shard | None = None
            problem: DamagedStoreError | None = None
            try:
                if (status == DONE).any():
                    shard = open_shard(self._files, key, self._layout)
            except DamagedStoreError as error:
                problem = error
            self._check_same_alias()
            if self._files.signature(status_file) == before:
                if problem is not None:
                    raise problem
                start, stop = self._layout.bounds(number)
                same = np.array_equal(status[: stop - start], self._status[start:stop])
                return _Entry(shard, status, same)
        raise MmcError(f"{self._files.where(key)} keeps changing; wait for the writer to finish")

    def _check_same_alias(self) -> None:
        """Refuse to mix with an alias that was overwritten or compacted since.

        Raises:
            MmcError: it was.
        """
        key = f"{self._prefix}/zarr.json"
        signature = self._files.signature(key)
        if signature == self._signature:
            return
        now = read_record(self._files, self._prefix)
        if (
            now is None
            or now.generation != self._record.generation
            or now.provenance.fingerprint != self.fingerprint
        ):
            raise MmcError(
                f"{self._files.where(self._prefix)} was compacted or overwritten while it was "
                "read; open the store again"
            )
        self._signature = signature


def _items(out: Array, row_bytes: int) -> Array:
    """``out`` as one void item per row: NumPy copies such rows whole."""
    return out.reshape(-1).view(np.dtype(f"V{row_bytes}")) if out.size else np.empty(0, "V1")
