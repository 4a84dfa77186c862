"""The memory map, the chunk reader and plain zarr give the same numbers, whatever the layout."""

import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from mmc.store import EmbeddingStore, FieldSpec
from mmc.store import layout as layout_module
from mmc.store.errors import InputError, RowsNotDoneError
from mmc.store.mapped import ChunkedShard, MappedShard

DTYPES = ["bool", "uint8", "int16", "int32", "float16", "float32", "float64"]
SOURCE = {"spec": "x"}


def table(rows: int) -> pa.Table:
    return pa.table({"id": [str(row) for row in range(rows)]})


def numbers(rows: int, field: FieldSpec, seed: int) -> Any:
    raw = np.random.default_rng(seed).standard_normal((rows, *field.shape)) * 100
    return raw > 0 if field.dtype == "bool" else np.abs(raw).astype(field.dtype)


def make(
    path: str, field: FieldSpec, data: Any, failed: set[int], first: int, **settings: Any
) -> EmbeddingStore:
    """A store that was filled at ``first`` rows and again after it grew to all of ``data``."""
    store: EmbeddingStore | None = None
    for rows in sorted({first, len(data)}):
        arguments: dict[str, Any] = {"label_set": (), "task": "unlabelled", "source": SOURCE}
        if store is None:
            store = EmbeddingStore.create(path, table(rows), **arguments)
        else:
            store.sync(table(rows), **arguments)
        with store.writer("a", [field], {}, {}, **settings) as writer:
            pending = writer.pending(field.tower)
            for shard in range(writer.num_shards):
                start, stop = writer.bounds(shard)
                mine = pending[(pending >= start) & (pending < stop)]
                bad = {int(row): "bad" for row in mine if int(row) in failed}
                good = np.setdiff1d(mine, list(bad))
                if len(mine):
                    writer.commit(shard, field.tower, good, {field.name: data[good]}, bad)
    assert store is not None
    return store


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    rows = draw(st.integers(1, 50))
    return {
        "rows": rows,
        "field": FieldSpec(
            name="f",
            shape=draw(st.sampled_from([(), (1,), (3,), (5,), (8,), (2, 3), (36, 5), (1, 1, 7)])),
            dtype=draw(st.sampled_from(DTYPES)),
            tower="image",
        ),
        "failed": draw(st.sets(st.integers(0, rows - 1), max_size=5)),
        "first": draw(st.integers(1, rows)),
        "shard_rows": draw(st.sampled_from([1, 3, 4, 12, 16, 64])),
        "chunk_bytes": draw(st.sampled_from([1, 24, 100, 4 << 20])),
        "compress": draw(st.sampled_from([None, "zstd"])),
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=50, deadline=None)
@given(case=cases())
def test_all_paths_agree(tmp_path_factory: pytest.TempPathFactory, case: dict[str, Any]) -> None:
    field, failed = case["field"], case["failed"]
    data = numbers(case["rows"], field, case["seed"])
    local = str(tmp_path_factory.mktemp("store") / "s")
    places = (local, f"memory://{uuid.uuid4()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_module, "_CHUNK_BYTES", case["chunk_bytes"])
        stores = [
            make(
                place,
                field,
                data,
                failed,
                case["first"],
                shard_rows=case["shard_rows"],
                compress=case["compress"],
            )
            for place in places
        ]
    good = np.setdiff1d(np.arange(case["rows"]), list(failed))
    generator = np.random.default_rng(case["seed"])
    pick = generator.choice(good, 40) if len(good) else good
    truth = data.copy()
    truth[list(failed)] = layout_module.fill_value(data.dtype)
    plain = zarr.open_group(local, mode="r")["features/a/f"]
    np.testing.assert_array_equal(plain[:], truth)  # type: ignore[index]
    for store in stores:
        feature = store["a/f"]
        assert feature.shape == data.shape
        assert feature.dtype == data.dtype
        np.testing.assert_array_equal(feature.done, np.isin(np.arange(case["rows"]), good))
        for rows in (good, good[::-1], pick, np.sort(pick)):
            np.testing.assert_array_equal(feature.take(rows), data[rows])
        every = generator.permutation(case["rows"])
        np.testing.assert_array_equal(feature.take(every, missing="fill"), truth[every])
        start, stop = sorted(generator.integers(0, case["rows"] + 1, 2).tolist())
        part = feature.take(slice(start, stop), missing="fill")
        np.testing.assert_array_equal(part, truth[start:stop])
        step = max(1, case["rows"] // 3)
        for first, block in feature.blocks(step, missing="fill"):
            np.testing.assert_array_equal(block, truth[first : first + step])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    field = FieldSpec(name="f", shape=(4,), dtype="float32", tower="image")
    path = str(tmp_path_factory.mktemp("store") / "s")
    return make(path, field, numbers(20, field, 0), {7}, 20, shard_rows=8)


@pytest.fixture(scope="module")
def data() -> Any:
    return numbers(20, FieldSpec(name="f", shape=(4,), dtype="float32", tower="image"), 0)


def test_local_stores_are_mapped_and_others_are_not(store: EmbeddingStore, tmp_path: Path) -> None:
    feature = store["a/f"]
    feature.take([0, 19])
    assert {type(entry.shard) for entry in feature._shards.values()} == {MappedShard}
    field = FieldSpec(name="f", shape=(4,), dtype="float32", tower="image")
    packed = make(f"{tmp_path}/z", field, numbers(20, field, 0), set(), 20, compress="zstd")["a/f"]
    packed.take([0, 19])
    assert {type(entry.shard) for entry in packed._shards.values()} == {ChunkedShard}


def test_indexing(store: EmbeddingStore, data: Any) -> None:
    feature = store["a/f"]
    np.testing.assert_array_equal(feature[3], data[3])
    np.testing.assert_array_equal(feature[-1], data[19])
    np.testing.assert_array_equal(feature[8:], data[8:])
    np.testing.assert_array_equal(feature[19:7:-2], data[19:7:-2])
    np.testing.assert_array_equal(feature[[1, 1, 0]], data[[1, 1, 0]])
    mask = np.arange(20) % 5 == 0
    np.testing.assert_array_equal(feature[mask], data[mask])
    assert feature[5:5].shape == feature.take([]).shape == (0, 4)
    assert len(feature) == 20


def test_rows_that_are_not_done_raise_before_anything_is_read(store: EmbeddingStore) -> None:
    with pytest.raises(RowsNotDoneError, match=r"a/f: 1 of the rows .*\(7; 0 missing, 1 failed\)"):
        store["a/f"].take([6, 7, 7])
    with pytest.raises(RowsNotDoneError):
        store["a/f"][:]
    with pytest.raises(RowsNotDoneError):
        list(store["a/f"].blocks(4))
    assert np.isnan(store["a/f"].take([7], missing="fill")).all()


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([20], "row 20 is outside"),
        ([-1], "row -1 is outside"),
        ([0.5], "integers"),
        (["a"], "integers"),
        ([[1]], "one dimension"),
        (np.ones(3, bool), "mask of 3 rows"),
    ],
)
def test_rows_that_make_no_sense(store: EmbeddingStore, rows: Any, word: str) -> None:
    with pytest.raises(InputError, match=word):
        store["a/f"].take(rows)


