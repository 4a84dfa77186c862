"""From scores to the probability that a label is true, given all else that is known of a sample.

Two steps. What a sample's *other* labels say is taken in: a digit that looks like 3 or 8 is no
missing 3 where 8 is given. With the errors of the scores as a Gaussian of C values, the expected
error of one label given those of the others is in closed form (the precision matrix). Then each
label's scores are made probabilities by a logistic curve (Platt 1999).

Legend: n samples, C labels.
"""

import torch
from torch import Tensor

from mmc.heads.temperature import fit_temperature, probabilities

MOST_LABELS = 4096
"""Beyond it the labels' errors are taken as independent: the matrix is C x C."""
PLATT_ENTRIES = 1 << 22
"""Scores that the curves are fitted to, of evenly spaced samples."""
PLATT_STEPS = 50
BLOCK = 1 << 22
LEAST = 1e-6
"""Probabilities stay this far from 0 and 1."""


def label_probabilities(scores: Tensor, targets: Tensor, task: str) -> Tensor:
    """float32 (n, C): how likely each label is for each sample, by all but that label itself.

    Args:
        scores: float32 (n, C), left out; overwritten.
        targets: int8 (n, C) of 0 and 1, the labels given; -1 where one is not known.
    """
    if task != "multilabel":
        temperature = fit_temperature(scores, targets.argmax(1), task)
        return probabilities(scores, task, temperature).clamp(LEAST, 1 - LEAST)
    if 1 < scores.shape[1] <= MOST_LABELS and len(scores) > 1:
        _condition(scores, targets)
    return _platt(scores, targets)


def _condition(scores: Tensor, targets: Tensor) -> None:
    """Expected score of each label given the errors of the others, in place."""
    n, width = scores.shape
    step = max(1, BLOCK // width)
    covariance = torch.zeros(width, width, dtype=torch.float64)
    for i in range(0, n, step):
        error = (
            _given(targets[i : i + step], scores[i : i + step]) - scores[i : i + step]
        ).double()
        covariance += error.T @ error
    covariance /= n
    spread = covariance.diagonal().clone()
    # Few samples tell little of how errors go together: the diagonal grows with C / n.
    lift = spread * (width / n) + 1e-6 * spread.mean().clamp(min=1e-12)
    precision = torch.linalg.inv(covariance + torch.diag(lift))
    weights = (precision / precision.diagonal()[None, :]).float()
    for i in range(0, n, step):
        y = _given(targets[i : i + step], scores[i : i + step])
        scores[i : i + step] = y - (y - scores[i : i + step]) @ weights


def _given(targets: Tensor, scores: Tensor) -> Tensor:
    """The labels as float32, the score where one is not known: no error, which says nothing."""
    return torch.where(targets < 0, scores, targets.float())


def _platt(scores: Tensor, targets: Tensor) -> Tensor:
    """Logistic curves, one per label, by Newton's method on all labels at once.

    A label with few samples of either kind gets a curve near that of all labels together.
    """
    stride = max(1, -(-scores.numel() // PLATT_ENTRIES))
    x, y = scores[::stride].double(), targets[::stride].double()
    known = None
    if len(y) and y.min() < 0:
        known, y = (y >= 0).double(), y.clamp(min=0)
    flat = None if known is None else known.reshape(-1, 1)
    slope, bias = _newton(x.reshape(-1, 1), y.reshape(-1, 1), None, flat)
    start = (slope.expand(x.shape[1]).clone(), bias.expand(x.shape[1]).clone())
    slope, bias = _newton(x, y, start, known)
    out = torch.empty_like(scores)
    step = max(1, BLOCK // scores.shape[1])
    for i in range(0, len(scores), step):
        z = scores[i : i + step].double() * slope + bias
        out[i : i + step] = z.sigmoid().clamp(LEAST, 1 - LEAST).float()
    return out


def _newton(
    x: Tensor, y: Tensor, near: tuple[Tensor, Tensor] | None, known: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(slope, bias), (C,) each, float64; held near ``near`` by a weak quadratic penalty.

    Args:
        known: (n, C) 1 and 0: entries that count; None: all.
    """
    width = x.shape[1]
    wished = near or (torch.full((width,), 4.0).double(), torch.full((width,), -2.0).double())
    slope, bias = (w.clone() for w in wished)
    hold = 0.1
    for _ in range(PLATT_STEPS):
        p = (x * slope + bias).sigmoid()
        error, weight = p - y, p * (1 - p)
        if known is not None:
            error, weight = error * known, weight * known
        g1 = (error * x).sum(0) + hold * (slope - wished[0])
        g2 = error.sum(0) + hold * (bias - wished[1])
        h11, h12 = (weight * x * x).sum(0) + hold, (weight * x).sum(0)
        h22 = weight.sum(0) + hold
        determinant = (h11 * h22 - h12 * h12).clamp(min=1e-12)
        d1 = (h22 * g1 - h12 * g2) / determinant
        d2 = (h11 * g2 - h12 * g1) / determinant
        # Steps far from the optimum overshoot; a bounded step gets there all the same.
        size = torch.maximum(d1.abs(), d2.abs()).clamp(min=1e-12)
        shrink = (2.0 / size).clamp(max=1.0)
        slope, bias = slope - shrink * d1, bias - shrink * d2
        if float(size.max()) < 1e-8:
            break
    return slope.clamp(min=0), bias
