"""Runs measured anew on the same rows of one store, with a paired bootstrap of the difference."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmc.heads import metrics
from mmc.heads.artifact import Run
from mmc.heads.bootstrap import Floats, interval, resampled
from mmc.heads.evaluate import task_targets
from mmc.heads.metrics import HEADLINE
from mmc.heads.predict import Predictor, Rows, aligned_targets, select_rows
from mmc.heads.splits import rows_digest
from mmc.store.errors import InputError, MmcError

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

Row = dict[str, Any]


def remeasure(
    rows: list[Row],
    store: "EmbeddingStore",
    split: str,
    *,
    compared: Mapping[str, Sequence[str]],
    device: str,
    seed: int,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Overwrite the metrics of ``split`` in the rows of `mmc.heads.compare` by those found now.

    The rows are the labelled ones of the split that have the features of every run. A run that
    cannot be measured there, or has another task or other labels than the first, is told of and
    keeps none.

    Args:
        split: ``all``: every labelled row.
        compared: task -> names of the metrics to keep.

    Returns:
        store, split, rows, metric, reference, resamples, seed.

    Raises:
        InputError: no run can be measured, or no row is left.
    """
    measurable = _measurable(rows, store, warn)
    chosen = select_rows(store, None, None if split == "all" else split)
    labelled = chosen[np.asarray(store.labels.known)[chosen]]
    if store.task in ("binary", "multiclass"):
        labelled = labelled[np.diff(store.labels.indptr)[labelled] == 1]
    done = np.logical_and.reduce([done for _, done in measurable])
    kept = labelled[done[labelled]]
    if not len(kept):
        raise InputError(
            f"{store.path}: none of the {len(labelled):,} labelled rows of split {split} has the "
            "features of every run"
        )
    if len(kept) < len(labelled):
        warn(f"{len(labelled) - len(kept):,} rows that lack features of some run are left out")
    ranked = sorted(measurable, key=lambda item: _validation(item[0]), reverse=True)
    for row in rows:  # what was recorded there is of other rows
        row |= dict.fromkeys((f"{split}.{key}" for key in compared[row["task"]]), None)
        row["rows_digest"].pop(split, None)
    reference: tuple[str, float, Floats] | None = None
    told: dict[str, Any] = {}
    for row, _ in ranked:
        found, draws = _measure(row, store, kept, device, seed)
        name = HEADLINE[row["task"]]
        row |= {f"{split}.{key}": found.get(key) for key in compared[row["task"]]}
        row["rows_digest"][split] = found["rows_digest"]
        value = float("nan") if found[name] is None else found[name]
        if reference is None:
            reference = (row["run"], value, draws)
            told = {"metric": name, "reference": row["run"], "resamples": len(draws)}
            continue
        difference = value - reference[1]
        low, high = interval(draws - reference[2])
        if not np.isnan([difference, low]).any():
            row |= {"difference": difference, "difference_interval": [low, high]}
    return {"store": store.path, "split": split, "rows": len(kept), **told, "seed": seed}


def _validation(row: Row) -> float:
    value = row.get(f"val.{HEADLINE[row['task']]}")
    return -1.0 if value is None else float(value)


def _measurable(
    rows: list[Row], store: "EmbeddingStore", warn: Callable[[str], None]
) -> list[tuple[Row, Any]]:
    """Rows whose runs can be measured on the store, and a mask of the samples with features."""
    found: list[tuple[Row, Any]] = []
    for row in rows:
        run = Run.load(Path(row["run"]))
        try:
            if run.task != store.task:
                raise InputError(f"the run is {run.task} and {store.path} {store.task}")
            run.check_labels(store.label_set, store.path)
            if found and row["labels_hash"] != found[0][0]["labels_hash"]:
                raise InputError(f"it has other labels than {found[0][0]['run']}")
            names = run.resolve_features(store).values()
            found.append((row, np.logical_and.reduce([store[name].done for name in names])))
        except MmcError as error:
            reason = " ".join(str(error).split())
            warn(f"{row['run']} is not measured: {reason}")
    if not found:
        raise InputError(f"none of the runs can be measured on {store.path}")
    return found


def _measure(
    row: Row, store: "EmbeddingStore", rows: Rows, device: str, seed: int
) -> tuple[dict[str, Any], Floats]:
    """Metrics of a run on the rows, and its headline metric on resamples of them."""
    run = Run.load(Path(row["run"]))
    logits = Predictor(run, store, device=device).logits(rows)
    targets = task_targets(aligned_targets(run, store, rows), run.task)
    found = metrics.evaluate(
        logits,
        targets.to(logits.device),
        run.task,
        label_set=run.label_set,
        thresholds=run.thresholds,
        temperature=run.temperature,
    )
    found["rows_digest"] = rows_digest(store, rows, targets)
    return found, resampled(logits, targets, run.task, seed=seed)
