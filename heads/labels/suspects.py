"""Labels that are likely wrong: given ones that should not be there, and missing ones.

Every label of every labelled sample gets the probability that it is wrong, by what the other
samples say of this one (`ridge`) and what its other labels explain (`posterior`); and by a run's
predictions, where it did not train on the sample (`unseen`). The neighbours' labels are shown
beside it for the reader: they add nothing to the ranking, since the fit has them.

A label that is not known of a sample is no suspect, and says nothing of others.

Legend: n labelled samples, C labels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmc.heads.labels.around import Around, shares
from mmc.heads.labels.material import Ints, Material, Progress
from mmc.heads.labels.posterior import label_probabilities
from mmc.heads.labels.ridge import Ridge
from mmc.heads.labels.unseen import RunView, join, run_opinion

LEAST_SAMPLES = 10
"""Fewer labelled samples say nothing of each other."""
FLOOR = 0.5
"""Less likely to be wrong than this is not listed."""
KINDS = ("missing", "extra", "wrong")
COLUMNS = (
    "rank",
    "kind",
    "id",
    "split",
    "label",
    "suggested",
    "score",
    "neighbors",
    "run",
    "labels",
    "image",
    "text",
)


@dataclass(frozen=True)
class Judged:
    """What is thought of the labels of the labelled samples."""

    places: Ints
    """(n,)"""
    targets: npt.NDArray[np.int8]
    """(n, C) as given, -1 where a label is not known."""
    probabilities: Tensor
    """float32 (n, C) that a label is true."""
    ridge: Ridge

    def wrong(self) -> Tensor:
        """float32 (n, C): that the entry is not as given; -1 where nothing is given."""
        given = torch.from_numpy(self.targets)
        wrong = torch.where(given == 1, 1 - self.probabilities, self.probabilities)
        return wrong.masked_fill_(given < 0, -1)


def judge(
    material: Material,
    progress: Progress,
    view: RunView | None = None,
    *,
    targets: npt.NDArray[np.int8] | None = None,
) -> Judged | None:
    """Probabilities of all labels; None where there are too few labelled samples to say.

    Args:
        targets: (n, C) of the labelled samples, instead of what the store says.
    """
    places = material.labelled
    if len(places) < LEAST_SAMPLES or not len(material.label_set):
        return None
    given = material.store.labels.multi_hot(material.rows[places]) if targets is None else targets
    ridge = Ridge(material, places, given, progress)
    known = torch.from_numpy(given)
    found = label_probabilities(ridge.left_out(), known, material.store.task)
    if view is not None:
        at, says = run_opinion(view, places)
        if len(at):
            rows = torch.from_numpy(at)
            found[rows] = join(found[rows], says, known[rows], material.store.task)
    return Judged(places, given, found, ridge)


def suspects(
    material: Material,
    judged: Judged,
    limit: int,
    *,
    near: list[Around],
    view: RunView | None = None,
) -> list[dict[str, Any]]:
    """Rows of `suspects.csv`, the likeliest first; ``limit`` of each kind at most."""
    wrong = judged.wrong()
    single = material.store.task != "multilabel"
    if single:
        given = torch.from_numpy(judged.targets.argmax(1)).long()
        chosen = _highest(wrong.gather(1, given[:, None]), limit)
        picked = [("wrong", sample, int(given[sample]), score) for sample, _, score in chosen]
    else:
        targets = torch.from_numpy(judged.targets)
        picked = []
        for kind, mask in (("missing", targets == 0), ("extra", targets == 1)):
            chosen = _highest(wrong.masked_fill(~mask, -1), limit)
            picked += [(kind, sample, label, score) for sample, label, score in chosen]
        picked.sort(key=lambda item: -item[3])
    places = judged.places[[item[1] for item in picked]] if picked else judged.places[:0]
    columns = {name: material.column(name, places) for name in ("id", "image", "text")}
    votes = shares(material, near, places) if len(places) else None
    ranks = dict.fromkeys(KINDS, 0)
    rows = []
    for at, (kind, sample, label, score) in enumerate(picked):
        place = int(places[at])
        ranks[kind] += 1
        instead = None
        if single:
            others = judged.probabilities[sample].clone()
            others[label] = -1
            instead = material.label_set[int(others.argmax())] if len(others) > 1 else None
        rows.append(
            {
                "rank": ranks[kind],
                "kind": kind,
                "id": columns["id"][at],
                "split": material.split[place],
                "label": material.label_set[label],
                "suggested": instead,
                "score": score,
                "neighbors": None if votes is None else float(votes[at, label]),
                "run": _said(view, place, label),
                "labels": material.names(place),
                "image": columns["image"][at],
                "text": columns["text"][at],
                "_place": place,
            }
        )
    return rows


def _said(view: RunView | None, place: int, label: int) -> float | None:
    """The run's probability of a label, where it did not train on the sample."""
    if view is None or not view.unseen[place]:
        return None
    return float(view.probabilities[place, label])


def _highest(wrong: Tensor, limit: int) -> list[tuple[int, int, float]]:
    """(sample, column, value) of the largest entries that reach the floor, largest first."""
    flat = wrong.reshape(-1)
    values, at = flat.topk(min(limit, len(flat)))
    width = wrong.shape[1]
    return [
        (place // width, place % width, value)
        for value, place in zip(values.tolist(), at.tolist(), strict=True)
        if value >= FLOOR
    ]
