"""Training from a store to a run: what comes out, exact resuming, refusals."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from mmc.heads import batches, memory
from mmc.heads.artifact import Run
from mmc.heads.checkpoints import claimed
from mmc.heads.options import TrainConfig
from mmc.heads.predict import logits
from mmc.heads.trainer import train
from mmc.heads.training import default_batch, default_lr
from mmc.store import EmbeddingStore, FieldSpec
from mmc.store.errors import InputError, MmcError

OFTEN = "optim.checkpoint_seconds=0"
HEADS = {
    "linear": (),
    "mlp": ("head.hidden=16", "optim.ema=0.9"),
    "router": ("head.router_hidden=8",),
    "boost": ("head.hidden=16", "head.rounds=2"),
}


class Stopped(Exception):
    """Raised by a test to end a training early."""


def config(head: str = "linear", *settings: str, **changes) -> TrainConfig:
    values = {"epochs": 40, "batch_size": 8, "device": "cpu", **changes}
    return TrainConfig(head=head, settings=(*HEADS.get(head, ()), *settings), **values)


def bits(folder: Path) -> dict[str, torch.Tensor]:
    return Run.load(folder).state


def assert_same_bits(a: Path, b: Path) -> None:
    first, second = bits(a), bits(b)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


# -- what comes out --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["multilabel", "binary", "multiclass"])
@pytest.mark.parametrize("head", ["linear", "mlp", "router"])
def test_a_head_learns_and_says_how_good_it_is(make_store: Callable, tmp_path, task, head):
    store = make_store(task, n=200)
    report = train(store, tmp_path / "run", config(head))
    headline = {"multilabel": "mAP", "binary": "auroc", "multiclass": "macro_f1"}[task]
    assert report.metrics["test"][headline] > 0.9
    assert report.rows == {"train": 100, "val": 50, "test": 47}  # 2 failed, 1 without labels
    run = Run.load(tmp_path / "run")
    assert run.metrics == json.loads(json.dumps(report.metrics))
    assert set(run.features) == {"image", "text"}
    best = max(row[f"val_{headline}"] for row in report.run.history[-40:])
    assert best >= run.metrics["val"][headline] - 1e-6


def test_the_run_gives_the_logits_that_were_validated(make_store: Callable, tmp_path):
    store = make_store(n=200)
    report = train(store, tmp_path / "run", config())
    rows = store.rows(split="val", features=list(report.features.values()), labelled=True)
    run = Run.load(tmp_path / "run")
    from mmc.heads import metrics

    targets = torch.from_numpy(store.labels.multi_hot(rows))
    value = metrics.score(logits(run, store, rows, device="cpu"), targets, "multilabel")
    best = max(row["val_mAP"] for row in report.run.history)
    assert value == pytest.approx(best, abs=1e-6)
    assert value == pytest.approx(report.metrics["val"]["mAP"], abs=1e-9)


def test_the_history_has_a_row_per_validation(make_store: Callable, tmp_path):
    train(make_store(), tmp_path / "run", config("router", epochs=30))
    with (tmp_path / "run" / "history.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["stage"] for row in rows} == {"classifier image", "classifier text", "router"}
    wanted = {"stage", "epoch", "loss", "lr", "val_loss", "val_mAP", "best", "seconds"}
    assert wanted == set(rows[0])
    # 27 rows in batches of 8 are 4 steps, so 13 epochs make a round of 50 steps.
    assert [row["epoch"] for row in rows[:3]] == ["13", "26", "30"]


def test_progress_and_notes_are_told(make_store: Callable, tmp_path):
    seen, lines = [], []
    train(
        make_store(),
        tmp_path / "run",
        config(epochs=13),
        report=lines.append,
        progress=lambda *args: seen.append(args),
    )
    assert seen == [("train", 13, 13)]
    assert any("2 without features" in line and "1 without labels" in line for line in lines)


def test_no_checkpoint_is_left_in_a_finished_run(make_store: Callable, tmp_path):
    train(make_store(), tmp_path / "run", config("linear", OFTEN))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"head.safetensors", "run.json", "history.csv", "README.md"}


def test_training_does_not_touch_the_callers_random_numbers(make_store: Callable, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(make_store(), tmp_path / "run", config("mlp", epochs=2))
    assert torch.equal(torch.rand(3), expected)


def test_early_stopping_keeps_the_best_and_stops(make_store: Callable, tmp_path):
    """Labels of pure noise: validation soon stops improving, and its best parameters are kept."""
    store = make_store(n=120, noise=40.0)
    stopping = config("mlp", "optim.patience=3", epochs=2000, lr=0.02)
    report = train(store, tmp_path / "run", stopping)
    history = report.run.history
    assert len(history) < 100
    values = [row["val_mAP"] for row in history]
    assert max(values[-3:]) <= max(values)
    assert report.metrics["val"]["mAP"] == pytest.approx(max(values), abs=1e-6)


def test_zero_shot_needs_no_training(make_store: Callable, tmp_path):
    """Label texts that point where the label's images lie."""
    store = make_store(n=200)
    with store.writer(
        "clip",
        fields=[FieldSpec(name=t, shape=(8,), dtype="float16", tower=t) for t in ("image", "text")],
        identity={"backbone": "tiny", "weights": "abc"},
        context={},
    ) as writer:
        writer.write_label_text(store.label_set, np.eye(8, dtype=np.float32)[:5], "a {label}")
    store = EmbeddingStore.open(store.path)
    report = train(store, tmp_path / "run", TrainConfig(head="zero_shot", device="cpu"))
    assert report.features == {"image": "clip/image"}
    assert report.epochs == 0
    assert report.run.history == []
    assert report.metrics["test"]["mAP"] > 0.9
    again = logits(Run.load(tmp_path / "run"), store, np.arange(5), device="cpu")
    assert again.std(0).min() > 0


