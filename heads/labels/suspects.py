"""Labels that are likely wrong: given ones that should not be there, and missing ones.

Every label of every labelled sample gets a probability, by what the other samples say of this one
(`ridge`) and what its other labels explain (`posterior`), and by a run's predictions, where it did
not train on the sample (`unseen`). How likely a label that is doubted is wrong comes from flipping
some on purpose (`flips`). The neighbours' labels are shown beside it for the reader: they add
nothing to the ranking, since the fit has them.

A label that is not known of a sample is no suspect, and says nothing of others.

Legend: n labelled samples, C labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmc.heads.labels.flips import SHARE, SHOWN_DOUBT, Scale, fit_scale, flip
from mmc.heads.labels.material import Ints, Material, Progress, spaced
from mmc.heads.labels.posterior import label_probabilities
from mmc.heads.labels.ridge import Ridge
from mmc.heads.labels.unseen import RunView, join, run_opinion

LEAST_SAMPLES = 10
"""Fewer labelled samples say nothing of each other."""
FLOOR = 0.5
"""A label that is less likely not as given is not listed."""
WORTH_A_LOOK = 0.1
"""Score from which pages show a label: of ten with such a score one is wrong. The table has all."""
KINDS = ("missing", "extra", "wrong")
COLUMNS = (
    "rank",
    "kind",
    "id",
    "split",
    "label",
    "suggested",
    "score",
    "probability",
    "evidence",
    "neighbors",
    "run",
    "labels",
    "image",
    "text",
)
OTHERS, OUT_OF_FOLD, RUN = "leave-one-out", "out-of-fold", "run"
"""What a label is judged by: the other samples, a run's folds, a run that did not train on it."""
TRIAL_ROWS, TRIAL_ENTRIES = 20_000, 1 << 25
"""Samples and entries (of all trials together) among which some are flipped on purpose."""
TRIAL_FLIPS, MOST_TRIALS, TRIAL_SEED = 1000, 8, 5
BLOCK_ENTRIES = 1 << 23


@dataclass(frozen=True)
class Judged:
    """What is thought of the labels of the labelled samples."""

    places: Ints
    """(n,)"""
    targets: npt.NDArray[np.int8]
    """(n, C) as given, -1 where a label is not known."""
    probabilities: Tensor
    """float32 (n, C) that a label is true."""
    evidence: npt.NDArray[np.str_]
    """(n,) what they are made of."""
    ridge: Ridge
    scales: dict[str, Scale]
    """Kind -> how likely a label of it is wrong."""

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
    found, evidence = _opinion(material, places, ridge.left_out(), given, view)
    scales = _trials(material, places, given, progress, view)
    return Judged(places, given, found, evidence, ridge, scales)


def _opinion(
    material: Material,
    places: Ints,
    scores: Tensor,
    given: npt.NDArray[np.int8],
    view: RunView | None,
) -> tuple[Tensor, npt.NDArray[np.str_]]:
    """Probabilities (n, C) from scores, which are overwritten, and a run; and their evidence."""
    known, task = torch.from_numpy(given), material.store.task
    found = label_probabilities(scores, known, task)
    evidence = np.full(len(places), OTHERS, dtype="U32")
    if view is not None:
        at, says = run_opinion(view, places)
        if len(at):
            rows = torch.from_numpy(at)
            found[rows], used = join(found[rows], says, known[rows], task)
            if used != "own":
                run = np.where(view.out_of_fold[places[at]], OUT_OF_FOLD, RUN)
                evidence[at] = run if used == "run" else np.char.add(f"{OTHERS} + ", run)
    return found, evidence


