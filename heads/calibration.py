"""How far probabilities can be taken at their word: calibration error, Brier score, log loss.

Guo et al. 2017 for the binned error. Legend: n rows, L columns (labels).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmc.heads.ranking import CHUNK_ENTRIES
from mmc.heads.temperature import log_loss, probabilities

BINS = 15
# Most entries of a multilabel matrix are sure negatives in the first bin, which hides the rest.
FLOOR = 0.1
COMPARED = ("ece", "ece_above_0.1", "log_loss", "brier")
"""What is given for the probabilities without the temperature too, as ``<name>_uncalibrated``."""


def calibration(logits: Tensor, targets: Tensor, task: str, temperature: float) -> dict[str, float]:
    """ece, brier, log_loss and more of the probabilities at ``temperature`` and at 1.

    Args:
        logits: float (n, L).
        targets: multilabel int (n, L) in {-1, 0, 1}; otherwise int64 (n,); -1 is left out.

    Of a binary task the error is that of the second class, of a multiclass task that of the
    predicted class, and the Brier score is the sum over classes.
    """
    after = _calibration(logits, targets, task, temperature)
    before = after if temperature == 1 else _calibration(logits, targets, task, 1.0)
    plain = {f"{name}_uncalibrated": before[name] for name in COMPARED if name in before}
    return {"temperature": temperature, **after, **plain}


def _calibration(
    logits: Tensor, targets: Tensor, task: str, temperature: float
) -> dict[str, float]:
    columns = logits.shape[1] if task == "multilabel" else 1
    binned, squares, rows = BinnedCalibration(columns, logits.device), 0.0, 0
    step = max(1, CHUNK_ENTRIES // max(logits.shape[1], 1))
    for i in range(0, len(logits), step):
        block = targets[i : i + step]
        p = probabilities(logits[i : i + step], task, temperature)
        known = block >= 0
        if task == "multilabel":
            binned.add(p, block == 1, known)
        elif task == "binary":
            binned.add(p[:, 1:], (block == 1)[:, None], known[:, None])
        else:
            confidence, predicted = p.max(1)
            binned.add(confidence[:, None], (predicted == block)[:, None], known[:, None])
            truth = F.one_hot(block[known].long(), p.shape[1])
            squares += float((p[known].double() - truth).square().sum())
            rows += int(known.sum())
    found = {**binned.result(), "log_loss": log_loss(logits, targets, task, temperature)}
    if task != "multiclass":
        return found
    brier = squares / rows if rows else float("nan")
    return {"ece": found["ece"], "log_loss": found["log_loss"], "brier": brier}


class BinnedCalibration:
    """Counts of probabilities and outcomes in 15 equal-width bins, gathered block by block."""

    def __init__(self, num_labels: int, device: torch.device) -> None:
        shape = (3, num_labels * BINS)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self.above = torch.zeros(3, BINS, dtype=torch.float64, device=device)
        self.squared = 0.0

    def add(self, probabilities: Tensor, outcomes: Tensor, known: Tensor) -> None:
        """Add a block: probabilities float (n, L), outcomes bool (n, L), known bool (n, L)."""
        p = probabilities.double()
        columns = torch.arange(p.shape[1], device=p.device) * BINS
        bins = (p * BINS).long().clamp(max=BINS - 1)
        self.sums += _binned((bins + columns)[known], p[known], outcomes[known], self.sums.shape[1])
        above = known & (p > FLOOR)
        self.above += _binned(bins[above], p[above], outcomes[above], BINS)
        self.squared += float((p - outcomes.double())[known].square().sum())

    def result(self) -> dict[str, float]:
        """ece over all entries, its mean over labels, ece of entries above 0.1, Brier score.

        NaN when nothing was added.
        """
        per_label = self.sums.view(3, -1, BINS)
        total = self.sums[0].sum()
        return {
            "ece": float(_error(per_label.sum(1))),
            "ece_per_label": float(_error(per_label).nanmean()),
            "ece_above_0.1": float(_error(self.above)),
            "brier": float(self.squared / total),
        }


def _error(sums: Tensor) -> Tensor:
    """Expected calibration error (...) from sums (3, ..., 15): counts, probabilities, outcomes."""
    counts, p, y = sums
    error: Tensor = (p - y).abs().sum(-1) / counts.sum(-1)
    return error


def _binned(bins: Tensor, p: Tensor, outcomes: Tensor, num_bins: int) -> Tensor:
    """Counts, sums of probabilities and of outcomes per bin: float64 (3, bins)."""
    return torch.stack(
        [
            torch.bincount(bins, minlength=num_bins).double(),
            torch.bincount(bins, weights=p, minlength=num_bins),
            torch.bincount(bins[outcomes], minlength=num_bins).double(),
        ]
    )
