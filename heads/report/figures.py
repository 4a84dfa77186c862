"""The parts of a page on how good a run is: figures, labels, mix-ups, calibration, fields, curves.

Legend: n rows, C labels, F fields.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmc.heads.artifact import Run
from mmc.heads.card import summary_rows
from mmc.heads.metrics import HEADLINE
from mmc.heads.models.ensemble import Ensemble
from mmc.heads.models.router import Router
from mmc.heads.predict import Predictor
from mmc.heads.report.charts import Line, Point, line_chart, unit_chart
from mmc.heads.report.markup import (
    cell,
    esc,
    folded,
    number,
    paragraph,
    row_head,
    section,
    table,
    text_cell,
)
from mmc.heads.report.measured import Measured, reliability

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

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
MOST_LABELS, MOST_CURVES, MOST_CELLS, CURVE_POINTS = 1000, 120, 30, 48
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
        span = f"{number(low)} to {number(high)}"
        cards.append(
            f"<div{first}><dt>{esc(NAMES[name])}</dt><dd>{number(value)}"
            f"<span>95 % interval {span}</span></dd></div>"
        )
    name, floor, how = CHANCE[run.task]
    chance = measured.metrics[floor]
    notes = [paragraph(f"For comparison: {how} gets {NAMES[name]} {number(chance)}.", "soft")]
    seen = run.metrics.get(measured.split, {}).get("also_in_train", {})
    if any(seen.values()):
        parts = ", ".join(f"{count:,} the {what}" for what, count in seen.items() if count)
        notes.append(
            paragraph(
                f"Of these samples {parts} of a training sample: on new samples the run may do "
                "worse than the figures say.",
                "note",
            )
        )
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
    """A dictionary per label of those that are shown, best first: by AP, or F1."""
    columns = measured.metrics["per_label"]
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    for place, row in enumerate(rows):
        row["place"] = place
    if run.task == "binary":
        rows[1] |= {"ap": measured.metrics["ap"], "threshold": measured.metrics["threshold"]}
    key = "ap" if "ap" in columns else "f1"
    return sorted(rows, key=lambda r: (not r["positives"], -(r[key] or 0.0), r["place"]))


def labels(run: Run, measured: Measured) -> str:
    """The table of labels, which sorts, and their precision-recall curves."""
    rows = label_rows(run, measured)
    shown = rows
    hidden = ""
    if len(rows) > MOST_LABELS:
        half = MOST_LABELS // 2
        shown = rows[:half] + rows[-half:]
        hidden = (
            f"{len(rows) - len(shown):,} labels between the best and the last {half} are left out."
        )
    curves = {
        row["place"]: row
        for row in sorted(shown, key=lambda r: -r["positives"])[:MOST_CURVES]
        if row["positives"] and not (run.task == "binary" and row["place"] == 0)
    }
    names = [
        (key, title)
        for key, title in (
            ("ap", "AP"),
            ("f1", "F1"),
            ("precision", "precision"),
            ("recall", "recall"),
        )
        if any(key in row for row in rows)
    ]
    has_threshold = any("threshold" in row for row in rows)
    header = ["label", "samples", *(title for _, title in names)]
    header += ["given to", *(["threshold"] if has_threshold else [])]
    body = []
    for row in shown:
        name = esc(row["label"])
        if row["place"] in curves:
            name = f'<a href="#pr-{row["place"]}">{name}</a>'
        cells = [row_head(name), cell(row["positives"])]
        cells += [cell(row.get(key), bar=key in ("ap", "f1")) for key, _ in names]
        cells += [cell(row["predicted"]), *([cell(row.get("threshold"))] if has_threshold else [])]
        body.append(cells)
    few = sum(0 < row["positives"] < FEW for row in rows)
    none = sum(not row["positives"] for row in rows)
    notes = [
        f"{few} labels have fewer than {FEW} samples here: their figures are mostly chance."
        * bool(few),
        f"{none} labels have no sample here, so nothing can be said of them." * bool(none),
        hidden,
    ]
    grid = "".join(_curve(run, measured, curves[place]) for place in curves)
    left = sum(row["positives"] > 0 for row in rows) - len(curves)
    title = "Precision-recall curves" + (
        f" of the {len(curves)} most frequent labels" if left > 1 else ""
    )
    how = paragraph(
        "Up: precision, right: recall, both from 0 to 1. Dotted: the precision of guessing. The dot "
        "is where the decisions are taken.",
        "soft",
    )
    return section(
        "labels",
        "Label by label",
        paragraph("Titles of columns sort; a label's name leads to its curve.", "soft"),
        table(f"Labels on {measured.split}", header, body, sortable=True),
        *(paragraph(note, "soft") for note in notes if note),
        folded(title, how, f'<div class="curves">{grid}</div>') if curves else "",
    )


def _curve(run: Run, measured: Measured, row: dict[str, Any]) -> str:
    place = row["place"]
    scores = measured.logits.double()
    if run.task == "binary":
        scores = scores[:, 1:] - scores[:, :1]
        column = scores[:, 0]
    else:
        column = (scores.log_softmax(1) if run.task == "multiclass" else scores)[:, place]
    truth = measured.truth[:, place] == 1
    points = precision_recall(column.numpy(), truth.numpy())
    recall, precision = row["recall"], row["precision"]
    mark = None if recall is None or precision is None else (recall, precision)
    ap = f"AP {number(row.get('ap'))}"
    title = f"Precision-recall curve of {row['label']}, {ap}"
    drawn = unit_chart(title, points, base=float(truth.double().mean()), mark=mark)
    return f'<figure id="pr-{place}">{drawn}<figcaption>{esc(row["label"])}<br>{ap}</figcaption></figure>'


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


def confusions(run: Run, measured: Measured) -> str:
    """What is taken for what; for several labels per sample also what occurs together."""
    names = run.label_set
    yes, chosen = (measured.truth == 1).double(), measured.decisions.double()
    if run.task != "multilabel":
        counts = yes.T @ chosen
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        kept = _most_involved(counts - counts.diag().diag())
        title = "Rows: the true class; columns: the class that was given; samples"
        return section(
            "confusions",
            "What is taken for what",
            _heat(title, "true ↓ given →", names, kept, counts, shares),
            _left_out(names, kept),
        )
    # Of the samples that have i and not j: how many were given j.
    without = 1 - yes
    wrong = yes.T @ (chosen * without)
    possible = yes.T @ without
    shares = wrong / possible.clamp(min=1)
    found = (yes * chosen).sum(0) / yes.sum(0).clamp(min=1)
    shares = shares.fill_diagonal_(0) + found.diag()
    kept = _most_involved(wrong.fill_diagonal_(0))
    together = yes.T @ yes / yes.sum(0).clamp(min=1)[:, None]
    return section(
        "confusions",
        "What is mixed up",
        paragraph(
            "Of the samples that have the label of the row and lack that of the column, the "
            "share in per cent that was given the column's all the same. On the diagonal, framed: "
            "the share of the row's samples that was found.",
            "soft",
        ),
        _heat("Wrongly given labels, per cent", "has ↓ given →", names, kept, shares * 100, shares),
        _left_out(names, kept),
        folded(
            "Which labels occur together",
            paragraph("Of the samples that have the label of the row, the share in per cent that also "
                      "has the column's.", "soft"),
            _heat("Labels that occur together, per cent", "has ↓ also →", names, kept, together * 100,
                  together),
        ),
    )  # fmt: skip


def _most_involved(wrong: Tensor) -> list[int]:
    """Labels that are shown, in the label set's order: all, or those with the most mistakes."""
    involved = wrong.sum(0) + wrong.sum(1)
    return sorted(involved.argsort(descending=True, stable=True)[:MOST_CELLS].tolist())