def make_plain_store(
    path: Path, fields: dict[str, np.ndarray], truth: np.ndarray, splits: list[str], ids=None
) -> EmbeddingStore:
    n = len(truth)
    table = pa.table(
        {
            "id": ids or [f"s{i}" for i in range(n)],
            "split": splits,
            "labels": pa.array([np.flatnonzero(t).tolist() for t in truth], pa.list_(pa.int32())),
            "image": ["x"] * n,
            "image_key": [f"k{i}" for i in range(n)],
        }
    )
    names = tuple(f"l{i}" for i in range(truth.shape[1]))
    source = {"spec": "x.csv"}
    store = EmbeddingStore.create(path, table, label_set=names, task="multilabel", source=source)
    for name, values in fields.items():
        alias, field = name.split("/")
        spec = FieldSpec(name=field, shape=values.shape[1:], dtype="float16", tower="image")
        with store.writer(alias, fields=[spec], identity={"a": alias}, context={}) as writer:
            for shard in range(writer.num_shards):
                rows = np.arange(*writer.bounds(shard))
                part = {field: values[rows].astype(np.float16)}
                writer.commit(shard, "image", rows, part, failed={})
    return EmbeddingStore.open(path)


def test_the_router_learns_which_field_to_trust(tmp_path):
    """One of two fields tells the truth, the other lies; a flag says which. Linear cannot."""
    random = np.random.default_rng(0)
    n, labels = 1500, 4
    truth, lie = (random.random((n, labels)) < 0.3 for _ in range(2))
    trusted = random.random(n) < 0.5
    views = [np.where(trusted[:, None] == first, truth, lie) * 2.0 - 1 for first in (True, False)]
    flag = np.where(trusted, 2.0, -2.0)[:, None]
    fields = {
        "a/image": np.hstack([views[0] + random.normal(0, 0.2, (n, labels)), flag]),
        "b/image": np.hstack([views[1] + random.normal(0, 0.2, (n, labels)), flag]),
    }
    splits = ["train"] * 1000 + ["val"] * 250 + ["test"] * 250
    store = make_plain_store(tmp_path / "store", fields, truth, splits)
    linear = train(store, tmp_path / "linear", TrainConfig(head="linear", device="cpu"))
    router = train(
        store, tmp_path / "router", TrainConfig(head="router", device="cpu", lr=0.003, epochs=40)
    )
    assert linear.metrics["test"]["mAP"] < 0.8
    assert router.metrics["test"]["mAP"] > 0.95
    assert set(router.features) == {"a.image", "b.image"}
    head = router.run.build_head()
    batch = {
        r: torch.from_numpy(store[f].take(range(n)).astype(np.float32))
        for r, f in router.features.items()
    }
    weights = head.weights(batch)
    assert weights[trusted, 0].mean() > 0.8
    assert weights[~trusted, 0].mean() < 0.2


@pytest.mark.parametrize("weak", [False, True])
def test_a_field_that_is_better_alone_is_said(tmp_path, weak):
    """Few samples, one field that tells the labels, and one that is noise or tells them too."""
    random = np.random.default_rng(1)
    n, labels = 260, 4
    truth = random.random((n, labels)) < 0.4
    sign = np.where(truth, 1.0, -1.0)
    clear = sign + random.normal(0, 1, (n, labels))
    other = random.normal(0, 1, (n, 300)) if weak else sign + random.normal(0, 1, (n, labels))
    splits = ["train"] * 60 + ["val"] * 200
    fields = {"a/image": clear, "b/image": other}
    store = make_plain_store(tmp_path / "store", fields, truth, splits)
    config = TrainConfig(head="router", device="cpu", epochs=20, settings=("head.normalize=none",))
    said: list[str] = []
    run = train(store, tmp_path / "run", config, report=said.append).run
    told = [line for line in said if "alone is better" in line]
    assert Run.load(tmp_path / "run").training["notes"] == told
    if not weak:
        assert told == []
        return
    alone = max(r["val_mAP"] for r in run.history if r["stage"] == "classifier a.image")
    whole = run.metrics["val"]["mAP"]
    assert f"a/image alone is better on val: mAP {alone:.4f} against {whole:.4f}" in told[0]
    assert "--features a/image" in told[0]


