"""Boost: what a stage adds, when it is dropped, and that the run needs its base no more."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from mmc.heads.artifact import Run
from mmc.heads.models.boost import Boost, BoostConfig
from mmc.heads.options import TrainConfig
from mmc.heads.predict import logits
from mmc.heads.trainer import train
from mmc.store import EmbeddingStore, FieldSpec
from mmc.store.errors import InputError


def make_store(path: Path, fields, truth, *, labels=None, task="multilabel", weights="x"):
    """Rows go train, train, val, test; ``fields`` is "alias/field" -> values (n, D)."""
    n, c = truth.shape
    table = pa.table(
        {
            "id": [f"s{i}" for i in range(n)],
            "split": [("train", "train", "val", "test")[i % 4] for i in range(n)],
            "labels": pa.array([np.flatnonzero(r).tolist() for r in truth], pa.list_(pa.int32())),
            "text": [f"t{i}" for i in range(n)],
            "text_key": [f"t{i}" for i in range(n)],
            "image": [f"{i}.png" for i in range(n)],
            "image_key": [f"k{i}" for i in range(n)],
        }
    )
    names = labels or tuple(f"l{i}" for i in range(c))
    store = EmbeddingStore.create(path, table, label_set=names, task=task, source={"spec": "x"})
    for name, values in fields.items():
        alias, field = name.split("/")
        spec = FieldSpec(name=field, shape=values.shape[1:], dtype="float16", tower="image")
        with store.writer(
            alias,
            fields=[spec],
            identity={"weights": weights, "name": alias},
            context={"spec": "tiny"},
        ) as writer:
            for shard in range(writer.num_shards):
                rows = np.arange(*writer.bounds(shard))
                writer.commit(shard, "image", rows, {field: values[rows].astype(np.float16)})
    return EmbeddingStore.open(path)


def signs(n: int = 1200, seed: int = 0, task: str = "multilabel"):
    """Labels that are products of two signs, which no linear function of the values tells."""
    random = np.random.default_rng(seed)
    bits = random.random((n, 4)) < 0.5
    first, second = bits[:, 0] ^ bits[:, 1], bits[:, 2] ^ bits[:, 3]
    values = 2.0 * bits - 1 + random.normal(0, 0.2, (n, 4))
    if task == "multilabel":
        return values, np.stack([first, second, bits[:, 0]], 1)
    if task == "binary":
        return values, np.stack([~first, first], 1)
    return values, np.eye(3, dtype=bool)[np.where(first, 0, np.where(second, 1, 2))]


def config(head: str = "boost", *settings: str, **changes) -> TrainConfig:
    values = {"device": "cpu", "epochs": 20, "batch_size": 32, "lr": 0.01, **changes}
    return TrainConfig(head=head, settings=settings, **values)


@pytest.fixture
def crossed(tmp_path) -> EmbeddingStore:
    values, truth = signs()
    return make_store(tmp_path / "store", {"c/image": values}, truth)


@pytest.mark.parametrize("task", ["multilabel", "binary", "multiclass"])
def test_it_learns_what_its_linear_base_cannot(tmp_path, task):
    values, truth = signs(task=task)
    store = make_store(tmp_path / "store", {"c/image": values}, truth, task=task)
    name = {"multilabel": "mAP", "binary": "auroc", "multiclass": "macro_f1"}[task]
    base = train(store, tmp_path / "base", config("linear"))
    lines: list[str] = []
    report = train(
        store,
        tmp_path / "run",
        config("boost", f"head.base={tmp_path / 'base'}", "head.shrinkage=1", "head.hidden=32"),
        report=lines.append,
    )
    assert base.metrics["test"][name] < 0.85
    assert report.metrics["test"][name] > base.metrics["test"][name] + 0.1
    assert report.metrics["test"][name] > 0.9
    assert report.metrics["val"][name] >= base.metrics["val"][name]
    said = [line for line in lines if line.startswith("stage 1: kept, shrunk by 1: ")]
    assert said
    assert said[0] in report.notes


def test_a_stage_that_does_not_help_is_dropped_and_nothing_changes(tmp_path):
    values, truth = signs()
    truth = values[:, :2] > 0  # which the base knows
    store = make_store(tmp_path / "store", {"c/image": values}, truth)
    base = train(store, tmp_path / "base", config("linear"))
    report = train(store, tmp_path / "run", config("boost", f"head.base={tmp_path / 'base'}"))
    assert report.notes[-1].startswith("stage 1: dropped, shrunk by 0.5: ")
    assert {row["stage"] for row in report.run.history} == {"stage 1"}  # and none is tried again
    rows = store.rows(split="test")
    assert torch.equal(logits(report.run, store, rows), logits(base.run, store, rows))
    assert report.metrics["val"]["mAP"] == base.metrics["val"]["mAP"]


def test_stages_stop_at_the_first_that_does_not_help(crossed, tmp_path):
    report = train(crossed, tmp_path / "run", config("boost", "head.kind=linear", "head.rounds=6"))
    notes = [note for note in report.notes if note.startswith("stage ")]
    assert "kept" in notes[0]
    assert "dropped" in notes[-1]
    assert len(notes) < 6
    assert len({row["stage"] for row in report.run.history}) == len(notes)


def test_a_kept_stage_is_shrunk_and_a_dropped_one_adds_exactly_nothing():
    torch.manual_seed(0)
    head = Boost({"image": (4,)}, 2, BoostConfig(rounds=2, shrinkage=0.25, hidden=3)).eval()
    for step in head.steps:
        torch.nn.init.normal_(step[-1].weight)
    batch = {"image": torch.randn(5, 4)}
    with torch.no_grad():
        prepared = head.prepare(batch)
        first = head.stages()[0].score(prepared) - head.prior
        both = head(batch)
        assert (both - head.prior - first).abs().max() > 0.1
        values = iter([0.4, 0.5])
        said = head.stages()[0].finish(lambda: next(values))
        assert said == "kept, shrunk by 0.25: 0.5000 on val (0.4000 without it)"
        torch.testing.assert_close(head.stages()[0].score(prepared) - head.prior, first / 4)
        assert head.stages()[1].needed()
        kept = head.stages()[0].score(prepared)
        values = iter([0.5, 0.5])
        said = head.stages()[1].finish(lambda: next(values))
        assert said == "dropped, shrunk by 0.25: 0.5000 on val (0.5000 without it)"
        assert torch.equal(head(batch), kept)
    assert not head.stages()[1].needed()


def test_the_run_needs_the_folder_of_its_base_no_more(crossed, tmp_path):
    train(crossed, tmp_path / "base", config("mlp", "head.hidden=8"))
    one = train(crossed, tmp_path / "one", config("boost", f"head.base={tmp_path / 'base'}"))
    two = train(crossed, tmp_path / "two", config("boost", f"head.base={tmp_path / 'one'}"))
    rows = crossed.rows()
    expected = [logits(report.run, crossed, rows) for report in (one, two)]
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(tmp_path / "one" / "checkpoints", ignore_errors=True)
    assert torch.equal(logits(Run.load(tmp_path / "one"), crossed, rows), expected[0])
    shutil.rmtree(tmp_path / "one")
    assert torch.equal(logits(Run.load(tmp_path / "two"), crossed, rows), expected[1])


def test_the_base_is_frozen(crossed, tmp_path):
    base = train(crossed, tmp_path / "base", config("linear"))
    report = train(crossed, tmp_path / "run", config("boost", f"head.base={tmp_path / 'base'}"))
    for key, value in base.run.state.items():
        assert torch.equal(report.run.state[f"base.{key}"], value)


def test_stages_may_read_more_than_the_base(tmp_path):
    values, truth = signs()
    fields = {"c/image": values[:, :2], "d/image": values[:, 2:]}
    store = make_store(tmp_path / "store", fields, truth)
    base = train(store, tmp_path / "base", config("linear", features=("c/image",)))
    report = train(store, tmp_path / "run", config("boost", f"head.base={tmp_path / 'base'}"))
    assert set(report.features.values()) == {"c/image", "d/image"}
    assert report.metrics["test"]["mAP"] > base.metrics["test"]["mAP"] + 0.1


def refused(store, folder: Path, base: Path, **changes) -> str:
    with pytest.raises(InputError) as caught:
        train(store, folder, config("boost", f"head.base={base}", **changes))
    assert "\n" not in str(caught.value)
    assert not folder.exists()
    return str(caught.value)


def test_a_base_that_does_not_fit_is_refused_in_one_line(crossed, tmp_path):
    values, truth = signs()
    fields = {"c/image": values, "d/image": values[:, :2]}
    both = make_store(tmp_path / "both", fields, truth)
    train(both, tmp_path / "base", config("linear", features=("d/image",), epochs=1))
    said = refused(both, tmp_path / "run", tmp_path / "base", features=("c/image",))
    assert "reads d/image, which is not among the features given (c/image)" in said

    other = make_store(tmp_path / "other", fields, truth, weights="y")
    assert "another d/image" in refused(other, tmp_path / "run", tmp_path / "base")

    names = ("l0", "l1", "new")
    renamed = make_store(tmp_path / "renamed", fields, truth, labels=names)
    said = refused(renamed, tmp_path / "run", tmp_path / "base")
    assert "another label set (3 labels and 3 here, differing in 'new', 'l2')" in said
    turned = make_store(tmp_path / "turned", fields, truth, labels=("l1", "l0", "l2"))
    assert "in another order" in refused(turned, tmp_path / "run", tmp_path / "base")

    values, truth = signs(task="multiclass")
    classes = make_store(tmp_path / "classes", fields, truth, task="multiclass")
    assert "a run for a multilabel task" in refused(classes, tmp_path / "run", tmp_path / "base")
    assert "is not a run" in refused(both, tmp_path / "run", tmp_path / "both")


def test_what_is_recorded_of_the_base_cannot_be_set(crossed, tmp_path):
    with pytest.raises(InputError, match="base_run"):
        train(crossed, tmp_path / "run", config("boost", "head.base_run={}"))


@pytest.mark.parametrize(
    "settings",
    [{"rounds": 0}, {"hidden": 0}, {"input_dropout": 1.0}, {"shrinkage": 0.0}, {"shrinkage": 1.5}],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(InputError, match=f"head.{next(iter(settings))}"):
        BoostConfig(**settings)


def test_it_needs_a_pooled_field():
    with pytest.raises(InputError, match="needs a pooled field"):
        Boost({"text_tokens": (7, 4), "text_mask": (7,)}, 2, BoostConfig())
    head = Boost({"text_tokens": (7, 4), "text_mask": (7,), "text": (4,)}, 2, BoostConfig())
    assert head.roles == ("text",)
