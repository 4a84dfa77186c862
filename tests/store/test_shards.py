"""The bytes of a shard are those that zarr-python writes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from mmc.store.errors import DamagedStoreError
from mmc.store.files import LocalFiles
from mmc.store.layout import Layout
from mmc.store.mapped import ChunkedShard, MappedShard, open_shard
from mmc.store.schema import fill_value
from mmc.store.shards import encode, index_bytes, parse_index, with_crc

DTYPES = ["bool", "uint8", "int16", "int64", "float16", "float32", "float64"]


def values(shape: tuple[int, ...], dtype: np.dtype[Any], seed: int) -> Any:
    bits = np.random.default_rng(seed).standard_normal(shape) * 50
    return (bits > 0) if dtype.kind == "b" else np.abs(bits).astype(dtype)


def write_with_zarr(path: Path, layout: Layout, data: Any) -> Any:
    """The array as zarr-python itself lays it out, every chunk written."""
    array = zarr.create_array(
        path,
        shape=data.shape,
        dtype=layout.dtype,
        shards=(layout.shard_rows, *layout.row_shape),
        chunks=(layout.chunk_rows, *layout.row_shape),
        serializer=BytesCodec(endian="little" if layout.dtype.itemsize > 1 else None),
        compressors=[*([ZstdCodec(level=3)] if layout.compress else []), Crc32cCodec()],
        fill_value=fill_value(layout.dtype),
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    array[:] = data
    return array


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    row_shape=st.sampled_from([(), (1,), (3,), (8,), (2, 3)]),
    dtype=st.sampled_from(DTYPES),
    chunk_rows=st.sampled_from([1, 2, 4]),
    chunks=st.integers(1, 4),
    zeros=st.booleans(),
)
def test_uncompressed_shards_equal_zarr_pythons(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    row_shape: tuple[int, ...],
    dtype: str,
    chunk_rows: int,
    chunks: int,
    zeros: bool,
) -> None:
    layout = Layout(
        rows=rows,
        row_shape=row_shape,
        dtype=np.dtype(dtype).newbyteorder("<"),
        shard_rows=chunk_rows * chunks,
        chunk_rows=chunk_rows,
        compress=None,
    )
    data = values((rows, *row_shape), layout.dtype, seed=rows)
    if zeros:
        data[...] = 0
    folder = tmp_path_factory.mktemp("zarr")
    write_with_zarr(folder, layout, data)
    for shard in range(layout.num_shards):
        start, stop = layout.bounds(shard)
        ours = b"".join(bytes(memoryview(b)) for b in encode(layout, data[start:stop]))
        assert ours == (folder / layout.key(shard)).read_bytes()


def test_metadata_equals_zarr_pythons(tmp_path: Path) -> None:
    layout = Layout(
        rows=10,
        row_shape=(3,),
        dtype=np.dtype("<f2"),
        shard_rows=8,
        chunk_rows=4,
        compress="zstd",
    )
    array = write_with_zarr(tmp_path, layout, values((10, 3), layout.dtype, 0))
    theirs = array.metadata.to_dict()
    ours = layout.to_json()
    assert {key: ours[key] for key in ours if key != "storage_transformers"} == {
        key: _listed(theirs[key]) for key in ours if key != "storage_transformers"
    }


def _listed(value: Any) -> Any:
    """zarr-python's dictionaries with tuples as lists, as in JSON."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


LAYOUT = Layout(
    rows=20, row_shape=(3,), dtype=np.dtype("<f4"), shard_rows=8, chunk_rows=4, compress=None
)


def shard_file(folder: Path, rows: int = 8) -> LocalFiles:
    files = LocalFiles(folder)
    files.write("c.0.0", encode(LAYOUT, values((rows, 3), LAYOUT.dtype, 1)))
    return files


def test_a_local_uncompressed_shard_is_mapped(tmp_path: Path) -> None:
    assert isinstance(open_shard(shard_file(tmp_path), "c.0.0", LAYOUT), MappedShard)


def test_chunks_in_another_order_are_read_all_the_same(tmp_path: Path) -> None:
    """zarr allows any order in a shard; only ours can be mapped."""
    files = shard_file(tmp_path)
    raw = files.read("c.0.0")
    assert raw is not None
    size = 4 * 12 + 4
    first, second = raw[:size], raw[size : 2 * size]
    index = np.array([[size, size], [0, size]], "<u8").tobytes()
    files.write("c.0.0", [second, first, with_crc(index)])
    shard = open_shard(files, "c.0.0", LAYOUT)
    assert isinstance(shard, ChunkedShard)
    out = np.empty((8, 3), "<f4")
    shard.read(0, 8, out.reshape(-1).view(np.uint8))
    np.testing.assert_array_equal(out, values((8, 3), LAYOUT.dtype, 1))


def test_an_absent_chunk_is_an_error_not_zeros(tmp_path: Path) -> None:
    shard = open_shard(shard_file(tmp_path, rows=4), "c.0.0", LAYOUT)
    out = np.empty((1, 3), "<f4")
    items = out.reshape(-1).view("V12")
    shard.take(np.array([3]), items, np.array([0]), check=False)
    with pytest.raises(DamagedStoreError, match=r"c\.0\.0.*chunk 1 is absent"):
        shard.take(np.array([4]), items, np.array([0]), check=False)


@pytest.mark.parametrize("offset", [1 << 40, (1 << 64) - 8])
def test_an_index_that_points_outside_is_refused(offset: int) -> None:
    index = np.array([[0, 52], [offset, 52]], "<u8").tobytes()
    raw = with_crc(index)
    with pytest.raises(DamagedStoreError, match="shorter than its index says"):
        parse_index(LAYOUT, raw, 104 + len(raw), "x")
    assert len(raw) == index_bytes(LAYOUT)
