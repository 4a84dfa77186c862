"""Where the rows of an array lie: shards, inner chunks and the zarr v3 metadata that says so.

Shape letters: N rows of the store, S rows of a shard, R rows of an inner chunk.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from mmc.store.errors import DamagedStoreError
from mmc.store.schema import FORMAT, Compression, FieldSpec, fill_value

ZSTD_LEVEL = 3

_MIN_SHARD_ROWS, _MAX_SHARD_ROWS = 1024, 65536
_SMALLEST_SHARD_ROWS = 16
_SHARDS_WANTED = 32
_SHARD_BYTES = 256 << 20
_CHUNK_BYTES = 4 << 20


def default_shard_rows(rows: int, largest_row_bytes: int) -> int:
    """Rows of a shard: about 32 shards, 1,024 to 65,536 rows, at most 256 MiB (then 16 or more)."""
    wanted = max(1, -(-rows // _SHARDS_WANTED))
    shard_rows = 1 << (wanted - 1).bit_length()
    shard_rows = min(max(shard_rows, _MIN_SHARD_ROWS), _MAX_SHARD_ROWS)
    while shard_rows > _SMALLEST_SHARD_ROWS and shard_rows * largest_row_bytes > _SHARD_BYTES:
        shard_rows //= 2
    return shard_rows


def default_chunk_rows(shard_rows: int, row_bytes: int) -> int:
    """Rows of an inner chunk: the largest divisor of ``shard_rows`` within 4 MiB (or one row)."""
    limit = max(1, min(shard_rows, _CHUNK_BYTES // row_bytes))
    return next(rows for rows in range(limit, 0, -1) if shard_rows % rows == 0)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the rows of one sharded array lie: what its zarr.json says."""

    rows: int
    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    shard_rows: int
    chunk_rows: int
    compress: Compression

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one inner chunk before compression, without its checksum."""
        return self.chunk_rows * self.row_bytes

    @property
    def chunks_per_shard(self) -> int:
        """Entries in the index of a shard."""
        return self.shard_rows // self.chunk_rows

    @property
    def num_shards(self) -> int:
        """Shards that hold at least one row."""
        return -(-self.rows // self.shard_rows)

    def key(self, shard: int) -> str:
        """Name of a shard's file inside the array's folder."""
        return ".".join(["c", str(shard), *("0" for _ in self.row_shape)])

    def bounds(self, shard: int) -> tuple[int, int]:
        """First row of ``shard`` and the row after its last."""
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.rows)

    @classmethod
    def of(cls, field: FieldSpec, rows: int, shard_rows: int, compress: Compression) -> Self:
        """The layout that a new array for ``field`` gets."""
        return cls(
            rows=rows,
            row_shape=field.shape,
            dtype=np.dtype(field.dtype).newbyteorder("<"),
            shard_rows=shard_rows,
            chunk_rows=default_chunk_rows(shard_rows, field.row_bytes),
            compress=compress,
        )

    def to_json(self) -> dict[str, Any]:
        """The zarr v3 metadata of the array."""
        sharding = {
            "chunk_shape": [self.chunk_rows, *self.row_shape],
            "codecs": [_bytes_codec(self.dtype), *_compressors(self.compress), {"name": "crc32c"}],
            "index_codecs": [_bytes_codec(np.dtype("u8")), {"name": "crc32c"}],
            "index_location": "end",
        }
        return _array_json(
            shape=(self.rows, *self.row_shape),
            chunk_shape=(self.shard_rows, *self.row_shape),
            dtype=self.dtype,
            codecs=[{"name": "sharding_indexed", "configuration": sharding}],
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> Self:
        """Read back what :meth:`to_json` wrote.

        Raises:
            DamagedStoreError: the metadata of ``where`` is not that of a format 1 feature.
        """
        try:
            rows, *row_shape = data["shape"]
            (sharding,) = data["codecs"]
            inner = sharding["configuration"]
            layout = cls(
                rows=rows,
                row_shape=tuple(row_shape),
                dtype=np.dtype(data["data_type"]).newbyteorder("<"),
                shard_rows=data["chunk_grid"]["configuration"]["chunk_shape"][0],
                chunk_rows=inner["chunk_shape"][0],
                compress="zstd" if any(c["name"] == "zstd" for c in inner["codecs"]) else None,
            )
            expected = layout.to_json()
            same = all(data[key] == expected[key] for key in expected if key != "attributes")
        except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
            raise DamagedStoreError(
                f"{where} is not the metadata of a feature: {type(error).__name__}: {error}"
            ) from None
        if not same:
            raise DamagedStoreError(f"{where} is not the metadata of a format {FORMAT} feature")
        return layout


def status_json(rows: int, shard_rows: int) -> dict[str, Any]:
    """The zarr v3 metadata of a status array: one chunk per shard, not sharded."""
    codecs: list[dict[str, Any]] = [_bytes_codec(np.dtype("u1")), {"name": "crc32c"}]
    return _array_json(
        shape=(rows,), chunk_shape=(shard_rows,), dtype=np.dtype("u1"), codecs=codecs
    )


def plain_json(array_shape: tuple[int, ...], attributes: dict[str, Any]) -> dict[str, Any]:
    """The zarr v3 metadata of a float32 array in one chunk (label texts)."""
    dtype = np.dtype("<f4")
    codecs: list[dict[str, Any]] = [_bytes_codec(dtype), {"name": "crc32c"}]
    data = _array_json(shape=array_shape, chunk_shape=array_shape, dtype=dtype, codecs=codecs)
    return {**data, "attributes": attributes}


def _bytes_codec(dtype: np.dtype[Any]) -> dict[str, Any]:
    if dtype.itemsize == 1:
        return {"name": "bytes"}
    return {"name": "bytes", "configuration": {"endian": "little"}}


def _compressors(compress: Compression) -> list[dict[str, Any]]:
    if compress is None:
        return []
    return [{"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}]


def _array_json(
    *,
    shape: tuple[int, ...],
    chunk_shape: tuple[int, ...],
    dtype: np.dtype[Any],
    codecs: list[dict[str, Any]],
) -> dict[str, Any]:
    fill = fill_value(dtype)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        # One folder per array and no folder per shard: one directory to sync after a rename.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN" if fill != fill else fill,
        "codecs": codecs,
        "attributes": {},
        "storage_transformers": [],
    }
