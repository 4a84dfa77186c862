"""--sweep, --seeds and --folds: what is trained, what is kept, what is said, and going on."""

import csv
import json
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmc.heads import metrics, splits
from mmc.heads.artifact import Run
from mmc.heads.batches import Reader
from mmc.heads.options import TrainConfig, as_options, parse_sweep
from mmc.heads.predict import logits
from mmc.heads.search import running
from mmc.heads.search.grid import settings
from mmc.heads.trainer import train
from mmc.store.errors import InputError, MmcError

FILES = {"head.safetensors", "run.json", "history.csv", "README.md", "histories.csv"}
RATES = "lr=0.001,0.003,0.01"


def config(**changes) -> TrainConfig:
    values = {"epochs": 26, "batch_size": 8, "device": "cpu", "precision": "float32"}
    return TrainConfig(**{**values, **changes})


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def states_agree(a: Run, b: Run, tolerance: float = 1e-5) -> bool:
    return a.state.keys() == b.state.keys() and all(
        torch.allclose(a.state[key], b.state[key], atol=tolerance, rtol=tolerance)
        for key in a.state
    )


def from_options(options: list[str]) -> TrainConfig:
    """What ``mmc train-head`` makes of them."""
    given: dict = {}
    for name, value in zip(options[::2], options[1::2], strict=True):
        if name == "--set":
            given["settings"] = (*given.get("settings", ()), value)
        else:
            key = name.removeprefix("--").replace("-", "_")
            given[key] = tuple(value.split(",")) if key == "features" else value
    from mmc.store.config import build

    return build(TrainConfig, given, where="test")


# -- the grid --------------------------------------------------------------------------------------


def test_the_grid_is_every_combination():
    found = settings(config(sweep=("lr=1e-3,1e-2", "head.hidden=8,16", "head=mlp")))
    assert [s.number for s in found] == [1, 2, 3, 4]
    assert [s.values["lr"] for s in found] == ["1e-3", "1e-3", "1e-2", "1e-2"]
    assert found[1].config == config(head="mlp", lr=1e-3, settings=("head.hidden=16",))
    assert settings(config()) == [replace(settings(config())[0], values={}, config=config())]


@pytest.mark.parametrize(
    ("sweep", "says"),
    [
        (("lr",), "write key=value,value"),
        (("lr=",), "write key=value,value"),
        (("lr=1,,2",), "write key=value,value"),
        (("rate=1,2",), "no key 'rate'; choose from head, loss, lr"),
        (("data.x=1,2",), "no key 'data.x'"),
        (("lr=1e-3,0.001",), "0.001 is there twice"),
        (("lr=1,2", "lr=3"), "lr is given twice"),
        (("seed=1,2",), "--seeds N"),
        (("optim.metric=mAP,micro_f1",), "compared by it"),
    ],
)
def test_a_sweep_that_says_nothing_is_refused(sweep, says):
    with pytest.raises(InputError, match=says):
        config(sweep=sweep)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": 0.1, "sweep": ("lr=1,2",)}, "lr is given and swept"),
        ({"head": "mlp", "sweep": ("head=mlp,linear",)}, "head is given and swept"),
        ({"settings": ("head.hidden=3",), "sweep": ("head.hidden=4,5",)}, "given and swept"),
        ({"seeds": 1}, "--seeds must be 2 or more"),
        ({"folds": 1}, "--folds must be 2 or more"),
        ({"folds": 2, "seeds": 2}, "give one of them"),
    ],
)
def test_options_that_do_not_go_together(changes, says):
    with pytest.raises(InputError, match=says):
        TrainConfig(**changes)


def test_dashes_are_as_good():
    assert parse_sweep(["batch-size=8, 16"]) == {"batch_size": ["8", "16"]}


