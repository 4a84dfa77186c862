"""The hash of a table's content."""

import io
from typing import Any

import pyarrow as pa


def hash_table(digest: Any, table: pa.Table) -> None:
    """Feed a table, as an Arrow stream, to a hash of `hashlib`."""
    with (
        pa.PythonFile(_Hashing(digest), mode="w") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)


class _Hashing(io.RawIOBase):
    """A file that keeps nothing but a hash."""

    def __init__(self, digest: Any) -> None:
        self._digest = digest

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return len(data)
