"""Arrow files (.arrow, .feather, .ipc): the file format and the stream that `datasets` writes.

Files are mapped into memory. Where they are not compressed, a picture's bytes lie in the file as
they are: the distance of its buffer from the file's first byte is the offset.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmc.extract.sources.base import Records, SourceOptions
from mmc.extract.sources.embedded import inside, picture_bytes
from mmc.extract.sources.typed import Places, read_records
from mmc.store.errors import InputError

SUFFIXES = (".arrow", ".feather", ".ipc")
_MAGIC = b"ARROW1"


class Arrow:
    """Format `arrow`."""

    def recognises(self, spec: str) -> bool:
        """By suffix."""
        return spec.lower().endswith(SUFFIXES) and os.path.isfile(spec)

    def read(self, spec: str, options: SourceOptions) -> Records:
        """All rows; pictures stay in the file.

        Raises:
            InputError: no Arrow file, one without rows, or pictures in a compressed stream.
        """
        file = ArrowFile(os.path.abspath(spec))
        folder = os.path.dirname(file.path)
        return read_records([(None, file)], options, folder=folder, description="Arrow")


class ArrowFile:
    """One file, as `typed.TypedFile`."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            with pa.memory_map(path) as mapped:
                self._bytes = mapped.read_buffer()
            self._is_file = self._bytes[: len(_MAGIC)].to_pybytes() == _MAGIC
            with self._open() as reader:
                self.schema: pa.Schema = reader.schema
            # Rows are counted by a column of numbers: that uncompresses no picture.
            fixed = [one.name for one in self.schema if pa.types.is_primitive(one.type)]
            counted = fixed[:1] or self.schema.names[:1]
            self.num_rows = sum(batch.num_rows for batch in self._batches(counted))
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from None

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Some columns."""
        schema = pa.schema([self.schema.field(name) for name in columns])
        try:
            batches = [batch.select(list(columns)) for batch in self._batches(columns)]
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self.path, error) from None
        return pa.Table.from_batches(batches, schema).replace_schema_metadata(None)

    def first_bytes(self, column: str) -> bytes | None:
        """The first bytes in a column; None = there are none."""
        kind = self.schema.field(column).type
        if pa.types.is_nested(kind) and not _has_field(kind, "bytes"):
            return None
        for batch in self._batches([column]):
            found = picture_bytes(batch.column(column)).drop_null()
            if len(found):
                return bytes(found[0].as_py())
        return None

    def places(self, column: str, name: str) -> Places:
        """By offset and size; by row where values are compressed.

        Raises:
            InputError: a compressed stream, which can only be read from its start.
        """
        images, offsets, sizes = [], [], []
        row = 0
        for batch in self._batches([column]):
            values = batch.column(column)
            found = picture_bytes(values)
            there = found.is_valid()
            paths = pa.nulls(len(found), pa.string())
            if _has_field(values.type, "path"):
                paths = pc.struct_field(values, "path").cast(pa.string())
            begin, size = self._in_file(found)
            if begin is None:
                if not self._is_file and pc.any(there).as_py():
                    raise InputError(
                        f"{self.path} is a compressed Arrow stream, whose pictures cannot be read"
                        " one by one; write it as Parquet"
                    )
                begin = np.arange(row, row + len(found))
            place = inside(name, column) if size is None else name
            images.append(pc.if_else(there, pa.scalar(place), paths))
            offsets.append(pc.if_else(there, pa.array(begin), pa.scalar(None, pa.int64())))
            sizes.append(
                pa.nulls(len(found), pa.int64())
                if size is None
                else pc.if_else(there, pa.array(size), pa.scalar(None, pa.int64()))
            )
            row += len(found)
        return Places(_one(images, pa.string()), _one(offsets, pa.int64()), _one(sizes, pa.int64()))

    def _open(self, options: pa.ipc.IpcReadOptions | None = None) -> Any:
        open_ = pa.ipc.open_file if self._is_file else pa.ipc.open_stream
        return open_(pa.BufferReader(self._bytes), options=options)

    def _batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The record batches with some columns, one at a time."""
        wanted = [self.schema.names.index(name) for name in columns]
        with self._open(pa.ipc.IpcReadOptions(included_fields=wanted)) as reader:
            if self._is_file:
                yield from map(reader.get_batch, range(reader.num_record_batches))
            else:
                yield from reader

    def _in_file(self, values: pa.Array) -> tuple[np.ndarray | None, np.ndarray | None]:
        """(offsets, sizes) of values in the file, int64; None where they do not lie in it."""
        wide = pa.types.is_large_binary(values.type)
        if not (wide or pa.types.is_binary(values.type)):
            return None, None
        _, ends, data = values.buffers()
        if data is None or ends is None:  # nothing but nulls or empty values
            zeros = np.zeros(len(values), np.int64)
            return zeros, zeros
        start = data.address - self._bytes.address
        if not 0 <= start <= self._bytes.size:
            return None, None
        bounds = np.frombuffer(ends, np.int64 if wide else np.int32)
        bounds = bounds[values.offset : values.offset + len(values) + 1].astype(np.int64)
        return start + bounds[:-1], np.diff(bounds)


def _has_field(kind: pa.DataType, name: str) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index(name) >= 0)


def _unreadable(path: str, error: Exception) -> InputError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return InputError(f"cannot read {path} as Arrow: {reason}; write or download it again")


def _one(chunks: Sequence[pa.Array], kind: pa.DataType) -> pa.ChunkedArray:
    return pa.chunked_array(chunks, kind)
