"""The checks pass on good files, and each kind of damage fails the check that is about it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mmc.heads.checks import Check, check_file
from mmc.heads.formats import Layout, write
from mmc.heads.predict import Predictions

N, C = 200, 4
LABELS = ("ant", "bee", "cow", "dog")
IDS = pa.array([f"s{i}" for i in range(N)], pa.string())


def make(
    path: Path,
    *,
    task: str = "multilabel",
    form: str = "default",
    scores: bool = True,
    seed: int = 0,
    skill: float = 3.0,
    ok: np.ndarray[Any, Any] | None = None,
) -> tuple[Layout, np.ndarray[Any, Any]]:
    """Write a file of predictions that know something; gives its layout and the truth."""
    random = np.random.default_rng(seed)
    c = 2 if task == "binary" else C
    if task == "multilabel":
        truth = (random.random((N, c)) < 0.3).astype(np.int8)
    else:
        truth = np.eye(c, dtype=np.int8)[random.integers(0, c, N)]
    logits = torch.from_numpy(random.normal(0, 1, (N, c)) + skill * (truth - 0.5)).float()
    if task == "multilabel":
        p = torch.sigmoid(logits)
        chosen = p >= 0.5
    else:
        p = torch.softmax(logits, 1)
        chosen = torch.nn.functional.one_hot(p.argmax(1), c).bool()
    mask = torch.ones(N, dtype=torch.bool) if ok is None else torch.from_numpy(ok)
    p = torch.where(mask[:, None], p, torch.nan)
    block = Predictions(IDS, logits, p, chosen & mask[:, None], mask)
    layout = Layout(form=form, label_set=LABELS[:c], task=task, separator=" ", scores=scores)
    write([block], path, layout)
    return layout, truth


def run_checks(path: Path, layout: Layout, truth: Any, **kw: Any) -> dict[str, Check]:
    reader = None if truth is None else lambda start, stop: truth[start:stop]
    return {c.name: c for c in check_file(path, layout, ids=kw.pop("ids", IDS), truth=reader, **kw)}


def edit(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(change(lines)))


SEVEN = {
    "no null predictions",
    "valid labels",
    "probabilities in [0, 1]",
    "no null probabilities",
    "count matches",
    "class distribution reasonable",
    "better than random",
}


@pytest.mark.parametrize("task", ["multilabel", "binary", "multiclass"])
@pytest.mark.parametrize(
    ("form", "scores"),
    [("default", False), ("default", True), ("wide", True), ("long", False), ("kaggle", False)],
)
def test_good_files_pass(task: str, form: str, scores: bool, tmp_path: Path) -> None:
    layout, truth = make(tmp_path / "p.csv", task=task, form=form, scores=scores)
    found = run_checks(tmp_path / "p.csv", layout, truth)
    assert found.keys() >= SEVEN
    assert all(check.ok and not check.warning for check in found.values()), list(
        map(str, found.values())
    )
    assert ("scores vary" in found) == scores


def test_a_good_hateful_memes_file_passes(tmp_path: Path) -> None:
    layout, truth = make(tmp_path / "p.csv", task="binary", form="hateful-memes", scores=False)
    found = run_checks(tmp_path / "p.csv", layout, truth)
    assert all(check.ok for check in found.values())
    assert "scores vary" in found


def set_cell(row: int, column: int, value: str) -> Callable[[list[str]], list[str]]:
    def change(lines: list[str]) -> list[str]:
        cells = lines[row].rstrip("\n").split(",")
        cells[column] = value
        lines[row] = ",".join(cells) + "\n"
        return lines

    return change


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("no null probabilities", set_cell(5, 3, ""), "1 of 800"),
        ("no null probabilities", set_cell(5, 3, "nan"), "1 of 800"),
        ("probabilities in [0, 1]", set_cell(5, 3, "3.25"), "to 3.25: logits"),
        ("probabilities in [0, 1]", set_cell(5, 3, "-0.5"), "-0.5 to"),
        ("probabilities in [0, 1]", set_cell(5, 3, "inf"), "inf"),
        ("valid labels", set_cell(5, 1, "ant emu"), "emu"),
        ("valid labels", set_cell(5, 1, "ant ant"), "ant twice"),
        ("count matches", lambda lines: lines[:-1], "199 samples, should be 200"),
        ("count matches", lambda lines: [*lines, "extra,,0.1,0.1,0.1,0.1\n"], "201 samples"),
        ("count matches", set_cell(5, 0, "s0"), "1 ids occur twice"),
        ("count matches", set_cell(5, 0, "z9"), "sample 5 is 'z9', should be 's4'"),
        (
            "count matches",
            lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
            "sample 1 is 's1', should be 's0'",
        ),
        (
            "scores vary",
            lambda lines: [lines[0], *(f"s{i},ant,0.1,0.2,0.3,0.4\n" for i in range(N))],
            "same scores",
        ),
        (
            "class distribution reasonable",
            lambda lines: [lines[0], *(f"s{i},ant,0.1,0.2,0.3,0.4\n" for i in range(N))],
            "all 200 samples get ant",
        ),
        ("readable", set_cell(5, 3, "high"), "high"),
        ("readable", set_cell(0, 2, "score:cow"), "should be 'score:ant'"),
        ("readable", lambda lines: [",".join(x.split(",")[:5]) + "\n" for x in lines], "5 columns"),
        ("readable", lambda lines: [], "0 columns"),
    ],
)
def test_damage_is_found(
    name: str, change: Callable[[list[str]], list[str]], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "p.csv"
    layout, truth = make(path)
    edit(path, change)
    check = run_checks(path, layout, truth)[name]
    assert not check.ok
    assert words in check.detail
    assert str(check).startswith("FAIL")


def test_a_missing_file_is_not_readable(tmp_path: Path) -> None:
    layout, truth = make(tmp_path / "p.csv")
    assert not run_checks(tmp_path / "q.csv", layout, truth)["readable"].ok


def test_a_transposed_or_reordered_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    layout, truth = make(path)
    cells = [line.split(",") for line in path.read_text().splitlines()]
    path.write_text("\n".join(",".join(column) for column in zip(*cells, strict=True)) + "\n")
    assert not run_checks(path, layout, truth)["readable"].ok
    swapped = [[a, b, d, c, e, f] for a, b, c, d, e, f in cells]
    path.write_text("\n".join(map(",".join, swapped)) + "\n")
    assert "score:bee" in run_checks(path, layout, truth)["readable"].detail


def test_softmax_rows_must_sum_to_one(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    layout, truth = make(path, task="multiclass")
    edit(path, set_cell(5, 2, "0.99"))
    assert "sum to 1" in run_checks(path, layout, truth)["probabilities in [0, 1]"].detail


def test_single_label_samples_have_exactly_one(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    layout, truth = make(path, task="multiclass")
    edit(path, set_cell(5, 1, "ant bee"))
    assert "1 samples have more than one" in run_checks(path, layout, truth)["valid labels"].detail
    assert run_checks(path, layout, truth, top_k=2)["valid labels"].ok
    edit(path, set_cell(5, 1, ""))
    check = run_checks(path, layout, truth)["no null predictions"]
    assert not check.ok
    assert "1 of 200 samples are empty" in check.detail


def test_failed_samples_may_be_empty_and_are_said(tmp_path: Path) -> None:
    ok = np.arange(N) % 10 != 0
    for form, scores in (("default", True), ("wide", True), ("long", False)):
        layout, truth = make(tmp_path / "p.csv", form=form, scores=scores, ok=ok)
        found = run_checks(tmp_path / "p.csv", layout, truth, failed=~ok)
        assert all(check.ok for check in found.values()), list(map(str, found.values()))
        check = found["no null predictions"]
        assert check.warning
        assert "20 samples failed" in check.detail
    layout, truth = make(tmp_path / "p.csv", ok=ok)
    strict = run_checks(tmp_path / "p.csv", layout, truth)
    assert not strict["no null probabilities"].ok


def test_wide_cells_are_0_or_1(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    layout, truth = make(path, form="wide", scores=False)
    edit(path, set_cell(5, 2, "0.7"))
    assert "0.7" in run_checks(path, layout, truth)["valid labels"].detail
    edit(path, set_cell(5, 2, ""))
    assert not run_checks(path, layout, truth)["no null predictions"].ok


def test_ranks_of_a_long_file_count_up(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    layout, truth = make(path, form="long", scores=False)
    text = path.read_text()
    path.write_text(text.replace(",2\n", ",7\n", 1))
    assert "ranks" in run_checks(path, layout, truth)["valid labels"].detail


@pytest.mark.parametrize("task", ["multilabel", "binary", "multiclass"])
def test_random_and_inverted_predictions_fail(task: str, tmp_path: Path) -> None:
    for seed in range(5):
        layout, truth = make(tmp_path / "p.csv", task=task, skill=-2.0, seed=seed)
        found = run_checks(tmp_path / "p.csv", layout, truth)["better than random"]
        assert not found.ok
        assert "by chance" in found.detail
    # Chance passes a test at two deviations once in about forty times.
    verdicts = []
    for seed in range(20):
        layout, truth = make(tmp_path / "p.csv", task=task, skill=0.0, seed=seed)
        verdicts.append(run_checks(tmp_path / "p.csv", layout, truth)["better than random"].ok)
    assert sum(verdicts) <= 3


def test_few_rows_only_warn(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    layout, truth = make(path, skill=0.0)
    edit(path, lambda lines: lines[:21])
    found = run_checks(path, layout, truth, ids=IDS[:20])["better than random"]
    assert found.ok
    assert "too few to tell" in found.detail or not found.warning


def test_unknown_truth_is_left_out(tmp_path: Path) -> None:
    layout, truth = make(tmp_path / "p.csv")
    check = run_checks(tmp_path / "p.csv", layout, None)["better than random"]
    assert (check.ok, check.detail) == (True, "not compared: no labels of the run to compare with")
    assert str(check).startswith("-  ")
    truth[100:] = -1
    check = run_checks(tmp_path / "p.csv", layout, truth)["better than random"]
    assert "on 100 samples" in check.detail


def test_a_constant_class_may_be_right(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    layout, _ = make(path, task="binary", scores=False)
    path.write_text("id,labels\n" + "".join(f"s{i},ant\n" for i in range(N)))
    rare = {"samples": 1000, "per_label": {"positives": [980, 20]}}
    even = {"samples": 1000, "per_label": {"positives": [500, 500]}}
    name = "class distribution reasonable"
    assert run_checks(path, layout, None, reference=rare)[name].ok
    assert not run_checks(path, layout, None, reference=even)[name].ok


def test_label_counts_far_from_validation_warn(tmp_path: Path) -> None:
    layout, truth = make(tmp_path / "p.csv")
    name = "class distribution reasonable"
    close = run_checks(tmp_path / "p.csv", layout, truth, reference={"cardinality_predicted": 1.2})
    far = run_checks(tmp_path / "p.csv", layout, truth, reference={"cardinality_predicted": 9.0})
    assert not close[name].warning
    assert far[name].warning
    asked = run_checks(
        tmp_path / "p.csv", layout, truth, reference={"cardinality_predicted": 9.0}, top_k=1
    )
    assert not asked[name].warning
    assert asked[name].detail.endswith("labels per sample, as asked")


def test_labels_that_validation_does_not_know_are_counted_as_well(tmp_path: Path) -> None:
    """Of ten labels one is known there; the file has all ten."""
    layout, truth = make(tmp_path / "p.csv")
    name = "class distribution reasonable"
    reference = {"cardinality_predicted": 0.12, "samples": 50, "labels": 10}
    few = run_checks(tmp_path / "p.csv", layout, truth, reference=reference)
    assert few[name].warning
    reference |= {"unknown_entries": 450}
    found = run_checks(tmp_path / "p.csv", layout, truth, reference=reference)[name]
    assert not found.warning
    assert found.detail.endswith("1.20 on validation data")


def test_constant_columns_and_saturation_warn(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    layout, truth = make(path)
    lines = path.read_text().splitlines()
    flat = [lines[0], *(",".join([*line.split(",")[:5], "0.5"]) for line in lines[1:])]
    path.write_text("\n".join(flat) + "\n")
    check = run_checks(path, layout, truth)["scores vary"]
    assert check.warning
    assert "dog" in check.detail
    hard = [f"s{i},ant,{i % 2},{(i + 1) % 2},{i // 2 % 2},0.{i}" for i in range(N)]
    path.write_text("\n".join([lines[0], *hard]) + "\n")
    check = run_checks(path, layout, truth)["scores vary"]
    assert check.warning
    assert "75% are exactly 0 or 1" in check.detail