@pytest.mark.parametrize(
    ("sweep", "says"),
    [
        (("lr=0.1,abc",), "lr='abc' is not"),
        (("head.hiden=1,2",), "setting head.hiden=1: head linear has no setting 'hiden'"),
        (("head=linear,mpl",), "setting head=mpl: unknown head 'mpl'"),
        (("loss=bce,ce",), "setting loss=ce: loss ce is for"),
        (("epochs=0,1",), "--epochs must be 1 or more"),
    ],
)
def test_settings_are_checked_before_any_work(make_store: Callable, tmp_path, sweep, says):
    with pytest.raises(InputError, match=says):
        train(make_store(), tmp_path / "run", TrainConfig(sweep=sweep))
    assert not (tmp_path / "run").exists()


def test_options_give_the_config_again():
    for wanted in (
        TrainConfig(),
        config(head="mlp", settings=("head.hidden=4", "loss.pos_weight=auto"), lr=1e-4, seed=3),
        config(features=("a/image", "text=b/text"), loss="asl", max_memory="1G"),
    ):
        assert from_options(as_options(wanted)) == wanted
    assert as_options(config(sweep=("lr=1,2",), folds=3))[-4:] == [
        "--sweep",
        "lr=1,2",
        "--folds",
        "3",
    ]


# -- sweep -----------------------------------------------------------------------------------------


def test_a_sweep_keeps_the_best_and_it_can_be_trained_alone(make_store: Callable, tmp_path):
    store, said = make_store(n=200), []
    wanted = config(sweep=("lr=0.003,0.01", "loss=bce,asl", "epochs=7,13"), epochs=None)
    report = train(store, tmp_path / "run", wanted, report=said.append)
    rows = table(tmp_path / "run" / "sweep.csv")
    assert len(rows) == 8
    assert {row["epochs"] for row in rows} == {"7", "13"}
    assert [row["lr"] for row in rows] == sorted(row["lr"] for row in rows)
    (best,) = [row for row in rows if row["best"] == "True"]
    assert float(best["val_mAP"]) == max(float(row["val_mAP"]) for row in rows)
    run = Run.load(tmp_path / "run")
    assert float(best["val_mAP"]) == pytest.approx(run.metrics["val"]["mAP"], abs=1e-6)
    assert run.search == json.loads(json.dumps(report.search))
    assert {p.name for p in (tmp_path / "run").iterdir()} == FILES | {"sweep.csv"}
    again = train(store, tmp_path / "alone", from_options(run.search["options"]))
    assert states_agree(run, again.run)
    assert run.train_config == Run.load(tmp_path / "alone").train_config
    histories = table(tmp_path / "run" / "histories.csv")
    assert {row["setting"] for row in histories} == {row["setting"] for row in rows}
    mine = [float(row["val_mAP"]) for row in histories if row["setting"] == best["setting"]]
    assert mine == [row["val_mAP"] for row in run.history]
    assert sum("val mAP" in line for line in said) == 8
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert f"mmc train-head my.store another.run {shlex.join(run.search['options'])}" in card
    assert "the setting of the sweep were chosen on `val`" in card


def test_data_is_read_once_for_all_settings_that_prepare_alike(
    make_store: Callable, tmp_path, monkeypatch
):
    store, read = make_store(), []
    reading = Reader.read

    def counted(self, block):
        read.append(len(self.rows))
        return reading(self, block)

    monkeypatch.setattr(Reader, "read", counted)
    train(store, tmp_path / "one", config(epochs=1))
    once = list(read)
    read.clear()
    wanted = config(epochs=1, sweep=("head=linear,mlp", "lr=0.001,0.01", "optim.ema=0,0.9"))
    train(store, tmp_path / "many", wanted)
    assert sorted(read) == sorted(once)
    read.clear()
    wanted = config(epochs=1, sweep=("head.normalize=l2,center", "lr=0.001,0.01"))
    train(store, tmp_path / "two", wanted)
    assert len(read) <= 2 * len(once)


