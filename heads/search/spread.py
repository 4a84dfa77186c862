"""Means and standard deviations of what several trainings reached; None where undefined."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mmc.heads.search.trials import Result


def best_loss(result: Result) -> float:
    """Validation loss of what was kept; NaN where nothing was trained."""
    return next((row["val_loss"] for row in reversed(result.history) if row["best"]), math.nan)


def mean(values: Sequence[float | None]) -> float | None:
    """Of the values that are defined."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return statistics.fmean(known) if known else None


def std(values: Sequence[float | None]) -> float | None:
    """Standard deviation of the sample (n - 1)."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return statistics.stdev(known) if len(known) > 1 else None


def spread(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation of each metric."""
    keys = [key for key in rows[0] if key != "samples"]
    return {
        "mean": {key: mean([row[key] for row in rows]) for key in keys},
        "std": {key: std([row[key] for row in rows]) for key in keys},
    }


def turned(by_split: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{split: {"mean": ...}} -> {"mean": {split: ...}}."""
    return {
        what: {split: found[what] for split, found in by_split.items()} for what in ("mean", "std")
    }
