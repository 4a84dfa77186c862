"""Rows of one shard: through a memory map where it is local and uncompressed, else chunk by chunk.

Both readers answer the same two questions. ``take`` gathers rows in any order; ``read`` copies a
run of rows and checks the CRC-32C of every chunk that it touches, each once per open shard.
"""

import contextlib
import math
import mmap
import os
import sys
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mmc.store.errors import DamagedStoreError
from mmc.store.files import Files, LocalFiles, stat_signature
from mmc.store.layout import Layout
from mmc.store.shards import (
    ABSENT,
    CRC_BYTES,
    REMEDY,
    Array,
    Index,
    crc32c,
    decode_chunk,
    index_bytes,
    parse_index,
)

# A map needs no file descriptor; Python before 3.13 keeps one all the same.
_UNTRACKED: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}

MANY_SHARDS = 4096 if _UNTRACKED else 128
"""Maps that a feature keeps open: 1,024 descriptors are a usual limit of a process."""

_PIECE_BYTES = 256 << 10

Rows = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class Shard(Protocol):
    """One open shard. Rows count from its start; an absent chunk is always an error."""

    signature: Hashable
    """Of the file that was opened."""
    present: npt.NDArray[np.bool_]
    """(chunks_per_shard,) which inner chunks are in the file."""

    def take(self, rows: Rows, out: Array, positions: Rows, *, check: bool) -> None:
        """``out[positions] = rows`` where ``out`` is 1-d with one void item per row.

        Args:
            rows: which rows, in any order.
            out: where they go.
            positions: places in ``out``.
            check: compare the checksums of the chunks touched.
        """

    def read(self, start: int, stop: int, out: Bytes) -> None:
        """Copy the bytes of a run of rows, checksums compared."""

    def check(self, chunk: int) -> None:
        """Compare the checksum of one chunk.

        Raises:
            DamagedStoreError: it does not fit, or the chunk is absent.
        """


def open_shard(files: Files, key: str, layout: Layout) -> Shard:
    """Open one shard.

    Raises:
        DamagedStoreError: missing, truncated, or with a damaged index.
    """
    where = files.where(key)
    if layout.compress is None and isinstance(files, LocalFiles):
        mapped = MappedShard(files.path(key), layout)
        if mapped.regular:
            return mapped
    size = files.size(key)
    if size is None:
        raise missing_shard(where)
    start = max(0, size - index_bytes(layout))
    try:
        signature = files.signature(key)
        (raw,) = files.read_ranges(key, [(start, size)])
    except FileNotFoundError:
        raise missing_shard(where) from None
    return ChunkedShard(files, key, layout, parse_index(layout, raw, size, where), signature)


def missing_shard(where: str) -> DamagedStoreError:
    """The error for a shard whose rows are done and whose file is not there."""
    return DamagedStoreError(f"{where} is missing and its rows are marked done; {REMEDY}")


def _absent_chunk(where: str, chunk: int) -> DamagedStoreError:
    return DamagedStoreError(
        f"{where} is damaged: chunk {chunk} is absent and its rows are marked done; {REMEDY}"
    )