@pytest.mark.parametrize("head", ["mlp", "boost"])
def test_heads_that_are_not_stacked_end_as_alone(make_store: Callable, tmp_path, head):
    store = make_store()
    wanted = config(head=head, epochs=13, sweep=("lr=0.003,0.01",))
    run = train(store, tmp_path / "run", wanted).run
    alone = train(store, tmp_path / "alone", from_options(run.search["options"])).run
    for key, value in alone.state.items():
        assert torch.equal(run.state[key], value), key


def test_a_setting_that_diverges_loses(make_store: Callable, tmp_path):
    store = make_store()
    for name, head in (("stacked", "linear"), ("alone", "mlp")):
        wanted = config(head=head, sweep=("lr=1e30,0.01",), settings=("optim.clip_norm=0",))
        run = train(store, tmp_path / name, wanted).run
        failed, kept = run.search["sweep"]["settings"]
        assert "diverged" in failed["error"]
        assert failed["val_mAP"] is None
        assert kept["best"]
        assert run.metrics["val"]["mAP"] == pytest.approx(kept["val_mAP"], abs=1e-6)
    with pytest.raises(MmcError, match=r"no setting could be trained.*diverged"):
        train(
            store,
            tmp_path / "none",
            config(head="mlp", sweep=("lr=1e30,1e31",), settings=("optim.clip_norm=0",)),
        )


def test_one_value_and_heads_that_train_nothing_are_settings_too(make_store: Callable, tmp_path):
    store = make_store()
    run = train(store, tmp_path / "run", config(sweep=("lr=0.01",))).run
    assert len(run.search["sweep"]["settings"]) == 1
    assert states_agree(run, train(store, tmp_path / "alone", config(lr=0.01)).run)


# -- going on --------------------------------------------------------------------------------------


def interrupted(store, folder: Path, wanted: TrainConfig, after: int, monkeypatch) -> list[str]:
    """Stop a search with Ctrl-C when ``after`` trainings are on the shelf; what was said."""
    said: list[str] = []

    def report(line: str) -> None:
        said.append(line)
        if sum("mAP" in entry for entry in said) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(store, folder, wanted, report=report)
    return said


@pytest.mark.parametrize(
    "asked",
    [
        {"head": "mlp", "sweep": (RATES,)},
        {"sweep": (RATES, "batch_size=8,16"), "batch_size": None},
        {"head": "mlp", "folds": 3},
    ],
)
def test_what_is_done_is_kept_and_the_same_command_goes_on(
    make_store: Callable, tmp_path, monkeypatch, asked
):
    store, wanted = make_store(), config(**{"epochs": 13, **asked})
    whole = train(store, tmp_path / "whole", wanted).run
    said = interrupted(store, tmp_path / "run", wanted, 2, monkeypatch)
    assert "2 of" in said[-1] or "3 of" in said[-1]
    assert not (tmp_path / "run" / "run.json").exists()
    there = [p.parent.name for p in (tmp_path / "run" / "checkpoints").rglob("result.json")]
    assert len(there) >= 2
    trained = []
    finish = running.Runner._finish

    def counted(self, trial, *args):
        trained.append(trial)
        return finish(self, trial, *args)

    monkeypatch.setattr(running.Runner, "_finish", counted)
    report = train(store, tmp_path / "run", wanted)
    assert report.resumed
    assert trained
    assert not {trial.name for trial in trained} & set(there)
    # To the bit where each trained alone; the rest of a stack is a narrower product.
    assert states_agree(report.run, whole, 1e-6 if asked.get("head") is None else 0)
    assert report.run.train_config == whole.train_config
    if "head" in asked:
        assert without_seconds(report.search) == without_seconds(whole.search)
    assert not (tmp_path / "run" / "checkpoints").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (cut, "head.safetensors"),
        (flip, "head.safetensors"),
        (cut, "logits.safetensors"),
        (Path.unlink, "logits.safetensors"),
    ],
)
def test_a_training_whose_files_are_damaged_is_done_again(
    make_store: Callable, tmp_path, monkeypatch, damage, file
):
    store, wanted = make_store(), config(head="mlp", epochs=3, folds=3)
    whole = train(store, tmp_path / "whole", wanted).run
    interrupted(store, tmp_path / "run", wanted, 2, monkeypatch)
    damage(tmp_path / "run" / "checkpoints" / "trials" / "0001-fold0" / file)
    said: list[str] = []
    report = train(store, tmp_path / "run", wanted, report=said.append)
    (line,) = [line for line in said if line.startswith("warning: fold 1: ")]
    assert f"{file} is damaged or gone; it is trained again" in line
    assert any("1 of 3 trainings are there" in line for line in said)
    assert states_agree(report.run, whole, 0)
    assert torch.equal(report.run.out_of_fold().logits, whole.out_of_fold().logits)
    assert without_seconds(report.search) == without_seconds(whole.search)


