"""Contents that are in train and in what a head is measured on."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmc.heads import splits
from mmc.heads.artifact import Run
from mmc.heads.leakage import described, near_in_train
from mmc.heads.options import TrainConfig
from mmc.heads.trainer import train
from mmc.store import EmbeddingStore, FieldSpec

N = 80


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    """Rows 0-59 train, 60-69 val, 70-79 test. Of the test rows two have a training image, three a
    training text, of which one has both of one training row and one has them of two."""
    images: list[str | None] = [f"i{row}" for row in range(N)]
    texts: list[str | None] = [f"t{row}" for row in range(N)]
    images[70], texts[70] = "i1", "t1"
    images[71], texts[71] = "i2", "t3"
    texts[72] = "t4"
    images[73], texts[73] = None, None
    images[5], texts[5] = None, None
    texts[60] = "t9"
    images[74] = images[75]
    store = EmbeddingStore.create(
        tmp_path_factory.mktemp("leaks") / "s",
        pa.table(
            {
                "id": [f"s{row}" for row in range(N)],
                "split": ["train"] * 60 + ["val"] * 10 + ["test"] * 10,
                "labels": [[row % 2] for row in range(N)],
                "image_key": images,
                "text_key": texts,
            }
        ),
        label_set=("a", "b"),
        task="multilabel",
        source={"spec": "x"},
    )
    towers = ("image", "text", "fused")
    fields = [FieldSpec(name=t, shape=(4,), dtype="float16", tower=t) for t in towers]
    data = np.random.default_rng(0).standard_normal((N, 4)).astype("float16")
    with store.writer("x", fields, {}, {}) as writer:
        for tower in towers:
            writer.commit(0, tower, range(N), {tower: data})
    return store


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        (["image"], {"image": 2}),
        (["text"], {"text": 3}),
        (["image", "text"], {"image": 2, "text": 3, "image and text": 1}),
        (["fused"], {"image": 2, "text": 3, "image and text": 1}),
    ],
)
def test_contents_that_the_head_reads_are_compared(
    store: EmbeddingStore, fields: list[str], found: dict[str, int]
) -> None:
    chosen = splits.choose(store, [f"x/{field}" for field in fields], trains=True)
    assert chosen.seen["test"] == found
    assert sum(note.startswith("warning: of 10 test samples") for note in chosen.notes) == 1


def test_what_is_said(store: EmbeddingStore, tmp_path: Path) -> None:
    lines: list[str] = []
    config = TrainConfig(features=("x/fused",), epochs=1, device="cpu")
    train(store, tmp_path / "run", config, report=lines.append)
    (warning,) = [line for line in lines if line.startswith("warning")]
    assert warning.startswith(
        "warning: of 10 test samples 2 have the image, 3 the text and 1 both of a training sample:"
    )
    run = Run.load(tmp_path / "run")
    assert run.metrics["val"]["also_in_train"] == {"image": 0, "text": 1, "image and text": 0}
    assert "Of the 10 samples 2 have the image" in (tmp_path / "run" / "README.md").read_text()


def test_a_head_that_trains_nothing_has_seen_nothing(store: EmbeddingStore) -> None:
    chosen = splits.choose(store, ["x/image"], trains=False)
    assert chosen.seen == {}
    assert chosen.notes == []


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ({}, ""),
        ({"image": 0, "text": 0}, ""),
        ({"image": 1200}, "1,200 have the image of a training sample"),
        (
            {"image": 1, "text": 2, "image and text": 0},
            "1 has the image and 2 the text of a training sample",
        ),
    ],
)
def test_in_words(found: dict[str, int], text: str) -> None:
    assert described(found) == text


def test_near_identical_training_samples_are_told(tmp_path: Path) -> None:
    """Row 50 is row 3 but for noise, row 51 is row 4 by one of two features only, and row 52 has
    the very content of row 5."""
    random = np.random.default_rng(0)
    first, second = random.normal(size=(2, 60, 48))
    first[50] = first[3] + 0.01 * random.normal(size=48)
    second[50] = 2 * second[3]
    first[51] = first[4]
    first[52], second[52] = first[5], second[5]
    keys = [f"k{row}" for row in range(60)]
    keys[52] = "k5"
    table = pa.table(
        {
            "id": [f"s{row}" for row in range(60)],
            "split": ["train"] * 40 + ["val"] * 10 + ["test"] * 10,
            "labels": [[row % 2] for row in range(60)],
            "image_key": keys,
        }
    )
    store = EmbeddingStore.create(
        tmp_path / "s", table, label_set=("a", "b"), task="multilabel", source={"spec": "x"}
    )
    fields = [FieldSpec(name=n, shape=(48,), dtype="float32", tower="image") for n in "ab"]
    with store.writer("x", fields, {}, {}) as writer:
        writer.commit(0, "image", range(60), {"a": first.astype("f4"), "b": second.astype("f4")})
    train, test = np.arange(40), np.arange(50, 60)
    assert near_in_train(store, ["x/a", "x/b"], train, test) == 1
    assert near_in_train(store, ["x/a"], train, test) == 2
    assert near_in_train(store, ["x/a"], train[:0], test) is None
    notes = splits.choose(store, ["x/a", "x/b"], trains=True).notes
    assert any(note.startswith("warning: 1 of 10 test samples are near-iden") for note in notes)
