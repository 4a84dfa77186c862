"""Pictures inside tables, read one at a time from any thread.

In an uncompressed Arrow file a picture's bytes lie there as they are, so such a sample has the
file's name, an offset and a size, and needs nothing of this module. Where values are compressed or
encoded (Parquet, compressed Arrow), `image` is ``file.parquet#column`` and `image_offset` the row.

Rows are decoded in blocks of about 4 MiB. A block stays until each of its rows was read once, or
until all blocks together are too large: then those go that were used longest ago. Samples are
embedded in the order of their rows, by several threads that are not far apart, so each block is
decoded once and memory stays flat, however long a row group is. Nothing can begin within a row
group, so each has a few cursors: a step back to a block that is gone starts another one.
"""

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_INSIDE = re.compile(r"(.+\.(?:parquet|pq|arrow|feather|ipc))#([^#/]+)", re.IGNORECASE | re.DOTALL)
_BLOCK_BYTES = 4 << 20
_KEPT_BYTES = 256 << 20
_MOST_OPEN = 16
_MOST_CURSORS = 16
_NEAR = 16
"""A cursor so many blocks before the one that is wanted goes there; one further away is another
thread's, which will want it where it is."""

_FileKey = tuple[str, int, int]
"""Path, mtime_ns and size: another file by that name is another table."""
_BlockKey = tuple[_FileKey, str, int, int]
"""File, column, part and number of a block."""


def inside(file: str, column: str) -> str:
    """The `image` of pictures in a table's column."""
    return f"{file}#{column}"


def table_of(image: str) -> tuple[str, str | None]:
    """(file, column) that an `image` names; the column is None where the file is the picture."""
    match = _INSIDE.fullmatch(image)
    return (match[1], match[2]) if match else (image, None)


