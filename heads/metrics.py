"""How good predictions are: one dictionary per task, from logits and targets.

Legend: N rows, C labels. Everything is a fraction in [0, 1] unless its name says otherwise; sums
are float64; what is not defined (a label without positives, an empty split) is None.
Equal to scikit-learn where it defines the same thing (``zero_division=0``).

Targets: multilabel int (N, C) in {-1, 0, 1}; binary and multiclass int64 (N,) class indices;
-1 is unknown and left out.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmc.heads.averages import averaged, mean, ratio, top_k_averaged
from mmc.heads.calibration import calibration
from mmc.heads.ranking import (
    CHUNK_ENTRIES,
    Ranking,
    auroc_interval,
    micro_auroc,
    rank_labels,
    top_k_f1,
)
from mmc.heads.temperature import probabilities
from mmc.heads.thresholds import Thresholds, decide
from mmc.store.errors import InputError, MmcError

# The metric that early stopping and comparisons use when none is named.
HEADLINE = {"multilabel": "mAP", "binary": "auroc", "multiclass": "macro_f1"}
CONFUSION_CLASSES = 200
"""Up to so many classes their whole table of confusions is given: of 3,000 it takes 100 MB of
JSON. Of more the largest `MOST_CONFUSIONS`."""
MOST_CONFUSIONS = 1000
METRICS = {
    "multilabel": ("mAP", "micro_f1", "macro_f1", "samples_f1"),
    "binary": ("auroc", "ap", "accuracy", "macro_f1", "f1"),
    "multiclass": ("macro_f1", "accuracy", "balanced_accuracy"),
}


def score(logits: Tensor, targets: Tensor, task: str, metric: str | None = None) -> float:
    """One number for model selection (larger is better), cheaper than `evaluate`.

    Decisions are taken at 0.5. NaN where the metric is not defined on these rows.

    Raises:
        InputError: the task has no such metric.
    """
    metric = metric or HEADLINE[task]
    if metric not in METRICS[task]:
        raise InputError(
            f"no metric {metric!r} for a {task} task; choose from {', '.join(METRICS[task])}"
        )
    _require_finite(logits)
    if task == "multilabel":
        if metric == "mAP":
            return mean(rank_labels(logits, targets).ap)
        counts = _Decisions(logits, targets, Thresholds.default(task, logits.shape[1]))
        return counts.f1()[metric]
    known = targets >= 0
    logits, targets = logits[known], targets[known]
    if task == "binary" and metric in ("auroc", "ap"):
        ranking = _binary_ranking(logits, targets)
        return float(getattr(ranking, metric))
    thresholds = Thresholds.default(task, logits.shape[1])
    predicted = decide(probabilities(logits, task), task, thresholds).int().argmax(1)
    by_class = _Counts.of(predicted, targets, logits.shape[1])
    return _from_counts(by_class, binary=task == "binary")[metric]


def evaluate(
    logits: Tensor,
    targets: Tensor,
    task: str,
    *,
    label_set: Sequence[str],
    thresholds: Thresholds | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Every metric of the task as a JSON-able dictionary.

    Args:
        logits: float32 or float64 (N, C), on any device; half precision is refused because
            rounded scores tie.
        targets: see the module's docstring.
        thresholds: on probabilities at ``temperature``; 0.5 (arg-max for multiclass) by default.
        temperature: what the logits are divided by for probabilities. What calibration would be
            without it is given as ``ece_uncalibrated`` and so on.
        seed: of the bootstrap interval of a binary AUROC.

    Raises:
        MmcError: logits that are not finite.
    """
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"metrics need float32 logits, got {logits.dtype}")
    if logits.shape[1] != len(label_set):
        raise ValueError(f"logits have {logits.shape[1]} columns for {len(label_set)} labels")
    _require_finite(logits)
    thresholds = thresholds or Thresholds.default(task, len(label_set))
    if task == "multilabel":
        result = _multilabel(logits, targets, thresholds, label_set, temperature)
    else:
        known = targets >= 0
        result = {"samples": int(known.sum()), "unknown": int((~known).sum())}
        logits, targets = logits[known], targets[known]
        if task == "binary":
            result |= _binary(logits, targets, thresholds, label_set, temperature, seed)
        else:
            result |= _multiclass(logits, targets, label_set, temperature)
    plain: dict[str, Any] = _plain({"task": task, **result})
    return plain


