"""Every loss at logits of 100 and -100, in bf16: values and gradients are those of the formulas.

The formulas are evaluated and differentiated with 120 digits, where nothing rounds to 0 or 1.
"""

from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from mpmath import mp, mpf

from mmc.heads.losses import LOSSES
from mmc.store.registry import load

ROWS = [
    [-100, 100, 100, -100],
    [100, -100, -100, 100],
    [-20, 0.5, 20, -3],
    [0, 0, -8, 8],
]
TARGETS = [[0, 1, 0, 1], [0, 1, 0, 1], [1, 0, 0, 0], [1, 0, 0, 1]]
CLASSES = [0, 1, 0, 3]


def p(x):
    return 1 / (1 + mpmath.exp(-x))


def log_loss(x, y):
    """Of a target from 0 to 1."""
    return y * mpmath.log(1 + mpmath.exp(-x)) + (1 - y) * mpmath.log(1 + mpmath.exp(x))


def asl(x, y):
    shifted = max(p(x) - mpf("0.05"), 0)
    return -mpmath.log(p(x)) if y else -(shifted**4) * mpmath.log(1 - shifted)


def aam(x, y, offset):
    scale, margin = 15, mpf("0.2")
    c = (x - offset) / scale
    phi = c - margin * mpmath.sin(margin)
    if c > mpmath.cos(mp.pi - margin):
        sine = mpmath.sqrt(max(1 - c * c, mpf("1e-7")))
        phi = c * mpmath.cos(margin) - sine * mpmath.sin(margin)
    return log_loss(scale * (phi if y else c) + offset, y)


def zlpr(row, truth):
    soft = [t * mpf("0.95") + mpf("0.025") for t in truth]
    pairs = list(zip(row, soft, strict=True))
    yes = sum(t * mpmath.exp(-x) for x, t in pairs)
    no = sum((1 - t) * mpmath.exp(x) for x, t in pairs)
    return mpmath.log(1 + yes) + mpmath.log(1 + no)


def each(element: Callable[..., Any]) -> Callable[..., Any]:
    """The loss of a row of labels, as its share of the mean over all elements."""
    return lambda row, truth, offsets: (
        sum(element(x, y, offset) for x, y, offset in zip(row, truth, offsets, strict=True))
        / len(row)
    )


def softmax(row, k):
    return mpmath.exp(row[k]) / sum(mpmath.exp(x) for x in row)


def ce(row, k):
    return -mpmath.log(softmax(row, k))


FORMULAS: dict[str, Callable[..., Any]] = {
    "bce": each(lambda x, y, _: log_loss(x, y)),
    "smooth_bce": each(lambda x, y, _: log_loss(x, y * mpf("0.9") + mpf("0.05"))),
    "focal": each(lambda x, y, _: (p(-x) if y else p(x)) ** 2 * log_loss(x, y)),
    "asl": each(lambda x, y, _: asl(x, y)),
    "aam": each(aam),
    "zlpr": lambda row, truth, _: zlpr(row, truth),
    "ce": lambda row, k, _: ce(row, k),
    "smooth_ce": lambda row, k, _: (
        mpf("0.9") * ce(row, k) + mpf("0.1") * sum(ce(row, j) for j in range(4)) / 4
    ),
    "focal_ce": lambda row, k, _: (1 - softmax(row, k)) ** 2 * ce(row, k),
}


@pytest.mark.parametrize("name", [entry.name for entry in LOSSES])
def test_values_and_gradients_at_large_logits_in_bf16(name):
    cls = load(next(entry for entry in LOSSES if entry.name == name))
    counts = torch.tensor([50.0, 20.0, 1.0, 5.0])
    loss = cls(cls.Config(), counts, torch.full_like(counts, 100.0))
    multilabel = "multilabel" in cls.tasks
    targets = torch.tensor(TARGETS).float() if multilabel else torch.tensor(CLASSES)
    logits = torch.tensor(ROWS, dtype=torch.bfloat16, requires_grad=True)
    value = loss(logits, targets)
    value.backward()
    with mp.workdps(120):  # 1 - p is 1e-44 at a logit of 100, and is told from 0
        offsets = [mpf(o) for o in loss.prior().tolist()]
        total, slopes = mpf(0), []
        for row, truth in zip(ROWS, TARGETS if multilabel else CLASSES, strict=True):

            def formula(*x, truth=truth):
                return FORMULAS[name](x, truth, offsets) / len(ROWS)

            at = tuple(mpf(x) for x in row)
            total += formula(*at)
            slopes.append([mpmath.diff(formula, at, order) for order in np.eye(4, dtype=int)])
    assert value.item() == pytest.approx(float(total), rel=1e-5)
    found = torch.tensor([[float(slope) for slope in row] for row in slopes])
    # A gradient is handed on in bf16: 8 bits.
    torch.testing.assert_close(logits.grad.float(), found, rtol=0.01, atol=1e-6)