def _left_out(names: tuple[str, ...], kept: list[int]) -> str:
    if len(kept) == len(names):
        return ""
    return paragraph(f"The {len(kept)} of {len(names):,} labels with the most mistakes.", "soft")


def _heat(
    caption: str,
    corner: str,
    names: tuple[str, ...],
    kept: list[int],
    values: Tensor,
    shares: Tensor,
) -> str:
    body = []
    for i in kept:
        cells = [row_head(esc(names[i]))]
        for j in kept:
            share = float(shares[i, j])
            kind = " ".join(k for k, on in (("hi", share > 0.55), ("diag", i == j)) if on)
            value = f"{float(values[i, j]):.0f}"
            cells.append(
                f'<td class="num {kind}" style="--v:{share:.2f}">{value if value != "0" else "·"}</td>'
            )
        body.append(cells)
    return table(caption, (corner, *(names[j] for j in kept)), body, css="heat")


def calibration(run: Run, measured: Measured) -> str:
    """Whether probabilities can be taken at their word, before and after the temperature."""
    after = reliability(measured, run.task, run.temperature)
    lines, shown = [], [("with", after)]
    if run.temperature != 1:
        before = reliability(measured, run.task, 1.0)
        shown.append(("without", before))
    for name, bins in shown:
        label = "probabilities" if run.temperature == 1 else f"{name} the temperature"
        lines.append(Line(name=label, points=[(p, y) for _, p, y in bins], dots=True))
    what = {
        "multilabel": "all decisions of all labels together",
        "binary": f"the probability of {run.label_set[-1]}",
        "multiclass": "the probability of the class that was given",
    }[run.task]
    ece, before_ece = (measured.metrics.get(key) for key in ("ece", "ece_uncalibrated"))
    text = f"Of what was given a probability of 0.7, 0.7 should be true: the line should lie on the diagonal. Here: {what}, in bins of equal width. The calibration error (ECE) is {number(ece)}"
    if run.temperature != 1:
        text += (
            f"; it would be {number(before_ece)} without the temperature of {run.temperature:.3g} "
            "by which logits are divided, which was fitted on validation data"
        )
    rows = [(cell(p), cell(y), cell(count)) for count, p, y in after]
    return section(
        "calibration",
        "Whether probabilities hold",
        paragraph(text + "."),
        line_chart("Calibration", lines, x_title="probability", y_title="share that is true",
                   x_range=(0.0, 1.0), y_range=(0.0, 1.0), diagonal=True),
        folded("The bins as a table", table(
            "Probabilities and what came true",
            ("mean probability", "share that is true", "decisions"), rows)),
    )  # fmt: skip


