"""The parts of a page with figures: of the whole run, and label by label.

Legend: n rows, C labels.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from mmc.heads.artifact import Run
from mmc.heads.card import summary_rows
from mmc.heads.leakage import described
from mmc.heads.metrics import HEADLINE
from mmc.heads.report.charts import Point, unit_chart
from mmc.heads.report.markup import cell, esc, folded, number, paragraph, row_head, section, table
from mmc.heads.report.measured import Measured

CARDS = {
    "multilabel": ("mAP", "micro_f1", "macro_f1", "samples_f1", "subset_accuracy"),
    "binary": ("auroc", "ap", "accuracy", "macro_f1", "f1"),
    "multiclass": ("macro_f1", "accuracy", "balanced_accuracy"),
}
NAMES = {
    "mAP": "mAP",
    "micro_f1": "micro-F1",
    "macro_f1": "macro-F1",
    "samples_f1": "samples-F1",
    "subset_accuracy": "all labels right",
    "auroc": "AUROC",
    "ap": "average precision",
    "accuracy": "accuracy",
    "f1": "F1 of the positive class",
    "balanced_accuracy": "balanced accuracy",
}
CHANCE = {
    "multilabel": ("mAP", "random_mAP", "a random ranking"),
    "binary": ("accuracy", "majority_accuracy", "always the larger class"),
    "multiclass": ("accuracy", "majority_accuracy", "always the largest class"),
}
"""Task -> a metric, what it is without any skill, and how that is got."""
WORDS = (
    ("average precision (AP)", "How well samples that have a label are ranked above those that do "
     "not: 1 is perfect, a random ranking gets the share of samples that have the label."),
    ("mAP", "The mean of the average precision over labels; rare labels count as much as common "
     "ones. No threshold is involved."),
    ("precision, recall", "Precision: of the samples that were given a label, the share that "
     "has it. Recall: of the samples that have it, the share that was given it."),
    ("F1", "Precision and recall in one figure (their harmonic mean). micro: over all decisions; "
     "macro: the mean over labels; samples: the mean over samples."),
    ("AUROC", "The chance that a sample of the class is ranked above one that is not of it; 0.5 "
     "is guessing."),
    ("threshold", "The probability from which a label is given; chosen on validation data."),
    ("95 % interval", "Where the figure would lie in 95 of 100 cases if other samples of the same "
     "kind had been drawn (percentile bootstrap over samples)."),
    ("calibration error (ECE)", "By how much probabilities miss the share that comes true, on "
     "average."),
)  # fmt: skip
COLUMNS = (("ap", "AP"), ("f1", "F1"), ("precision", "precision"), ("recall", "recall"))
MOST_LABELS, MOST_CURVES, CURVE_POINTS = 1000, 120, 48
"""What is shown at most, so that a page of thousands of labels still opens at once."""
FEW = 10
"""Samples of a label below which its figures say little."""


def quality(run: Run, measured: Measured, found: dict[str, tuple[float, float]]) -> str:
    """The headline figures with their intervals, and all others folded away."""
    cards = []
    for name in CARDS[run.task]:
        value = measured.metrics[name]
        if value is None:
            continue
        low, high = found.get(name, (float("nan"),) * 2)
        first = ' class="first"' if name == HEADLINE[run.task] else ""
        span = "too few samples of a label" if np.isnan(low) else f"{number(low)} to {number(high)}"
        cards.append(
            f"<div{first}><dt>{esc(NAMES[name])}</dt><dd>{number(value)}"
            f"<span>95 %: {span}</span></dd></div>"
        )
    name, floor, how = CHANCE[run.task]
    chance = measured.metrics[floor]
    notes = [paragraph(f"For comparison: {how} gets {NAMES[name]} {number(chance)}.", "soft")]
    seen = described(run.metrics.get(measured.split, {}).get("also_in_train", {}))
    if seen:
        text = f"Of these samples {seen}: on new ones the run may do worse than the figures say."
        notes.append(paragraph(text, "note"))
    rows = [
        (row_head(esc(title)), *(f'<td class="num">{esc(v)}</td>' for v in values))
        for title, *values in summary_rows(run.task, {measured.split: measured.metrics})
    ]
    words = "".join(f"<dt>{esc(word)}</dt><dd>{esc(text)}</dd>" for word, text in WORDS)
    return section(
        "quality",
        "How good it is",
        f'<dl class="cards">{"".join(cards)}</dl>',
        *notes,
        folded("All figures", table(f"Figures on {measured.split}", ("metric", "value"), rows)),
        folded("What the figures mean", f"<dl>{words}</dl>"),
    )


def label_rows(run: Run, measured: Measured) -> list[dict[str, Any]]:
    """A dictionary per label, best first: by AP, or F1; those without samples last."""
    columns = measured.metrics["per_label"]
    values = enumerate(zip(*columns.values(), strict=True))
    rows = [{"place": i, **dict(zip(columns, row, strict=True))} for i, row in values]
    if run.task == "binary":
        rows[1] |= {"ap": measured.metrics["ap"], "threshold": measured.metrics["threshold"]}
    key = "ap" if "ap" in columns else "f1"
    return sorted(rows, key=lambda r: (not r["positives"], -(r[key] or 0.0), r["place"]))


def labels(run: Run, measured: Measured) -> str:
    """The table of labels, which sorts, and their precision-recall curves."""
    rows = label_rows(run, measured)
    shown, notes = rows, []
    if len(rows) > MOST_LABELS:
        half = MOST_LABELS // 2
        shown = rows[:half] + rows[-half:]
        notes.append(
            f"{len(rows) - MOST_LABELS:,} labels between the best and the last are left out."
        )
    few = sum(0 < row["positives"] < FEW for row in rows)
    none = sum(not row["positives"] for row in rows)
    if few:
        notes.append(
            f"Labels with fewer than {FEW} samples, whose figures are mostly chance: {few}."
        )
    if none:
        notes.append(f"Labels without any sample here: {none}.")
    drawn = [
        row
        for row in sorted(shown, key=lambda r: -r["positives"])[:MOST_CURVES]
        if row["positives"] and "ap" in row
    ]
    return section(
        "labels",
        "Label by label",
        paragraph("Titles of columns sort; a label's name leads to its curve.", "soft"),
        _label_table(measured, shown, {row["place"] for row in drawn}),
        *(paragraph(note, "soft") for note in notes),
        _curves(run, measured, drawn, sum(row["positives"] > 0 for row in rows)),
    )


def _label_table(measured: Measured, rows: list[dict[str, Any]], linked: set[int]) -> str:
    names = [(key, title) for key, title in COLUMNS if any(key in row for row in rows)]
    partly = any("known" in row for row in rows)
    last = ["predicted", *(["threshold"] if any("threshold" in row for row in rows) else [])]
    body = []
    for row in rows:
        name = esc(row["label"])
        if row["place"] in linked:
            name = f'<a href="#pr-{row["place"]}">{name}</a>'
        cells = [row_head(name), cell(row["positives"])]
        cells += [cell(row["known"])] if partly else []
        cells += [cell(row.get(key), bar=key in ("ap", "f1")) for key, _ in names]
        body.append(cells + [cell(row.get(key)) for key in last])
    known = ["known"] if partly else []
    header = ("label", "samples", *known, *(title for _, title in names), *last)
    return table(f"Labels on {measured.split}", header, body, sortable=True)


def _curves(run: Run, measured: Measured, rows: list[dict[str, Any]], of: int) -> str:
    if not rows:
        return ""
    frequent = f" of the {len(rows)} most frequent labels" if len(rows) == MOST_CURVES < of else ""
    how = paragraph(
        "Up: precision, right: recall, both from 0 to 1. Dotted: the precision of guessing. The "
        "dot is where the decisions are taken.",
        "soft",
    )
    scores = measured.logits.double()
    if run.task == "binary":
        scores = (scores[:, 1] - scores[:, 0])[:, None].expand(-1, 2)
    elif run.task == "multiclass":
        scores = scores.log_softmax(1)
    figures = []
    for row in rows:
        place, ap = row["place"], f"AP {number(row['ap'])}"
        known = measured.truth[:, place] >= 0
        truth = measured.truth[known, place] == 1
        points = precision_recall(scores[known, place].numpy(), truth.numpy())
        decided = row["recall"], row["precision"]
        mark = None if None in decided else decided
        drawn = unit_chart(
            f"Precision-recall curve of {row['label']}, {ap}",
            points,
            base=float(truth.double().mean()),
            mark=mark,
        )
        below = f"<figcaption>{esc(row['label'])}<br>{ap}</figcaption>"
        figures.append(f'<figure id="pr-{place}">{drawn}{below}</figure>')
    grid = f'<div class="curves">{"".join(figures)}</div>'
    return folded(f"Precision-recall curves{frequent}", how, grid)


def precision_recall(
    scores: npt.NDArray[np.float64], truth: npt.NDArray[np.bool_], most: int = CURVE_POINTS
) -> list[Point]:
    """(recall, precision) at falling thresholds, ties together; ``most`` points at most.

    Evenly spaced in recall where there are more; the first and the last stay.
    """
    order = np.argsort(-scores, kind="stable")
    falling, hits = scores[order], truth[order].cumsum()
    ends = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))
    recall, precision = hits[ends] / hits[-1], hits[ends] / (ends + 1)
    if len(ends) > most:
        wanted = np.searchsorted(recall, np.linspace(recall[0], recall[-1], most))
        keep = np.unique(np.concatenate([[0], wanted, [len(ends) - 1]]))
        recall, precision = recall[keep], precision[keep]
    return list(zip(recall.tolist(), precision.tolist(), strict=True))
