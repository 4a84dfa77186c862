"""What a page is made of: a run's answers on some rows, the truth, figures and their intervals.

Legend: n rows, C labels, R resamples of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mmc.heads import metrics
from mmc.heads.artifact import Run
from mmc.heads.bootstrap import Floats, drawn, how_often, interval, resampled
from mmc.heads.calibration import BINS, BinnedCalibration
from mmc.heads.evaluate import task_targets
from mmc.heads.metrics import HEADLINE
from mmc.heads.predict import Predictor, aligned_targets
from mmc.heads.splits import Rows, rows_digest
from mmc.heads.temperature import probabilities
from mmc.heads.thresholds import decide

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

Bin = tuple[int, float, float]

LABELS_AT_ONCE = 128
"""Whose counts are resampled together."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A run's answers on rows with known labels; tensors are on the CPU."""

    split: str
    rows: Rows
    """(n,) of the store."""
    logits: Tensor
    """float32 (n, C)."""
    probabilities: Tensor
    """float32 (n, C), at the run's temperature."""
    decisions: Tensor
    """bool (n, C), at the run's thresholds."""
    truth: Tensor
    """int8 (n, C): 0 or 1, -1 where a label is not known; every row knows one or more."""
    metrics: dict[str, Any]
    """As `mmc.heads.metrics.evaluate` gives them, with rows_digest."""

    def __len__(self) -> int:
        return len(self.rows)


def measure(run: Run, store: "EmbeddingStore", rows: Rows, split: str, device: str) -> Measured:
    """A run on rows that are labelled and have its features.

    Raises:
        InputError, FingerprintMismatchError: the store has not the features of the run.
    """
    logits = Predictor(run, store, device=device).logits(rows).cpu()
    truth = aligned_targets(run, store, rows)
    targets = task_targets(truth, run.task)
    if run.task != "multilabel":  # rows without exactly one label say nothing to such a task
        known = targets >= 0
        rows, logits, truth, targets = (
            rows[known.numpy()],
            logits[known],
            truth[known],
            targets[known],
        )
    p = probabilities(logits, run.task, run.temperature)
    found = metrics.evaluate(
        logits,
        targets,
        run.task,
        label_set=run.label_set,
        thresholds=run.thresholds,
        temperature=run.temperature,
    )
    found["rows_digest"] = rows_digest(store, rows, targets)
    return Measured(
        split=split,
        rows=rows,
        logits=logits,
        probabilities=p,
        decisions=decide(p, run.task, run.thresholds),
        truth=truth,
        metrics=found,
    )


def losses(measured: Measured, run: Run) -> Tensor:
    """float64 (n,): -log p of what is true, for multilabel its mean over the known labels."""
    exact = measured.logits.double() / run.temperature
    if run.task == "multilabel":
        known = (measured.truth >= 0).double()
        return F.binary_cross_entropy_with_logits(
            exact, measured.truth.clamp(min=0).double(), weight=known, reduction="none"
        ).sum(1) / known.sum(1)
    return F.cross_entropy(exact, measured.truth.argmax(1), reduction="none")


def reliability(
    measured: Measured, task: str, temperature: float
) -> list[tuple[int, float, float]]:
    """(entries, mean probability, share that is true) of each of 15 bins that holds any.

    Of a binary task the probability of the second class, of a multiclass task that of the
    predicted class, else of every label.
    """
    p = probabilities(measured.logits, task, temperature)
    yes, known = measured.truth == 1, measured.truth >= 0
    if task == "binary":
        p, yes = p[:, 1:], yes[:, 1:]
    elif task == "multiclass":
        p, place = p.max(1, keepdim=True)
        yes = yes.gather(1, place)
    binned = BinnedCalibration(p.shape[1], p.device)
    binned.add(p, yes, known if task == "multilabel" else torch.ones_like(yes))
    sums = binned.sums.view(3, -1, BINS).sum(1)
    return [
        (int(count), float(total / count), float(true / count))
        for count, total, true in sums.T
        if count > 0
    ]


def intervals(measured: Measured, task: str, *, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of the headline figures: rows drawn with replacement, seeded.

    NaN where the figure itself lies outside: of labels with one sample or two, draws hold copies of
    it or none, whose figures are not those of other samples.
    """
    targets = task_targets(measured.truth, task)
    ranked = {"multilabel": ("mAP",), "binary": ("auroc", "ap"), "multiclass": ()}[task]
    draws = {
        name: resampled(measured.logits, targets, task, metric=name, seed=seed) for name in ranked
    }
    count = len(next(iter(draws.values()))) if draws else how_often(len(measured))
    blocks: dict[str, list[Floats]] = {}
    for counts in drawn(len(measured), count, seed):
        for name, values in counted(measured, task, counts).items():
            blocks.setdefault(name, []).append(values)
    draws |= {name: np.concatenate(parts) for name, parts in blocks.items()}
    found = {name: interval(values) for name, values in draws.items()}
    for name, (low, high) in found.items():
        value = measured.metrics.get(name)
        if value is not None and not low - 1e-9 <= value <= high + 1e-9:
            found[name] = (float("nan"), float("nan"))
    return found


def counted(measured: Measured, task: str, counts: npt.NDArray[np.int32]) -> dict[str, Floats]:
    """Metrics of decisions, (R,) each, where rows count as often as ``counts`` (R, n) says.

    Definitions are those of `mmc.heads.metrics`, which counts of one give exactly.
    """
    weights = torch.from_numpy(counts).double()
    chosen, yes = measured.decisions & (measured.truth >= 0), measured.truth == 1
    both = chosen & yes
    tp, predicted, true = (_weighted(weights, x) for x in (both, chosen, yes))
    rows = weights.sum(1)
    f1 = 2 * tp / (predicted + true).clamp(min=1)
    if task == "multilabel":
        either = (chosen.sum(1) + yes.sum(1)).double()
        per_row = 2 * both.sum(1).double() / either.clamp(min=1)
        exact = (chosen == yes).all(1).double()
        found = {
            "micro_f1": 2 * tp.sum(1) / (predicted + true).sum(1).clamp(min=1),
            "macro_f1": f1[:, (measured.truth >= 0).any(0)].mean(1),
            "samples_f1": weights @ per_row / rows,
            "subset_accuracy": weights @ exact / rows,
        }
    else:
        recall = torch.where(true > 0, tp / true.clamp(min=1), torch.nan)
        found = {
            "accuracy": tp.sum(1) / rows,
            "macro_f1": torch.where(predicted + true > 0, f1, torch.nan).nanmean(1),
            "balanced_accuracy": recall.nanmean(1),
        }
        if task == "binary":
            found["f1"] = f1[:, 1]
    return {name: values.numpy() for name, values in found.items()}


def _weighted(weights: Tensor, flags: Tensor) -> Tensor:
    """weights (R, n) x flags (n, C) -> float64 (R, C)."""
    return torch.cat([weights @ block.double() for block in _columns(flags)], 1)


def _columns(flags: Tensor) -> Iterator[Tensor]:
    yield from flags.split(LABELS_AT_ONCE, dim=1)


def headline(measured: Measured, task: str) -> float | None:
    """The task's headline metric."""
    value: float | None = measured.metrics[HEADLINE[task]]
    return value
