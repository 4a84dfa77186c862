"""Heads of tokens from a store to predictions, and runs that score labels they never saw."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmc.heads.artifact import Run
from mmc.heads.models.vilbert_trunk import Sizes
from mmc.heads.newlabels import templates, text_recipe
from mmc.heads.options import TrainConfig
from mmc.heads.predict import logits, predict
from mmc.heads.trainer import train
from mmc.heads.training import default_batch
from mmc.store import EmbeddingStore, FieldSpec
from mmc.store.errors import InputError

WIDTH, TOKENS = 8, 4
NAMES = ("bus", 'a "quoted" label', "sea, sky", "zug", "never seen")
TEXTS = np.linalg.qr(np.random.default_rng(5).normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)
"""The text of label c is row c; rows after the labels' are for new ones."""


@pytest.fixture
def dual(make_store):
    """A store with alias ``dual``: one token of each picture is the sum of its labels' texts."""
    store: EmbeddingStore = make_store(n=240, failed=(), unlabelled=())
    truth = store.labels.multi_hot().astype(np.float32)
    random = np.random.default_rng(0)
    n = len(store)
    tokens = random.normal(0, 0.1, (n, TOKENS, WIDTH))
    tokens[np.arange(n), random.integers(0, TOKENS, n)] += truth @ TEXTS[:5]
    arrays = {
        "image": {"image_tokens": tokens, "image": tokens.sum(1)},
        "text": {"text_tokens": tokens, "text_mask": np.ones((n, TOKENS), bool)},
    }
    fields = [
        FieldSpec(name="image", shape=(WIDTH,), dtype="float16", tower="image"),
        FieldSpec(name="image_tokens", shape=(TOKENS, WIDTH), dtype="float16", tower="image"),
        FieldSpec(name="text_tokens", shape=(TOKENS, WIDTH), dtype="float16", tower="text"),
        FieldSpec(name="text_mask", shape=(TOKENS,), dtype="bool", tower="text"),
    ]
    kinds = {field.name: field.dtype for field in fields}
    with store.writer(
        "dual", fields=fields, identity={"weights": "d"}, context={"spec": "hf:dual"}
    ) as writer:
        for tower, values in arrays.items():
            for shard in range(writer.num_shards):
                rows = np.arange(*writer.bounds(shard))
                part = {name: array[rows].astype(kinds[name]) for name, array in values.items()}
                writer.commit(shard, tower, rows, part)
        writer.write_label_text(store.label_set, TEXTS[:5], "a photo of a {label}")
    return EmbeddingStore.open(store.path)


SETTINGS = {
    "ml_decoder": ("head.width=16", "head.feedforward=16", "head.input_dropout=0"),
    "fusion": ("head.width=16", "head.feedforward=16", "head.layers=1", "head.input_dropout=0"),
    "dm_decoder": ("head.layers=1", "head.label_budget=3"),
}


def trained(store: EmbeddingStore, folder, head: str, *settings: str, epochs: int = 20) -> Run:
    config = TrainConfig(
        head=head,
        features=("dual",),
        settings=(*SETTINGS.get(head, ()), *settings),
        epochs=epochs,
        lr=5e-3 if head != "zero_shot" else None,
    )
    train(store, folder, config)
    return Run.load(folder)


@pytest.mark.parametrize("head", ["ml_decoder", "fusion", "dm_decoder"])
def test_from_a_store_to_predictions(dual, tmp_path, head):
    run = trained(dual, tmp_path / "run", head, epochs=60)
    assert run.metrics["test"]["mAP"] > 0.8
    assert all(ref.alias == "dual" for ref in run.features.values())
    if head != "dm_decoder":
        assert set(run.features) == {"image_tokens", "text_tokens", "text_mask"}
    rows = dual.rows(split="test")
    found = predict(run, dual, rows)
    assert found.ok.all()
    torch.testing.assert_close(found.logits, logits(run, dual, rows).cpu())


@pytest.fixture
def read_and_seen(make_store):
    """Regions of a detector and token ids; only both together tell the class."""
    store: EmbeddingStore = make_store("binary", n=480, failed=(), unlabelled=())
    n, random = len(store), np.random.default_rng(0)
    truth = store.labels.multi_hot()[:, 1] > 0
    sign = random.integers(0, 2, n) * 2 - 1
    regions = random.normal(0, 0.2, (n, 3, 6))
    regions[np.arange(n), random.integers(0, 3, n), 0] += 2 * sign
    ids = random.integers(20, 30, (n, 5))
    ids[:, 0] = 2
    ids[np.arange(n), random.integers(1, 4, n)] = np.where(truth == (sign > 0), 7, 8)
    real = np.ones((n, 5), bool)
    real[:, 4] = False
    aliases = {
        "detector": {
            "regions": (regions, "float16"),
            "boxes": (np.full((n, 3, 5), 0.5), "float32"),
            "region_mask": (np.ones((n, 3)), "bool"),
        },
        "words": {"text_ids": (ids, "int32"), "text_mask": (real, "bool")},
    }
    for alias, arrays in aliases.items():
        tower = "text" if alias == "words" else "image"
        fields = [
            FieldSpec(name=name, shape=array.shape[1:], dtype=kind, tower=tower)
            for name, (array, kind) in arrays.items()
        ]
        with store.writer(
            alias, fields=fields, identity={"a": alias}, context={"spec": alias}
        ) as writer:
            for shard in range(writer.num_shards):
                rows = np.arange(*writer.bounds(shard))
                part = {name: array[rows].astype(kind) for name, (array, kind) in arrays.items()}
                writer.commit(shard, tower, rows, part)
    return EmbeddingStore.open(store.path)


