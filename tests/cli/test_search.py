"""train-head --sweep, --seeds and --folds as a user runs them."""

import json
from collections.abc import Callable

import pyarrow.parquet as pq
import pytest

FAST = ("--epochs", 3, "--device", "cpu")


def test_a_sweep_says_what_is_best_and_keeps_it(mmc: Callable, trained, tmp_path):
    store, run = trained[0], tmp_path / "run"
    args = ("train-head", store, run, *FAST, "--sweep", "lr=1e-4,0.05", "--sweep", "loss=bce,asl")
    result = mmc(*args)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    # Losses of two kinds cannot be compared: their column is in the file alone.
    assert lines[0].split() == ["lr", "loss", "val", "mAP", "epochs", "seconds"]
    assert lines[1].split()[0] == "best"
    assert len([line for line in lines[1:5] if line.split()[1] in ("1e-4", "0.05")]) == 4
    assert "micro-F1" in result.out
    assert (run / "sweep.csv").read_text(encoding="utf-8").count("\n") == 5
    options = json.loads((run / "run.json").read_text(encoding="utf-8"))["search"]["options"]
    again = mmc("train-head", store, tmp_path / "again", *options, "--json")
    assert again.code == 0, again.err
    value = json.loads((run / "run.json").read_text(encoding="utf-8"))["metrics"]["test"]["mAP"]
    assert again.json()["metrics"]["test"]["mAP"] == pytest.approx(value, abs=1e-6)
    assert mmc("predict", run, store, "--out", tmp_path / "p.csv").code == 0
    assert mmc("evaluate", run, store, "--json").json()["mAP"] == pytest.approx(value, abs=1e-6)
    assert "finished run" in mmc(*args).error


def test_seeds_and_folds(mmc: Callable, trained, tmp_path):
    store = trained[0]
    seeds = mmc("train-head", store, tmp_path / "a", *FAST, "--seeds", 2, "--json")
    assert seeds.code == 0, seeds.err
    found = seeds.json()["search"]["seeds"]
    assert [row["seed"] for row in found["by_seed"]] == [0, 1]
    assert set(found["mean"]) == {"val", "test"}
    folds = mmc("train-head", store, tmp_path / "b", *FAST, "--folds", 3)
    assert folds.code == 0, folds.err
    assert "3 folds" in folds.out
    both = mmc("train-head", store, tmp_path / "c", *FAST, "--folds", 2, "--sweep", "lr=0.01,0.1")
    header, first = (line.split() for line in both.out.splitlines()[:2])
    assert header[-6:] == ["val_loss", "mean", "epochs", "seconds", "in", "all"]
    assert first[-2] == "3"
    assert "±" in folds.out
    table = pq.read_table(tmp_path / "b" / "out_of_fold.parquet")
    assert table.column_names == ["id", "fold", "labels", "logits"]
    assert table.num_rows == 80


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--sweep", "lr=abc"), "lr='abc'"),
        (("--sweep", "lr"), "write key=value,value"),
        (("--sweep", "nonsense=1,2"), "no key 'nonsense'"),
        (("--sweep", "head.hidden=1,2"), "head linear has no setting 'hidden'"),
        (("--sweep", "lr=1e-3,1e-3"), "there twice"),
        (("--folds", 1), "--folds must be 2 or more"),
        (("--folds", 500), "--folds 500 is too many"),
        (("--seeds", 2, "--folds", 2), "give one of them"),
    ],
)
def test_what_cannot_be_searched_is_one_line(mmc: Callable, trained, tmp_path, options, says):
    result = mmc("train-head", trained[0], tmp_path / "run", *options)
    assert result.code == 2
    assert says in result.error
    assert not (tmp_path / "run").exists()
