"""Runs side by side: what each reached, what it took, and whether that can be compared at all."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmc.heads.artifact import Run
from mmc.heads.card import shown
from mmc.heads.evaluate import aligned
from mmc.heads.metrics import HEADLINE
from mmc.heads.runfiles import RECORD, label_set_hash
from mmc.store.errors import InputError, MmcError

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

Report = Callable[[str], None]
Row = dict[str, Any]

METRICS = {
    "multilabel": ("mAP", "micro_f1", "macro_f1", "ece"),
    "binary": ("auroc", "ap", "macro_f1", "accuracy", "ece"),
    "multiclass": ("macro_f1", "accuracy", "mAP", "ece"),
}
"""What is compared, the headline metric first."""
SPLITS = ("val", "test")
EFFORT = ("parameters", "train_seconds", "rate", "epochs")
LOWER_IS_BETTER = ("ece", "parameters", "train_seconds")
NOT_JUDGED = ("epochs",)
HEADERS = {
    "micro_f1": "micro-F1",
    "macro_f1": "macro-F1",
    "auroc": "AUROC",
    "ap": "AP",
    "ece": "ECE",
    "train_seconds": "train s",
    "rate": "rows/s",
    "difference": "difference",
    "difference_interval": "95 % interval",
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` found."""

    rows: list[Row]
    """A dictionary per run, best first: run, set (which may be compared with each other), head,
    features, loss, task, labels, ``<split>.<metric>`` ..., parameters, seconds, train_seconds, rate
    (rows/s), epochs, rows_digest; measured anew also difference and difference_interval."""
    columns: list[str]
    """Keys of the rows that hold numbers to compare."""
    best: dict[str, dict[str, list[str]]]
    """Set -> column -> the best run there, several where they tie."""
    measured: dict[str, Any] | None = None
    """Where all were measured anew: store, split, rows, metric, reference, resamples, seed."""
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return dict(vars(self))


def find_runs(paths: Iterable[Path], warn: Report) -> list[Path]:
    """The folders of runs among ``paths``: each is one, or a folder that holds some.

    Raises:
        InputError: there is none.
    """
    given = list(paths)
    found: dict[Path, Path] = {}
    for path in given:
        inside = [path] if (path / RECORD).is_file() else []
        if not inside and path.is_dir():
            inside = sorted(child.parent for child in path.glob(f"*/{RECORD}"))
        if not inside:
            what = "holds no run" if path.is_dir() else "is no folder"
            warn(f"{path} {what}; left out")
        for run in inside:
            found.setdefault(run.resolve(), run)
    if not found:
        shown_ = ", ".join(map(str, given[:3]))
        raise InputError(f"no run in {shown_} (a run is what `mmc train-head` writes)")
    return list(found.values())


def compare(
    paths: Iterable[Path],
    *,
    store: "EmbeddingStore | None" = None,
    split: str = "test",
    device: str = "auto",
    seed: int = 0,
    report: Report = lambda line: None,
) -> Comparison:
    """Compare runs by what they recorded, or by measuring them anew on the same rows of a store.

    Measured anew, each run's headline metric is compared with that of the best on validation by a
    paired bootstrap of the rows (`mmc.heads.bootstrap`).

    Args:
        paths: runs, or folders that hold runs.
        store: where to measure all; None: as recorded.
        split: of the store, with ``store`` only.
        report: told each warning, a line of plain text.

    Raises:
        InputError: no run is left, or none can be measured on the store.
    """
    warnings: list[str] = []

    def warn(line: str) -> None:
        warnings.append(line)
        report(f"warning: {line}")

    rows = []
    for path in find_runs(paths, warn):
        try:
            rows.append(_row(Run.load(path), path))
        except MmcError as error:
            warn(f"{' '.join(str(error).split())}; left out")
    if not rows:
        raise InputError("none of the runs can be read: nothing to compare")
    measured = None
    if store is not None:
        from mmc.heads.remeasure import remeasure

        measured = remeasure(
            rows, store, split, compared=METRICS, device=device, seed=seed, warn=warn
        )
    # What could not be measured anew has been told of.
    rows = _in_sets(rows, *((SPLITS, warn) if store is None else ((split,), lambda line: None)))
    columns = _columns(rows, measured)
    return Comparison(
        rows=rows,
        columns=columns,
        best=_best(rows, columns),
        measured=measured,
        warnings=warnings,
    )


