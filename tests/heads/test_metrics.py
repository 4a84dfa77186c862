"""Metrics equal scikit-learn and the sheet's toy numbers; degenerate inputs never raise."""

import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmc.heads import metrics, ranking
from mmc.heads.calibration import BinnedCalibration
from mmc.heads.thresholds import Thresholds, decide
from mmc.store.errors import InputError, MmcError

EXACT = 1e-9


def multilabel(n: int, c: int, *, ties: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Skewed random problem: logits float32 (n, c) that know something, targets int8 (n, c)."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.linspace(0.03, 0.4, c)
    targets = (torch.rand(n, c, generator=generator) < share).to(torch.int8)
    logits = torch.randn(n, c, generator=generator) + 1.5 * targets - 1.5
    return ((logits * 4).round() / 4 if ties else logits), targets


def names(c: int) -> list[str]:
    return [f"label {i}" for i in range(c)]


def evaluate(
    logits: Tensor, targets: Tensor, task: str = "multilabel", **kw: Any
) -> dict[str, Any]:
    result = metrics.evaluate(logits, targets, task, label_set=names(logits.shape[1]), **kw)
    json.dumps(result, allow_nan=False)
    return result


@pytest.mark.parametrize("ties", [False, True])
def test_multilabel_equals_scikit_learn(ties: bool) -> None:
    logits, targets = multilabel(400, 11, ties=ties)
    y, s = targets.numpy(), logits.numpy()
    p = (torch.sigmoid(logits.double()) >= 0.5).int().numpy()
    found = evaluate(logits, targets)
    f1 = {
        average: reference.f1_score(y, p, average=average, zero_division=0)
        for average in ("micro", "macro", "weighted", "samples")
    }
    expected = {
        "mAP": reference.average_precision_score(y, s, average="macro"),
        "auroc_macro": reference.roc_auc_score(y, s, average="macro"),
        "auroc_micro": reference.roc_auc_score(y, s, average="micro"),
        **{f"{average}_f1": value for average, value in f1.items()},
        "subset_accuracy": reference.accuracy_score(y, p),
        "hamming_loss": reference.hamming_loss(y, p),
        "brier": float(np.mean((torch.sigmoid(logits).double().numpy() - y) ** 2)),
        "cardinality_true": y.sum(1).mean(),
        "cardinality_predicted": p.sum(1).mean(),
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-7 if key == "brier" else EXACT), key
    for i in range(11):
        ap = reference.average_precision_score(y[:, i], s[:, i])
        assert found["per_label"]["ap"][i] == pytest.approx(ap, abs=EXACT)
    assert found["labels_evaluated"] == found["auroc_labels"] == 11


def test_averaged_precision_and_recall() -> None:
    logits, targets = multilabel(500, 9, ties=False, seed=3)
    y, p = targets.double(), (logits >= 0).double()
    found = evaluate(logits, targets)
    cp = float(((p * y).sum(0) / p.sum(0).clamp(min=1)).mean())
    cr = float(((p * y).sum(0) / y.sum(0)).mean())
    assert found["CP"] == pytest.approx(cp, abs=EXACT)
    assert found["CR"] == pytest.approx(cr, abs=EXACT)
    assert found["CF1"] == pytest.approx(2 * cp * cr / (cp + cr), abs=EXACT)
    assert found["OF1"] == pytest.approx(found["micro_f1"], abs=EXACT)
    # The F1 of averages is not the average of F1s.
    assert abs(found["CF1"] - found["macro_f1"]) > 1e-3


def test_top_three_with_a_score_above_half() -> None:
    """ML-GCN's variant: a row may get fewer than three labels, unlike the exact top three."""
    logits, targets = multilabel(500, 9, ties=False, seed=4)
    targets[7, :4] = -1
    targets[8] = -1
    found = evaluate(logits, targets)["top_3_above_half"]
    tp, predicted, true = np.zeros(9), np.zeros(9), np.zeros(9)
    for scores, truth in zip(logits.numpy(), targets.numpy(), strict=True):
        known = np.flatnonzero(truth >= 0)
        best = known[np.argsort(-scores[known])][:3]
        chosen = best[scores[best] >= 0]
        predicted[chosen] += 1
        tp[chosen] += truth[chosen] == 1
        true += truth == 1
    assert predicted.sum() < 3 * 499
    cp, cr = (tp / predicted).mean(), (tp / true).mean()
    precision, recall = tp.sum() / predicted.sum(), tp.sum() / true.sum()
    expected = {
        "CP": cp,
        "CR": cr,
        "CF1": 2 * cp * cr / (cp + cr),
        "OP": precision,
        "OR": recall,
        "OF1": 2 * precision * recall / (precision + recall),
    }
    assert found == pytest.approx(expected, abs=EXACT)
    few = multilabel(20, 3, ties=False, seed=0)
    assert evaluate(*few)["top_3_above_half"] is None


def test_toy_numbers_of_the_sheet() -> None:
    logits = torch.tensor([[0.9], [0.8], [0.7], [0.6]])
    targets = torch.tensor([[1], [0], [1], [0]], dtype=torch.int8)
    found = ranking.rank_labels(logits, targets)
    assert float(found.ap) == pytest.approx((1 + 2 / 3) / 2)
    assert float(found.auroc) == pytest.approx(0.75)


@given(
    values=st.lists(
        st.tuples(st.integers(-3, 3), st.sampled_from([0, 0, 1, -1])), min_size=1, max_size=30
    ),
    shuffle=st.randoms(),
)
@settings(max_examples=100, deadline=None)
def test_order_of_rows_and_unknown_entries_do_not_matter(
    values: list[tuple[int, int]], shuffle: Any
) -> None:
    def rank(rows: list[tuple[int, int]]) -> list[float]:
        data = torch.tensor(rows, dtype=torch.float32).reshape(-1, 2)
        found = ranking.rank_labels(data[:, :1], data[:, 1:].to(torch.int8))
        return [float(found.ap), float(found.auroc)]

    mixed = list(values)
    shuffle.shuffle(mixed)
    known = [pair for pair in values if pair[1] >= 0]
    np.testing.assert_allclose(rank(values), rank(mixed), atol=1e-12)
    np.testing.assert_allclose(rank(values), rank(known), atol=1e-12)
    truth = [y for _, y in known]
    if 0 < sum(truth) < len(truth):
        scores = [s for s, _ in known]
        expected = [
            reference.average_precision_score(truth, scores),
            reference.roc_auc_score(truth, scores),
        ]
        np.testing.assert_allclose(rank(values), expected, atol=EXACT)


def test_saturated_probabilities_do_not_tie() -> None:
    logits = torch.tensor([[50.0], [60.0], [70.0], [40.0]])
    targets = torch.tensor([[0], [1], [1], [0]], dtype=torch.int8)
    assert metrics.probabilities(logits, "multilabel").unique().numel() == 1
    assert evaluate(logits, targets)["mAP"] == 1.0


def test_labels_are_chunked_without_changing_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = multilabel(60, 7, ties=True)
    targets[5] = -1
    targets[8, 2] = -1
    whole = evaluate(logits, targets)
    monkeypatch.setattr(ranking, "CHUNK_ENTRIES", 100)
    monkeypatch.setattr(metrics, "CHUNK_ENTRIES", 16)
    parts = evaluate(logits, targets)
    for key, value in whole.items():
        if isinstance(value, float):
            assert parts[key] == pytest.approx(value, abs=1e-12), key
    assert parts["per_label"] == whole["per_label"]


def test_binned_micro_auroc_is_close(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = multilabel(300, 5, ties=False)
    targets[3] = -1
    exact = ranking.micro_auroc(logits, targets)
    monkeypatch.setattr(ranking, "EXACT_ENTRIES", 10)
    monkeypatch.setattr(ranking, "CHUNK_ENTRIES", 64)
    assert ranking.micro_auroc(logits, targets) == pytest.approx(exact, abs=1e-5)


def test_unknown_rows_and_entries_are_left_out() -> None:
    logits, targets = multilabel(200, 6, ties=False)
    kept = evaluate(logits[20:], targets[20:])
    unknown = targets.clone()
    unknown[:20] = -1
    found = evaluate(logits, unknown)
    assert (found["samples"], found["unknown"]) == (180, 20)
    for key in ("mAP", "micro_f1", "samples_f1", "hamming_loss", "ece", "brier", "top_k"):
        assert found[key] == kept[key], key
    unknown[:, 5] = -1
    five = evaluate(logits[20:, :5], targets[20:, :5])
    found = evaluate(logits, unknown)
    assert found["mAP"] == pytest.approx(five["mAP"], abs=EXACT)
    assert found["micro_f1"] == pytest.approx(five["micro_f1"], abs=EXACT)
    assert found["per_label"]["ap"][5] is None


def test_a_label_without_positives_is_excluded_and_counted() -> None:
    logits, targets = multilabel(100, 4, ties=False)
    targets[:, 1] = 0
    found = evaluate(logits, targets)
    rest = evaluate(logits[:, [0, 2, 3]], targets[:, [0, 2, 3]])
    assert found["mAP"] == pytest.approx(rest["mAP"], abs=EXACT)
    assert found["CR"] == pytest.approx(rest["CR"], abs=EXACT)
    assert found["labels_evaluated"] == 3
    assert found["per_label"]["ap"][1] is None
    assert found["per_label"]["f1"][1] == 0.0


@pytest.mark.parametrize("fill", [0, 1, -1])
@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("c", [1, 4])
def test_degenerate_multilabel_never_raises(fill: int, n: int, c: int) -> None:
    logits = torch.zeros(n, c)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate(logits, torch.full((n, c), fill, dtype=torch.int8))
    assert found["samples"] == (n if fill >= 0 else 0)
    assert (found["mAP"] is None) == (n == 0 or fill != 1)
    assert found["auroc_macro"] is None


@pytest.mark.parametrize("task", ["binary", "multiclass"])
@pytest.mark.parametrize("targets", [[], [0], [1], [1, 1], [-1, -1]])
def test_degenerate_single_label_never_raises(task: str, targets: list[int]) -> None:
    truth = torch.tensor(targets, dtype=torch.int64)
    found = evaluate(torch.zeros(len(targets), 2), truth, task)
    assert found["samples"] == sum(t >= 0 for t in targets)
    assert found.get("auroc") is None


@pytest.mark.parametrize("ties", [False, True])
def test_binary_equals_scikit_learn(ties: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    truth = (torch.rand(300, generator=generator) < 0.3).long()
    margin = torch.randn(300, generator=generator) + truth
    margin = margin.round() if ties else margin
    logits = torch.stack([-margin / 2, margin / 2], 1)
    cut = Thresholds(values=(0.6,), mode="global")
    found = evaluate(logits, truth, "binary", thresholds=cut)
    p = torch.sigmoid(margin.double())
    y, chosen = truth.numpy(), (p >= 0.6).int().numpy()
    assert found["auroc"] == pytest.approx(reference.roc_auc_score(y, margin), abs=EXACT)
    assert found["ap"] == pytest.approx(reference.average_precision_score(y, margin), abs=EXACT)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(y, chosen), abs=EXACT)
    assert found["f1"] == pytest.approx(reference.f1_score(y, chosen), abs=EXACT)
    assert found["macro_f1"] == pytest.approx(
        reference.f1_score(y, chosen, average="macro"), abs=EXACT
    )
    assert found["log_loss"] == pytest.approx(reference.log_loss(y, p.numpy()), abs=1e-6)
    assert found["brier"] == pytest.approx(reference.brier_score_loss(y, p.numpy()), abs=1e-6)
    assert found["confusion"] == reference.confusion_matrix(y, chosen).tolist()
    assert (found["positive_label"], found["threshold"]) == ("label 1", 0.6)


def test_auroc_interval_is_seeded_and_covers() -> None:
    generator = torch.Generator().manual_seed(2)
    truth = (torch.arange(400) % 2).long()
    margin = torch.randn(400, generator=generator) + truth
    low, high = ranking.auroc_interval(margin, truth, seed=5)
    assert (low, high) == ranking.auroc_interval(margin, truth, seed=5)
    assert (low, high) != ranking.auroc_interval(margin, truth, seed=6)
    area = reference.roc_auc_score(truth, margin)
    # Hanley and McNeil's standard error here is 0.023.
    assert low < area < high
    assert 0.06 < high - low < 0.12


def test_auroc_interval_equals_plain_resampling() -> None:
    """The same draws, scored by scikit-learn one resample at a time."""
    truth = torch.tensor([0, 0, 0, 1, 1, 0, 1, 0])
    scores = torch.tensor([1.0, 2, 2, 2, 3, 0, 4, 3])
    generator = torch.Generator().manual_seed(9)
    pools = [scores[truth == value] for value in (0, 1)]
    draws = [p[torch.randint(len(p), (50, len(p)), generator=generator)] for p in pools]
    y = [0] * 5 + [1] * 3
    areas = [reference.roc_auc_score(y, torch.cat([a, b])) for a, b in zip(*draws, strict=True)]
    expected = np.quantile(areas, [0.025, 0.975])
    found = ranking.auroc_interval(scores, truth, seed=9, resamples=50)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_multiclass_equals_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(4)
    truth = torch.randint(0, 6, (400,), generator=generator)
    logits = torch.randn(400, 7, generator=generator)
    logits[torch.arange(400), truth] += 1.5
    # The seventh class never occurs but is predicted now and then.
    found = evaluate(logits, truth, "multiclass")
    y, chosen = truth.numpy(), logits.argmax(1).numpy()
    p = torch.softmax(logits.double(), 1).numpy()
    assert (chosen == 6).any()
    expected = {
        "accuracy": reference.accuracy_score(y, chosen),
        "macro_f1": reference.f1_score(y, chosen, average="macro", zero_division=0),
        "weighted_f1": reference.f1_score(y, chosen, average="weighted", zero_division=0),
        "log_loss": reference.log_loss(y, p, labels=list(range(7))),
        "top5_accuracy": reference.top_k_accuracy_score(y, p, k=5, labels=list(range(7))),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected["balanced_accuracy"] = reference.balanced_accuracy_score(y, chosen)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=EXACT), key
    assert found["confusion"] == reference.confusion_matrix(y, chosen, labels=range(7)).tolist()


def test_of_many_classes_the_largest_confusions_are_given() -> None:
    generator = torch.Generator().manual_seed(3)
    c, n = 210, 4000
    targets = torch.randint(c, (n,), generator=generator)
    logits = torch.randn(n, c, generator=generator)
    logits[torch.arange(n), targets] += 3
    logits[targets == 7, 9] += 9
    place = {name: i for i, name in enumerate(names(c))}
    found = evaluate(logits, targets, "multiclass")
    assert "confusion" not in found
    table = reference.confusion_matrix(targets, logits.argmax(1), labels=range(c))
    pairs = list(zip(*found["largest_confusions"].values(), strict=True))
    assert pairs[0] == (names(c)[7], names(c)[9], table[7, 9])
    assert all(table[place[a], place[b]] == count for a, b, count in pairs)
    np.fill_diagonal(table, 0)
    assert [count for *_, count in pairs] == sorted(table.ravel().tolist())[::-1][:1000]
    assert len(json.dumps(found)) < 200_000
    few = evaluate(logits[:, :200], targets.clamp(max=199), "multiclass")
    assert np.shape(few["confusion"]) == (200, 200)


@pytest.mark.parametrize("task", ["multilabel", "binary", "multiclass"])
def test_score_agrees_with_evaluate(task: str) -> None:
    generator = torch.Generator().manual_seed(6)
    c = 2 if task == "binary" else 5
    logits = torch.randn(150, c, generator=generator)
    if task == "multilabel":
        targets = (torch.rand(150, c, generator=generator) < 0.3).to(torch.int8)
    else:
        targets = torch.randint(-1, c, (150,), generator=generator)
    found = evaluate(logits, targets, task)
    for metric in metrics.METRICS[task]:
        if task == "binary" and metric == "accuracy":
            continue
        assert metrics.score(logits, targets, task, metric) == pytest.approx(found[metric]), metric
    assert metrics.score(logits, targets, task) == pytest.approx(found[metrics.HEADLINE[task]])
    with pytest.raises(InputError, match="no metric 'wer'"):
        metrics.score(logits, targets, task, "wer")


def test_top_k_bounds() -> None:
    generator = torch.Generator().manual_seed(8)
    targets = (torch.rand(50, 10, generator=generator) < 0.15).to(torch.int8)
    perfect = targets.float() + torch.rand(50, 10, generator=generator) / 2
    found = ranking.top_k_f1(perfect, targets, 3)
    assert found["f1"] == found["oracle_f1"] < 1
    assert ranking.top_k_f1(torch.randn(50, 10, generator=generator), targets, 10)["recall"] == 1
    hits = found["precision"] * 3 * 50
    assert hits == pytest.approx(float(targets.sum(1).clamp(max=3).sum()))


def test_unknown_entries_take_no_place_in_the_top_k() -> None:
    targets = torch.tensor([[-1, 1, 0, 0]], dtype=torch.int8)
    scores = torch.tensor([[9.0, 5.0, 1.0, 0.0]])
    assert ranking.top_k_f1(scores, targets, 1)["recall"] == 1.0


def test_both_conventions_for_empty_samples_can_be_had() -> None:
    logits = torch.tensor([[-1.0, -1.0], [1.0, -1.0]])
    targets = torch.tensor([[0, 0], [1, 0]], dtype=torch.int8)
    found = evaluate(logits, targets)
    assert found["samples_f1"] == 0.5
    assert found["empty_both"] == 1
    y, p = targets.numpy(), (logits > 0).int().numpy()
    as_one = found["samples_f1"] + found["empty_both"] / found["samples"]
    assert as_one == reference.f1_score(y, p, average="samples", zero_division=1)


def test_calibrated_probabilities_have_no_calibration_error() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(100_000, 1, generator=generator)
    outcomes = torch.rand(100_000, 1, generator=generator) < p
    calibration = BinnedCalibration(1, p.device)
    calibration.add(p, outcomes, torch.ones_like(outcomes))
    found = calibration.result()
    assert found["ece"] < 0.01
    assert found["brier"] == pytest.approx(1 / 6, abs=0.005)
    shifted = BinnedCalibration(1, p.device)
    shifted.add((p + 0.2).clamp(max=1), outcomes, torch.ones_like(outcomes))
    assert shifted.result()["ece"] == pytest.approx(0.18, abs=0.01)


def test_sure_negatives_do_not_hide_the_error_above_a_tenth() -> None:
    p = torch.cat([torch.full((900, 1), 0.01), torch.full((100, 1), 0.9)])
    outcomes = torch.cat([torch.zeros(950, 1), torch.ones(50, 1)]).bool()
    calibration = BinnedCalibration(1, p.device)
    calibration.add(p, outcomes, torch.ones_like(outcomes))
    found = calibration.result()
    assert found["ece"] == pytest.approx(0.9 * 0.01 + 0.1 * 0.4)
    assert found["ece_above_0.1"] == pytest.approx(0.4)


def test_half_precision_and_broken_logits_are_refused() -> None:
    targets = torch.ones(3, 2, dtype=torch.int8)
    with pytest.raises(TypeError, match="float32"):
        metrics.evaluate(torch.zeros(3, 2).half(), targets, "multilabel", label_set=["a", "b"])
    broken = torch.zeros(3, 2)
    broken[1, 0] = math.nan
    with pytest.raises(MmcError, match="1 of 3 rows"):
        metrics.evaluate(broken, targets, "multilabel", label_set=["a", "b"])
    with pytest.raises(ValueError, match="2 columns for 3 labels"):
        metrics.evaluate(torch.zeros(3, 2), targets, "multilabel", label_set=["a", "b", "c"])


def test_thresholds_of_the_run_are_what_is_scored() -> None:
    logits, targets = multilabel(200, 3, ties=False)
    cuts = Thresholds(values=(0.2, 0.5, 0.8), mode="per_label")
    found = evaluate(logits, targets, thresholds=cuts)
    chosen = decide(metrics.probabilities(logits, "multilabel"), "multilabel", cuts)
    expected = reference.f1_score(targets.numpy(), chosen.int().numpy(), average="macro")
    assert found["macro_f1"] == pytest.approx(expected, abs=EXACT)
    assert found["per_label"]["threshold"] == [0.2, 0.5, 0.8]


@pytest.mark.gpu
def test_gpu_gives_the_same_numbers() -> None:
    logits, targets = multilabel(500, 8, ties=True)
    here, there = evaluate(logits, targets), evaluate(logits.cuda(), targets.cuda())
    for key, value in here.items():
        if isinstance(value, float):
            assert there[key] == pytest.approx(value, abs=1e-9), key
