"""How far probabilities can be taken at their word: expected calibration error and Brier score.

Guo et al. 2017 for the binned error. Legend: n rows, L columns (labels).
"""

import torch
from torch import Tensor

BINS = 15
# Most entries of a multilabel matrix are sure negatives in the first bin, which hides the rest.
FLOOR = 0.1


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
            "ece_per_label": float(_error(per_label).mean()),
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