def test_vilbert_reads_token_ids_from_a_store(read_and_seen, tmp_path, monkeypatch):
    sizes = Sizes(
        vocabulary=30,
        positions=8,
        text_layers=2,
        text_width=32,
        text_heads=2,
        text_feedforward=64,
        region_layers=1,
        region_width=32,
        region_heads=2,
        region_feedforward=64,
        joint=32,
        joint_heads=2,
    )
    monkeypatch.setattr("mmc.heads.models.vilbert.SMALL", sizes)
    config = TrainConfig(
        head="vilbert",
        features=("detector", "words"),
        settings=("head.dropout=0",),
        epochs=15,
        lr=3e-3,
    )
    train(read_and_seen, tmp_path / "run", config)
    run = Run.load(tmp_path / "run")
    assert run.features["text_ids"].feature == "words/text_ids"
    assert "text_mask" in run.features
    assert run.metrics["test"]["auroc"] > 0.9
    rows = read_and_seen.rows(split="test")
    found = logits(run, read_and_seen, rows)
    assert torch.equal(logits(Run.load(tmp_path / "run"), read_and_seen, rows), found)
    with pytest.raises(InputError, match="holds 5 of int32 per sample"):
        train(
            read_and_seen,
            tmp_path / "no",
            replace(config, head="linear", settings=(), features=("words/text_ids",)),
        )


def test_training_is_the_same_again_with_labels_left_out(dual, tmp_path):
    first, second = (trained(dual, tmp_path / n, "dm_decoder", epochs=3) for n in ("a", "b"))
    assert all(torch.equal(first.state[key], second.state[key]) for key in first.state)


OPEN = [
    ("zero_shot", ()),
    ("dm_decoder", ()),
    ("ml_decoder", ("head.queries=label_text",)),
]


@pytest.mark.parametrize(("head", "settings"), OPEN)
def test_a_run_scores_other_labels(dual, tmp_path, head, settings):
    run = trained(dual, tmp_path / "run", head, *settings, epochs=4)
    labels = ("zug", "brand new", "bus")
    other = run.with_labels(labels, TEXTS[[3, 6, 0]])
    assert other.label_set == labels
    assert other.metrics == {}
    old, cuts = run.thresholds.values, other.thresholds.values
    assert (cuts[0], cuts[2]) == (old[3], old[0])
    assert cuts[1] == np.median(old)
    rows = dual.rows(split="test")
    scores = logits(other, dual, rows)
    assert scores.shape == (len(rows), 3)
    assert scores.isfinite().all()
    assert scores[:, 1].std() > 0
    before = logits(run, dual, rows)
    if head == "dm_decoder":  # labels see each other
        assert np.corrcoef(scores[:, 0], before[:, 3])[0, 1] > 0.9
    else:
        torch.testing.assert_close(scores[:, [0, 2]], before[:, [3, 0]])
    again = Run.load(other.save(tmp_path / "other").path)
    torch.testing.assert_close(logits(again, dual, rows), scores)


@pytest.mark.parametrize(("head", "settings"), OPEN)
def test_a_run_knows_what_made_its_label_texts(dual, tmp_path, head, settings):
    run = trained(dual, tmp_path / "run", head, *settings, epochs=1)
    recipe = text_recipe(run)
    assert recipe.templates == ("a photo of a {label}",)
    assert recipe.backbone["alias"] == "dual"
    assert recipe.backbone["context"]["spec"] == "hf:dual"
    assert recipe.backbone["identity"] == {"weights": "d"}


def test_other_runs_say_that_they_cannot(dual, tmp_path):
    run = trained(dual, tmp_path / "run", "fusion", epochs=1)
    with pytest.raises(InputError, match=r"fusion was trained without label texts"):
        text_recipe(run)
    with pytest.raises(InputError, match=r"no others; train zero_shot, dm_decoder"):
        run.with_labels(("a",), TEXTS[:1])


def test_bad_new_labels_are_refused(dual, tmp_path):
    run = trained(dual, tmp_path / "run", "zero_shot")
    with pytest.raises(InputError, match="'a' is there twice"):
        run.with_labels(("a", "b", "a"), TEXTS[:3])
    with pytest.raises(InputError, match="there are none"):
        run.with_labels((), TEXTS[:0])
    with pytest.raises(InputError, match=r"2 labels need texts \(2, 8\), got \(2, 5\)"):
        run.with_labels(("a", "b"), TEXTS[:2, :5])
    run.task = "binary"
    with pytest.raises(InputError, match="two classes"):
        run.with_labels(("a", "b"), TEXTS[:2])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a {label}", ("a {label}",)),
        ('["a {label}", "the {label}"]', ("a {label}", "the {label}")),
        ("a {label} (label names 0123456789ab)", ("a {label}",)),
    ],
)
def test_recorded_prompts_are_read(prompt, expected):
    assert templates(prompt) == expected


def test_the_default_batch_is_what_the_head_allows():
    cpu, gpu = torch.device("cpu"), torch.device("meta")
    assert default_batch(100_000, cpu) == 1000
    assert default_batch(100_000, cpu, 128) == 128
    assert default_batch(10_000_000, gpu, None) == 65_536
    assert default_batch(500, cpu, 16) == 16