def read_picture(path: Path, column: str, row: int) -> bytes:
    """The bytes in a row of a table's column; none where the row has none.

    Raises:
        OSError: the file, the column or the row is not there, or it is damaged.
    """
    status = os.stat(path)
    key = (str(path), status.st_mtime_ns, status.st_size)
    with _lock:
        table = _open.pop(key, None)
        if table is None:
            table = _open_table(key)
        _open[key] = table
        while len(_open) > _MOST_OPEN:
            _open.popitem(last=False)
    try:
        value = table.value(column, row)
    except (pa.ArrowException, KeyError, IndexError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else "no such row"
        raise OSError(f"cannot read row {row} of {path}: {reason}") from None
    return value or b""


class _Kept:
    """Decoded blocks of all tables, each with the number of its rows that were not read yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: OrderedDict[_BlockKey, tuple[pa.Array, int]] = OrderedDict()
        self._bytes = 0

    def get(self, key: _BlockKey) -> pa.Array | None:
        """A block, to read one row of it."""
        with self._lock:
            found = self._blocks.pop(key, None)
            if found is None:
                return None
            block, left = found
            if left > 1:
                self._blocks[key] = block, left - 1
            else:
                self._bytes -= block.nbytes
            return block

    def put(self, key: _BlockKey, block: pa.Array, unread: int) -> None:
        """Keep a block that has unread rows, and forget others where that makes too many."""
        with self._lock:
            if key in self._blocks or not unread:
                return
            self._blocks[key] = block, unread
            self._bytes += block.nbytes
            while self._bytes > _KEPT_BYTES and len(self._blocks) > 1:
                _, (oldest, _) = self._blocks.popitem(last=False)
                self._bytes -= oldest.nbytes


@dataclass
class _Cursor:
    """A way through the blocks of one part."""

    column: str
    part: int
    blocks: Iterator[pa.Array]
    position: int = 0
    """The number of the block that comes next."""


class _Table:
    """The rows of one file."""

    def __init__(self, key: _FileKey, starts: list[int]) -> None:
        """``starts``: the first row of each part, and the number of rows."""
        self._key = key
        self._starts = np.array(starts)
        self._lock = threading.Lock()
        self._cursors: list[_Cursor] = []

    def rows_per_block(self, part: int, column: str) -> int:
        """Rows in each block of a part but the last."""
        raise NotImplementedError

    def blocks(self, part: int, column: str) -> Iterator[pa.Array]:
        """The blocks of a part from its start, binary arrays."""
        raise NotImplementedError

    def value(self, column: str, row: int) -> bytes | None:
        """The bytes in a row."""
        if not 0 <= row < self._starts[-1]:
            raise IndexError(row)
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        number, at = divmod(row - int(self._starts[part]), self.rows_per_block(part, column))
        key = (self._key, column, part, number)
        block = _kept.get(key)
        if block is None:
            with self._lock:
                # Another thread may have come to it while this one waited.
                block = _kept.get(key)
                if block is None:
                    block = self._decoded(column, part, number)
        value: bytes | None = block[at].as_py()
        return value

    def _decoded(self, column: str, part: int, number: int) -> pa.Array:
        """A block that is not kept, to read one row: from the cursor that is nearest before it."""
        before = [
            cursor
            for cursor in self._cursors
            if (cursor.column, cursor.part) == (column, part)
            and number - _NEAR <= cursor.position <= number
        ]
        if before:
            cursor = max(before, key=lambda one: one.position)
            self._cursors.remove(cursor)
        else:
            cursor = _Cursor(column, part, self.blocks(part, column))
        while cursor.position <= number:
            block = next(cursor.blocks, None)
            if block is None:
                raise IndexError(number)
            unread = len(block) - (cursor.position == number)
            _kept.put((self._key, column, part, cursor.position), block, unread)
            cursor.position += 1
        rows = int(self._starts[part + 1] - self._starts[part])
        if cursor.position * self.rows_per_block(part, column) < rows:
            self._cursors = [*self._cursors[1 - _MOST_CURSORS :], cursor]
        return block


class _Parquet(_Table):
    """Parts are row groups."""

    def __init__(self, key: _FileKey) -> None:
        self._path = key[0]
        self._file = pq.ParquetFile(self._path, memory_map=True)
        metadata = self._file.metadata
        groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
        super().__init__(key, [0, *np.cumsum([group.num_rows for group in groups]).tolist()])
        self._groups = groups
        self._rows: dict[tuple[int, str], int] = {}

    def rows_per_block(self, part: int, column: str) -> int:
        if (part, column) not in self._rows:
            group = self._groups[part]
            sizes = [
                group.column(at).total_uncompressed_size
                for at in range(group.num_columns)
                if group.column(at).path_in_schema.split(".")[0] == column.split(".")[0]
            ]
            rows = _BLOCK_BYTES * group.num_rows // max(1, sum(sizes))
            self._rows[part, column] = min(max(1, rows), 1024)
        return self._rows[part, column]

    def blocks(self, part: int, column: str) -> Iterator[pa.Array]:
        kind = self._file.schema_arrow.field(column).type
        name = f"{column}.bytes" if pa.types.is_struct(kind) else column
        # A file of its own: iterators over one share its batch size.
        file = pq.ParquetFile(self._path, metadata=self._file.metadata, memory_map=True)
        batches = file.iter_batches(
            self.rows_per_block(part, column), row_groups=[part], columns=[name]
        )
        for batch in batches:
            yield picture_bytes(batch.column(0))


class _ArrowFile(_Table):
    """Parts are record batches, each one block: compressed ones cannot be had in pieces."""

    def __init__(self, key: _FileKey) -> None:
        self._path = path = key[0]
        with pa.memory_map(path) as file, pa.ipc.open_file(file) as reader:
            schema = reader.schema
        self._names = schema.names
        # Counting rows by a column of numbers decodes no picture.
        fixed = [at for at, kind in enumerate(schema.types) if pa.types.is_primitive(kind)]
        options = pa.ipc.IpcReadOptions(included_fields=fixed[:1])
        with pa.memory_map(path) as file, pa.ipc.open_file(file, options=options) as reader:
            counts = [reader.get_batch(at).num_rows for at in range(reader.num_record_batches)]
        super().__init__(key, [0, *np.cumsum(counts).tolist()])

    def rows_per_block(self, part: int, column: str) -> int:
        return int(max(1, self._starts[part + 1] - self._starts[part]))

    def blocks(self, part: int, column: str) -> Iterator[pa.Array]:
        wanted = pa.ipc.IpcReadOptions(included_fields=[self._names.index(column)])
        with pa.memory_map(self._path) as file:
            yield picture_bytes(pa.ipc.open_file(file, options=wanted).get_batch(part).column(0))


def picture_bytes(array: pa.Array) -> pa.Array:
    """The encoded pictures of a column: the column itself, or the `bytes` of its structs."""
    if pa.types.is_struct(array.type):
        array = pc.struct_field(array, "bytes")
    return array


def _open_table(key: _FileKey) -> _Table:
    path = key[0]
    try:
        is_parquet = path.lower().endswith((".parquet", ".pq"))
        return _Parquet(key) if is_parquet else _ArrowFile(key)
    except pa.ArrowException as error:
        raise OSError(f"cannot read {path}: {str(error).splitlines()[0]}") from None


_lock = threading.Lock()
_open: OrderedDict[_FileKey, _Table] = OrderedDict()
_kept = _Kept()
