"""Decision thresholds: which probabilities count as "yes", tuned on validation data only.

Legend: N rows, C labels, K candidate cuts. A label is predicted when ``probability >= threshold``.

Lipton et al. 2014 (F1-optimal thresholding) for the sweep; Dinkelbach 1967 (fractional programming)
for the exact micro-F1 optimum with one threshold per label.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Objective = Literal["micro", "macro", "samples"]
Mode = Literal["default", "global", "per_label", "argmax"]
Fit = Callable[[Tensor, Tensor, str, bool], Tensor]

LOWEST, HIGHEST = 0.01, 0.99
DEFAULT = 0.5
# Above this many distinct values a common threshold is searched on a grid of 0.001 instead.
MAX_CUTS = 2048
# Two candidate sets whose objective differs by less are a tie (float64 sums in another order).
TIE = 1e-12


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Thresholds on probabilities, in the order of the label set."""

    values: tuple[float, ...]
    """One per label (multilabel), one on P(second class) (binary), none (multiclass: arg-max)."""
    mode: Mode = "default"
    """How they were made: 0.5 kept, one common value, one per label, or none needed."""
    objective: str | None = None
    """The F1 that was maximised; None when nothing was tuned."""
    held_out: dict[str, float] = field(default_factory=dict)
    """Objective of every mode on the half it was not fitted on (2-fold cross-fit)."""

    @classmethod
    def default(cls, task: str, num_labels: int) -> "Thresholds":
        """0.5 for every decision; arg-max for multiclass."""
        if task == "multiclass":
            return cls(values=(), mode="argmax")
        return cls(values=(DEFAULT,) * (1 if task == "binary" else num_labels))

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary that `from_json` reads back."""
        return {**asdict(self), "values": list(self.values)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Thresholds":
        """Thresholds from what `to_json` gave."""
        return cls(**{**data, "values": tuple(data["values"])})


def decide(
    probabilities: Tensor, task: str, thresholds: Thresholds, *, at_least_one: bool = False
) -> Tensor:
    """Which labels are predicted: bool (n, C) from float probabilities (n, C).

    Multiclass and binary rows get exactly one label. ``at_least_one`` gives a multilabel row that
    passes no threshold its most probable label.
    """
    n, num_labels = probabilities.shape
    chosen = torch.zeros(n, num_labels, dtype=torch.bool, device=probabilities.device)
    if task == "multiclass":
        return chosen.scatter_(1, probabilities.argmax(1, keepdim=True), True)
    cuts = torch.tensor(thresholds.values, dtype=torch.float64, device=probabilities.device)
    if task == "binary":
        chosen[:, 1] = probabilities[:, 1].double() >= cuts[0]
        chosen[:, 0] = ~chosen[:, 1]
        return chosen
    chosen = probabilities.double() >= cuts
    if at_least_one:
        empty = ~chosen.any(1)
        chosen[empty, probabilities[empty].argmax(1)] = True
    return chosen


def tune(
    probabilities: Tensor,
    targets: Tensor,
    task: str,
    *,
    objective: Objective | None = None,
    min_positives: int = 10,
    shrinkage: float = 20.0,
    seed: int = 0,
) -> Thresholds:
    """Choose thresholds on validation data: 0.5, one common value, or one per label.

    Each way is fitted on one half of the rows and scored on the other, both ways round; the one
    with the best held-out objective is fitted again on all rows (the simpler one on a tie).

    Args:
        probabilities: float (N, C).
        targets: multilabel int (N, C) in {-1, 0, 1}; otherwise int64 (N,) class indices, -1
            unknown. Unknown entries are left out.
        objective: default micro-F1 for multilabel, macro-F1 over both classes for binary.
        min_positives: a label with fewer positives takes the common threshold.
        shrinkage: how many positives the common threshold counts for when a label's own threshold
            is drawn towards it.
        seed: of the split into halves.
    """
    num_labels = probabilities.shape[1]
    if task == "multiclass":
        return Thresholds.default(task, num_labels)
    if task == "binary":
        objective = objective or "macro"
        scores, truth = _binary_columns(probabilities, targets)
    else:
        objective = objective or "micro"
        scores, truth = _mask_unknown(probabilities, targets)
    fitters: dict[Mode, Fit] = {"default": _fit_default, "global": _fit_global}
    if task == "multilabel" and num_labels > 1:
        fitters["per_label"] = _PerLabel(min_positives, shrinkage)
    n = len(scores)
    if n < 4 or not bool((truth == 1).any()):
        return Thresholds.default(task, num_labels)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(scores.device)
    halves = order[: n // 2].sort().values, order[n // 2 :].sort().values
    held_out: dict[str, float] = {}
    for mode, fit in fitters.items():
        chosen = torch.zeros_like(truth, dtype=torch.bool)
        for seen, unseen in (halves, halves[::-1]):
            cuts = fit(scores[seen], truth[seen], objective, task == "binary")
            chosen[unseen] = scores[unseen] >= cuts
        held_out[mode] = objective_value(chosen, truth, objective, binary=task == "binary")
    best = max(held_out.values())
    mode = next(m for m in fitters if held_out[m] >= best - TIE)
    cuts = fitters[mode](scores, truth, objective, task == "binary")
    return Thresholds(
        values=tuple(float(c) for c in cuts), mode=mode, objective=objective, held_out=held_out
    )


def objective_value(
    chosen: Tensor, truth: Tensor, objective: str, *, binary: bool = False
) -> float:
    """F1 of decisions bool (N, C) against truth int8 (N, C); an empty class or row counts 0.

    With ``binary`` C is 1; micro and samples are the accuracy, macro the mean F1 of both classes.
    """
    yes = truth == 1
    if binary:
        chosen, yes = torch.cat([~chosen, chosen], 1), torch.cat([~yes, yes], 1)
    dim = {"micro": None, "macro": 0, "samples": 1}[objective]
    tp = (chosen & yes).sum(dim, dtype=torch.float64)
    size = chosen.sum(dim, dtype=torch.float64) + yes.sum(dim, dtype=torch.float64)
    return float((2 * tp / size.clamp(min=1)).mean())


def _mask_unknown(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with any known entry; an unknown entry is never predicted and never true."""
    rows = (targets >= 0).any(1)
    scores, truth = probabilities[rows].double(), targets[rows].to(torch.int8)
    return torch.where(truth < 0, -1.0, scores), truth.clamp(min=0)


