"""Heads on other fields than image and text: fused, match scores; texts against label texts."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmc.heads.artifact import Run
from mmc.heads.options import TrainConfig
from mmc.heads.predict import logits, predict
from mmc.heads.trainer import train
from mmc.store import EmbeddingStore, FieldSpec

LABELS = ("cat", "dog", "owl")
N, WIDTH = 240, 8
FIELDS = tuple(
    FieldSpec(name=name, shape=shape, dtype=dtype, tower=tower)
    for name, shape, dtype, tower in (
        ("image", (WIDTH,), "float16", "image"),
        ("text", (WIDTH,), "float16", "text"),
        ("fused", (WIDTH,), "float16", "fused"),
        ("fused_tokens", (3, WIDTH), "float16", "fused"),
        ("fused_mask", (3,), "bool", "fused"),
        ("itm", (1,), "float16", "fused"),
    )
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    """Labels that only the fused vector tells; "owl" also where the match score is high.

    The text points to the label texts a little. Rows 5 and 6 have no image, so nothing fused.
    """
    path = tmp_path_factory.mktemp("fused") / "s"
    random = np.random.default_rng(0)
    truth = random.random((N, 3)) < 0.4
    table = pa.table(
        {
            "id": [f"s{i}" for i in range(N)],
            "split": [("train", "train", "val", "test")[i % 4] for i in range(N)],
            "labels": pa.array([np.flatnonzero(row).tolist() for row in truth]),
            "text_key": [f"t{i}" for i in range(N)],
            "image_key": [f"i{i}" for i in range(N)],
        }
    )
    store = EmbeddingStore.create(
        path, table, label_set=LABELS, task="multilabel", source={"spec": "x.csv"}
    )
    data: dict[str, Any] = {
        "image": random.normal(size=(N, WIDTH)),
        "text": random.normal(size=(N, WIDTH)),
        "fused": random.normal(0, 0.3, (N, WIDTH)),
        "fused_tokens": random.normal(size=(N, 3, WIDTH)),
        "fused_mask": np.ones((N, 3), bool),
        "itm": np.where(truth[:, 2:], 0.9, 0.1) + random.normal(0, 0.02, (N, 1)),
    }
    data["fused"][:, :3] += np.where(truth, 1.0, -1.0)
    data["text"][:, :3] += np.where(truth, 1.0, -1.0)
    data = {f.name: data[f.name].astype(f.dtype) for f in FIELDS}
    with store.writer("vlm", FIELDS, {"model": "x"}, {"spec": "hf:vlm"}, 64) as writer:
        for tower in ("image", "text", "fused"):
            for shard in range(writer.num_shards):
                rows = np.arange(*writer.bounds(shard))
                lost = [row for row in (5, 6) if row in rows and tower != "text"]
                good = np.setdiff1d(rows, lost)
                mine = {f.name: data[f.name][good] for f in FIELDS if f.tower == tower}
                writer.commit(shard, tower, good, mine, dict.fromkeys(lost, "no image"))
    with store.writer("minilm", FIELDS[1:2], {"model": "y"}, {"spec": "hf:minilm"}) as writer:
        writer.commit(0, "text", range(N), {"text": data["text"]})
        writer.write_label_text(LABELS[::-1], np.eye(3, WIDTH)[::-1], "about {label}")
    return EmbeddingStore.open(path)


def config(head: str, *features: str, **changes: Any) -> TrainConfig:
    return TrainConfig(head=head, features=features, device="cpu", epochs=40, **changes)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_fused_field_feeds_a_head(store: EmbeddingStore, tmp_path: Path, head: str) -> None:
    report = train(store, tmp_path / "run", config(head, "joint=vlm/fused"))
    assert report.features == {"joint": "vlm/fused"}
    assert report.rows["train"] == N // 2 - 1
    assert report.metrics["test"]["mAP"] > 0.9
    run = Run.load(tmp_path / "run")
    assert run.recipe()[0]["fields"] == ["fused"]
    got = predict(run, store, np.array([4, 5, 6, 7]))
    assert got.ok.tolist() == [True, False, False, True]
    assert got.probabilities[1:3].isnan().all()


def test_the_router_trusts_the_fused_field(store: EmbeddingStore, tmp_path: Path) -> None:
    features = ("vlm/image", "vlm/fused")
    report = train(store, tmp_path / "run", config("router", *features))
    assert report.features == {"image": "vlm/image", "fused": "vlm/fused"}
    assert report.metrics["test"]["mAP"] > 0.9


def test_all_pooled_fields_of_a_fused_backbone(store: EmbeddingStore, tmp_path: Path) -> None:
    report = train(store, tmp_path / "run", config("linear", "vlm"))
    assert list(report.features) == ["image", "text", "fused"]
    assert report.metrics["test"]["mAP"] > 0.9


def test_a_match_score_alone_can_tell(store: EmbeddingStore, tmp_path: Path) -> None:
    report = train(store, tmp_path / "run", config("linear", "vlm/itm", lr=0.1))
    table = report.metrics["test"]["per_label"]
    ap = dict(zip(table["label"], table["ap"], strict=True))
    assert ap["owl"] > 0.95
    assert ap["cat"] < 0.8


def test_zero_shot_on_texts_is_the_cosine_with_the_label_texts(
    store: EmbeddingStore, tmp_path: Path
) -> None:
    plain = config("zero_shot", settings=("head.calibrate=false", "head.scale=10"))
    report = train(store, tmp_path / "run", plain)
    assert report.features == {"text": "minilm/text"}
    rows = store.rows(split="test")
    texts = store["minilm/text"].take(rows).astype(float)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    found = store.label_text("minilm")
    assert found is not None
    names, vectors = found
    cosine = texts @ vectors[[names.index(label) for label in store.label_set]].T
    got = logits(Run.load(tmp_path / "run"), store, rows, device="cpu")
    np.testing.assert_allclose(got.numpy(), 10 * cosine, atol=1e-4)
    assert report.metrics["test"]["mAP"] > report.metrics["test"]["random_mAP"] + 0.2
    card = (tmp_path / "run" / "README.md").read_text()
    assert "`minilm/text`" in card
    assert "cosine of the field with the embedding of the label's text" in card
