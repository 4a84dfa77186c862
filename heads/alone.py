"""Whether a field alone does better than all together, of heads that train each by itself first.

Legend: n validation rows, C labels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmc.heads import metrics
from mmc.heads.models.base import Stage

DRAWS, MOST_ROWS = 30, 20_000
"""How often the validation rows are drawn anew for the noise, and how many of them at most."""


def better_alone(
    stages: Sequence[Stage],
    history: Sequence[Mapping[str, Any]],
    features: Mapping[str, str],
    logits: Tensor,
    targets: Tensor,
    task: str,
    metric: str,
) -> str:
    """A line where the best field alone beat the whole on validation by more than noise, else "".

    Noise is a standard error of the metric (bootstrap). Both were measured on the same rows, so
    that their difference varies less than that.

    Args:
        stages, history: of the training. A stage that reads one role is of that field alone.
        features: role -> feature.
        logits: of the whole head, float (n, C).
        targets: int8 (n, C), or classes int64 (n,).
    """
    alone: dict[str, float] = {}
    for stage in stages:
        if stage.reads is None or len(stage.reads) != 1 or len(features) < 2:
            continue
        reached = [row.get(f"val_{metric}") for row in history if row["stage"] == stage.name]
        best = max((value for value in reached if value is not None), default=None)
        if best is not None:
            alone[features[stage.reads[0]]] = best
    if not alone:
        return ""
    name = max(alone, key=lambda feature: alone[feature])
    whole = metrics.score(logits, targets, task, metric)
    if not alone[name] > whole or alone[name] - whole <= _noise(logits, targets, task, metric):
        return ""
    others = [feature for feature in features.values() if feature != name]
    return (
        f"{name} alone is better on val: {metric} {alone[name]:.4f} against {whole:.4f} together "
        f"with {', '.join(others)}; try it by itself (--head linear or mlp, --features {name})"
    )


def _noise(logits: Tensor, targets: Tensor, task: str, metric: str) -> float:
    """Standard error of a metric; infinite where it cannot be told."""
    n = len(logits)
    rows = min(n, MOST_ROWS)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(DRAWS):
        drawn = torch.randint(n, (rows,), generator=generator).to(logits.device)
        value = metrics.score(logits[drawn], targets[drawn], task, metric)
        found += [] if math.isnan(value) else [value]
    if len(found) < DRAWS // 2:
        return math.inf
    return float(torch.tensor(found, dtype=torch.float64).std()) * math.sqrt(rows / n)
