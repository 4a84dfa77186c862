"""Results of a search as CSV files, as text for a terminal and as a part of the model card.

A run records them as ``search``: ``metric`` (what settings are compared by), ``options`` (of a
plain ``mmc train-head`` that trains the head that was kept), and ``sweep``, ``seeds``, ``folds``.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmc.heads.runfiles import (
    FOLDS,
    HISTORIES,
    OUT_OF_FOLD,
    SEEDS,
    SWEEP,
    history_csv,
    write_atomic,
)

if TYPE_CHECKING:
    from mmc.heads.search.trials import Result, Trial

HEADLINES = {
    "multilabel": (
        "mAP",
        "micro_f1",
        "macro_f1",
        "samples_f1",
        "auroc_macro",
        "subset_accuracy",
        "hamming_loss",
        "ece",
    ),
    "binary": ("auroc", "ap", "accuracy", "macro_f1", "f1", "log_loss", "ece", "brier"),
    "multiclass": (
        "accuracy",
        "top5_accuracy",
        "macro_f1",
        "balanced_accuracy",
        "log_loss",
        "ece",
    ),
}
"""Metrics of each task whose mean and spread are told."""
SHOWN = 20
"""Settings listed on a terminal and in the card."""

Rows = list[tuple[str, ...]]


def headline(task: str, found: Mapping[str, Any]) -> dict[str, float | None]:
    """Those of them that `mmc.heads.metrics.evaluate` gave."""
    return {name: found[name] for name in HEADLINES[task] if name in found}


def histories(
    trials: Sequence[Sequence["Trial"]], result: Callable[["Trial"], "Result | None"]
) -> list[dict[str, Any]]:
    """The history of every trial, a row per validation."""
    rows = []
    for trial in (trial for group in trials for trial in group):
        found = result(trial)
        # Not its values, which are columns of a history as well: loss, lr.
        which = {"setting": trial.setting.number}
        which |= {trial.kind: trial.repeat} if trial.kind else {}
        rows += [{**which, **row} for row in (found.history if found else ())]
    return rows


def write(folder: Path, search: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """The CSV files of a search."""
    files = {HISTORIES: rows}
    if "sweep" in search:
        files[SWEEP] = search["sweep"]["settings"]
    if "seeds" in search:
        files[SEEDS] = [_flat(row) for row in search["seeds"]["by_seed"]]
    if "folds" in search:
        files[FOLDS] = search["folds"]["by_fold"]
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in files.items():
        write_atomic(folder / name, history_csv(table))


def text(search: Mapping[str, Any]) -> str:
    """Everything that a search found, for a terminal."""
    parts = []
    for rows in _tables(search).values():
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
        parts.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(parts)


def card(search: Mapping[str, Any], table: Callable[[tuple[str, ...], Rows], str]) -> str:
    """The part of a model card; ``table`` makes Markdown of a header and rows."""
    if not search:
        return ""
    parts = ["## Search"]
    said = {
        "sweep": f"Settings, best first, by {search['metric']} ({SWEEP} has them all).",
        "seeds": "Mean and standard deviation over trainings that differ in their seed alone; the "
        "one that is best on `val` was kept. The mean is what to expect of another training.",
        "folds": "Cross-validation on train and val: every sample is judged by a head that has not "
        "seen it, at thresholds and a temperature from the other folds. The head kept here is "
        "another, trained on `train`; only its thresholds and temperature come from these "
        f"predictions ({OUT_OF_FOLD}).",
    }
    for name, rows in _tables(search).items():
        parts += [said[name], table(rows[0], rows[1:])]
    command = " ".join(["mmc train-head my.store another.run", shlex.join(search["options"])])
    parts.append(f"The same head again, but for rounding: `{command.strip()}`.")
    return "\n\n".join(parts)


def _tables(search: Mapping[str, Any]) -> dict[str, Rows]:
    """Header and rows of each part."""
    found: dict[str, Rows] = {}
    if "sweep" in search:
        found["sweep"] = _sweep(search["sweep"], search["metric"])
    if "seeds" in search:
        seeds = search["seeds"]
        by_split = seeds["mean"]
        header = (f"{len(seeds['by_seed'])} seeds", *by_split)
        names = next(iter(by_split.values()))
        found["seeds"] = [
            header,
            *(
                (name, *(_pair(seeds["mean"][s][name], seeds["std"][s][name]) for s in by_split))
                for name in names
            ),
        ]
    if "folds" in search:
        folds = search["folds"]
        found["folds"] = [
            (f"{len(folds['by_fold'])} folds", "mean ± std of folds", "all rows pooled"),
            *(
                (
                    name,
                    _pair(folds["mean"][name], folds["std"][name]),
                    _number(folds["together"][name]),
                )
                for name in folds["mean"]
            ),
        ]
    return found


def _sweep(sweep: Mapping[str, Any], metric: str) -> Rows:
    """Settings, best first, failed ones last."""
    rows: list[dict[str, Any]] = sweep["settings"]
    score = next(key for key in rows[0] if key.endswith(f"_{metric}"))
    ranked = sorted(rows, key=lambda row: (not row["best"], -_or_least(row[score])))
    title = f"{'held-out' if score.startswith('held_out') else 'val'} {metric}"
    several = any("std" in row for row in rows)
    same_loss = not any(key.startswith("loss") for key in sweep["keys"])
    lines = [
        (
            "",
            *sweep["keys"],
            title,
            *(("val_loss",) if same_loss else ()),  # of other losses it says nothing
            "mean epochs" if several else "epochs",
            "seconds in all" if several else "seconds",
        )
    ]
    for row in ranked[:SHOWN]:
        value = "failed" if row["error"] else _pair(row[score], row.get("std"))
        lines.append(
            (
                "best" if row["best"] else str(row["setting"]),
                *(row[key] for key in sweep["keys"]),
                value,
                *((_number(row["val_loss"]),) if same_loss else ()),
                f"{row['epochs_run']:g}",
                f"{row['seconds']:.1f}",
            )
        )
    if len(ranked) > SHOWN:
        lines.append((f"{len(ranked) - SHOWN} more", *[""] * (len(lines[0]) - 1)))
    return lines


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """``{"val": {"mAP": 1}}`` -> ``{"val_mAP": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat |= (
            {f"{key}_{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        )
    return flat


def _or_least(value: float | None) -> float:
    return float("-inf") if value is None else value


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _pair(mean: float | None, std: float | None) -> str:
    return _number(mean) if std is None else f"{_number(mean)} ± {std:.4f}"
