"""The parts of a page on how a run came to its answers: calibration, fields, epochs.

Legend: n rows, C labels, F fields.
"""

from typing import TYPE_CHECKING

from mmc.heads.artifact import Run
from mmc.heads.models.ensemble import Ensemble
from mmc.heads.models.router import Router
from mmc.heads.predict import Predictor
from mmc.heads.report.charts import Line, Point, line_chart
from mmc.heads.report.markup import cell, esc, folded, number, paragraph, row_head, section, table
from mmc.heads.report.measured import Measured, reliability

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

MOST_ROWS = 120
"""Labels of a table at most."""


def calibration(run: Run, measured: Measured) -> str:
    """Whether probabilities can be taken at their word, before and after the temperature."""
    after = reliability(measured, run.task, run.temperature)
    shown = [("probabilities", after)]
    if run.temperature != 1:
        before = reliability(measured, run.task, 1.0)
        shown = [("with the temperature", after), ("without it", before)]
    lines = [
        Line(name=name, points=[(p, y) for _, p, y in bins], dots=True) for name, bins in shown
    ]
    what = {
        "multilabel": "all decisions of all labels together",
        "binary": f"the probability of {run.label_set[-1]}",
        "multiclass": "the probability of the class that was given",
    }[run.task]
    text = (
        "Of what was given a probability of 0.7, 0.7 should be true: the line should lie on the "
        f"diagonal. Here: {what}, in bins of equal width. The calibration error (ECE) is "
        f"{number(measured.metrics['ece'])}"
    )
    if run.temperature != 1:
        text += (
            f"; it would be {number(measured.metrics['ece_uncalibrated'])} without the temperature "
            f"of {run.temperature:.3g} by which logits are divided, which was fitted on validation "
            "data"
        )
    chart = line_chart(
        "Calibration",
        lines,
        x_title="probability",
        y_title="share that is true",
        x_range=(0.0, 1.0),
        y_range=(0.0, 1.0),
        diagonal=True,
    )
    header = ("mean probability", "share that is true", "decisions")
    rows = [(cell(p), cell(y), cell(count)) for count, p, y in after]
    return section(
        "calibration",
        "Whether probabilities hold",
        paragraph(text + "."),
        chart,
        folded("The bins as a table", table("Probabilities and what came true", header, rows)),
    )


def fields(run: Run, store: "EmbeddingStore", measured: Measured, device: str) -> str:
    """Which field mattered for which label; empty for heads that have no weights of fields."""
    predictor = Predictor(run, store, device=device)
    head, yes = predictor.head, (measured.truth == 1).float()
    if isinstance(head, Ensemble):
        weights = head.weights.cpu()
        how = "The weights that each label gives its fields, as shares."
    elif isinstance(head, Router):
        per_row = predictor.over(measured.rows, head.prepared_weights, len(head.roles)).cpu()
        weights = yes.T @ per_row / yes.sum(0).clamp(min=1)[:, None]
        how = (
            "The router weighs the fields anew for each sample; here the mean over the samples "
            "that have the label."
        )
    else:
        return ""
    shares = weights / weights.sum(1, keepdim=True).clamp(min=1e-12)
    names = [run.features[role].feature for role in head.roles]
    frequent = yes.sum(0).argsort(descending=True, stable=True)[:MOST_ROWS].tolist()
    body = []
    for label in frequent:
        row = shares[label].tolist() if yes[:, label].any() else []
        if row:
            bars = "".join(f'<i style="--v:{share:.3f}"></i>' for share in row)
            drawn = f'<td aria-hidden="true"><span class="share">{bars}</span></td>'
            cells = [cell(share, digits=2) for share in row]
            body.append([row_head(esc(run.label_set[label])), *cells, drawn])
    return section(
        "fields",
        "Which input mattered",
        paragraph(how + " A share says how far a field was trusted, not how good it is alone."),
        table("Shares of the fields by label", ("label", *names, "in this order"), body),
    )


def learning(run: Run) -> str:
    """Loss and validation metric by epoch, of all stages one after another."""
    if not run.history:
        return section("learning", "How it learned", paragraph("Nothing was trained."))
    metric = next(k for k in run.history[0] if k.startswith("val_") and k != "val_loss")
    series: dict[str, list[Point]] = {"loss": [], "val_loss": [], metric: []}
    for epoch, row in enumerate(run.history, 1):
        for key, points in series.items():
            if isinstance(row.get(key), int | float):
                points.append((float(epoch), float(row[key])))
    stages = [row["stage"] for row in run.history]
    starts = [i + 0.5 for i in range(1, len(stages)) if stages[i] != stages[i - 1]]
    name, x_range = metric.removeprefix("val_"), (0.5, max(len(stages), 2) + 0.5)
    loss = line_chart(
        "Loss",
        [
            Line(name="training", points=series["loss"]),
            Line(name="validation", points=series["val_loss"]),
        ],
        x_title="epoch",
        y_title="loss",
        x_range=x_range,
        dividers=starts,
    )
    score = line_chart(
        f"{name} on validation data",
        [Line(name=name, points=series[metric])],
        x_title="epoch",
        y_title=name,
        x_range=x_range,
        dividers=starts,
    )
    return section(
        "learning",
        "How it learned",
        paragraph(_effort(run, stages)),
        f'<div class="charts">{loss}{score}</div>',
    )


def _effort(run: Run, stages: list[str]) -> str:
    """Epochs, time, and which epoch of each stage was kept."""
    text, took = f"{len(stages)} epochs", run.training
    if took.get("train_seconds") is not None:
        text += (
            f" in {took['train_seconds']:.1f} s of steps ({took['rate']:,.0f} samples/s, batch "
            f"{took['batch_size']:,}, {took['device']})"
        )
    names = list(dict.fromkeys(stages))
    if len(names) > 1:
        text += f"; stages, divided by dotted lines: {', '.join(names)}"
    kept = []
    for name in names:
        rows = [row for row in run.history if row["stage"] == name]
        best = [i for i, row in enumerate(rows, 1) if str(row.get("best")) == "True"]
        if best:
            kept.append(f"{name}: {best[-1]} of {len(rows)}" if len(names) > 1 else f"{best[-1]}")
    return f"{text}. Kept was the best epoch on validation data: {'; '.join(kept)}."