def test_a_setting_that_was_dropped_comes_back_when_the_best_is_damaged(
    make_store: Callable, tmp_path, monkeypatch
):
    """The best one, trained again, ends lower: the next best is kept, its parameters anew."""
    store = make_store(n=120, noise=1.0)
    wanted = config(head="mlp", epochs=13, sweep=("lr=0.01,0.0003,0.000001",))
    interrupted(store, tmp_path / "run", wanted, 3, monkeypatch)
    trials = tmp_path / "run" / "checkpoints" / "trials"
    assert not (trials / "0002" / "head.safetensors").exists()
    cut(trials / "0001" / "head.safetensors")
    finish = running.Runner._finish

    def worse(self, trial, head, data, position, error):
        return finish(
            self, trial, head, data, position, "diverged" if trial.name == "0001" else error
        )

    monkeypatch.setattr(running.Runner, "_finish", worse)
    run = train(store, tmp_path / "run", wanted).run
    assert [row["best"] for row in run.search["sweep"]["settings"]] == [False, True, False]
    alone = train(store, tmp_path / "alone", from_options(run.search["options"])).run
    assert states_agree(run, alone, 0)


def without_seconds(found):
    if isinstance(found, dict):
        return {k: without_seconds(v) for k, v in found.items() if k != "seconds"}
    return [without_seconds(v) for v in found] if isinstance(found, list) else found


def test_an_unfinished_search_is_not_mixed_with_anything_else(
    make_store: Callable, tmp_path, monkeypatch
):
    store, wanted = make_store(), config(epochs=2, head="mlp", sweep=(RATES,))
    interrupted(store, tmp_path / "run", wanted, 1, monkeypatch)
    with pytest.raises(InputError, match=r"other settings \(search.sweep.lr: .*--overwrite"):
        train(store, tmp_path / "run", replace(wanted, sweep=("lr=0.001,0.1",)))
    with pytest.raises(InputError, match="unfinished search of several trainings"):
        train(store, tmp_path / "run", replace(wanted, sweep=()))
    report = train(store, tmp_path / "run", replace(wanted, sweep=(), overwrite=True))
    assert not report.resumed
    assert {p.name for p in (tmp_path / "run").iterdir()} == FILES - {"histories.csv"}


def test_files_of_a_search_go_when_a_plain_run_takes_its_place(make_store: Callable, tmp_path):
    store = make_store()
    train(store, tmp_path / "run", config(epochs=1, sweep=(RATES,), folds=2))
    train(store, tmp_path / "run", config(epochs=1, overwrite=True))
    assert {p.name for p in (tmp_path / "run").iterdir()} == FILES - {"histories.csv"}
    with pytest.raises(InputError, match="--folds"):
        Run.load(tmp_path / "run").out_of_fold()


