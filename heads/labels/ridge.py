"""What the other samples say of each one: kernel ridge regression, left one out in closed form.

A Gaussian kernel through its values at some samples (Nyström: Williams & Seeger 2001), and a linear
least-squares fit of every label with an l2 penalty. The prediction for a sample by a fit without it
needs no second fit (Cook 1977): ``(p - h y) / (1 - h)``, where ``h`` is its leverage. So all others
judge each sample, without folds or chance.

A label that is not known of a sample counts as the mean of those that know it. That draws scores
towards the mean, which the logistic curves of `posterior` take back, and needs one fit for all
labels.

Legend: n samples, C labels, D values, M landmarks, R values of the map, b samples of a block.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmc.heads.labels.material import Ints, Material, spaced

LANDMARKS = 1024
BANDWIDTH = 0.25
"""Of the kernel exp(-BANDWIDTH d² / median d²): so wide that it is hardly more than linear, which
was best on every set tried."""
PENALTIES = tuple(10 ** (e / 2) for e in range(-5, 7))
"""The one with the least error on left-out samples is taken."""
CHOICE_ROWS, CHOICE_LABELS = 8192, 512
"""Of so many samples and labels, evenly spaced."""
SMALLEST = 1e-6
"""Directions of the landmarks' kernel with less than this share of the largest are dropped."""

Told = Callable[[str, int, int], None]


class Ridge:
    """The fit, and its answers.

    Args:
        places: labelled samples to fit on, ascending (n,).
        targets: int8 (n, C) of 0 and 1, -1 where a label is not known.
        progress: told (stage, done, total).
    """

    def __init__(
        self, material: Material, places: Ints, targets: npt.NDArray[np.int8], progress: Told
    ) -> None:
        self.material, self.places, self._progress = material, places, progress
        self._targets = targets
        self._means = _known_means(targets)
        self._fit_map()
        self._fit()

    def left_out(self) -> Tensor:
        """float32 (n, C) on the CPU: what all others say of each; not calibrated."""
        out = torch.empty(len(self.places), self.mean.shape[0])
        for first, block in self._blocks("judge labels", self.places):
            y = self._labels(slice(first, first + len(block)))
            found = self._left_out(self._rotated(block), y, self.penalty)
            out[first : first + len(block)] = found.cpu()
        return out

    def scores(self, places: Ints) -> Tensor:
        """float32 (n, C) on the CPU: for samples that are not in the fit."""
        out = torch.empty(len(places), self.mean.shape[0])
        weights = self._solved(self.penalty)
        for first, block in self._blocks("judge unlabelled samples", places):
            out[first : first + len(block)] = (self._rotated(block) @ weights + self.mean).cpu()
        return out

    def _fit_map(self) -> None:
        random = np.random.default_rng(0)
        count = min(LANDMARKS, len(self.places))
        chosen = np.sort(random.choice(self.places, count, replace=False))
        self.landmarks = self.material.gather(chosen)
        square = torch.cdist(self.landmarks, self.landmarks).double().square()
        apart = square[~torch.eye(count, dtype=torch.bool, device=square.device)]
        self.scale = BANDWIDTH / max(float(apart.median()) if len(apart) else 1.0, 1e-6)
        values, vectors = torch.linalg.eigh((-self.scale * square).exp())
        kept = values > SMALLEST * values.max()
        self.whiten = (vectors[:, kept] / values[kept].sqrt()).float()

    def _map(self, block: Tensor) -> Tensor:
        """(b, D) -> (b, R), whose inner products are about the kernel's values."""
        square = torch.cdist(block, self.landmarks).square()
        return (-self.scale * square).exp() @ self.whiten

    def _fit(self) -> None:
        n, width = len(self.places), self.whiten.shape[1]
        labels = self._targets.shape[1]
        kind: dict[str, Any] = {"dtype": torch.float64, "device": self.material.device}
        gram = torch.zeros(width, width, **kind)
        total, cross = torch.zeros(width, **kind), torch.zeros(width, labels, **kind)
        mean = torch.zeros(labels, **kind)
        for first, block in self._blocks("fit neighbourhoods", self.places):
            phi = self._map(block)
            y = self._labels(slice(first, first + len(block)))
            gram += phi.T @ phi
            cross += phi.T @ y
            total += phi.double().sum(0)
            mean += y.double().sum(0)
        centre, mean = total / n, mean / n
        self.centre, self.mean = centre.float(), mean.float()
        gram -= n * torch.outer(centre, centre)
        cross -= n * torch.outer(centre, mean)
        values, vectors = torch.linalg.eigh(gram)
        self.strength = values.clamp(min=0).float()
        self.rotation = vectors.float()
        self.projected = (vectors.T @ cross).float()
        some = spaced(np.arange(n), CHOICE_ROWS)
        few = torch.from_numpy(spaced(np.arange(labels), CHOICE_LABELS)).to(self.material.device)
        errors = torch.zeros(len(PENALTIES), dtype=torch.float64)
        for first, block in self.material.vectors(self.places[some]):
            y = self._labels(some[first : first + len(block)])[:, few]
            q = self._rotated(block)
            for place, penalty in enumerate(PENALTIES):
                wrong = self._left_out(q, y, penalty, few) - y
                if self._means is not None:
                    given = self._targets[some[first : first + len(block)]]
                    open_ones = torch.from_numpy(given < 0).to(wrong.device)
                    wrong[open_ones[:, few]] = 0
                errors[place] += float(wrong.square().sum())
        self.penalty = PENALTIES[int(errors.argmin())]

    def _labels(self, at: slice | Ints) -> Tensor:
        y = torch.from_numpy(self._targets[at]).to(self.material.device, torch.float32)
        return y if self._means is None else torch.where(y < 0, self._means.to(y), y)

    def _rotated(self, block: Tensor) -> Tensor:
        return (self._map(block) - self.centre) @ self.rotation

    def _solved(self, penalty: float) -> Tensor:
        return self.projected / (self.strength + penalty)[:, None]

    def _left_out(
        self, q: Tensor, y: Tensor, penalty: float, labels: Tensor | slice = slice(None)
    ) -> Tensor:
        """(b, C) from what is `_rotated` and the labels of a block; of some of the labels."""
        leverage = (q.square() / (self.strength + penalty)).sum(1, keepdim=True)
        leverage = (leverage + 1 / len(self.places)).clamp(max=1 - 1e-4)
        p = q @ self._solved(penalty)[:, labels] + self.mean[labels]
        return (p - leverage * y) / (1 - leverage)

    def _blocks(self, stage: str, places: Ints) -> Iterator[tuple[int, Tensor]]:
        return self.material.vectors(places, lambda done, of: self._progress(stage, done, of))


def _known_means(targets: npt.NDArray[np.int8]) -> Tensor | None:
    """float32 (C,): the share of each label where it is known; None where all are."""
    if not len(targets) or targets.min() >= 0:
        return None
    known, yes = (targets >= 0).sum(0), (targets == 1).sum(0)
    return torch.from_numpy(yes / np.maximum(known, 1)).float()
