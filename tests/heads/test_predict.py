"""Predicting from a store: right numbers, the order asked for, failed samples, bounded blocks."""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmc.heads import metrics
from mmc.heads.artifact import Run
from mmc.heads.evaluate import evaluate, format_table, task_targets
from mmc.heads.options import PredictConfig
from mmc.heads.predict import (
    Predictor,
    aligned_targets,
    logits,
    predict,
    predict_csv,
)
from mmc.heads.thresholds import Thresholds
from mmc.store import EmbeddingStore
from mmc.store.errors import FingerprintMismatchError, InputError, RowsNotDoneError

MakeStore = Callable[..., EmbeddingStore]
MakeRun = Callable[..., Run]


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_logits_are_the_heads(batch: int, make_store: MakeStore, make_run: MakeRun) -> None:
    store = make_store()
    run = make_run(store)
    rows = np.array([40, 2, 59, 2, 0])
    predictor = Predictor(run, store, device="cpu")
    predictor.batch = batch
    features = torch.from_numpy(store["clip/image"].take(rows)).float()
    expected = 2 * features[:, :5]
    torch.testing.assert_close(predictor.logits(rows), expected)
    torch.testing.assert_close(logits(run, store, rows, device="cpu"), expected)


def test_order_and_failed_rows(make_store: MakeStore, make_run: MakeRun) -> None:
    store = make_store()
    run = make_run(store)
    rows = np.array([12, 7, 3, 11, 0])
    found = predict(run, store, rows)
    assert found.ids.to_pylist() == ["s12", "s7", "s3", "s11", "s0"]
    assert found.ok.tolist() == [True, False, True, False, True]
    assert found.logits[~found.ok].isnan().all()
    assert found.probabilities[~found.ok].isnan().all()
    assert not found.decisions[~found.ok].any()
    good = rows[found.ok.numpy()]
    torch.testing.assert_close(found.logits[found.ok], logits(run, store, good, device="cpu"))
    p = torch.sigmoid(found.logits[found.ok])
    torch.testing.assert_close(found.probabilities[found.ok], p)
    assert torch.equal(found.decisions[found.ok], p >= 0.5)
    with pytest.raises(RowsNotDoneError):
        logits(run, store, rows, device="cpu")


def test_decisions_can_be_forced(make_store: MakeStore, make_run: MakeRun) -> None:
    store = make_store()
    run = make_run(store, thresholds=Thresholds(values=(0.99,) * 5, mode="global"))
    rows = store.rows(features=["clip/image"])
    plain = predict(run, store, rows).decisions
    filled = predict(run, store, rows, PredictConfig(at_least_one=True)).decisions
    top = predict(run, store, rows, PredictConfig(top_k=2)).decisions
    assert (plain.sum(1) == 0).any()
    assert (filled.sum(1) >= 1).all()
    assert (top.sum(1) == 2).all()
    with pytest.raises(InputError, match="--top-k must be 1 or more, got 0"):
        PredictConfig(top_k=0)
    with pytest.raises(InputError, match="leave --at-least-one out"):
        PredictConfig(top_k=2, at_least_one=True)


def test_other_features_are_refused(make_store: MakeStore, make_run: MakeRun) -> None:
    run = make_run(make_store())
    other = make_store(name="other", identity={"backbone": "tiny", "weights": "new"})
    for attempt in (lambda: predict(run, other), lambda: evaluate(run, other)):
        with pytest.raises(FingerprintMismatchError, match="weights"):
            attempt()


def test_empty_and_unknown_splits(make_store: MakeStore, make_run: MakeRun) -> None:
    store = make_store()
    run = make_run(store)
    for attempt in (
        lambda: predict(run, store, None, PredictConfig(split="dev")),
        lambda: evaluate(run, store, "dev"),
    ):
        with pytest.raises(InputError, match=r"no samples in split 'dev' .*test, train, val"):
            attempt()


def read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    return list(reader.fieldnames or []), rows


