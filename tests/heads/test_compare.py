"""Runs side by side: what is shown, what is marked, what may not be compared, and by how much."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmc.heads.artifact import Run
from mmc.heads.compare import (
    Comparison,
    compare,
    comparison_csv,
    find_runs,
    format_comparison,
)
from mmc.heads.evaluate import evaluate
from mmc.heads.featureref import FeatureRef
from mmc.store import EmbeddingStore
from mmc.store.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden" / "run-v1"
EFFORT = {
    "seconds": 9.0,
    "train_seconds": 4.0,
    "rows": 600,
    "epochs": 20,
    "rate": 150.0,
    "batch_size": 32,
    "lr": 0.1,
    "device": "cpu",
}


@pytest.fixture
def save(make_run: Callable, tmp_path: Path) -> Callable[..., Run]:
    """Saves a measured run under ``runs/NAME``; ``noise`` makes it worse."""

    def make(store: EmbeddingStore, name: str, *, noise: float = 0.0, **changes: Any) -> Run:
        run: Run = make_run(store, **{"training": EFFORT, **changes})
        random = torch.Generator().manual_seed(0)
        weight = run.state["classifier.weight"].clone()
        weight += noise * torch.randn(weight.shape, generator=random)
        run.state = {**run.state, "classifier.weight": weight}
        run.metrics = {s: evaluate(run, store, s, device="cpu") for s in ("val", "test")}
        return run.save(tmp_path / "runs" / name)

    return make


def by_name(found: Comparison) -> dict[str, dict[str, Any]]:
    return {Path(row["run"]).name: row for row in found.rows}


@pytest.mark.parametrize("task", ["multilabel", "binary", "multiclass"])
def test_the_table_says_what_the_runs_recorded(
    make_store: Callable, save: Callable, tmp_path: Path, task: str
) -> None:
    store = make_store(task, n=200, noise=1.0)
    worse = save(store, "a", noise=3.0, training={**EFFORT, "train_seconds": 2.0})
    better = save(store, "b")
    found = compare([tmp_path / "runs"])
    assert [Path(row["run"]).name for row in found.rows] == ["b", "a"]
    headline = {"multilabel": "mAP", "binary": "auroc", "multiclass": "macro_f1"}[task]
    for name, run in (("a", worse), ("b", better)):
        row = by_name(found)[name]
        for split in ("val", "test"):
            for metric in (headline, "macro_f1", "ece"):
                assert row[f"{split}.{metric}"] == run.metrics[split][metric]
        assert row["parameters"] == run.parameters
        assert (row["head"], row["features"], row["loss"]) == ("linear", "clip/image", "-")
        assert (row["epochs"], row["rate"], row["seconds"]) == (20, 150.0, 9.0)
    best = found.best["A"]
    b = str(tmp_path / "runs" / "b")
    assert best[f"test.{headline}"] == [b]
    assert best["train_seconds"] == [str(tmp_path / "runs" / "a")]
    assert len(best["parameters"]) == 2
    assert "epochs" not in best
    assert not found.warnings
    text = format_comparison(found).splitlines()
    value = f"{better.metrics['val'][headline]:.4f}*"
    assert text[0].split() == ["val", "test"]
    assert text[2].startswith("b ")
    assert value in text[2]
    assert value not in text[3]
    assert "set" not in text[1].split()
    assert text[-1].endswith(f"the runs are in {tmp_path / 'runs'}")
    assert max(map(len, text[:-1])) <= 100
    json.dumps(found.to_json(), allow_nan=False)


def test_a_lower_calibration_error_is_the_better_one(
    make_store: Callable, save: Callable, tmp_path: Path
) -> None:
    store = make_store(n=200, noise=1.0)
    save(store, "sure", temperature=0.01)
    save(store, "fair")
    found = compare([tmp_path / "runs"])
    assert found.best["A"]["test.ece"] == [str(tmp_path / "runs" / "fair")]
    assert len(found.best["A"]["test.mAP"]) == 2


def test_the_csv_has_all_digits(make_store: Callable, save: Callable, tmp_path: Path) -> None:
    store = make_store(n=200, noise=1.0)
    run = save(store, "a, b")
    save(store, "c", noise=2.0)
    found = compare([tmp_path / "runs"], store=store, device="cpu")
    rows = list(csv.DictReader(io.StringIO(comparison_csv(found).decode())))
    assert len(rows) == 2
    assert Path(rows[0]["run"]).name == "a, b"
    assert float(rows[0]["test.mAP"]) == run.metrics["test"]["mAP"]
    assert rows[0]["difference"] == rows[0]["difference_low"] == ""
    low, value, high = (
        float(rows[1][key]) for key in ("difference_low", "difference", "difference_high")
    )
    assert low < value < high < 0


def test_what_may_not_be_compared_is_told_apart(
    make_store: Callable, save: Callable, tmp_path: Path
) -> None:
    store = make_store(n=100)
    save(store, "a")
    save(store, "b", noise=1.0)
    save(make_store("binary", name="binary"), "other task")
    save(make_store(name="labels", label_set=("x", "y", "z")), "other labels")
    save(make_store(n=100, name="rows", failed=(7, 11, 15)), "other rows")
    found = compare([tmp_path / "runs", GOLDEN])
    sets = {name: row["set"] for name, row in by_name(found).items()}
    assert sets["a"] == sets["b"] == "A"
    assert len(set(sets.values())) == 5
    said = {line.split(" (set ")[0].rpartition("/")[2]: line for line in found.warnings}
    assert "the task is binary and not multilabel" in said["other task"]
    assert "other labels (3 and 5)" in said["other labels"]
    assert "measured on other test rows" in said["other rows"]
    assert "other labels (3 and 5)" in said["run-v1"]
    assert found.best[sets["other task"]] == {}  # alone, so nothing to be best of
    text = format_comparison(found)
    assert "within its set" in text
    assert text.splitlines()[1].split()[:3] == ["run", "set", "mAP"]


def test_equal_rows_in_another_order_are_the_same_rows(
    make_store: Callable, save: Callable, tmp_path: Path
) -> None:
    store = make_store()
    run = save(store, "a")
    rows = store.rows(split="test", features=["clip/image"], labelled=True)
    from mmc.heads.splits import rows_digest

    truth = torch.from_numpy(store.labels.multi_hot(rows))
    found = rows_digest(store, rows, truth)
    assert found == run.metrics["test"]["rows_digest"]
    back = np.ascontiguousarray(rows[::-1])
    assert rows_digest(store, back, truth.flip(0)) == found
    assert rows_digest(store, back, truth) != found
    assert rows_digest(store, rows[1:], truth[1:]) != found


def test_an_old_run_that_does_not_name_its_rows(
    make_store: Callable, save: Callable, tmp_path: Path
) -> None:
    store = make_store()
    save(store, "a")
    run = save(store, "old", training={})
    for split in run.metrics.values():
        del split["rows_digest"]
    run.save(tmp_path / "runs" / "old")
    found = compare([tmp_path / "runs"])
    assert "does not say on which rows" in found.warnings[0]
    assert by_name(found)["old"].get("rate") is None
    assert compare([GOLDEN]).rows[0]["epochs"] == 9


def test_bad_runs_are_warned_of_and_the_rest_is_shown(
    make_store: Callable, save: Callable, tmp_path: Path
) -> None:
    save(make_store(), "good")
    save(make_store(name="again"), "cut")
    path = tmp_path / "runs" / "cut" / "run.json"
    path.write_text(path.read_text()[:100])
    save(make_store(name="third"), "weights")
    (tmp_path / "runs" / "weights" / "head.safetensors").write_bytes(b"no")
    save(make_store(name="fourth"), "edited")
    record = tmp_path / "runs" / "edited" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"metrics": {"val": 3}}))
    lines: list[str] = []
    found = compare(
        [tmp_path / "runs", tmp_path / "nowhere", tmp_path / "runs" / "good"], report=lines.append
    )
    assert [Path(row["run"]).name for row in found.rows] == ["good"]
    assert lines == [f"warning: {line}" for line in found.warnings]
    assert len(lines) == 4
    assert "nowhere is no folder; left out" in lines[0]
    assert "cut/run.json is not JSON" in lines[1]
    assert "edited/run.json is damaged at 'metrics'" in lines[2]
    assert "weights/head.safetensors" in lines[3]
    assert all("\n" not in line for line in lines)
    with pytest.raises(InputError, match="none of the runs can be read"):
        compare([tmp_path / "runs" / "cut"])
    with pytest.raises(InputError, match="no run in"):
        compare([tmp_path / "nowhere", tmp_path])


def test_a_folder_of_runs_and_its_runs_are_each_counted_once(
    make_store: Callable, save: Callable, tmp_path: Path
) -> None:
    store = make_store()
    for name in ("b", "a"):
        save(store, name)
    runs = tmp_path / "runs"
    (runs / "notes").mkdir()
    assert find_runs([runs, runs / "a", runs / "b"], print) == [runs / "a", runs / "b"]


# -- measured anew ---------------------------------------------------------------------------------


def test_measured_anew_all_are_measured_on_the_same_rows(
    make_store: Callable, save: Callable, tmp_path: Path
) -> None:
    store = make_store(n=400, noise=1.0)
    run = save(store, "a", noise=0.5)
    best = save(store, "b")
    other = make_store(n=400, noise=1.0, name="more", failed=(7, 11, 15, 19))
    found = compare([tmp_path / "runs"], store=other, device="cpu")
    assert found.warnings == ["4 rows that lack features of some run are left out"]
    assert found.measured is not None
    assert found.measured["rows"] == 95  # 100 of test, 4 failed, 1 without labels
    assert found.measured["reference"] == str(tmp_path / "runs" / "b")
    again = {
        name: evaluate(r, other, "test", device="cpu") for name, r in (("a", run), ("b", best))
    }
    for name, row in by_name(found).items():
        for metric in ("mAP", "micro_f1", "macro_f1", "ece"):
            assert row[f"test.{metric}"] == again[name][metric]
        assert row["test.mAP"] != run.metrics["test"]["mAP"]
    a, b = by_name(found)["a"], by_name(found)["b"]
    assert a["difference"] == pytest.approx(again["a"]["mAP"] - again["b"]["mAP"])
    low, high = a["difference_interval"]
    assert low < a["difference"] < high < 0
    assert "difference" not in b
    text = format_comparison(found)
    assert f"{low:+.4f} to {high:+.4f}" in text
    assert "95 rows" in text
    same = compare([tmp_path / "runs"], store=other, device="cpu")
    assert by_name(same)["a"]["difference_interval"] == [low, high]
    seeded = compare([tmp_path / "runs"], store=other, device="cpu", seed=1)
    assert by_name(seeded)["a"]["difference_interval"] != [low, high]


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_measured_anew_with_one_label_per_sample(
    make_store: Callable, save: Callable, tmp_path: Path, task: str
) -> None:
    store = make_store(task, n=200, noise=1.0)
    save(store, "a", noise=3.0)
    save(store, "b")
    found = compare([tmp_path / "runs"], store=store, split="all", device="cpu")
    assert found.measured is not None
    assert found.measured["rows"] == 197  # 2 failed, 1 without labels
    row = by_name(found)["a"]
    low, high = row["difference_interval"]
    assert low < row["difference"] < high < 0


def test_rows_that_one_run_cannot_read_are_left_out_for_all(
    make_store: Callable, save: Callable, tmp_path: Path
) -> None:
    store = make_store(n=100)
    save(store, "image")
    save(store, "text", features={"image": FeatureRef.of(store, "clip/text")})
    mask = store["clip/text"].done
    assert not mask.all()
    found = compare([tmp_path / "runs"], store=store, device="cpu")
    assert found.measured is not None
    assert len({row["set"] for row in found.rows}) == 1
    assert any("rows that lack features of some run are left out" in x for x in found.warnings)


def test_a_run_that_cannot_be_measured_is_told_and_has_no_figures(
    make_store: Callable, save: Callable, tmp_path: Path
) -> None:
    store = make_store(n=100)
    save(store, "a")
    save(make_store("binary", name="binary"), "binary")
    save(
        make_store(name="other", identity={"backbone": "tiny", "weights": "xyz"}), "made otherwise"
    )
    found = compare([tmp_path / "runs"], store=store, device="cpu")
    lines = " | ".join(found.warnings)
    assert "made otherwise is not measured: clip/image" in lines
    assert "binary is not measured: the run is binary" in lines
    rows = by_name(found)
    assert rows["made otherwise"]["test.mAP"] is None
    assert rows["a"]["set"] != rows["made otherwise"]["set"]
    assert rows["a"]["test.mAP"] is not None
    with pytest.raises(InputError, match="none of the runs can be measured"):
        compare([tmp_path / "runs" / "binary"], store=store, device="cpu")
    with pytest.raises(InputError, match="no samples in split 'nope'"):
        compare([tmp_path / "runs" / "a"], store=store, split="nope", device="cpu")