def _binary_columns(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """P(second class) and truth as one column each, known rows only."""
    known = targets >= 0
    return probabilities[known, 1:2].double(), targets[known].to(torch.int8)[:, None]


# -- fitting: each returns float64 (C,) thresholds ------------------------------------------------


def _fit_default(scores: Tensor, truth: Tensor, objective: str, binary: bool) -> Tensor:
    return torch.full((scores.shape[1],), DEFAULT, dtype=torch.float64, device=scores.device)


def _fit_global(scores: Tensor, truth: Tensor, objective: str, binary: bool) -> Tensor:
    """The common threshold with the best objective, the nearest to 0.5 on a tie."""
    cuts = _common_cuts(scores)
    if binary:
        values = _binary_curve(scores, truth, cuts, objective)
    else:
        values = _common_curve(scores, truth, cuts, objective)
    best = values >= values.max() - TIE
    distance = torch.where(best, (cuts - DEFAULT).abs(), torch.inf)
    return cuts[distance.argmin()].expand(scores.shape[1]).clone()


@dataclass(frozen=True)
class _PerLabel:
    """One threshold per label, drawn towards the common one."""

    min_positives: int
    shrinkage: float

    def __call__(self, scores: Tensor, truth: Tensor, objective: str, binary: bool) -> Tensor:
        common = _fit_global(scores, truth, objective, binary)
        own = per_label_cuts(scores, truth, objective, common)
        positives = truth.sum(0, dtype=torch.float64)
        share = positives / (positives + self.shrinkage).clamp(min=1e-9)
        mixed = share * own + (1 - share) * common
        return torch.where(positives < self.min_positives, common, mixed).clamp(LOWEST, HIGHEST)


def _common_cuts(scores: Tensor) -> Tensor:
    """Candidate common thresholds, ascending: between every two values, or a fine grid."""
    values = _distinct(scores)
    values = values[values >= 0]
    if len(values) > MAX_CUTS:
        return torch.linspace(LOWEST, HIGHEST, 981, dtype=torch.float64, device=scores.device)
    edges = torch.cat([values.new_zeros(1), values, values.new_ones(1)])
    middles = ((edges[:-1] + edges[1:]) / 2).clamp(LOWEST, HIGHEST)
    return _distinct(torch.cat([middles, middles.new_full((1,), DEFAULT)]))


def _distinct(values: Tensor) -> Tensor:
    """Sorted distinct values."""
    distinct: Tensor = torch.unique(values, sorted=True)
    return distinct


def _common_curve(scores: Tensor, truth: Tensor, cuts: Tensor, objective: str) -> Tensor:
    """Objective (K,) of every common threshold in ``cuts`` (ascending), in O(N C log C).

    Within a group (all entries, a label, a sample) entries are added from the most probable down;
    each changes the group's F1 by a step that holds for every cut at or below its probability.
    """
    if objective == "micro":
        grouped, yes = scores.reshape(1, -1), truth.reshape(1, -1)
    elif objective == "macro":
        grouped, yes = scores.T, truth.T
    else:
        grouped, yes = scores, truth
    ranked, order = grouped.sort(dim=1, descending=True)
    tp = yes.gather(1, order).cumsum(1, dtype=torch.float64)
    size = torch.arange(1, grouped.shape[1] + 1, dtype=torch.float64, device=scores.device)
    f1 = 2 * tp / (size + tp[:, -1:])
    steps = f1.diff(dim=1, prepend=f1.new_zeros(len(f1), 1))
    reached = torch.searchsorted(cuts, ranked.contiguous(), right=True)
    gained = torch.zeros(len(cuts) + 1, dtype=torch.float64, device=scores.device)
    gained.index_add_(0, reached.reshape(-1), steps.reshape(-1))
    # An entry that reaches r cuts is predicted at cuts 0 .. r-1.
    return gained.flip(0).cumsum(0).flip(0)[1:] / len(grouped)


def _binary_curve(scores: Tensor, truth: Tensor, cuts: Tensor, objective: str) -> Tensor:
    """Objective (K,) of thresholds on P(second class): accuracy, or the mean F1 of both classes."""
    ranked = scores[:, 0].sort().values
    positive = scores[truth[:, 0] == 1, 0].sort().values
    n, num_pos = len(ranked), len(positive)
    predicted = (n - torch.searchsorted(ranked, cuts)).double()
    tp = (num_pos - torch.searchsorted(positive, cuts)).double()
    tn = n - num_pos - (predicted - tp)
    if objective != "macro":
        return (tp + tn) / n
    yes = 2 * tp / (predicted + num_pos).clamp(min=1)
    no = 2 * tn / (2 * n - predicted - num_pos).clamp(min=1)
    return (yes + no) / 2


def per_label_cuts(scores: Tensor, truth: Tensor, objective: str, common: Tensor) -> Tensor:
    """The best threshold of every label on these rows, float64 (C,), before any shrinkage.

    macro: each label's own F1. micro: the exact optimum over all combinations. samples: coordinate
    ascent from ``common``. Ties go to the cut nearest to ``common``.
    """
    sweep = _Sweep(scores, truth, common)
    if objective == "macro":
        best = sweep.best(2 * sweep.tp / (sweep.size + sweep.positives).clamp(min=1))
    elif objective == "micro":
        best = _micro_optimum(sweep)
    else:
        return _samples_ascent(sweep, scores, truth, common)
    return sweep.cuts.gather(0, best[None])[0]


class _Sweep:
    """Every cut of every label: column l, row k predicts the k best-scored rows of label l."""

    def __init__(self, scores: Tensor, truth: Tensor, common: Tensor) -> None:
        n, num_labels = scores.shape
        ranked, self.order = scores.sort(dim=0, descending=True)
        hits = truth.gather(0, self.order).cumsum(0, dtype=torch.float64)
        self.tp = torch.cat([hits.new_zeros(1, num_labels), hits])
        self.size = torch.arange(n + 1, dtype=torch.float64, device=scores.device)[:, None]
        self.positives = self.tp[-1:]
        above = torch.cat([ranked.new_ones(1, num_labels), ranked])
        below = torch.cat([ranked, ranked.new_zeros(1, num_labels)])
        self.cuts = ((above + below) / 2).clamp(LOWEST, HIGHEST)
        # Not inside a block of equal scores, and reachable within [LOWEST, HIGHEST]; what 0.5
        # predicts always is, so every label keeps at least one cut.
        self.valid = (self.cuts <= above) & (self.cuts > below)
        self.distance = (self.cuts - common).abs()

    def best(self, values: Tensor) -> Tensor:
        """Row (C,) of the largest value among valid cuts, nearest to the common one on a tie."""
        values = torch.where(self.valid, values, -torch.inf)
        tied = values >= values.max(0).values - TIE
        return torch.where(tied, self.distance, torch.inf).argmin(0)


def _micro_optimum(sweep: _Sweep) -> Tensor:
    """Rows (C,) that maximise micro-F1 over all combinations of cuts (Dinkelbach's iteration).

    With F the value reached so far, each label takes the cut with the largest 2 TP - F * size;
    F rises until it is the optimum, in a handful of rounds.
    """
    total = sweep.positives.sum()
    value = torch.zeros((), dtype=torch.float64, device=sweep.tp.device)
    while True:
        best = sweep.best(2 * sweep.tp - value * sweep.size)
        tp = sweep.tp.gather(0, best[None]).sum()
        reached = 2 * tp / (best.sum() + total).clamp(min=1)
        if reached <= value + TIE:
            return best
        value = reached


def _samples_ascent(sweep: _Sweep, scores: Tensor, truth: Tensor, common: Tensor) -> Tensor:
    """Thresholds (C,) by coordinate ascent on samples-F1, one label at a time, from ``common``."""
    cuts = common.clone()
    chosen = scores >= cuts
    yes = truth == 1
    tp, size = (chosen & yes).sum(1).double(), (chosen.sum(1) + yes.sum(1)).double()
    for _ in range(5):
        moved = False
        for label in range(scores.shape[1]):
            hit, on = yes[:, label].double(), chosen[:, label].double()
            rest_tp, rest_size = tp - on * hit, size - on
            without = 2 * rest_tp / rest_size.clamp(min=1)
            gain = 2 * (rest_tp + hit) / (rest_size + 1) - without
            totals = torch.cat([gain.new_zeros(1), gain[sweep.order[:, label]].cumsum(0)])
            totals = torch.where(sweep.valid[:, label], totals, -torch.inf)
            if totals.max() <= (gain * on).sum() + TIE:
                continue
            tied = totals >= totals.max() - TIE
            row = torch.where(tied, sweep.distance[:, label], torch.inf).argmin()
            cuts[label] = sweep.cuts[row, label]
            chosen[:, label] = scores[:, label] >= cuts[label]
            on = chosen[:, label].double()
            tp, size, moved = rest_tp + on * hit, rest_size + on, True
        if not moved:
            break
    return cuts