def confusion_matrix(predicted: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Counts int64 (C, C): row = true class, column = predicted class, from int64 (N,) indices."""
    index = targets.long() * num_classes + predicted.long()
    return torch.bincount(index, minlength=num_classes**2).view(num_classes, num_classes)


# -- multilabel ------------------------------------------------------------------------------------


class _Decisions:
    """Counts of decisions against truth, gathered over blocks of rows.

    Rows without a known entry are left out; unknown entries count as neither predicted nor true.
    """

    def __init__(
        self, logits: Tensor, targets: Tensor, thresholds: Thresholds, temperature: float = 1.0
    ) -> None:
        self.thresholds, self.temperature = thresholds, temperature
        n, num_labels = logits.shape
        zeros = torch.zeros(num_labels, dtype=torch.float64, device=logits.device)
        self.tp, self.predicted, self.true = zeros.clone(), zeros.clone(), zeros.clone()
        self.known_rows = zeros.clone()
        self.samples = self.known = self.unknown = 0
        self.exact = self.empty = self.samples_sum = self.wrong = 0.0
        step = max(1, CHUNK_ENTRIES // num_labels)
        for i in range(0, n, step):
            self._add(logits[i : i + step], targets[i : i + step])

    def _add(self, logits: Tensor, targets: Tensor) -> None:
        rows = (targets >= 0).any(1)
        logits, targets = logits[rows], targets[rows]
        known, yes = targets >= 0, targets == 1
        p = probabilities(logits, "multilabel", self.temperature)
        chosen = decide(p, "multilabel", self.thresholds) & known
        both = (chosen & yes).sum(1).double()
        size = (chosen.sum(1) + yes.sum(1)).double()
        self.tp += (chosen & yes).sum(0)
        self.predicted += chosen.sum(0)
        self.true += yes.sum(0)
        self.known_rows += known.sum(0)
        self.samples += len(logits)
        self.unknown += int((~rows).sum())
        self.known += int(known.sum())
        self.samples_sum += float((2 * both / size.clamp(min=1)).sum())
        self.empty += float((size == 0).sum())
        self.exact += float((2 * both == size).sum())
        self.wrong += float((chosen ^ yes).sum())

    def f1(self) -> dict[str, float]:
        """micro, macro, weighted and samples F1 (an empty class or row counts 0)."""
        per_label = self.per_label_f1()
        total = float(self.true.sum())
        return {
            "micro_f1": ratio(2 * self.tp.sum(), self.predicted.sum() + self.true.sum()),
            "macro_f1": mean(per_label),
            "weighted_f1": ratio((per_label * self.true).nansum(), total),
            "samples_f1": self.samples_sum / self.samples if self.samples else math.nan,
        }

    def per_label_f1(self) -> Tensor:
        """F1 of every label, float64 (C,); NaN where it is known of no row."""
        f1 = 2 * self.tp / (self.predicted + self.true).clamp(min=1)
        return torch.where(self.known_rows > 0, f1, torch.nan)


def _multilabel(
    logits: Tensor,
    targets: Tensor,
    thresholds: Thresholds,
    label_set: Sequence[str],
    temperature: float,
) -> dict[str, Any]:
    ranking = rank_labels(logits, targets)
    counts = _Decisions(logits, targets, thresholds, temperature)
    rows = max(counts.samples, 1)
    return {
        "samples": counts.samples,
        "unknown": counts.unknown,
        "unknown_entries": counts.samples * len(label_set) - counts.known,
        "labels": len(label_set),
        "labels_evaluated": int((ranking.positives > 0).sum()),
        "mAP": mean(ranking.ap),
        "random_mAP": mean((ranking.positives / ranking.known)[ranking.positives > 0]),
        **counts.f1(),
        **averaged(counts.tp, counts.predicted, counts.true),
        "auroc_macro": mean(ranking.auroc),
        "auroc_micro": micro_auroc(logits, targets),
        "auroc_labels": int((~ranking.auroc.isnan()).sum()),
        "subset_accuracy": counts.exact / rows,
        "hamming_loss": counts.wrong / max(counts.known, 1),
        "cardinality_true": float(counts.true.sum()) / rows,
        "cardinality_predicted": float(counts.predicted.sum()) / rows,
        "empty_both": int(counts.empty),
        "top_k": {str(k): top_k_f1(logits, targets, k) for k in (3, 5) if k < len(label_set)},
        "top_3_above_half": top_k_averaged(logits, targets, 3) if len(label_set) > 3 else None,
        **calibration(logits, targets, "multilabel", temperature),
        "per_label": _label_table(ranking, counts, thresholds, label_set),
    }


def _label_table(
    ranking: Ranking, counts: _Decisions, thresholds: Thresholds, label_set: Sequence[str]
) -> dict[str, list[Any]]:
    """Columns with one value per label, in the label set's order.

    Where single labels of samples are not known, ``known`` says of how many samples each is.
    """
    partly = counts.samples * len(label_set) > counts.known
    return {
        "label": list(label_set),
        "positives": [int(x) for x in ranking.positives],
        **({"known": [int(x) for x in ranking.known]} if partly else {}),
        "predicted": [int(x) for x in counts.predicted],
        "ap": ranking.ap.tolist(),
        "auroc": ranking.auroc.tolist(),
        "f1": counts.per_label_f1().tolist(),
        "precision": (counts.tp / counts.predicted).tolist(),
        "recall": (counts.tp / counts.true).tolist(),
        "threshold": list(thresholds.values),
    }


# -- one label per sample --------------------------------------------------------------------------


def _binary_ranking(logits: Tensor, targets: Tensor) -> Ranking:
    """Ranking of the second class; the difference of logits ties less than the probability."""
    margin = logits[:, 1].double() - logits[:, 0].double()
    return rank_labels(margin[:, None], targets[:, None].to(torch.int8))


def _binary(
    logits: Tensor,
    targets: Tensor,
    thresholds: Thresholds,
    label_set: Sequence[str],
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    ranking = _binary_ranking(logits, targets)
    p = probabilities(logits, "binary", temperature)
    chosen = decide(p, "binary", thresholds)[:, 1]
    counts = _Counts.of(chosen, targets, 2)
    margin = logits[:, 1].double() - logits[:, 0].double()
    return {
        "labels": 2,
        "positive_label": label_set[1],
        "positives": int((targets == 1).sum()),
        "auroc": float(ranking.auroc),
        "auroc_interval": list(auroc_interval(margin, targets, seed=seed)),
        "ap": float(ranking.ap),
        **_from_counts(counts, binary=True),
        **calibration(logits, targets, "binary", temperature),
        "threshold": thresholds.values[0],
        **_confusions(chosen, targets, label_set),
        "per_label": _class_table(counts, label_set),
    }


def _multiclass(
    logits: Tensor, targets: Tensor, label_set: Sequence[str], temperature: float
) -> dict[str, Any]:
    num_classes = len(label_set)
    predicted = probabilities(logits, "multiclass", temperature).argmax(1)
    counts = _Counts.of(predicted, targets, num_classes)
    k = min(5, num_classes)
    truth = torch.nn.functional.one_hot(targets.long(), num_classes)
    # Log-probabilities: those of a confident model do not tie.
    ranking = rank_labels(logits.double().log_softmax(1), truth.to(torch.int8))
    in_top = (logits.topk(k, dim=1).indices == targets[:, None]).any(1)
    return {
        "labels": num_classes,
        **_from_counts(counts, binary=False),
        "top5_accuracy": mean(in_top.double()) if num_classes > 5 else None,
        "mAP": mean(ranking.ap),
        "auroc_macro": mean(ranking.auroc),
        **calibration(logits, targets, "multiclass", temperature),
        **_confusions(predicted, targets, label_set),
        "per_label": _class_table(counts, label_set)
        | {"ap": ranking.ap.tolist(), "auroc": ranking.auroc.tolist()},
    }


class _Counts(NamedTuple):
    """Of every class how many rows are right, have it and were given it: float64 (C,) each."""

    tp: Tensor
    true: Tensor
    predicted: Tensor

    @classmethod
    def of(cls, predicted: Tensor, targets: Tensor, num_classes: int) -> "_Counts":
        """Counts of class indices (N,)."""
        predicted, targets = predicted.long(), targets.long()
        right = targets[predicted == targets]
        found = (torch.bincount(x, minlength=num_classes) for x in (right, targets, predicted))
        return cls(*(x.double() for x in found))


def _confusions(
    predicted: Tensor, targets: Tensor, label_set: Sequence[str]
) -> dict[str, list[Any] | dict[str, list[Any]]]:
    """``confusion``, the counts of `confusion_matrix`; of many classes ``largest_confusions``:
    columns true, predicted and samples, the most frequent first."""
    size = len(label_set)
    if size <= CONFUSION_CLASSES:
        return {"confusion": confusion_matrix(predicted, targets, size).tolist()}
    wrong = predicted.long() != targets.long()
    pairs = targets.long()[wrong] * size + predicted.long()[wrong]
    places, counts = torch.unique(pairs, return_counts=True)  # ascending: ties in a fixed order
    order = counts.argsort(descending=True, stable=True)[:MOST_CONFUSIONS]
    places = places[order]
    table = {
        "true": [label_set[i] for i in (places // size).tolist()],
        "predicted": [label_set[i] for i in (places % size).tolist()],
        "samples": counts[order].tolist(),
    }
    return {"largest_confusions": table}


def _from_counts(counts: _Counts, *, binary: bool) -> dict[str, float]:
    """Accuracy, F1 and balanced accuracy.

    The averages run over classes that occur in the truth or, for F1, among the predictions.
    """
    tp, true, predicted = counts
    f1 = 2 * tp / (true + predicted).clamp(min=1)
    total = float(true.sum())
    result = {
        "accuracy": ratio(tp.sum(), total),
        "balanced_accuracy": mean((tp / true.clamp(min=1))[true > 0]),
        "macro_f1": mean(f1[true + predicted > 0]),
        "weighted_f1": ratio((f1 * true).sum(), total),
        "majority_accuracy": ratio(true.max(), total),
    }
    if binary:
        result["f1"] = float(f1[1])
        result["precision"] = ratio(tp[1], predicted[1])
        result["recall"] = ratio(tp[1], true[1])
    return result


def _class_table(counts: _Counts, label_set: Sequence[str]) -> dict[str, list[Any]]:
    """Columns with one value per class, in the label set's order."""
    tp, true, predicted = counts
    return {
        "label": list(label_set),
        "positives": [int(x) for x in true],
        "predicted": [int(x) for x in predicted],
        "f1": (2 * tp / (true + predicted).clamp(min=1)).tolist(),
        "precision": (tp / predicted).tolist(),
        "recall": (tp / true).tolist(),
    }


# -- small things ----------------------------------------------------------------------------------


def _require_finite(logits: Tensor) -> None:
    # A sum over a finite matrix can overflow, so count instead; by blocks to bound memory.
    bad = 0
    step = max(1, CHUNK_ENTRIES // max(logits.shape[1], 1))
    for i in range(0, len(logits), step):
        bad += int((~logits[i : i + step].isfinite()).any(1).sum())
    if bad:
        raise MmcError(
            f"{bad} of {len(logits)} rows have logits that are not finite; training diverged "
            f"(lower the learning rate) or the features hold NaN (`mmc verify`)"
        )


def _plain(value: Any) -> Any:
    """The same with None for NaN, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
