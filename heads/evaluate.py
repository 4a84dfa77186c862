"""How good a run is on a store: metrics as a dictionary and as a table for the terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mmc.heads import metrics
from mmc.heads.artifact import Run
from mmc.heads.card import ranked_labels, shown, summary_rows
from mmc.heads.predict import Predictor, aligned_targets, select_rows
from mmc.heads.splits import rows_digest
from mmc.store.errors import InputError

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

# Labels listed in a terminal: the best and the worst.
SHOWN = 10


def evaluate(
    run: Run,
    store: "EmbeddingStore",
    split: str | None = None,
    *,
    device: str | torch.device = "auto",
) -> dict[str, Any]:
    """Metrics on the labelled samples of ``split`` (of the whole store when None); JSON-able.

    Besides what `mmc.heads.metrics.evaluate` gives: split, failed (labelled samples without
    features, left out), unlabelled (samples without labels, left out) and rows_digest (equal where
    the same samples with the same labels were measured).

    Raises:
        InputError: no labelled samples there, or labels that the run does not know.
        FingerprintMismatchError: other features than those the run was trained on.
    """
    run.check_labels(store.label_set, store.path)
    predictor = Predictor(run, store, device=device)
    rows = select_rows(store, None, split)
    labelled = rows[np.asarray(store.labels.known)[rows]]
    done = labelled[predictor.done(labelled)]
    where = f"split {split!r} of {store.path}" if split else store.path
    if not len(labelled):
        raise InputError(
            f"no labelled samples in {where}: there is no truth to compare with{_labelled(store)}"
        )
    if not len(done):
        raise InputError(
            f"none of the {len(labelled)} labelled samples in {where} has its features; "
            "run `mmc extract` again"
        )
    logits = predictor.logits(done)
    targets = task_targets(aligned_targets(run, store, done), run.task)
    found = metrics.evaluate(
        logits,
        targets.to(logits.device),
        run.task,
        label_set=run.label_set,
        thresholds=run.thresholds,
        temperature=run.temperature,
    )
    return {
        "split": split,
        "rows_digest": rows_digest(store, done, targets),
        "failed": len(labelled) - len(done),
        "unlabelled": len(rows) - len(labelled),
        **found,
    }


def _labelled(store: "EmbeddingStore") -> str:
    """Which splits could be evaluated, for an error."""
    rows = store.rows(labelled=True)
    splits = store.column("split").take(pa.array(rows)).value_counts().to_pylist()
    named = ", ".join(f"{item['values']} ({item['counts']})" for item in splits if item["values"])
    return f"; labelled are: {named}, choose with --split" if named else ""


def task_targets(multi_hot: Tensor, task: str) -> Tensor:
    """int8 (n, C) in {-1, 0, 1} -> what the metrics take: the same, or class indices (n,).

    A row that does not have exactly one label is unknown (-1) to a single-label task.
    """
    if task == "multilabel":
        return multi_hot
    one = (multi_hot == 1).sum(1) == 1
    return torch.where(one, multi_hot.argmax(1), -1)


def format_table(result: Mapping[str, Any]) -> str:
    """Metrics as text: headline figures, then the best and the worst labels.

    Args:
        result: what `evaluate` gave, or several of them by split; labels are listed for the last.
    """
    by_split = {result.get("split") or "all": result} if "task" in result else dict(result)
    if not by_split:
        return "not measured: no labelled validation or test samples"
    result = list(by_split.values())[-1]
    lines = aligned([("", *by_split), *summary_rows(result["task"], by_split)])
    for key, what in (("failed", "without features"), ("unlabelled", "without labels")):
        if result.get(key):
            lines.append(f"{result[key]} samples {what} were left out")
    if "train" in by_split:
        lines.append("the head has seen the train samples: val and test tell how good it is")
    labels = ranked_labels(result)
    wanted = ("label", "positives", "known", "ap", "f1", "precision", "recall", "threshold")
    columns = [c for c in wanted if labels and c in labels[0]]
    if not columns:
        return "\n".join(lines)
    kept = labels if len(labels) <= 2 * SHOWN else [*labels[:SHOWN], *labels[-SHOWN:]]
    body = [tuple(shown(row[c]) for c in columns) for row in kept]
    if len(kept) < len(labels):
        gap = (f"... {len(labels) - len(kept)} more", *[""] * (len(columns) - 1))
        body.insert(SHOWN, gap)
    heads = (f"label, on {list(by_split)[-1]}", *columns[1:])
    return "\n".join([*lines, "", *aligned([heads, *body])])


def aligned(rows: list[tuple[str, ...]], left: int = 1) -> list[str]:
    """Lines of a table, columns of equal width; the first ``left`` to the left, others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