class MappedShard:
    """A local, uncompressed shard viewed as rows without copying.

    The chunks lie one after another, each followed by its checksum, so row r starts at byte
    ``r // R * (chunk bytes + 4) + r % R * row bytes``: always a multiple of a word of 4 bytes or
    fewer. One overlapping view, a row wide and a word apart, therefore holds every row, and a
    gather is one fancy index into it. (Never ``np.take``, which copies such a view whole first.)
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.where = str(path)
        self.layout = layout
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise missing_shard(self.where) from None
        try:
            stat = os.fstat(descriptor)
            if stat.st_size < index_bytes(layout):
                raise DamagedStoreError(
                    f"{path} is damaged: too short ({stat.st_size} bytes); {REMEDY}"
                )
            self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ, **_UNTRACKED)
        finally:
            os.close(descriptor)
        self.signature = stat_signature(stat)
        self._bytes: Bytes = np.frombuffer(self._map, np.uint8)
        tail = self._bytes[-index_bytes(layout) :].tobytes()
        index = parse_index(layout, tail, stat.st_size, self.where)
        self.present = index[:, 0] != ABSENT
        self._stride = layout.chunk_bytes + CRC_BYTES
        self.regular = self._is_regular(index)
        self._checked = np.zeros(layout.chunks_per_shard, bool)
        self._word = math.gcd(layout.row_bytes, CRC_BYTES)
        self._rows: Array = np.ndarray(
            max(0, (stat.st_size - layout.row_bytes) // self._word + 1),
            np.dtype(f"V{layout.row_bytes}"),
            self._map,
            strides=(self._word,),
        )

    def _is_regular(self, index: Index) -> bool:
        """Whether the chunks present are the first ones, back to back."""
        count = int(self.present.sum())
        offsets = np.arange(count, dtype=np.uint64) * np.uint64(self._stride)
        return bool(
            self.present[:count].all()
            and (index[:count, 0] == offsets).all()
            and (index[:count, 1] == self._stride).all()
        )

    def take(self, rows: Rows, out: Array, positions: Rows, *, check: bool) -> None:
        """See :class:`Shard`."""
        chunks = rows // self.layout.chunk_rows
        if not self.present[chunks].all():
            raise _absent_chunk(self.where, int(chunks[~self.present[chunks]][0]))
        if check:
            for chunk in np.unique(chunks).tolist():
                self.check(chunk)
        # r // R * (R * row_bytes + 4) + r % R * row_bytes, rearranged
        offsets = (rows * self.layout.row_bytes + chunks * CRC_BYTES) // self._word
        out[positions] = self._rows[offsets]

    def read(self, start: int, stop: int, out: Bytes) -> None:
        """See :class:`Shard`."""
        size, per_chunk = self.layout.row_bytes, self.layout.chunk_rows
        with self._reopened() as descriptor:
            if descriptor is not None:
                self._announce(descriptor, start * size, stop * size)
            for chunk in range(start // per_chunk, -(-stop // per_chunk)):
                first, last = max(start, chunk * per_chunk), min(stop, (chunk + 1) * per_chunk)
                part = out[(first - start) * size : (last - start) * size]
                inside = (first - chunk * per_chunk) * size
                if descriptor is None or not self.present[chunk]:
                    self.check(chunk)
                    at = chunk * self._stride + inside
                    part[:] = self._bytes[at : at + len(part)]
                elif last - first == per_chunk:
                    self._read_chunk(descriptor, chunk, part)
                else:
                    if not self._checked[chunk]:
                        self._read_chunk(descriptor, chunk, None)
                    self._copy(descriptor, [part], chunk * self._stride + inside)

    def check(self, chunk: int) -> None:
        """See :class:`Shard`."""
        if self._checked[chunk]:
            return
        if not self.present[chunk]:
            raise _absent_chunk(self.where, chunk)
        end = chunk * self._stride + self.layout.chunk_bytes
        self._compare(
            chunk,
            self._bytes[chunk * self._stride : end],
            self._bytes[end : end + CRC_BYTES].tobytes(),
        )

    def _compare(self, chunk: int, data: Bytes, stored: bytes) -> None:
        self._settle(chunk, crc32c(data), stored)

    def _settle(self, chunk: int, found: int, stored: bytes) -> None:
        if found != int.from_bytes(stored, "little"):
            raise DamagedStoreError(
                f"{self.where} is damaged: the checksum of chunk {chunk} does not fit; {REMEDY}"
            )
        self._checked[chunk] = True

    def _read_chunk(self, descriptor: int, chunk: int, out: Bytes | None) -> None:
        """A whole chunk straight into ``out``; None: only compare its checksum.

        Piece by piece: one is in a core's cache still when its checksum is computed, which other
        threads of Python wait for.
        """
        start, size = chunk * self._stride, self.layout.chunk_bytes
        if out is not None and self._checked[chunk]:
            self._copy(descriptor, [out], start)
            return
        room = np.empty(min(size, _PIECE_BYTES), np.uint8) if out is None else out
        found = 0
        for at in range(0, size, _PIECE_BYTES):
            length = min(_PIECE_BYTES, size - at)
            piece = room[:length] if out is None else out[at : at + length]
            self._copy(descriptor, [piece], start + at)
            found = crc32c(piece, found)
        stored = bytearray(CRC_BYTES)
        self._copy(descriptor, [stored], start + size)
        self._settle(chunk, found, bytes(stored))

    def _announce(self, descriptor: int, start: int, stop: int) -> None:
        """Have the kernel read all of a run at once, not a little ahead of what is asked for."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # a file system that takes no advice
                os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)

    def _copy(self, descriptor: int, buffers: list[Any], offset: int) -> None:
        """Bytes of the file into ``buffers``: a copy by the kernel takes no page faults."""
        if os.preadv(descriptor, buffers, offset) != sum(map(len, buffers)):
            raise DamagedStoreError(f"{self.where} ended while it was read; {REMEDY}")

    @contextlib.contextmanager
    def _reopened(self) -> Iterator[int | None]:
        """The file that is mapped, opened for reading; None when that cannot be (replaced since).

        A map keeps a descriptor of its own that Python does not tell; a second one for each open
        shard would soon meet the limit of the process.
        """
        descriptor = None
        try:
            if hasattr(os, "preadv"):
                with contextlib.suppress(FileNotFoundError):
                    descriptor = os.open(self.where, os.O_RDONLY)
            if descriptor is None or stat_signature(os.fstat(descriptor)) != self.signature:
                yield None
            else:
                yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)


