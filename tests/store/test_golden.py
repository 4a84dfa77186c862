"""The store of every released format still opens; tests/golden/make_store.py made it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from mmc.store import EmbeddingStore, FieldSpec, verify

STORE = Path(__file__).parents[1] / "golden" / "store-v1"
ALIASES = ("plain", "packed")
IMAGE_ROWS = [0, 1, 2, 3, 5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def store() -> EmbeddingStore:
    return EmbeddingStore.open(STORE)


def test_samples(store: EmbeddingStore) -> None:
    assert len(store) == 10
    assert store.label_set == ("1", "2", "10")
    assert store.task == "multiclass"
    assert store.sources[0]["columns"] == {"id": "ImageID", "labels": "Labels"}
    assert store.column("id").to_pylist() == [f"p{number}" for number in range(10)]
    assert store.column("age").to_pylist() == [number / 2 for number in range(10)]
    assert store.rows("train").tolist() == [0, 1, 2, 3, 4, 5]
    assert store.rows("val").tolist() == [6, 7, 8]
    assert store.labels.multi_hot([4, 5, 9]).tolist() == [[0, 1, 0], [-1] * 3, [-1] * 3]


@pytest.mark.parametrize("alias", ALIASES)
def test_features(store: EmbeddingStore, alias: str) -> None:
    rows = np.array(IMAGE_ROWS)
    image = store[f"{alias}/image"]
    assert (image.shape, image.dtype, image.tower) == ((10, 3), np.dtype("float16"), "image")
    assert np.flatnonzero(image.done).tolist() == IMAGE_ROWS
    np.testing.assert_array_equal(image.take(rows), rows[:, None] + [[0, 0.125, 0.25]])
    tokens = store[f"{alias}/text_tokens"][:]
    every = np.arange(10)
    np.testing.assert_array_equal(tokens, every[:, None, None] * 10 + [[[0, 1], [2, 3]]])
    mask = store[f"{alias}/text_mask"][:]
    np.testing.assert_array_equal(mask, np.stack([every >= 0, every % 2 == 0], axis=1))
    assert store.rows(features=[f"{alias}/image", f"{alias}/text_mask"]).tolist() == [
        0, 1, 2, 3, 5, 6, 7, 8,
    ]  # fmt: skip


@pytest.mark.parametrize("alias", ALIASES)
def test_what_belongs_to_an_alias(store: EmbeddingStore, alias: str) -> None:
    provenance = store.provenance(alias)
    assert provenance.identity == {"made": "by hand"}
    assert provenance.context == {"mmc": "0.1"}
    # The hash of {"made":"by hand"}, by any SHA-256 tool.
    assert provenance.fingerprint == (
        "23da312195dbc153e4b724aef0858b5cef543ac36ea0e9c9a381934b339cdb02"
    )
    failure = {"row": 4, "id": "p4", "tower": "image", "reason": "not an image"}
    assert store.errors(alias).to_pylist() == [failure]
    found = store.label_text(alias)
    assert found is not None
    assert found[0] == ("1", "2", "10")
    np.testing.assert_array_equal(found[1], np.eye(3))


def test_it_has_no_problems(store: EmbeddingStore) -> None:
    assert verify(store) == []
    info = store.info()
    assert (info["rows"], info["gone"], info["format"]) == (9, 1, 1)


@pytest.mark.parametrize("alias", ALIASES)
def test_plain_zarr_reads_it(alias: str) -> None:
    group: Any = zarr.open_group(STORE, mode="r")[f"features/{alias}"]
    truth = np.arange(10)[:, None] + np.array([[0, 0.125, 0.25]])
    truth[4] = np.nan
    np.testing.assert_array_equal(group["image"][:], truth)
    assert group["status_image"][:].tolist() == [1, 1, 1, 1, 2, 1, 1, 1, 1, 1]
    assert group["label_text"][:].tolist() == np.eye(3).tolist()


@pytest.mark.parametrize("alias", ALIASES)
def test_it_can_be_continued(tmp_path: Path, alias: str) -> None:
    shutil.copytree(STORE, tmp_path / "s")
    store = EmbeddingStore.open(tmp_path / "s")
    field = FieldSpec(name="image", shape=(3,), dtype="float16", tower="image")
    with store.writer(alias, [field], {"made": "by hand"}, {}) as writer:
        assert writer.pending("image", retry_failed=True).tolist() == [4]
        writer.commit(1, "image", [4], {"image": np.full((1, 3), 4, "float16")})
    np.testing.assert_array_equal(store[f"{alias}/image"][4:6][:, 0], [4, 5])