@pytest.mark.parametrize("task", ["multilabel", "binary", "multiclass"])
def test_csv_has_every_sample_in_order_and_rescores_to_the_same_metrics(
    task: str, make_store: MakeStore, make_run: MakeRun, tmp_path: Path
) -> None:
    store = make_store(task)
    run = make_run(store)
    report = predict_csv(run, store, tmp_path / "out.csv", PredictConfig(split="all", scores=True))
    assert (report.rows, report.failed, report.form) == (60, 2, "default")
    assert report.ok, list(map(str, report.checks))
    assert len(report.checks) == 8
    header, table = read(tmp_path / "out.csv")
    assert header[:2] == ["id", "labels"]
    assert [row["id"] for row in table] == store.column("id").to_pylist()
    assert table[7]["labels"] == ""
    # The file's scores, read back, give the metrics of the run.
    rows = store.rows(features=["clip/image"], labelled=True)
    p = torch.tensor(
        [[float(table[r][f"score:{label}"]) for label in run.label_set] for r in rows]
    ).float()
    again = torch.logit(p.double()) if task == "multilabel" else p.double().log()
    targets = task_targets(aligned_targets(run, store, rows), task)
    found = metrics.evaluate(again, targets, task, label_set=run.label_set)
    direct = evaluate(run, store, device="cpu")
    for key in metrics.METRICS[task]:
        assert found[key] == pytest.approx(direct[key], abs=1e-6), key
    # And so do its labels.
    for r in rows[:20]:
        chosen = set(table[r]["labels"].split("|")) - {""}
        scores = {label: float(table[r][f"score:{label}"]) for label in run.label_set}
        best = max(scores, key=lambda label: scores[label])
        expected = {k for k, v in scores.items() if v >= 0.5} if task == "multilabel" else {best}
        assert chosen == expected


