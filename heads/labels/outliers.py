"""Samples that are far from every other sample of a label that they have.

Legend: m samples of a label, D values.
"""

from typing import Any

import numpy as np
import torch

from mmc.heads.labels.material import Ints, Material, Progress, spaced

COLUMNS = ("rank", "id", "split", "label", "score", "cosine", "usual", "labels", "image", "text")
REFERENCES = 2000
"""A sample is compared with so many others of its label at most, evenly spaced."""
LEAST_SAMPLES = 5
"""A label with fewer has no usual distance."""
FLOOR = 3.0
"""Deviations from the usual cosine from which a sample is listed."""
BLOCK = 1 << 24


def outliers(material: Material, limit: int, progress: Progress) -> list[dict[str, Any]]:
    """Rows of `outliers.csv`, the farthest first.

    ``score`` is how many deviations (median absolute, scaled as for a normal distribution) the
    cosine to the nearest other sample of the label is below the label's median. Where nothing is
    labelled all samples count as one label, called "".
    """
    groups = _by_label(material)
    found: list[tuple[float, int, str, float, float]] = []
    for number, (label, places) in enumerate(groups, 1):
        if len(places) >= LEAST_SAMPLES:
            cosines = _nearest_cosines(material, places)
            usual = float(np.median(cosines))
            spread = 1.4826 * float(np.median(np.abs(cosines - usual)))
            scores = (usual - cosines) / max(spread, 1e-6)
            for at in np.argsort(-scores, kind="stable")[:limit]:
                if scores[at] < FLOOR:
                    break
                found.append((float(scores[at]), int(places[at]), label, float(cosines[at]), usual))
        progress("outliers", number, len(groups))
    found.sort(key=lambda item: (-item[0], item[1]))
    chosen = found[:limit]
    places = np.array([item[1] for item in chosen], np.int64)
    columns = {name: material.column(name, places) for name in ("id", "image", "text")}
    return [
        {
            "rank": at + 1,
            "id": columns["id"][at],
            "split": material.split[place],
            "label": label,
            "score": score,
            "cosine": cosine,
            "usual": usual,
            "labels": material.names(place),
            "image": columns["image"][at],
            "text": columns["text"][at],
            "_place": place,
        }
        for at, (score, place, label, cosine, usual) in enumerate(chosen)
    ]


def _by_label(material: Material) -> list[tuple[str, Ints]]:
    """Each label and the places of its samples; one group of all where nothing is labelled."""
    known = material.labels
    if not known.known.any():
        return [("", np.arange(len(material)))]
    sample = np.repeat(np.arange(len(material)), np.diff(known.indptr))
    order = np.argsort(known.indices, kind="stable")
    cuts = np.searchsorted(known.indices[order], np.arange(len(material.label_set) + 1))
    return [
        (label, sample[order[cuts[index] : cuts[index + 1]]])
        for index, label in enumerate(material.label_set)
    ]


def _nearest_cosines(material: Material, places: Ints) -> np.ndarray:
    """float32 (m,): the cosine of each sample to the nearest *other* reference of the label."""
    chosen = spaced(np.arange(len(places)), REFERENCES)
    references = material.gather(places[chosen])
    column = np.full(len(places), -1)
    column[chosen] = np.arange(len(chosen))
    out = np.empty(len(places), np.float32)
    step = max(1, BLOCK // len(chosen))
    for first, block in material.vectors(places):
        for i in range(0, len(block), step):
            part = block[i : i + step]
            cosines = part @ references.T
            own = column[first + i : first + i + len(part)]
            rows = np.flatnonzero(own >= 0)
            cosines[torch.from_numpy(rows), torch.from_numpy(own[rows])] = -2
            out[first + i : first + i + len(part)] = cosines.amax(1).cpu().numpy()
    return out