def format_comparison(found: Comparison) -> str:
    """Two tables as text: how good the runs are, and what they are; ``*`` marks the best.

    Runs of one folder are called by their names in it.
    """
    several = len(found.best) > 1
    folder = _common_folder([row["run"] for row in found.rows])

    def name(run: str) -> str:
        return os.path.basename(run) if folder else run

    quality = [column for column in found.columns if column not in EFFORT]
    effort = [column for column in found.columns if column in EFFORT]
    which = ("set",) if several else ()
    splits = [column.rpartition(".")[0] for column in quality]
    above = [
        split if split != before else ""
        for split, before in zip(splits, ["", *splits], strict=False)
    ]
    good = [("",) * (1 + len(which)) + tuple(above)] if any(above) else []
    good.append(("run", *which, *(_header(column) for column in quality)))
    what = [("run", *_WHAT, *(_header(column) for column in effort))]
    for row in found.rows:
        run = name(row["run"])
        good.append((run, *(row[key] for key in which), *_cells(found, row, quality)))
        what.append((run, *(row[key] for key in _WHAT), *_cells(found, row, effort)))
    lines = [*aligned(good, left=1 + len(which)), "", *aligned(what, left=1 + len(_WHAT)), ""]
    if found.measured:
        told = found.measured
        lines.append(
            f"{told['split']}: {told['rows']:,} rows of {told['store']}; difference in "
            f"{_header(told['metric'])} to {name(told['reference'])}, {told['resamples']:,} "
            "resamples"
        )
    where = f"; the runs are in {folder}" if folder else ""
    return "\n".join(
        [*lines, "* best of its column" + (", within its set" if several else "") + where]
    )


_WHAT = ("head", "features", "loss")


def _common_folder(runs: Sequence[str]) -> str:
    """The folder that holds all of several runs, as it was given; empty where there is none."""
    parents = {os.path.dirname(run) for run in runs}
    return parents.pop() if len(runs) > 1 and len(parents) == 1 else ""


def _cells(found: Comparison, row: Row, columns: Sequence[str]) -> list[str]:
    best = found.best[row["set"]]
    return [
        _shown(column, row.get(column)) + ("*" if row["run"] in best.get(column, ()) else "")
        for column in columns
    ]


def comparison_csv(found: Comparison) -> bytes:
    """The table as CSV with all digits, a line per run."""
    keys = ("run", "set", "head", "features", "loss", "task", "labels", *found.columns)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    low_high = ("difference_low", "difference_high")
    writer.writerow([k for key in keys for k in (low_high if key in _PAIRS else (key,))])
    for row in found.rows:
        values = [row.get(key) for key in keys]
        cells = [
            cell
            for key, value in zip(keys, values, strict=True)
            for cell in ((value or ("", "")) if key in _PAIRS else (value,))
        ]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue().encode()


_PAIRS = ("difference_interval",)
"""Columns of two numbers."""


def _row(run: Run, path: Path) -> Row:
    effort = run.training or _from_history(run)
    row: Row = {
        "run": str(path),
        "set": "",
        "head": run.head,
        "features": ",".join(dict.fromkeys(ref.feature for ref in run.features.values())),
        "loss": run.loss if run.history else "-",
        "task": run.task,
        "labels": len(run.label_set),
        "labels_hash": label_set_hash(sorted(run.label_set)),
        "rows_digest": {name: run.metrics[name].get("rows_digest") for name in run.metrics},
    }
    for split in SPLITS:
        found = run.metrics.get(split, {})
        row |= {f"{split}.{name}": found.get(name) for name in METRICS[run.task]}
    row |= {"parameters": run.parameters}
    return row | {key: effort.get(key) for key in ("seconds", *EFFORT[1:])}