# -- the same again --------------------------------------------------------------------------------


@pytest.mark.parametrize("head", list(HEADS))
def test_the_same_seed_gives_the_same_bits(make_store: Callable, tmp_path, head):
    store = make_store()
    for name in ("a", "b"):
        train(store, tmp_path / name, config(head))
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    train(store, tmp_path / "c", config(head, seed=1))
    first, other = bits(tmp_path / "a"), bits(tmp_path / "c")
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("head", list(HEADS))
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_stopped_anywhere_and_continued_it_ends_in_the_same_bits(
    make_store: Callable, tmp_path, head, precision
):
    store = make_store()
    wanted = config(head, OFTEN, "optim.patience=2", precision=precision)
    undisturbed = train(store, tmp_path / "whole", wanted)
    assert not undisturbed.resumed
    rounds = len(undisturbed.run.history)
    assert rounds >= 3
    for stop in {1, 2, rounds - 1, rounds}:
        calls = []

        def interrupt(*args, calls=calls, stop=stop):
            calls.append(args)
            if len(calls) == stop:
                raise Stopped

        folder = tmp_path / f"stopped{stop}"
        with pytest.raises(Stopped):
            train(store, folder, wanted, progress=interrupt)
        assert not (folder / "run.json").exists()
        report = train(store, folder, wanted)
        assert report.resumed == (stop > 1)  # the first round's checkpoint comes after it is told
        assert_same_bits(tmp_path / "whole", folder)
        for before, after in zip(undisturbed.run.history, report.run.history, strict=True):
            assert before | {"seconds": 0} == after | {"seconds": 0}


def test_continued_with_more_memory_the_rows_keep_their_order(
    make_store: Callable, tmp_path, monkeypatch
):
    """Windows and blocks are those of the beginning, though now all rows would fit."""
    monkeypatch.setattr(batches, "MIN_BLOCK_ROWS", 3)
    store, wanted, plenty = make_store(n=240), config("linear", OFTEN), memory.plan

    def scarce(needs: memory.Needs, budget: int) -> memory.Plan:
        return replace(plenty(needs, budget), window_rows=100, block=3 * needs.stored)

    monkeypatch.setattr(memory, "plan", scarce)
    train(store, tmp_path / "whole", wanted)
    stop_early(store, tmp_path / "stopped", wanted)
    monkeypatch.setattr(memory, "plan", plenty)
    assert train(store, tmp_path / "stopped", wanted).resumed
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped")


CHILD = """
import sys, time
from mmc.heads.options import TrainConfig
from mmc.heads.trainer import train
from mmc.store import EmbeddingStore
config = TrainConfig(
    head="router", epochs=40, batch_size=8, device="cpu", settings=eval(sys.argv[3])
)
slow = lambda *args: time.sleep(0.1)
train(EmbeddingStore.open(sys.argv[1]), sys.argv[2], config, progress=slow)
"""


def test_killed_and_continued_it_ends_in_the_same_bits(make_store: Callable, tmp_path):
    store = make_store()
    wanted = config("router", OFTEN)
    train(store, tmp_path / "whole", wanted)
    folder = tmp_path / "killed"
    args = [sys.executable, "-c", CHILD, store.path, str(folder), repr(wanted.settings)]
    child = subprocess.Popen(args, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    checkpoint = folder / "checkpoints" / "last.safetensors"
    while not checkpoint.exists():
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.15)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (folder / "run.json").exists()
    torch.set_num_threads(1)
    report = train(store, folder, wanted)
    assert report.resumed
    assert_same_bits(tmp_path / "whole", folder)


def stop_early(store: EmbeddingStore, folder: Path, wanted: TrainConfig) -> None:
    """Leave an unfinished training with a checkpoint in ``folder``."""
    count = []

    def interrupt(*args):
        count.append(args)
        if len(count) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        train(store, folder, wanted, progress=interrupt)


def test_other_settings_do_not_continue_an_unfinished_training(make_store: Callable, tmp_path):
    store = make_store()
    stop_early(store, tmp_path / "run", config("linear", OFTEN))
    with pytest.raises(InputError, match=r"config\.seed: 0 -> 1.*--overwrite"):
        train(store, tmp_path / "run", config("linear", OFTEN, seed=1))
    with pytest.raises(InputError, match=r"weight_decay: 1\.0 -> 0\.5"):
        train(store, tmp_path / "run", config("linear", OFTEN, "optim.weight_decay=0.5"))
    report = train(store, tmp_path / "run", config("linear", OFTEN, seed=1, overwrite=True))
    assert not report.resumed