# -- seeds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["multilabel", "binary"])
def test_seeds_tell_mean_and_spread_of_what_each_seed_reaches_alone(
    make_store: Callable, tmp_path, task
):
    store = make_store(task, n=120, noise=1.0)
    wanted = config(head="mlp", epochs=13, seed=4)
    run = train(store, tmp_path / "run", replace(wanted, seeds=3)).run
    alone = [
        train(store, tmp_path / f"{seed}", replace(wanted, seed=seed)).run for seed in (4, 5, 6)
    ]
    name = metrics.HEADLINE[task]
    for split in ("val", "test"):
        values = [one.metrics[split][name] for one in alone]
        seeds = run.search["seeds"]
        assert [row[split][name] for row in seeds["by_seed"]] == pytest.approx(values)
        assert seeds["mean"][split][name] == pytest.approx(np.mean(values))
        assert seeds["std"][split][name] == pytest.approx(np.std(values, ddof=1))
    rows = table(tmp_path / "run" / "seeds.csv")
    assert [row["seed"] for row in rows] == ["4", "5", "6"]
    best = max(range(3), key=lambda i: alone[i].metrics["val"][name])
    assert [row["kept"] for row in rows] == [str(i == best) for i in range(3)]
    assert run.seed == 4 + best
    assert run.metrics == alone[best].metrics


def test_settings_are_compared_by_the_mean_over_seeds(make_store: Callable, tmp_path):
    store = make_store(n=120, noise=1.0)
    wanted = config(epochs=13, seeds=3, sweep=("lr=0.0001,0.01",))
    run = train(store, tmp_path / "run", wanted).run
    first, second = run.search["sweep"]["settings"]
    assert second["best"]
    assert second["val_mAP"] > first["val_mAP"]
    by_seed = [row["val"]["mAP"] for row in run.search["seeds"]["by_seed"]]
    assert second["val_mAP"] == pytest.approx(np.mean(by_seed), abs=1e-6)
    assert second["std"] == pytest.approx(np.std(by_seed, ddof=1), abs=1e-6)


# -- folds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["multilabel", "binary", "multiclass"])
def test_every_sample_is_predicted_once_by_a_head_that_has_not_seen_it(
    make_store: Callable, tmp_path, task
):
    store = make_store(task, n=120)
    report = train(store, tmp_path / "run", config(folds=4, lr=0.02, epochs=13))
    run = Run.load(tmp_path / "run")
    found = run.out_of_fold()
    rows = np.sort(
        np.concatenate(
            [store.rows(split=s, features=["clip/image", "clip/text"]) for s in ("train", "val")]
        )
    )
    rows = rows[np.asarray(store.labels.known)[rows]]
    ids = store.column("id").to_pylist()
    assert found.ids.to_pylist() == [ids[row] for row in rows]
    assert torch.equal(found.targets, splits.targets(store, rows))
    assert set(found.fold.tolist()) == {0, 1, 2, 3}
    # The first fold again, by hand: what is not held out, an inner share of it for validation.
    folds = run.search["folds"]
    assert folds["mean"][metrics.HEADLINE[task]] > 0.8
    assert folds["together"][metrics.HEADLINE[task]] > 0.8
    values = [row[metrics.HEADLINE[task]] for row in folds["by_fold"]]
    for index, value in enumerate(values):
        held = found.fold == index
        score = metrics.score(found.logits[held], found.targets[held], task)
        assert value == pytest.approx(score, abs=1e-6)
    assert folds["mean"][metrics.HEADLINE[task]] == pytest.approx(np.mean(values))
    assert len(table(tmp_path / "run" / "folds.csv")) == 4
    # The run itself is the ordinary one, but for its thresholds.
    plain = train(store, tmp_path / "plain", config(lr=0.02, epochs=13)).run
    assert states_agree(run, plain, 0)
    assert run.metrics["test"]["samples"] == plain.metrics["test"]["samples"]
    if task == "multilabel":
        from mmc.heads.thresholds import tune

        assert run.thresholds == tune(found.probabilities, found.targets, task)
    assert report.features == {"image": "clip/image", "text": "clip/text"}


def test_thresholds_of_all_folds_are_made_in_one_way(make_store: Callable, tmp_path, monkeypatch):
    """One for all labels or one for each by a hair: folds would differ in that alone."""
    from mmc.heads import thresholds

    asked, tune = [], thresholds.tune

    def seen(*args, **more):
        asked.append(more.get("mode"))
        return tune(*args, **more)

    monkeypatch.setattr(thresholds, "tune", seen)
    run = train(make_store(n=120, noise=1.0), tmp_path / "run", config(folds=3, epochs=3)).run
    assert asked == [None, *[run.thresholds.mode] * 3]


