"""Of every sample: labels given, those of its neighbours, the nearest label texts, the run's."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mmc.heads.features import SHARED_SPACE
from mmc.heads.labels.around import Around, shares
from mmc.heads.labels.material import Ints, Material, Progress
from mmc.heads.labels.nearest import Views
from mmc.heads.labels.unseen import RunView

COLUMNS = (
    "id",
    "split",
    "labelled",
    "labels",
    "neighbors",
    "neighbor_shares",
    "texts",
    "text_cosines",
    "run",
    "run_trained_on_it",
)
NEAREST = 3
BLOCK_CELLS = 1 << 22


def samples(
    material: Material,
    near: list[Around],
    views: Views,
    view: RunView | None,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Rows of `samples.csv`, in the order of the store."""
    names = material.label_set
    feature = _shared_feature(material, views)
    step = max(1, BLOCK_CELLS // max(len(names), 1))
    for start in range(0, len(material), step):
        places = np.arange(start, min(start + step, len(material)))
        votes = np.nan_to_num(shares(material, [by.of(places) for by in near]))
        voted = np.argsort(-votes, axis=1, kind="stable")[:, :NEAREST]
        texts = _texts(material, places, feature, views) if feature else None
        ids = material.column("id", places)
        for at, place in enumerate(places.tolist()):
            best = [j for j in voted[at].tolist() if votes[at, j] > 0]
            row: dict[str, Any] = {
                "id": ids[at],
                "split": material.split[place],
                "labelled": int(material.labels.known[place]),
                "labels": material.names(place),
                "neighbors": [names[j] for j in best],
                "neighbor_shares": [f"{votes[at, j]:.3f}" for j in best],
                "texts": None,
                "text_cosines": None,
                "run": None,
                "run_trained_on_it": None,
            }
            if texts is not None:
                row["texts"] = [names[j] for j in texts[0][at]]
                row["text_cosines"] = [f"{value:.3f}" for value in texts[1][at]]
            if view is not None and not bool(view.probabilities[place, 0].isnan()):
                row["run"] = [names[j] for j in np.flatnonzero(view.decisions[place])]
                row["run_trained_on_it"] = int(not view.unseen[place])
            yield row
        progress("samples.csv", int(places[-1]) + 1, len(material))


def _shared_feature(material: Material, views: Views) -> str | None:
    """A feature of the material that lies in the space of the label texts."""
    if views.texts is None:
        return None
    for field in SHARED_SPACE:
        name = f"{views.text_alias}/{field}"
        if name in material.features and material.store[name].shape[1] == views.texts.shape[1]:
            return name
    return None


def _texts(
    material: Material, places: Ints, feature: str, views: Views
) -> tuple[list[list[int]], list[list[float]]]:
    """The nearest label texts of each sample, and their cosines."""
    assert views.texts is not None
    there = (~views.texts[:, 0].isnan()).nonzero()[:, 0]
    values = material.store[feature].take(material.rows[places]).astype(np.float32)
    cosines = (
        F.normalize(torch.from_numpy(values), dim=1) @ F.normalize(views.texts[there], dim=1).T
    )
    best = cosines.topk(min(NEAREST, len(there)), dim=1)
    return there[best.indices].tolist(), best.values.tolist()