def test_out_is_filled_and_checked(store: EmbeddingStore, data: Any) -> None:
    feature = store["a/f"]
    out = np.zeros((3, 4), "float32")
    assert feature.take([9, 0, 9], out=out) is out
    np.testing.assert_array_equal(out, data[[9, 0, 9]])
    assert feature.take(slice(1, 4), out=out) is out
    np.testing.assert_array_equal(out, data[1:4])
    for wrong in (np.zeros((2, 4), "f4"), np.zeros((3, 4)), np.zeros((3, 8), "f4")[:, ::2]):
        with pytest.raises(InputError, match="out has shape"):
            feature.take([9, 0, 9], out=wrong)
    with pytest.raises(InputError, match="choose 'raise' or 'fill'"):
        feature.take([0], missing="zero")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="1 or more"):
        next(feature.blocks(0))


def test_few_shards_stay_open(
    store: EmbeddingStore, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmc.store.feature.MANY_SHARDS", 1)
    feature = store["a/f"]
    rows = np.array([0, 19, 9, 1, 18])
    np.testing.assert_array_equal(feature.take(rows), data[rows])
    assert len(feature._shards) == 1


def test_names(store: EmbeddingStore) -> None:
    assert store.features == ("a/f",)
    assert "a/f" in store
    assert "a/g" not in store
    for name in ("a/g", "b/f", "a", "", "a/"):
        with pytest.raises(InputError, match=r"did you mean a/f|it has a/f"):
            store[name]
    with pytest.raises(InputError, match="no backbone 'b'"):
        store.provenance("b")
    with pytest.raises(InputError, match="no 'text' tower; it has image"):
        store.status("a", "text")