class ChunkedShard:
    """A remote or compressed shard: whole inner chunks are fetched, checked and decoded."""

    def __init__(
        self, files: Files, key: str, layout: Layout, index: Index, signature: Hashable
    ) -> None:
        self.files = files
        self.key = key
        self.layout = layout
        self.signature = signature
        self.present = index[:, 0] != ABSENT
        self._index = index
        self._where = files.where(key)

    def take(self, rows: Rows, out: Array, positions: Rows, *, check: bool) -> None:
        """See :class:`Shard`; checksums are compared in any case."""
        chunks, local = np.divmod(rows, self.layout.chunk_rows)
        order = np.argsort(chunks, kind="stable")
        wanted, first = np.unique(chunks[order], return_index=True)
        for chunk, places in zip(wanted.tolist(), np.split(order, first[1:]), strict=True):
            (block,) = self._fetch([chunk])
            items = block.reshape(-1).view(out.dtype)
            out[positions[places]] = items[local[places]]

    def read(self, start: int, stop: int, out: Bytes) -> None:
        """See :class:`Shard`."""
        per_chunk, size = self.layout.chunk_rows, self.layout.row_bytes
        chunks = range(start // per_chunk, -(-stop // per_chunk))
        for chunk, block in zip(chunks, self._fetch(chunks), strict=True):
            first, last = max(start, chunk * per_chunk), min(stop, (chunk + 1) * per_chunk)
            data = block.reshape(-1).view(np.uint8)
            at = (first - chunk * per_chunk) * size
            length = (last - first) * size
            to = (first - start) * size
            out[to : to + length] = data[at : at + length]

    def check(self, chunk: int) -> None:
        """See :class:`Shard`."""
        self._fetch([chunk])

    def _fetch(self, chunks: Any) -> list[Array]:
        ranges = []
        for chunk in chunks:
            if not self.present[chunk]:
                raise _absent_chunk(self._where, chunk)
            offset, size = (int(value) for value in self._index[chunk])
            ranges.append((offset, offset + size))
        try:
            parts = self.files.read_ranges(self.key, ranges)
        except FileNotFoundError:
            raise missing_shard(self._where) from None
        return [
            decode_chunk(self.layout, part, f"chunk {chunk} of {self._where}")
            for chunk, part in zip(chunks, parts, strict=True)
        ]
