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

from mmc.heads import cuts as search
from mmc.heads.cuts import DEFAULT, HIGHEST, LOWEST, TIE

Objective = Literal["micro", "macro", "samples"]
Mode = Literal["default", "global", "per_label", "argmax"]
Fit = Callable[[Tensor, Tensor, str, bool], Tensor]


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

    def check(self, task: str, num_labels: int) -> None:
        """Raise ValueError unless these are thresholds of such a task."""
        wanted = len(Thresholds.default(task, num_labels).values)
        if len(self.values) != wanted:
            raise ValueError(f"{len(self.values)} thresholds where {wanted} are needed")
        if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in self.values):
            raise ValueError("a threshold is not in [0, 1]")

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
    mode: Mode | None = None,
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
        mode: the only way to try; None: all of them.
        min_positives: a label with fewer positives takes the common threshold, and with fewer of
            all labels together that is 0.5.
        shrinkage: how many positives the common threshold counts for when a label's own threshold
            is drawn towards it, and 0.5 when the common one is.
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
    common = _Common(min_positives, shrinkage)
    fitters: dict[Mode, Fit] = {"default": _fit_default, "global": common}
    if task == "multilabel" and num_labels > 1:
        fitters["per_label"] = _PerLabel(common)
    if mode is not None:
        fitters = {mode: fitters[mode]}
    n = len(scores)
    if n < 4 or not bool((truth == 1).any()):
        return Thresholds.default(task, num_labels)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(scores.device)
    halves = order[: n // 2].sort().values, order[n // 2 :].sort().values
    held_out: dict[str, float] = {}
    for way, fit in fitters.items():
        chosen = torch.zeros_like(truth, dtype=torch.bool)
        for seen, unseen in (halves, halves[::-1]):
            cuts = fit(scores[seen], truth[seen], objective, task == "binary")
            for rows in unseen.split(_block_rows(scores)):
                chosen[rows] = scores[rows] >= cuts
        held_out[way] = objective_value(chosen, truth, objective, binary=task == "binary")
    best = max(held_out.values())
    way = next(m for m in fitters if held_out[m] >= best - TIE)
    cuts = fitters[way](scores, truth, objective, task == "binary")
    return Thresholds(
        values=tuple(float(c) for c in cuts), mode=way, objective=objective, held_out=held_out
    )


def objective_value(chosen: Tensor, truth: Tensor, objective: str, *, binary: bool) -> float:
    """F1 of decisions bool (N, C) against truth int8 (N, C); an empty class or row counts 0.

    With ``binary`` C is 1; micro and samples are the accuracy, macro the mean F1 of both classes.
    """
    if binary:
        chosen, truth = torch.cat([~chosen, chosen], 1), torch.cat([1 - truth, truth], 1)
    # Counts are whole numbers, which add up to the same in any order.
    count = truth.shape[0 if objective == "samples" else 1]
    tp = torch.zeros(count, dtype=torch.float64, device=truth.device)
    size = torch.zeros_like(tp)
    for start in range(0, len(truth), _block_rows(truth)):
        part = slice(start, start + _block_rows(truth))
        yes, given = truth[part] == 1, chosen[part]
        dim, place = (1, part) if objective == "samples" else (0, slice(None))
        tp[place] += (given & yes).sum(dim, dtype=torch.float64)
        size[place] += given.sum(dim, dtype=torch.float64) + yes.sum(dim, dtype=torch.float64)
    if objective == "micro":
        tp, size = tp.sum(), size.sum()
    return float((2 * tp / size.clamp(min=1)).mean())


def _block_rows(values: Tensor) -> int:
    """How many rows of (N, C) are looked at together."""
    return max(1, search.BLOCK_ENTRIES // max(values.shape[1], 1))


def _mask_unknown(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with any known entry; an unknown entry is never predicted and never true."""
    known = targets >= 0
    if known.all():  # as they mostly are: nothing is copied
        return probabilities, targets.to(torch.int8)
    rows = known.any(1)
    scores, truth = probabilities[rows], targets[rows].to(torch.int8)
    return scores.masked_fill_(truth < 0, -1.0), truth.clamp_(min=0)


def _binary_columns(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """P(second class) and truth as one column each, known rows only."""
    known = targets >= 0
    return probabilities[known, 1:2], targets[known].to(torch.int8)[:, None]


# Ways to fit: each returns float64 (C,) thresholds.


def _fit_default(scores: Tensor, truth: Tensor, objective: str, binary: bool) -> Tensor:
    return torch.full((scores.shape[1],), DEFAULT, dtype=torch.float64, device=scores.device)


@dataclass(frozen=True)
class _Common:
    """One threshold for all labels, drawn towards 0.5: a few rows tell little about it."""

    min_positives: int
    shrinkage: float

    def __call__(self, scores: Tensor, truth: Tensor, objective: str, binary: bool) -> Tensor:
        positives = search.positives(truth).sum()
        if binary:
            # Both classes count, and the smaller one decides how well the cut is known.
            positives = torch.minimum(positives, len(truth) - positives)
        best = search.common(scores, truth, objective, binary=binary)
        mixed = self.drawn(best, positives, torch.full_like(best, DEFAULT))
        return mixed.expand(scores.shape[1]).clone()

    def drawn(self, own: Tensor, positives: Tensor, towards: Tensor) -> Tensor:
        """``own`` mixed with ``towards`` by the positives that it rests on; too few count none."""
        share = positives / (positives + self.shrinkage) if self.shrinkage else 1.0
        mixed = share * own + (1 - share) * towards
        return torch.where(positives < self.min_positives, towards, mixed).clamp(LOWEST, HIGHEST)


@dataclass(frozen=True)
class _PerLabel:
    """One threshold per label, drawn towards the common one."""

    common: _Common

    def __call__(self, scores: Tensor, truth: Tensor, objective: str, binary: bool) -> Tensor:
        towards = self.common(scores, truth, objective, binary)
        own = search.per_label(scores, truth, objective, towards)
        return self.common.drawn(own, search.positives(truth), towards)
