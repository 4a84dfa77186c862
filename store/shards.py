"""The bytes of a shard: inner chunks one after another, each with its CRC-32C, then the index."""

from collections.abc import Iterator
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmc.store.errors import DamagedStoreError
from mmc.store.files import Buffer
from mmc.store.layout import ZSTD_LEVEL, Layout
from mmc.store.schema import fill_value

Array = npt.NDArray[Any]
Index = npt.NDArray[np.uint64]

ABSENT = np.uint64(2**64 - 1)
"""Offset and length, in the index, of a chunk that was not written."""
CRC_BYTES = 4


def crc32c(data: bytes | Array, before: int = 0) -> int:
    """CRC-32C of contiguous bytes, which follow on others whose checksum is ``before``."""
    return int(google_crc32c.extend(before, data))


def with_crc(data: bytes) -> bytes:
    """``data`` followed by its CRC-32C, little-endian: zarr's crc32c codec."""
    return data + crc32c(data).to_bytes(CRC_BYTES, "little")


def without_crc(data: bytes, where: str) -> bytes:
    """The reverse of :func:`with_crc`.

    Raises:
        DamagedStoreError: the checksum does not fit.
    """
    body = data[:-CRC_BYTES]
    if len(data) < CRC_BYTES or crc32c(body) != int.from_bytes(data[-CRC_BYTES:], "little"):
        raise DamagedStoreError(f"{where} is damaged: its checksum does not fit; {REMEDY}")
    return body


REMEDY = "run `mmc verify --repair` and extract again"


def index_bytes(layout: Layout) -> int:
    """Length of the index at the end of a shard, checksum included."""
    return 16 * layout.chunks_per_shard + CRC_BYTES


def encode(layout: Layout, block: Array) -> Iterator[Buffer]:
    """The bytes of one shard, in pieces, without copying whole chunks.

    Args:
        layout: of the array.
        block: (n, *row_shape) the shard's rows from its first to the array's end, contiguous.
    """
    index = np.full((layout.chunks_per_shard, 2), ABSENT, "<u8")
    offset = 0
    for chunk, start in enumerate(range(0, len(block), layout.chunk_rows)):
        rows = block[start : start + layout.chunk_rows]
        if len(rows) < layout.chunk_rows:
            padding = (layout.chunk_rows - len(rows), *layout.row_shape)
            fill = np.full(padding, fill_value(layout.dtype), layout.dtype)
            rows = np.concatenate([rows, fill])
        data: Buffer = rows.reshape(-1).view(np.uint8)
        if layout.compress:
            data = _codec().compress(data, asbytes=True)
        size = len(data) + CRC_BYTES
        index[chunk] = offset, size
        offset += size
        yield data
        yield crc32c(data).to_bytes(CRC_BYTES, "little")
    yield with_crc(index.tobytes())


def parse_index(layout: Layout, raw: bytes, shard_bytes: int, where: str) -> Index:
    """Offset and length of each inner chunk, (chunks, 2).

    Args:
        layout: of the array.
        raw: the last ``index_bytes`` bytes of the shard.
        shard_bytes: length of the shard.
        where: the file, for messages.

    Raises:
        DamagedStoreError: truncated, wrong checksum, or chunks that lie outside the file.
    """
    if len(raw) != index_bytes(layout):
        raise DamagedStoreError(f"{where} is damaged: too short ({shard_bytes} bytes); {REMEDY}")
    table = np.frombuffer(without_crc(raw, f"the index of {where}"), "<u8").reshape(-1, 2)
    present = table[table[:, 0] != ABSENT]
    # Offsets first: a huge one must not wrap around when the length is added.
    limit = np.uint64(shard_bytes - len(raw))
    if (present > limit).any() or (present.sum(axis=1, dtype=np.uint64) > limit).any():
        raise DamagedStoreError(f"{where} is damaged: it is shorter than its index says; {REMEDY}")
    return table.astype(np.uint64)


def decode_chunk(layout: Layout, raw: bytes, where: str) -> Array:
    """The rows of one inner chunk, (chunk_rows, *row_shape), read-only.

    Raises:
        DamagedStoreError: wrong checksum or length.
    """
    body = without_crc(raw, where)
    if layout.compress:
        try:
            body = _codec().decompress(body, decompressed_size=layout.chunk_bytes, asbytes=True)
        except (OSError, pa.ArrowInvalid) as error:
            raise DamagedStoreError(f"{where} is damaged: {error}; {REMEDY}") from None
    if len(body) != layout.chunk_bytes:
        raise DamagedStoreError(
            f"{where} is damaged: {len(body)} bytes instead of {layout.chunk_bytes}; {REMEDY}"
        )
    return np.frombuffer(body, layout.dtype).reshape(layout.chunk_rows, *layout.row_shape)


def _codec() -> Any:
    return pa.Codec("zstd", compression_level=ZSTD_LEVEL)