def _trials(
    material: Material,
    places: Ints,
    given: npt.NDArray[np.int8],
    progress: Progress,
    view: RunView | None,
) -> dict[str, Scale]:
    """Kind -> its scale, by flipping labels of some of the samples on purpose, several times."""
    task, width = material.store.task, given.shape[1]
    some = spaced(np.arange(len(places)), min(TRIAL_ROWS, max(256, TRIAL_ENTRIES // width)))
    random = np.random.default_rng(TRIAL_SEED)
    count = -(-TRIAL_FLIPS // max(1, round(SHARE * len(some))))
    count = max(1, min(count, MOST_TRIALS, TRIAL_ENTRIES // (len(some) * width)))
    flipped, wrong = zip(*(flip(given[some], task, random) for _ in range(count)), strict=True)
    ridge = Ridge(
        material,
        places[some],
        np.concatenate(flipped, 1),
        lambda stage, done, total: progress(f"{stage}, some flipped", done, total),
    )
    scores = ridge.left_out()
    doubts: dict[str, list[npt.NDArray[np.float32]]] = {}
    known: dict[str, list[npt.NDArray[np.bool_]]] = {}
    for trial in range(count):
        own = scores[:, trial * width : (trial + 1) * width].clone()
        targets = flipped[trial]
        p = _opinion(material, places[some], own, targets, view)[0].numpy()
        for kind, inside, doubt in _kinds(p, targets, task):
            shown = inside & (doubt >= SHOWN_DOUBT)
            doubts.setdefault(kind, []).append(doubt[shown])
            known.setdefault(kind, []).append(wrong[trial][shown])
    return {
        kind: fit_scale(np.concatenate(parts), np.concatenate(known[kind]), count)
        for kind, parts in doubts.items()
    }


def _kinds(
    p: npt.NDArray[np.float32], targets: npt.NDArray[np.int8], task: str
) -> list[tuple[str, npt.NDArray[np.bool_], npt.NDArray[np.float32]]]:
    """(kind, which entries are of it, how likely each is not as given)."""
    if task != "multilabel":
        return [("wrong", targets == 1, 1 - p)]
    return [("missing", targets == 0, p), ("extra", targets == 1, 1 - p)]


def suspects(
    material: Material,
    judged: Judged,
    limit: int,
    *,
    votes: Callable[[Ints], npt.NDArray[np.float32]],
    view: RunView | None = None,
) -> list[dict[str, Any]]:
    """Rows of `suspects.csv`, the likeliest first; ``limit`` of each kind at most.

    Args:
        votes: how much of the neighbours of samples (b,) has each label, (b, C).
    """
    single = material.store.task != "multilabel"
    picked = [
        (kind, sample, label, doubt, float(judged.scales[kind](doubt)))
        for kind in judged.scales
        for sample, label, doubt in _highest(judged, kind, material.store.task, limit)
    ]
    picked.sort(key=lambda item: (-item[4], -item[3]))
    places = judged.places[[item[1] for item in picked]] if picked else judged.places[:0]
    columns = {name: material.column(name, places) for name in ("id", "image", "text")}
    shares = votes(places) if len(places) else np.zeros((0, 0), np.float32)
    ranks = dict.fromkeys(KINDS, 0)
    rows = []
    for at, (kind, sample, label, _, score) in enumerate(picked):
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
                "probability": float(judged.probabilities[sample, label]),
                "evidence": str(judged.evidence[sample]),
                "neighbors": None if np.isnan(shares[at, label]) else float(shares[at, label]),
                "run": _said(view, place, label),
                "labels": material.names(place),
                "image": columns["image"][at],
                "text": columns["text"][at],
                "_row": int(material.rows[place]),
            }
        )
    return rows


def _said(view: RunView | None, place: int, label: int) -> float | None:
    """The run's probability of a label, where it did not train on the sample."""
    if view is None or not view.unseen[place]:
        return None
    return float(view.probabilities[place, label])


def _highest(judged: Judged, kind: str, task: str, limit: int) -> list[tuple[int, int, float]]:
    """(sample, label, doubt) of the most doubted entries of a kind, the most doubted first."""
    width = judged.targets.shape[1]
    step = max(1, BLOCK_ENTRIES // width)
    values, numbers = np.zeros(0, np.float32), np.zeros(0, np.int64)
    for start in range(0, len(judged.targets), step):
        part = slice(start, start + step)
        listed = _kinds(judged.probabilities[part].numpy(), judged.targets[part], task)
        inside, doubt = next((i, d) for name, i, d in listed if name == kind)
        at = np.flatnonzero(inside & (doubt >= FLOOR))
        values = np.concatenate([values, doubt.ravel()[at]])
        numbers = np.concatenate([numbers, at + start * width])
        order = np.argsort(-values, kind="stable")[:limit]
        values, numbers = values[order], numbers[order]
    return [
        (number // width, number % width, value)
        for number, value in zip(numbers.tolist(), values.tolist(), strict=True)
    ]