def test_a_head_that_learns_by_heart_is_found_out(make_store: Callable, tmp_path):
    """Labels of pure noise: out of fold nothing is better than chance."""
    store, by_heart = make_store(n=160, noise=60.0), ("head.hidden=64", "head.input_dropout=0")
    wanted = config(head="mlp", epochs=39, lr=0.01, folds=3, settings=by_heart)
    run = train(store, tmp_path / "run", wanted).run
    found = run.out_of_fold()
    chance = metrics.evaluate(found.logits, found.targets, "multilabel", label_set=run.label_set)[
        "random_mAP"
    ]
    assert run.search["folds"]["together"]["mAP"] == pytest.approx(chance, abs=0.12)
    seen = store.rows(split="train", features=["clip/image", "clip/text"], labelled=True)
    fitted = metrics.score(
        logits(run, store, seen, device="cpu"), splits.targets(store, seen), "multilabel"
    )
    assert fitted > run.search["folds"]["together"]["mAP"] + 0.2


def test_folds_choose_the_setting_of_a_sweep(make_store: Callable, tmp_path):
    store = make_store(n=120, noise=1.0)
    wanted = config(epochs=13, folds=3, sweep=("lr=0.0001,0.01",))
    run = train(store, tmp_path / "run", wanted).run
    first, second = run.search["sweep"]["settings"]
    assert second["best"]
    assert second["held_out_mAP"] > first["held_out_mAP"]
    found = run.out_of_fold()
    by_fold = [
        metrics.score(found.logits[found.fold == f], found.targets[found.fold == f], "multilabel")
        for f in range(3)
    ]
    assert second["held_out_mAP"] == pytest.approx(np.mean(by_fold), abs=1e-6)
    assert states_agree(run, train(store, tmp_path / "b", config(epochs=13, lr=0.01)).run, 0)


def test_too_many_folds_and_nothing_to_fold(make_store: Callable, tmp_path):
    store = make_store()
    for folds in (46, 1000):
        with pytest.raises(InputError, match=rf"--folds {folds} is too many for 45 labelled"):
            train(store, tmp_path / "run", config(folds=folds))
    assert not (tmp_path / "run").exists()


def test_a_head_on_a_run_that_saw_the_folds_is_refused(make_store: Callable, tmp_path):
    store, base = make_store(), f"head.base={tmp_path / 'base'}"
    train(store, tmp_path / "base", config(epochs=1))
    boosted = config(head="boost", epochs=1, settings=(base,))
    with pytest.raises(InputError, match=r"--folds with head.base=.*leave out --folds, or head.ba"):
        train(store, tmp_path / "run", replace(boosted, folds=3))
    assert not (tmp_path / "run").exists()
    assert train(store, tmp_path / "seeds", replace(boosted, seeds=2)).run.search["seeds"]
    alone = replace(boosted, settings=(), folds=2)
    assert train(store, tmp_path / "folds", alone).run.search["folds"]


def test_a_label_with_one_sample_is_no_trouble(make_store: Callable, tmp_path):
    store = make_store("multiclass", n=28, label_set=tuple("abcdefgh"))
    run = train(store, tmp_path / "run", config(folds=5, epochs=3)).run
    assert len(run.out_of_fold().ids) == len(run.out_of_fold().targets)
    assert all(
        value is None or math.isfinite(value) for value in run.search["folds"]["mean"].values()
    )


def test_a_damaged_file_of_predictions_is_said(make_store: Callable, tmp_path):
    run = train(make_store(), tmp_path / "run", config(folds=2, epochs=1)).run
    (tmp_path / "run" / "out_of_fold.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(MmcError, match=r"out_of_fold.parquet is damaged"):
        run.out_of_fold()