def fields(run: Run, store: "EmbeddingStore", measured: Measured, device: str) -> str:
    """Which field mattered for which label; empty for heads that have no weights of fields."""
    head = run.build_head()
    if not isinstance(head, Router | Ensemble):
        return ""
    names = [run.features[role].feature for role in head.roles]
    yes = (measured.truth == 1).float()
    if isinstance(head, Ensemble):
        weights = head.weights.abs()
        how = "The weights that each label gives its fields, as shares."
    else:
        predictor = Predictor(run, store, device=device)
        per_row = predictor.over(measured.rows, predictor.head.weights, len(names)).cpu()
        weights = yes.T @ per_row / yes.sum(0).clamp(min=1)[:, None]
        how = "The router weighs the fields anew for each sample; here the mean over the samples that have the label."
    shares = weights / weights.sum(1, keepdim=True).clamp(min=1e-12)
    known = [i for i in range(len(run.label_set)) if yes[:, i].any()]
    known = sorted(known, key=lambda i: -float(yes[:, i].sum()))[:MOST_CURVES]
    body = []
    for i in known:
        bars = "".join(f'<i style="--v:{float(share):.3f}"></i>' for share in shares[i])
        body.append(
            [row_head(esc(run.label_set[i])), *(cell(float(s), digits=2) for s in shares[i]),
             f'<td aria-hidden="true"><span class="share">{bars}</span></td>']
        )  # fmt: skip
    return section(
        "fields",
        "Which input mattered",
        paragraph(how + " A share says how far a field was trusted, not how good it is alone."),
        table(
            "Shares of the fields by label",
            ("label", *names, "in this order"),
            body,
            sortable=False,
        ),
    )