def test_other_labels_do_not_continue_an_unfinished_training(make_store: Callable, tmp_path):
    stop_early(make_store(name="a"), tmp_path / "run", config("linear", OFTEN))
    with pytest.raises(InputError, match="rows and labels"):
        train(make_store(name="b", seed=1), tmp_path / "run", config("linear", OFTEN))


def test_a_damaged_checkpoint_is_said(make_store: Callable, tmp_path):
    store = make_store()
    stop_early(store, tmp_path / "run", config("linear", OFTEN))
    (tmp_path / "run" / "checkpoints" / "last.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="not a checkpoint"):
        train(store, tmp_path / "run", config("linear", OFTEN))


# -- refusals --------------------------------------------------------------------------------------


def test_a_finished_run_is_not_overwritten_unasked(make_store: Callable, tmp_path):
    store = make_store()
    train(store, tmp_path / "run", config(epochs=1))
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(InputError, match=r"finished run.*--overwrite"):
        train(store, tmp_path / "run", config(epochs=1))
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    train(store, tmp_path / "run", config("mlp", epochs=1, overwrite=True))
    assert Run.load(tmp_path / "run").head == "mlp"


def test_a_folder_with_other_content_is_left_alone(make_store: Callable, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"thesis\.tex"):
            train(make_store(name=f"s{overwrite}"), tmp_path / "run", config(overwrite=overwrite))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"head": "ruoter"}, "did you mean router"),
        ({"loss": "bcee"}, "did you mean bce"),
        ({"loss": "ce"}, "loss ce is for binary and multiclass tasks"),
        ({"settings": ("head.hiden=3",)}, "no setting 'hiden'"),
        ({"settings": ("loss.pos_wait=auto",)}, "did you mean pos_weight"),
        ({"settings": ("optim.decay=1",)}, "weight_decay"),
        ({"settings": ("optim.metric=auroc",)}, "not one of a multilabel task: mAP"),
        ({"settings": ("optim.weight_decay=much",)}, "weight_decay='much'"),
        ({"device": "tpu"}, "--device tpu"),
        ({"features": ("clip/imago",)}, "clip/image, clip/text"),
        ({"features": ("dino",)}, "it has: clip"),
        ({"head": "router", "features": ("clip/image",)}, "2 or more fields, got 1"),
        ({"head": "zero_shot"}, "label texts"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_made(
    make_store: Callable, tmp_path, changes, says
):
    with pytest.raises(InputError, match=says):
        train(make_store(), tmp_path / "run", TrainConfig(**changes))
    assert not (tmp_path / "run").exists()


def test_training_that_diverges_is_said(make_store: Callable, tmp_path):
    wild = config("mlp", "optim.clip_norm=0", lr=1e30)
    with pytest.raises(MmcError, match="diverged"):
        train(make_store(), tmp_path / "run", wild)
    assert not (tmp_path / "run" / "run.json").exists()


def test_defaults_follow_the_size_of_the_set():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [default_batch(n, cpu) for n in (48, 3_621, 200_000, 10**7)] == [32, 36, 2000, 4096]
    assert default_batch(10**8, cuda) == 65_536
    assert default_lr(1e-3, 256, 10**6) == pytest.approx(1e-3)
    assert default_lr(1e-3, 4096, 10**6) == pytest.approx(2e-3)
    assert default_lr(1e-3, 32, 16) == pytest.approx(5e-4)


def test_one_training_at_a_time_in_a_folder(make_store: Callable, tmp_path):
    store = make_store()
    with (
        claimed(tmp_path / "run"),
        pytest.raises(MmcError, match="being trained by another process"),
    ):
        train(store, tmp_path / "run", TrainConfig(epochs=1))
    assert not (tmp_path / "run").exists(), "a claim leaves no trace"
    train(store, tmp_path / "run", TrainConfig(epochs=1))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_is_not_put_into_a_store(make_store: Callable, tmp_path):
    store = make_store()
    with pytest.raises(InputError, match="inside the store"):
        train(store, Path(store.path) / "run", TrainConfig(epochs=1))


def test_an_interrupted_training_says_what_is_kept(make_store: Callable, tmp_path):
    store, said = make_store(), []
    every = TrainConfig(epochs=300, settings=("optim.checkpoint_seconds=0",))
    for config, says in ((TrainConfig(epochs=300), "nothing is kept"), (every, "goes on from")):
        rounds = iter((False, True))

        def second(stage: str, done: int, total: int, rounds=rounds) -> None:
            if next(rounds):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(store, tmp_path / "run", config, report=said.append, progress=second)
        assert says in said[-1]
