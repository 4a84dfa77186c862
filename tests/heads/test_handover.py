"""A store's samples as tables and arrays: the same numbers, in order, what is missing empty."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.decomposition import PCA

from mmc.heads import projection, samplecolumns
from mmc.heads.handover import default_out, export_samples
from mmc.heads.predict import Predictor, predict
from mmc.store import EmbeddingStore
from mmc.store.errors import InputError, MmcError


class Pictures:
    """Pictures of even rows only."""

    def __call__(self, row: int) -> bytes:
        if row % 2:
            raise MmcError("gone")
        return b"small %d" % row

    def path(self, row: int) -> str | None:
        return f"/pictures/{row}.png" if row % 3 else None


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplecolumns, "MOST_ROWS", 25)


@pytest.mark.parametrize("task", ["multilabel", "binary", "multiclass"])
def test_a_table_holds_what_the_store_and_the_run_say(task, make_store, make_run, tmp_path: Path):
    store = make_store(task, noise=1.0)
    run = make_run(store)
    report = export_samples(store, tmp_path / "t.parquet", "parquet", run=run, device="cpu")
    file = pq.ParquetFile(tmp_path / "t.parquet")
    assert file.metadata.num_row_groups == 3
    table = file.read()
    assert table["id"].to_pylist() == [f"s{i}" for i in range(60)]
    assert (report.rows, report.without_features) == (60, 2)
    values = table["clip_image"].to_pylist()
    assert [i for i, v in enumerate(values) if v is None] == [7, 11]
    there = np.flatnonzero(store["clip/image"].done)
    np.testing.assert_array_equal(
        np.array([values[i] for i in there]), store["clip/image"].take(there).astype(np.float32)
    )
    names, truth = store.label_set, store.labels.multi_hot()
    expected = [[n for n, on in zip(names, row, strict=True) if on == 1] for row in truth]
    expected[3] = None  # unlabelled
    assert table["labels"].to_pylist() == expected
    assert table["label"].to_pylist() == [None if e is None else ", ".join(e) for e in expected]
    said = predict(run, store)
    np.testing.assert_array_equal(
        np.array([p for p in table["probabilities"].to_pylist() if p is not None], np.float32),
        said.probabilities[said.ok].numpy(),
    )
    given = [
        [n for n, on in zip(names, row, strict=True) if on] if ok else None
        for row, ok in zip(said.decisions.tolist(), said.ok.tolist(), strict=True)
    ]
    assert table["predicted"].to_pylist() == given
    right = [None if None in (e, g) else e == g for e, g in zip(expected, given, strict=True)]
    assert table["correct"].to_pylist() == right
    assert {True, False} <= set(right)
    told = json.loads(table.schema.metadata[b"mmc"])
    assert told["label_set"] == list(names)
    assert told["features"]["clip/text"]["column"] == "clip_text"


def test_arrays_are_those_of_the_store(make_store, make_run, tmp_path: Path):
    store = make_store()
    run = make_run(store)
    export_samples(store, tmp_path / "a", "npy", run=run, split="test", device="cpu")
    rows = store.rows(split="test")
    found = np.load(tmp_path / "a" / "clip_text.npy", mmap_mode="r")
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, store["clip/text"].take(rows, missing="fill"))
    np.testing.assert_array_equal(
        np.load(tmp_path / "a" / "labels.npy"), store.labels.multi_hot(rows)
    )
    p = np.load(tmp_path / "a" / "probabilities.npy")
    assert (np.isnan(p).all(1) == np.isin(rows, [7, 11])).all()
    table = pq.read_table(tmp_path / "a" / "samples.parquet")
    assert table["id"].to_pylist() == [f"s{row}" for row in rows]
    assert "clip_text" not in table.column_names
    assert (tmp_path / "a" / "labels.txt").read_text().splitlines() == list(run.label_set)
    assert np.load(tmp_path / "a" / "projection.npy").shape == (15, 2)
    with pytest.raises(InputError, match="is there already"):
        export_samples(store, tmp_path / "a", "npy", device="cpu")


def test_pictures_and_the_users_columns(make_store, tmp_path: Path):
    store = make_store()
    table = store.samples.append_column("label", pa.array([f"mine {i}" for i in range(60)]))
    table = table.append_column("year", pa.array(range(60))).drop_columns(["_gone", "_source"])
    store.sync(table, label_set=store.label_set, task=store.task, source={"spec": "store.csv"})
    report = export_samples(
        store, tmp_path / "t.parquet", "parquet", pictures=Pictures(), thumbnails=True
    )
    assert report.without_thumbnail == 30
    found = pq.read_table(tmp_path / "t.parquet")
    assert found["user.label"].to_pylist()[5] == "mine 5"
    assert found["year"].to_pylist() == list(range(60))
    assert found["image"].to_pylist()[:3] == ["0.png", "/pictures/1.png", "/pictures/2.png"]
    assert found["thumbnail"].to_pylist()[:2] == [{"bytes": b"small 0", "path": "s0.jpg"}, None]


def test_pca_is_that_of_scikit_learn(make_store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(projection, "BLOCK_ROWS", 7)
    store = make_store()
    rows = store.rows()[::-1].copy()
    found = projection.project(store["clip/image"], rows, "pca")
    done = store["clip/image"].done[rows]
    x = store["clip/image"].take(rows[done]).astype(np.float64)
    model = PCA(2).fit(x / np.linalg.norm(x, axis=1, keepdims=True))
    expected = model.transform(x / np.linalg.norm(x, axis=1, keepdims=True))
    signs = np.sign((found.places[done] * expected).sum(0))
    np.testing.assert_allclose(found.places[done], expected * signs, atol=1e-5)
    assert found.explained == pytest.approx(model.explained_variance_ratio_.sum())
    assert np.isnan(found.places[~done]).all()


def test_tsne_keeps_groups_apart_and_has_a_limit(make_store, monkeypatch: pytest.MonkeyPatch):
    store = make_store("multiclass", noise=0.05, failed=(), unlabelled=())
    found = projection.project(store["clip/image"], store.rows(), "tsne", seed=1)
    labels = store.labels.multi_hot().argmax(1)
    distances = np.linalg.norm(found.places[:, None] - found.places[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(1)] == labels).all()
    monkeypatch.setattr(projection, "TSNE_ROWS", 59)
    with pytest.raises(InputError, match="t-SNE is for up to 59 samples and there are 60"):
        projection.project(store["clip/image"], store.rows(), "tsne")


def test_nothing_is_left_of_a_failed_export(
    make_store, make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = make_store()
    run = make_run(store)
    out = tmp_path / "out"
    out.mkdir()
    export_samples(store, out / "t.parquet", "parquet", device="cpu")
    before = (out / "t.parquet").read_bytes()

    def broken(self: Predictor, rows: object) -> None:
        raise MmcError("no more")

    monkeypatch.setattr(Predictor, "logits", broken)
    for to, name in (("parquet", "t.parquet"), ("npy", "arrays")):
        with pytest.raises(MmcError, match="no more"):
            export_samples(store, out / name, to, run=run, device="cpu")
    assert [p.name for p in out.iterdir()] == ["t.parquet"]
    assert (out / "t.parquet").read_bytes() == before


def test_what_cannot_be_exported_is_said(make_store, make_run, tmp_path: Path):
    store = make_store()
    with pytest.raises(InputError, match="has no feature 'clip/depth'"):
        export_samples(store, tmp_path / "t", "parquet", features=["clip/depth"])
    with pytest.raises(InputError, match="is a folder"):
        export_samples(store, tmp_path, "parquet")
    other = make_store(name="other", label_set=("x", "y"))
    with pytest.raises(InputError, match="does not match"):
        export_samples(other, tmp_path / "t", "parquet", run=make_run(store))
    with pytest.raises(InputError, match="--out"):
        default_out("s3://bucket/my.store", "parquet")
    assert default_out(str(tmp_path / "my.store"), "npy") == tmp_path.resolve() / "my-arrays"


def test_a_store_without_features_is_a_table_of_samples(tmp_path: Path):
    table = pa.table({"id": ["a", "b"], "text": ["one", None]})
    EmbeddingStore.create(
        tmp_path / "s", table, label_set=(), task="unlabelled", source={"spec": "x"}
    )
    report = export_samples(EmbeddingStore.open(tmp_path / "s"), tmp_path / "t", "parquet")
    assert report.features == {}
    found = pq.read_table(tmp_path / "t")
    assert found["text"].to_pylist() == ["one", None]
    assert found["label"].to_pylist() == [None, None]