def _from_history(run: Run) -> dict[str, Any]:
    """What runs of older versions tell of the effort."""
    if not run.history or "seconds" not in run.history[-1]:
        return {}
    last = {row["stage"]: row["epoch"] for row in run.history}
    return {"train_seconds": run.history[-1]["seconds"], "epochs": sum(last.values())}


def _in_sets(rows: list[Row], splits: Sequence[str], warn: Report) -> list[Row]:
    """The rows, those that may be compared together: the larger set first, the best run first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        key = [row["task"], row["labels_hash"], *(row["rows_digest"].get(s) for s in splits)]
        groups.setdefault(json.dumps(key), []).append(row)
    ordered = sorted(groups.values(), key=len, reverse=True)
    for index, group in enumerate(ordered):
        name = _letters(index)
        group.sort(key=_quality, reverse=True)
        for row in group:
            row["set"] = name
        if index:
            first = ordered[0][0]
            others = ", ".join(row["run"] for row in group[:3]) + (" ..." if len(group) > 3 else "")
            warn(
                f"{others} (set {name}) cannot be compared with {first['run']} (set A): "
                f"{_why(first, group[0], splits)}"
            )
    return [row for group in ordered for row in group]


def _quality(row: Row) -> float:
    """The headline metric on validation, else on test, for sorting."""
    name = HEADLINE[row["task"]]
    values = [row.get(f"{split}.{name}") for split in SPLITS]
    return next((value for value in values if value is not None), -1.0)


def _why(first: Row, other: Row, splits: Sequence[str]) -> str:
    """What keeps two runs from being compared."""
    if first["task"] != other["task"]:
        return f"the task is {other['task']} and not {first['task']}"
    if first["labels_hash"] != other["labels_hash"]:
        return f"other labels ({other['labels']} and {first['labels']})"
    unlike = [s for s in splits if first["rows_digest"].get(s) != other["rows_digest"].get(s)]
    if any(not row["rows_digest"].get(s) for row in (first, other) for s in unlike):
        return (
            "one was not measured on the same splits, or does not say on which rows "
            "(--store STORE measures all on the same)"
        )
    return f"measured on other {' and '.join(unlike)} rows (--store STORE measures all on the same)"


def _letters(index: int) -> str:
    """A, B ... Z, AA, AB ..."""
    name = ""
    while index >= 0:
        name = chr(ord("A") + index % 26) + name
        index = index // 26 - 1
    return name


def _columns(rows: list[Row], measured: Mapping[str, Any] | None) -> list[str]:
    """The columns that any row has something in."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    names = list(dict.fromkeys(name for task in tasks for name in METRICS[task]))
    wanted = [f"{split}.{name}" for split in SPLITS for name in names]
    if measured:
        headlines = [f"val.{HEADLINE[task]}" for task in tasks]
        told = [f"{measured['split']}.{name}" for name in names]
        wanted = [*dict.fromkeys([*headlines, *told]), "difference", "difference_interval"]
    return [
        column for column in (*wanted, *EFFORT) if any(row.get(column) is not None for row in rows)
    ]


def _best(rows: list[Row], columns: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    best: dict[str, dict[str, list[str]]] = {row["set"]: {} for row in rows}
    for name, found in best.items():
        for column in columns:
            if column.startswith("difference") or column in NOT_JUDGED:
                continue
            values = {
                row["run"]: row[column]
                for row in rows
                if row["set"] == name and row.get(column) is not None
            }
            if len(values) > 1:
                least = column.endswith(LOWER_IS_BETTER)
                top = min(values.values()) if least else max(values.values())
                found[column] = [run for run, value in values.items() if value == top]
    return best


def _header(column: str) -> str:
    """A column's name below its split: ``val.micro_f1`` -> ``micro-F1``."""
    name = column.rpartition(".")[2]
    return HEADERS.get(name, name)


def _shown(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column == "difference":
        return f"{value:+.4f}"
    if column == "difference_interval":
        return f"{value[0]:+.4f} to {value[1]:+.4f}"
    if column == "train_seconds":
        return f"{value:.1f}"
    if column in EFFORT:
        return f"{round(value):,}"
    return shown(value)