def learning(run: Run) -> str:
    """Loss and validation metric by epoch, of all stages one after another."""
    if not run.history:
        return section(
            "learning", "How it learned", paragraph("Nothing was trained: the head has no epochs.")
        )
    metric = next(k for k in run.history[0] if k.startswith("val_") and k != "val_loss")
    series: dict[str, list[Point]] = {"loss": [], "val_loss": [], metric: []}
    starts, best = [], []
    for epoch, row in enumerate(run.history, 1):
        for key, points in series.items():
            if isinstance(row.get(key), int | float):
                points.append((float(epoch), float(row[key])))
        if epoch > 1 and row["stage"] != run.history[epoch - 2]["stage"]:
            starts.append(epoch - 0.5)
    stages = list(dict.fromkeys(row["stage"] for row in run.history))
    for stage in stages:
        of_it = [(e, row) for e, row in enumerate(run.history, 1) if row["stage"] == stage]
        kept = [e for e, row in of_it if row["best"] in (True, "True")]
        if kept:
            best.append(f"{stage}: epoch {kept[-1] - of_it[0][0] + 1} of {len(of_it)}")
    last = len(run.history)
    x_range = (0.5, max(last, 2) + 0.5)
    charts = line_chart(
        "Loss", [Line(name="training", points=series["loss"]),
                 Line(name="validation", points=series["val_loss"])],
        x_title="epoch", y_title="loss", x_range=x_range, dividers=starts,
    ) + line_chart(
        f"{metric.removeprefix('val_')} on validation data",
        [Line(name=metric.removeprefix("val_"), points=series[metric])],
        x_title="epoch", y_title=metric.removeprefix("val_"), x_range=x_range, dividers=starts,
    )  # fmt: skip
    took = run.training
    text = f"{last} epochs"
    if took.get("train_seconds") is not None:
        text += f" in {took['train_seconds']:.1f} s of steps ({took['rate']:,.0f} samples/s, batch {took['batch_size']:,}, {took['device']})"
    stages_text = (
        f" Stages, divided by dotted lines: {', '.join(stages)}." if len(stages) > 1 else ""
    )
    return section(
        "learning",
        "How it learned",
        paragraph(
            f"{text}.{stages_text} Kept was the best state on validation data: {'; '.join(best)}."
        ),
        f'<div class="charts">{charts}</div>',
    )


def near_labels(run: Run, store: "EmbeddingStore", measured: Measured) -> str:
    """For each label its nearest by text, by occurring together and by being wrongly given."""
    names = run.label_set
    ways: list[tuple[str, Tensor]] = []
    texts = _label_texts(run, store)
    if texts is not None:
        unit = torch.nn.functional.normalize(texts, dim=1)
        ways.append(("nearest by their texts (cosine)", unit @ unit.T))
    yes, chosen = (measured.truth == 1).double(), measured.decisions.double()
    if run.task == "multilabel":
        both = yes.T @ yes
        union = yes.sum(0)[:, None] + yes.sum(0)[None] - both
        ways.append(("occurs with (share of either)", both / union.clamp(min=1)))
    wrong = yes.T @ (chosen * (1 - yes))
    ways.append(("wrongly given instead or besides (samples)", wrong))
    if len(names) < 3:
        return ""
    order = yes.sum(0).argsort(descending=True, stable=True)[:MOST_CURVES].tolist()
    body = []
    for i in order:
        cells = [row_head(esc(names[i]))]
        for _, near in ways:
            values = near[i].clone()
            values[i] = -1
            top = [
                j
                for j in values.argsort(descending=True, stable=True)[:3].tolist()
                if values[j] > 0
            ]
            shown = ", ".join(
                f"{names[j]} {int(values[j]) if float(values[j]) >= 1 and near is wrong else f'{float(values[j]):.2f}'}"
                for j in top
            )
            cells.append(text_cell(shown or "–"))
        body.append(cells)
    return section(
        "near",
        "Labels that are near each other",
        table("The three nearest of each label", ("label", *(title for title, _ in ways)), body),
        _left_out(names, order),
    )


def _label_texts(run: Run, store: "EmbeddingStore") -> Tensor | None:
    """Embeddings of the label names (C, D) from a backbone that the run reads, if there are any."""
    for alias in dict.fromkeys(name.split("/")[0] for name in run.resolve_features(store).values()):
        found = store.label_text(alias)
        if found is not None and set(run.label_set) <= set(found[0]):
            place = {name: i for i, name in enumerate(found[0])}
            return torch.from_numpy(found[1][[place[name] for name in run.label_set]]).float()
    return None
