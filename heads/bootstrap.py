"""Paired bootstrap: is the difference between two runs on the same rows more than chance?

Rows are drawn with replacement, the same for every run, and the headline metric is computed anew
from how often each row was drawn (Efron 1979; percentiles).

Legend: N rows, C labels, R resamples of a block.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmc.heads.metrics import HEADLINE
from mmc.heads.temperature import probabilities

Floats = npt.NDArray[np.float64]

RESAMPLES, FEWEST = 1000, 200
ENTRIES = 2_000_000_000
"""Resamples x rows x labels that are looked at for one run; larger sets are resampled less often,
though never less than 200 times: their intervals are narrow."""
BLOCK = 1 << 22
"""Resamples x rows of a block."""


def resampled(
    logits: Tensor,
    targets: Tensor,
    task: str,
    *,
    metric: str | None = None,
    seed: int = 0,
    resamples: int | None = None,
) -> Floats:
    """A metric of resampled rows, (resamples,); NaN where it is not defined.

    The same seed and number of rows draw the same rows, so values of two runs are pairs.

    Args:
        logits: float (N, C).
        targets: multilabel int8 (N, C) in {-1, 0, 1}; otherwise int64 (N,), -1 unknown.
        metric: the task's headline metric when None; ``ap`` too for a binary task.
        resamples: default 1,000, fewer on large sets.
    """
    logits, targets = logits.detach().cpu().double(), targets.cpu()
    columns = logits.shape[1] if task == "multilabel" else 1
    if resamples is None:
        resamples = how_often(len(logits) * columns)
    measures = {"mAP": _mean_ap, "auroc": _auroc, "ap": _ap, "macro_f1": _macro_f1}
    measure = measures[metric or HEADLINE[task]]
    blocks = drawn(len(logits), resamples, seed)
    return np.concatenate(list(measure(logits, targets, blocks)))


def how_often(entries: int) -> int:
    """Resamples of a set with so many rows x labels: 1,000, fewer on large sets."""
    return min(RESAMPLES, max(FEWEST, ENTRIES // max(1, entries)))


def interval(differences: Floats, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of resampled values; NaN without any."""
    known = differences[~np.isnan(differences)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def drawn(rows: int, resamples: int, seed: int) -> Iterator[npt.NDArray[np.int32]]:
    """How often each row was drawn, (R, N), block by block; the same for the same seed."""
    random = np.random.default_rng(seed)
    step = max(1, BLOCK // max(rows, 1))
    for i in range(0, resamples, step):
        count = min(step, resamples - i)
        places = random.integers(0, rows, (count, rows)) + rows * np.arange(count)[:, None]
        counts = np.bincount(places.ravel(), minlength=count * rows)
        yield counts.reshape(count, rows).astype(np.int32)


class _Ranked:
    """One label's known rows by falling score, for precision and the ROC curve under counts."""

    def __init__(self, scores: Floats, truth: npt.NDArray[np.int8]) -> None:
        known = np.flatnonzero(truth >= 0)
        self.order = known[np.argsort(-scores[known], kind="stable")]
        falling, yes = -scores[self.order], truth[self.order] == 1
        self.positives = self.order[yes]
        # Ties count as one: up to the last row of a positive's score, and before its first.
        self.last = np.searchsorted(falling, falling[yes], side="right") - 1
        self.first = np.searchsorted(falling, falling[yes], side="left")
        own = falling[yes]
        self.last_positive = np.searchsorted(own, own, side="right") - 1
        self.first_positive = np.searchsorted(own, own, side="left")

    def ap(self, counts: npt.NDArray[np.int32]) -> Floats:
        """Average precision (R,) of rows that were drawn ``counts`` (R, N) times."""
        if not len(self.positives):
            return np.full(len(counts), np.nan)
        above = counts[:, self.order].cumsum(1, dtype=np.int32)[:, self.last]
        drawn = counts[:, self.positives]
        hits = drawn.cumsum(1, dtype=np.int32)[:, self.last_positive]
        total = drawn.sum(1)
        found = (drawn * (hits / np.maximum(above, 1))).sum(1) / np.maximum(total, 1)
        return np.where(total > 0, found, np.nan)

    def auroc(self, counts: npt.NDArray[np.int32]) -> Floats:
        """Area under the ROC curve (R,)."""
        if not len(self.positives):
            return np.full(len(counts), np.nan)
        zero = np.zeros((len(counts), 1), np.int64)
        all_rows = np.concatenate([zero, counts[:, self.order].cumsum(1)], 1)
        drawn = counts[:, self.positives]
        hits = np.concatenate([zero, drawn.cumsum(1)], 1)
        total, positives = all_rows[:, -1], hits[:, -1]
        negatives = total - positives
        # Negatives above a positive, and those that tie with it.
        above = all_rows[:, self.first] - hits[:, self.first_positive]
        tied = all_rows[:, self.last + 1] - hits[:, self.last_positive + 1] - above
        wins = (drawn * (negatives[:, None] - above - tied / 2)).sum(1)
        pairs = positives * negatives
        return np.where(pairs > 0, wins / np.maximum(pairs, 1), np.nan)


def _mean_ap(
    logits: Tensor, targets: Tensor, blocks: Iterator[npt.NDArray[np.int32]]
) -> Iterator[Floats]:
    scores, truth = logits.numpy(), targets.numpy()
    labels = [_Ranked(scores[:, i], truth[:, i]) for i in range(scores.shape[1])]
    for counts in blocks:
        yield _nanmean([label.ap(counts) for label in labels])


def _auroc(
    logits: Tensor, targets: Tensor, blocks: Iterator[npt.NDArray[np.int32]]
) -> Iterator[Floats]:
    ranked = _second_class(logits, targets)
    for counts in blocks:
        yield ranked.auroc(counts)


def _ap(
    logits: Tensor, targets: Tensor, blocks: Iterator[npt.NDArray[np.int32]]
) -> Iterator[Floats]:
    ranked = _second_class(logits, targets)
    for counts in blocks:
        yield ranked.ap(counts)


def _second_class(logits: Tensor, targets: Tensor) -> _Ranked:
    margin = (logits[:, 1] - logits[:, 0]).numpy()
    return _Ranked(margin, targets.numpy().astype(np.int8))


def _macro_f1(
    logits: Tensor, targets: Tensor, blocks: Iterator[npt.NDArray[np.int32]]
) -> Iterator[Floats]:
    """Of the most probable class, over classes that were drawn or predicted."""
    classes = logits.shape[1]
    predicted, truth = probabilities(logits, "multiclass").argmax(1), targets.long()
    known = truth >= 0
    one_hot = [torch.nn.functional.one_hot(x[known], classes).numpy() for x in (predicted, truth)]
    right = one_hot[0] * one_hot[1]
    for counts in blocks:
        drawn = counts[:, known.numpy()].astype(np.float64)
        size = drawn @ (one_hot[0] + one_hot[1])
        f1 = np.where(size > 0, 2 * (drawn @ right) / np.maximum(size, 1), np.nan)
        yield _nanmean(list(f1.T))


def _nanmean(columns: Sequence[Floats]) -> Floats:
    """Mean over columns of (R,) each, undefined ones left out; NaN where all are."""
    stacked = np.stack(columns)
    known = ~np.isnan(stacked)
    count = known.sum(0)
    total = np.where(known, stacked, 0.0).sum(0)
    mean: Floats = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return mean
