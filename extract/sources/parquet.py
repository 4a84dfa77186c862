"""Parquet files, with pictures as paths or as bytes in them."""

import os
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmc.extract.sources.base import Records, SourceOptions
from mmc.extract.sources.embedded import inside, picture_bytes
from mmc.extract.sources.typed import Places, read_records
from mmc.store.errors import InputError

SUFFIXES = (".parquet", ".pq")
_LOOKED_AT = 16


class Parquet:
    """Format `parquet`."""

    def recognises(self, spec: str) -> bool:
        """By suffix."""
        return spec.lower().endswith(SUFFIXES) and os.path.isfile(spec)

    def read(self, spec: str, options: SourceOptions) -> Records:
        """All rows; pictures stay in the file.

        Raises:
            InputError: no Parquet file, or one without rows.
        """
        file = ParquetFile(os.path.abspath(spec))
        folder = os.path.dirname(file.path)
        return read_records([(None, file)], options, folder=folder, description="Parquet")


class ParquetFile:
    """One file, as `typed.TypedFile`."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from None
        self.schema: pa.Schema = self._file.schema_arrow
        self.num_rows: int = self._file.metadata.num_rows

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Some columns; `a.b` is a field of a struct."""
        try:
            return self._file.read(list(columns)).replace_schema_metadata(None)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self.path, error) from None

    def first_bytes(self, column: str) -> bytes | None:
        """The first bytes in a column; None = there are none."""
        name = self._name(column)
        if name is None:
            return None
        for batch in self._file.iter_batches(_LOOKED_AT, columns=[name]):
            found = picture_bytes(batch.column(0)).drop_null()
            if len(found):
                return bytes(found[0].as_py())
        return None

    def places(self, column: str, name: str) -> Places:
        """By row: bytes in Parquet are encoded."""
        kind = self.schema.field(column).type
        there = self._filled(column)
        paths = pa.nulls(self.num_rows, pa.string())
        if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
            structs = self.read([f"{column}.path"])[column].combine_chunks()
            paths = pc.struct_field(structs, "path").cast(pa.string())
        mask = pa.array(there)
        rows = pa.array(np.arange(self.num_rows), pa.int64())
        return Places(
            image=pc.if_else(mask, pa.scalar(inside(name, column)), paths),
            offset=pc.if_else(mask, rows, pa.scalar(None, pa.int64())),
            size=pa.nulls(self.num_rows, pa.int64()),
        )

    def _name(self, column: str) -> str | None:
        kind = self.schema.field(column).type
        if not pa.types.is_struct(kind):
            return None if pa.types.is_nested(kind) else column
        return f"{column}.bytes" if kind.get_field_index("bytes") >= 0 else None

    def _filled(self, column: str) -> np.ndarray:
        """(N,) whether a row has bytes: from the statistics where they say it, else by reading."""
        name = self._name(column)
        metadata = self._file.metadata
        result = np.zeros(self.num_rows, bool)
        start = 0
        for at in range(metadata.num_row_groups):
            group = metadata.row_group(at)
            stop = start + group.num_rows
            nulls = _null_count(group, name)
            if nulls == 0:
                result[start:stop] = True
            elif nulls != group.num_rows:
                row = start
                for batch in self._file.iter_batches(64, row_groups=[at], columns=[name]):
                    valid = picture_bytes(batch.column(0)).is_valid()
                    result[row : row + len(batch)] = valid.to_numpy(zero_copy_only=False)
                    row += len(batch)
            start = stop
        return result


def _null_count(group: pq.RowGroupMetaData, name: str | None) -> int | None:
    for at in range(group.num_columns):
        column = group.column(at)
        if column.path_in_schema == name and column.statistics is not None:
            return column.statistics.null_count if column.statistics.has_null_count else None
    return None


def _unreadable(path: str, error: Exception) -> InputError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return InputError(f"cannot read {path} as Parquet: {reason}; write or download it again")
