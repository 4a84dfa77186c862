"""What to label next: samples without labels that the run is unsure of, and unlike each other.

Greedy k-centre (Sener & Savarese 2018) weighted by uncertainty: the next sample is the one with the
largest product of its uncertainty and its distance to those labelled or chosen already.

Legend: u unlabelled samples, C labels, D values.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmc.heads.labels.material import Ints, Material, Progress, spaced
from mmc.heads.labels.suspects import Judged
from mmc.heads.labels.unseen import RunView

COLUMNS = (
    "rank",
    "id",
    "split",
    "uncertainty",
    "distance",
    "likely",
    "probability",
    "image",
    "text",
)
POOL = 20_000
"""Of so many samples, the least sure ones, the list is chosen."""
LABELLED = 5_000
"""Labelled samples that distances are measured to, evenly spaced."""
LEAST = 1e-3
"""Uncertainty counts as this much at least, so that distance decides among sure ones."""


def to_label(
    material: Material,
    judged: Judged | None,
    view: RunView | None,
    limit: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Rows of `to_label.csv` in the order in which to label them.

    Uncertainty is the mean entropy of the labels' probabilities in bits (of the one distribution,
    over log2 C, for a task with one label per sample); by the run, else by the labelled samples;
    1 for all where there is neither.
    """
    places = np.flatnonzero(~material.labels.known)
    if not len(places):
        return []
    p = _probabilities(material, judged, view, places)
    if p is None:
        doubt = torch.ones(len(places))
        pool = spaced(np.arange(len(places)), POOL)
    else:
        doubt = uncertainty(p, material.store.task)
        pool = doubt.topk(min(POOL, len(places))).indices.sort().values.numpy()
    order, distances = _spread(material, places[pool], doubt[pool], limit, progress)
    chosen = pool[order]
    picked = places[chosen]
    columns = {name: material.column(name, picked) for name in ("id", "image", "text")}
    rows = []
    for at, place in enumerate(picked.tolist()):
        best = None if p is None else int(p[chosen[at]].argmax())
        rows.append(
            {
                "rank": at + 1,
                "id": columns["id"][at],
                "split": material.split[place],
                "uncertainty": None if p is None else float(doubt[chosen[at]]),
                "distance": distances[at],
                "likely": None if best is None else material.label_set[best],
                "probability": None if p is None else float(p[chosen[at], best]),
                "image": columns["image"][at],
                "text": columns["text"][at],
                "_row": int(material.rows[place]),
            }
        )
    return rows


def uncertainty(p: Tensor, task: str) -> Tensor:
    """float32 (u,) in [0, 1] of probabilities (u, C)."""
    p = p.clamp(1e-7, 1 - 1e-7)
    if task == "multilabel":
        return -(p * p.log2() + (1 - p) * (1 - p).log2()).mean(1)
    return -(p * p.log2()).sum(1) / max(float(np.log2(p.shape[1])), 1.0)


def _probabilities(
    material: Material, judged: Judged | None, view: RunView | None, places: Ints
) -> Tensor | None:
    """float32 (u, C) of the run, else of the fit on the labelled samples."""
    if view is not None:
        return view.probabilities[torch.from_numpy(places)].nan_to_num(0.5)
    if judged is None:
        return None
    scores = judged.ridge.scores(places).clamp(0, 1)
    return (
        scores
        if material.store.task == "multilabel"
        else scores / scores.sum(1, keepdim=True).clamp(min=1e-6)
    )


def _spread(
    material: Material, places: Ints, weight: Tensor, limit: int, progress: Progress
) -> tuple[Ints, list[float]]:
    """Positions in ``places`` as they are chosen, and the distance of each when it was."""
    vectors = material.gather(places)
    weight = weight.to(vectors.device).clamp(min=LEAST)
    distance = torch.full((len(places),), 2.0, device=vectors.device)
    if len(material.labelled):
        for _, block in material.vectors(spaced(material.labelled, LABELLED)):
            for start in range(0, len(block), 1024):
                cosines = vectors @ block[start : start + 1024].T
                distance = torch.minimum(distance, 1 - cosines.amax(1))
    distance = distance.clamp(min=0)
    order: list[int] = []
    distances: list[float] = []
    count = min(limit, len(places))
    for number in range(count):
        gain = weight * distance
        gain[order] = -1
        best = int(gain.argmax())
        order.append(best)
        distances.append(float(distance[best]))
        distance = torch.minimum(distance, (1 - vectors @ vectors[best]).clamp(min=0))
        if number % 100 == 99 or number + 1 == count:
            progress("choose what to label", number + 1, count)
    return np.array(order, np.int64), distances