def test_csv_of_a_split_and_blocks(
    make_store: MakeStore, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store()
    run = make_run(store)
    predict_csv(run, store, tmp_path / "whole.csv", PredictConfig(split="test", scores=True))
    monkeypatch.setattr("mmc.heads.predict.BLOCK_BYTES", 400)
    seen: list[tuple[str, int, int]] = []
    predict_csv(
        run,
        store,
        tmp_path / "parts.csv",
        PredictConfig(split="test", scores=True),
        progress=lambda *step: seen.append(step),
    )
    assert (tmp_path / "parts.csv").read_text() == (tmp_path / "whole.csv").read_text()
    assert seen[-1] == ("predict", 15, 15)
    assert len(seen) > 3
    assert [row["id"] for row in read(tmp_path / "parts.csv")[1]] == [
        f"s{i}" for i in range(3, 60, 4)
    ]


def test_every_sample_may_have_failed(
    make_store: MakeStore, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(make_store())
    broken = make_store(name="broken", failed=tuple(range(60)))
    report = predict_csv(run, broken, tmp_path / "out.csv", PredictConfig(split="all"))
    assert report.failed == 60
    assert not report.ok
    assert all(row["labels"] == "" for row in read(tmp_path / "out.csv")[1])


def test_an_unlabelled_store_is_predicted_but_not_evaluated(
    make_store: MakeStore, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(make_store())
    bare = make_store(name="bare", unlabelled=tuple(range(60)))
    report = predict_csv(run, bare, tmp_path / "out.csv")
    assert report.ok
    said = {check.name: check.detail for check in report.checks}
    assert said["better than random"] == "not compared: no labels of the run to compare with"
    with pytest.raises(InputError, match=r"there is no truth to compare with$"):
        evaluate(run, bare)
    partly = make_store(name="partly", unlabelled=tuple(range(3, 60, 4)))
    with pytest.raises(
        InputError, match=r"labelled are: train \(30\), val \(15\), choose with --split"
    ):
        evaluate(run, partly, "test")


def test_figures_of_train_are_marked(make_store: MakeStore, make_run: MakeRun) -> None:
    store = make_store()
    run = make_run(store)
    assert "the head has seen the train samples" in format_table(evaluate(run, store, "train"))
    assert "has seen" not in format_table(evaluate(run, store, "test"))


def test_labels_are_aligned_by_name(make_store: MakeStore, make_run: MakeRun) -> None:
    store = make_store("multiclass", label_set=("cat", "dog", "eel"))
    run = make_run(store, label_set=("eel", "cat", "dog", "fox"))
    rows = np.arange(60)
    here = store.labels.multi_hot(rows)
    there = aligned_targets(run, store, rows).numpy()
    assert (there[3] == -1).all()
    known = rows != 3
    np.testing.assert_array_equal(there[known][:, [1, 2, 0]], here[known])
    assert not there[known][:, 3].any()


def test_a_label_that_a_table_has_no_column_for_is_unknown(
    make_store: MakeStore, make_run: MakeRun
) -> None:
    """Unlike one that lists of labels never name."""
    source = {"options": {"label_column": "cat,dog,eel"}, "columns": {"labels": None}}
    named = {"options": {"label_column": "tags"}, "columns": {"labels": "tags"}}
    names = ("cat", "dog", "eel")
    columns = make_store(label_set=names, source=source)
    lists = make_store(label_set=names, source=named, name="lists")
    run = make_run(make_store(label_set=("eel", "fox", "cat", "dog"), name="all"))
    rows = np.arange(60)
    known = rows != 3
    found = aligned_targets(run, columns, rows).numpy()
    np.testing.assert_array_equal(found[:, [2, 3, 0]], columns.labels.multi_hot(rows))
    assert (found[:, 1] == -1).all()
    assert not aligned_targets(run, lists, rows).numpy()[known, 1].any()
    measured = evaluate(run, columns)
    assert measured["unknown_entries"] == measured["samples"] == 57


def test_strange_labels_are_refused(make_store: MakeStore, make_run: MakeRun) -> None:
    store = make_store("multiclass")
    run = make_run(store)
    other = make_store("multiclass", name="other", label_set=("cat", "dog", "yak"))
    with pytest.raises(InputError, match=r"label set does not match the run's: 'yak' not among"):
        evaluate(run, other)


def test_evaluate_leaves_out_and_says_what(make_store: MakeStore, make_run: MakeRun) -> None:
    store = make_store(unlabelled=(3, 15, 19))
    found = evaluate(make_run(store), store, "test", device="cpu")
    assert (found["split"], found["samples"]) == ("test", 10)
    assert (found["failed"], found["unlabelled"]) == (2, 3)
    text = format_table(found)
    assert "mAP" in text
    assert "2 samples without features were left out" in text
    assert "3 samples without labels were left out" in text
    assert "sea, sky" in text


def test_the_table_shortens_long_label_sets() -> None:
    c = 45
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(200, c, generator=generator) < 0.3).to(torch.int8)
    found = metrics.evaluate(
        torch.randn(200, c, generator=generator) + targets,
        targets,
        "multilabel",
        label_set=[f"label {i}" for i in range(c)],
    )
    lines = format_table({"test": found}).splitlines()
    shown = [line for line in lines if re.match(r"label \d", line)]
    assert len(shown) == 20
    assert any(line.startswith("... 25 more") for line in lines)
    assert len({len(line) for line in shown}) == 1


def test_a_row_without_exactly_one_label_is_unknown_to_a_single_label_task() -> None:
    multi_hot = torch.tensor([[0, 1], [1, 1], [0, 0], [-1, -1]], dtype=torch.int8)
    assert task_targets(multi_hot, "binary").tolist() == [1, -1, -1, -1]
    assert torch.equal(task_targets(multi_hot, "multilabel"), multi_hot)


def test_form_follows_the_store(make_store: MakeStore, make_run: MakeRun, tmp_path: Path) -> None:
    source: dict[str, Any] = {
        "form": "hateful-memes",
        "columns": {"id": "id", "image": "img", "labels": "label", "text": "text"},
    }
    store = make_store("binary", source=source)
    report = predict_csv(make_run(store), store, tmp_path / "out.csv", PredictConfig(split="test"))
    assert report.form == "hateful-memes"
    assert report.ok, list(map(str, report.checks))
    header, rows = read(tmp_path / "out.csv")
    assert header == ["id", "proba", "label"]
    for row in rows:
        if row["label"]:
            assert row["label"] == ("1" if float(row["proba"]) >= 0.5 else "0")


def test_which_samples_are_predicted(
    make_store: MakeStore, make_run: MakeRun, tmp_path: Path
) -> None:
    store = make_store()
    run = make_run(store)

    def ids(rows: Any = None, **choice: Any) -> list[str]:
        out, config = tmp_path / "out.csv", PredictConfig(**choice)
        report = predict_csv(run, store, out, config, rows=rows)
        assert f"{report.rows} samples" in str(report)
        return [row["id"] for row in read(tmp_path / "out.csv")[1]]

    everything = [f"s{i}" for i in range(60)]
    assert ids() == everything[3::4]
    assert ids(split="val") == everything[2::4]
    assert ids(split="all") == everything
    assert ids(rows=np.array([5, 3, 2])) == ["s5", "s3", "s2"]
    assert ids(rows=np.array([5, 3, 2]), split="val") == ["s2"]


def test_tables_of_several_splits() -> None:
    logits = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    found = metrics.evaluate(logits, torch.tensor([0, 1]), "binary", label_set=("no", "yes"))
    text = format_table({"val": found, "test": found})
    assert text.splitlines()[0].split() == ["val", "test"]
    assert ["AUROC", "1.0000", "1.0000"] in [line.split() for line in text.splitlines()]
    assert format_table({}).startswith("not measured")
