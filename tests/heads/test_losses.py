"""Values of the losses against formulas written out in float64, and their weights."""

import math

import numpy as np
import pytest
import torch

from mmc.heads.losses.bce import BCE, BCEConfig
from mmc.heads.losses.ce import CE, CEConfig
from mmc.store.errors import InputError


def make(cls, positives: list[float], known: float, **settings):
    counts = torch.tensor(positives)
    return cls(cls.Config(**settings), counts, torch.full_like(counts, known))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_bce_is_the_formula():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 3, (7, 4)), (rng.random((7, 4)) < 0.4).astype(float)
    expected = -(y * np.log(sigmoid(x)) + (1 - y) * np.log(sigmoid(-x))).mean()
    loss = make(BCE, [1, 2, 3, 4], 10)
    value = loss(torch.from_numpy(x), torch.from_numpy(y))
    assert float(value) == pytest.approx(expected, abs=1e-12)


def test_bce_at_zero_is_log_two():
    loss = make(BCE, [1, 2], 10)
    assert float(loss(torch.zeros(3, 2), torch.ones(3, 2))) == pytest.approx(math.log(2))


def test_bce_leaves_out_single_unknown_entries():
    x = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    y = torch.tensor([[1.0, -1.0], [0.0, 1.0]])
    expected = (
        math.log1p(math.exp(-1.0)) + math.log1p(math.exp(0.5)) + math.log1p(math.exp(-3.0))
    ) / 3
    assert float(make(BCE, [1, 2], 10)(x, y)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, [1, 1, 1]),
        ({"pos_weight": "auto"}, [1, 4, 99]),
        ({"pos_weight": "cap"}, [1, 4, 20]),
        ({"pos_weight": "cap", "pos_weight_cap": 2.5}, [1, 2.5, 2.5]),
    ],
)
def test_bce_weights_positives_by_their_rarity(settings, weights):
    loss = make(BCE, [50, 20, 1], 100, **settings)
    rng = np.random.default_rng(1)
    x, y = rng.normal(0, 2, (9, 3)), (rng.random((9, 3)) < 0.5).astype(float)
    elements = -(y * np.array(weights) * np.log(sigmoid(x)) + (1 - y) * np.log(sigmoid(-x)))
    value = loss(torch.from_numpy(x), torch.from_numpy(y))
    assert float(value) == pytest.approx(elements.mean(), abs=1e-12)


@pytest.mark.parametrize("weight", ["none", "auto"])
def test_bce_has_the_gradient_of_torchs_own(weight):
    loss = make(BCE, [50, 20, 1], 100, pos_weight=weight)
    torch.manual_seed(0)
    x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    y = (torch.rand(9, 3) < 0.5).double()
    known = torch.rand(9, 3) < 0.7
    loss(x, torch.where(known, y, -1.0)).backward()
    z = x.detach().requires_grad_()
    elements = torch.nn.functional.binary_cross_entropy_with_logits(
        z, y, pos_weight=loss.weights.double(), reduction="none"
    )
    elements[known].mean().backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_ce_is_the_formula():
    rng = np.random.default_rng(2)
    x, k = rng.normal(0, 3, (8, 5)), rng.integers(0, 5, 8)
    expected = (np.log(np.exp(x).sum(1)) - x[np.arange(8), k]).mean()
    loss = make(CE, [1, 2, 3, 4, 5], 15)
    value = loss(torch.from_numpy(x), torch.from_numpy(k))
    assert float(value) == pytest.approx(expected, abs=1e-12)


def test_ce_weights_divide_by_the_sum_of_the_weights():
    rng = np.random.default_rng(3)
    x, k = rng.normal(0, 3, (8, 3)), rng.integers(0, 3, 8)
    loss = make(CE, [60, 30, 10], 100, pos_weight="auto")
    weights = torch.tensor([100 / 180, 100 / 90, 100 / 30])
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(x).float(), torch.from_numpy(k), weight=weights
    )
    torch.testing.assert_close(loss(torch.from_numpy(x).float(), torch.from_numpy(k)), expected)


def test_priors_are_the_logits_of_the_shares():
    bce = make(BCE, [500, 100], 1000)
    assert bce.prior().tolist() == pytest.approx([0.0, math.log(100 / 900)], abs=0.01)
    ce = make(CE, [500, 400, 100], 1000)
    assert ce.prior().softmax(0).tolist() == pytest.approx([0.5, 0.4, 0.1], abs=0.001)


@pytest.mark.parametrize("config", [BCEConfig, CEConfig])
def test_a_cap_must_be_positive(config):
    with pytest.raises(InputError, match="pos_weight_cap"):
        config(pos_weight_cap=0)
