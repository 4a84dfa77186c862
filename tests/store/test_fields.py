"""Fields of every shape and type that backbones give: regions, masks, classes, scores, fused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmc.store import EmbeddingStore, FieldSpec, compact, verify
from mmc.store.errors import InputError, RowsNotDoneError
from mmc.store.testing import LABELS, SOURCE, samples_table

ROWS, FAILED = 21, (4, 17)
FIELDS = tuple(
    FieldSpec(name=name, shape=shape, dtype=dtype, tower=tower)
    for name, shape, dtype, tower in (
        ("regions", (36, 8), "float16", "image"),
        ("boxes", (36, 5), "float16", "image"),
        ("region_scores", (36,), "float16", "image"),
        ("region_classes", (36,), "int16", "image"),
        ("region_mask", (36,), "bool", "image"),
        ("image_places", (5, 3), "int16", "image"),
        ("text", (6,), "float16", "text"),
        ("fused", (6,), "float16", "fused"),
        ("fused_tokens", (7, 6), "float32", "fused"),
        ("fused_mask", (7,), "bool", "fused"),
        ("itm", (1,), "float16", "fused"),
        ("count", (), "int64", "fused"),
    )
)


def values(field: FieldSpec) -> Any:
    """(ROWS, *shape), with negative numbers and the largest ones of the type."""
    random = np.random.default_rng(len(field.name))
    if field.dtype == "bool":
        return random.random((ROWS, *field.shape)) < 0.5
    if field.dtype.startswith("int"):
        info = np.iinfo(field.dtype)
        array = random.integers(-1, 100, (ROWS, *field.shape)).astype(field.dtype)
        array[0], array[1] = info.min, info.max
        return array
    return random.standard_normal((ROWS, *field.shape)).astype(field.dtype)


DATA = {field.name: values(field) for field in FIELDS}


def commit(store: EmbeddingStore, **settings: Any) -> dict[str, int]:
    """Fill what is pending; tower -> rows that were."""
    counts = {}
    with store.writer("vlm", FIELDS, {"model": "x"}, {}, **settings) as writer:
        for tower in ("image", "text", "fused"):
            pending = writer.pending(tower)
            counts[tower] = len(pending)
            for shard in range(writer.num_shards):
                start, stop = writer.bounds(shard)
                rows = pending[(pending >= start) & (pending < stop)]
                bad = {row: "bad" for row in FAILED if row in rows and tower != "text"}
                good = np.setdiff1d(rows, list(bad))
                mine = {f.name: DATA[f.name][good] for f in FIELDS if f.tower == tower}
                if len(rows):
                    writer.commit(shard, tower, good, mine, bad)
    return counts


@pytest.fixture(scope="module", params=[None, "zstd", "memory://"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("fields")
    remote = request.param == "memory://"
    store = EmbeddingStore.create(
        f"memory://{folder.name}-{id(request)}" if remote else folder / "s",
        samples_table(range(ROWS)),
        label_set=LABELS,
        task="multilabel",
        source=SOURCE,
    )
    commit(store, shard_rows=8, compress=None if remote else request.param)
    return store


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_way_of_reading_gives_the_numbers(store: EmbeddingStore, field: FieldSpec) -> None:
    feature, data = store[f"vlm/{field.name}"], DATA[field.name]
    assert (feature.shape, feature.dtype) == (data.shape, data.dtype)
    good = np.flatnonzero(feature.done)
    assert len(good) == ROWS - (0 if field.tower == "text" else len(FAILED))
    for rows in (good, good[::-1], [9, 0, 9, 1], range(8, 14), [20]):
        got = feature.take(rows)
        assert got.dtype == data.dtype
        np.testing.assert_array_equal(got, data[list(rows)])
        out = np.zeros_like(got)
        assert feature.take(rows, out=out) is out
        np.testing.assert_array_equal(out, got)
    np.testing.assert_array_equal(feature[0], data[0])
    np.testing.assert_array_equal(feature[5:16], data[5:16])


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_rows_without_an_embedding_are_filled_by_type(
    store: EmbeddingStore, field: FieldSpec
) -> None:
    """NaN cannot be taken for a number; integers and masks have no such value and give 0."""
    feature = store[f"vlm/{field.name}"]
    truth = DATA[field.name].copy()
    if field.tower != "text":
        with pytest.raises(RowsNotDoneError):
            feature.take([3, 4])
        truth[list(FAILED)] = np.nan if field.dtype.startswith("float") else 0
    for rows in (np.arange(ROWS), np.arange(ROWS)[::-1], np.array([4, 4, 0, 17])):
        np.testing.assert_array_equal(feature.take(rows, missing="fill"), truth[rows])
    blocks = [block for _, block in feature.blocks(5, missing="fill")]
    np.testing.assert_array_equal(np.concatenate(blocks), truth)


def test_integers_and_masks_are_never_rounded(store: EmbeddingStore, tmp_path: Path) -> None:
    fresh = EmbeddingStore.create(
        tmp_path / "s", samples_table(range(2)), label_set=LABELS, task="multilabel", source=SOURCE
    )
    field = FieldSpec(name="region_classes", shape=(36,), dtype="int16", tower="image")
    with fresh.writer("x", [field], {}, {}) as writer:
        for wrong in (np.zeros((2, 36), "int64"), np.zeros((2, 36), "float32")):
            with pytest.raises(InputError, match="'region_classes' is int16, got"):
                writer.commit(0, "image", [0, 1], {"region_classes": wrong})
        writer.commit(0, "image", [0, 1], {"region_classes": np.full((2, 36), -1, "int8")})
    assert (fresh["x/region_classes"][:] == -1).all()


def test_a_change_of_either_content_makes_fused_missing(tmp_path: Path) -> None:
    store = EmbeddingStore.create(
        tmp_path / "s",
        samples_table(range(ROWS)),
        label_set=LABELS,
        task="multilabel",
        source=SOURCE,
    )
    assert commit(store, shard_rows=8) == {"image": ROWS, "text": ROWS, "fused": ROWS}
    images, texts = ([f"{kind}{row}" for row in range(ROWS)] for kind in "it")
    images[2], texts[9], images[17] = "new", "new", "new"
    texts[20] = None  # type: ignore[call-overload]  # a text that is gone is a change as well
    store.sync(
        samples_table(range(ROWS), image_key=images, text_key=texts),
        label_set=LABELS,
        task="multilabel",
        source=SOURCE,
    )
    missing = {
        tower: np.flatnonzero(store.status("vlm", tower) == 0).tolist()
        for tower in ("image", "text", "fused")
    }
    assert missing == {"image": [2, 17], "text": [9, 20], "fused": [2, 9, 17, 20]}
    assert store.errors("vlm").column("row").to_pylist() == [4, 4]
    assert 2 not in store.rows(features=["vlm/fused"])
    assert commit(store) == {"image": 2, "text": 2, "fused": 4}
    assert verify(store) == []
    store.sync(
        samples_table(range(1, ROWS), image_key=images[1:], text_key=texts[1:]),
        label_set=LABELS,
        task="multilabel",
        source=SOURCE,
    )
    assert compact(store).dropped == 1
    store = EmbeddingStore.open(tmp_path / "s")
    for name in ("region_classes", "fused_mask", "itm"):
        feature = store[f"vlm/{name}"]
        done = np.flatnonzero(feature.done)
        np.testing.assert_array_equal(feature.take(done), DATA[name][done + 1])
