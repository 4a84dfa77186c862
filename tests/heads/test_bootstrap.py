"""Resampled metrics equal scikit-learn's of the drawn rows, and pairs are pairs."""

import numpy as np
import pytest
import sklearn.metrics as reference
import torch

from mmc.heads import bootstrap, metrics
from mmc.heads.bootstrap import interval, resampled


def drawn_rows(n: int, resamples: int, seed: int) -> list[np.ndarray]:
    """The rows of every resample."""
    counts = np.concatenate(list(bootstrap.drawn(n, resamples, seed)))
    assert (counts.sum(1) == n).all()
    return [np.repeat(np.arange(n), row) for row in counts]


@pytest.mark.parametrize("ties", [False, True])
def test_mean_average_precision(ties: bool) -> None:
    random = np.random.default_rng(0)
    scores = random.normal(0, 1, (80, 4))
    scores = np.round(scores, 1) if ties else scores
    truth = (random.random((80, 4)) < [0.5, 0.2, 0.02, 0.0]).astype(np.int8)
    found = resampled(torch.from_numpy(scores), torch.from_numpy(truth), "multilabel", resamples=30)
    for value, rows in zip(found, drawn_rows(80, 30, 0), strict=True):
        have = [i for i in range(4) if truth[rows, i].any()]
        ap = [reference.average_precision_score(truth[rows, i], scores[rows, i]) for i in have]
        assert value == pytest.approx(np.mean(ap), abs=1e-12)


def test_unknown_entries_count_for_nothing() -> None:
    random = np.random.default_rng(1)
    scores = torch.from_numpy(random.normal(0, 1, (60, 3)))
    truth = torch.from_numpy(random.integers(-1, 2, (60, 3)).astype(np.int8))
    found = resampled(scores, truth, "multilabel", resamples=5)
    for value, rows in zip(found, drawn_rows(60, 5, 0), strict=True):
        assert value == pytest.approx(metrics.score(scores[rows], truth[rows], "multilabel"))


@pytest.mark.parametrize("ties", [False, True])
def test_auroc(ties: bool) -> None:
    random = np.random.default_rng(2)
    margin = random.normal(0, 1, 70)
    margin = np.round(margin, 1) if ties else margin
    truth = (random.random(70) < 0.3).astype(np.int64)
    logits = torch.from_numpy(np.stack([-margin / 2, margin / 2], 1))
    found = resampled(logits, torch.from_numpy(truth), "binary", resamples=30)
    for value, rows in zip(found, drawn_rows(70, 30, 0), strict=True):
        assert value == pytest.approx(reference.roc_auc_score(truth[rows], margin[rows]), abs=1e-12)
    assert np.isnan(resampled(logits, torch.zeros(70).long(), "binary", resamples=3)).all()


def test_macro_f1() -> None:
    random = np.random.default_rng(3)
    logits = random.normal(0, 1, (50, 4))
    logits[:, 3] = -9  # never predicted
    truth = random.integers(0, 3, 50)
    found = resampled(torch.from_numpy(logits), torch.from_numpy(truth), "multiclass", resamples=30)
    for value, rows in zip(found, drawn_rows(50, 30, 0), strict=True):
        wanted = reference.f1_score(truth[rows], logits[rows].argmax(1), average="macro")
        assert value == pytest.approx(wanted, abs=1e-12)


def test_a_run_against_itself_and_a_worse_one() -> None:
    random = np.random.default_rng(4)
    truth = torch.from_numpy((random.random((300, 5)) < 0.3).astype(np.int8))
    good = truth + torch.from_numpy(random.normal(0, 0.7, (300, 5)))
    bad = truth + torch.from_numpy(random.normal(0, 2.0, (300, 5)))
    pairs = [resampled(x, truth, "multilabel", resamples=200) for x in (good, good.clone(), bad)]
    assert interval(pairs[1] - pairs[0]) == (0, 0)
    low, high = interval(pairs[2] - pairs[0])
    assert low < high < 0
    again = resampled(bad, truth, "multilabel", resamples=200)
    assert (again == pairs[2]).all()
    other = resampled(bad, truth, "multilabel", resamples=200, seed=1)
    assert not (other == pairs[2]).any()
    # Rows of one pair are the same: the spread is less than that of two drawn apart.
    assert (pairs[2] - pairs[0]).std() < (other - pairs[0]).std()


def test_large_sets_are_resampled_less(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, truth = torch.randn(40, 3), torch.ones(40, 3, dtype=torch.int8)
    assert len(resampled(logits, truth, "multilabel")) == 1000
    monkeypatch.setattr(bootstrap, "ENTRIES", 120 * 300)
    monkeypatch.setattr(bootstrap, "BLOCK", 100)
    assert len(resampled(logits, truth, "multilabel")) == 300
    monkeypatch.setattr(bootstrap, "ENTRIES", 1)
    assert len(resampled(logits, truth, "multilabel")) == 200
