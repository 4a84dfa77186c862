"""The losses over classes against PyTorch's own and formulas written out in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmc.heads.losses.ce import CE, SmoothCE, SmoothCEConfig
from mmc.heads.losses.focal_ce import FocalCE, FocalCEConfig
from mmc.store.errors import InputError

COUNTS = [60.0, 30.0, 10.0]
every = pytest.mark.parametrize("cls", [CE, SmoothCE, FocalCE], ids=lambda cls: cls.__name__)


def make(cls, positives=COUNTS, **settings):
    counts = torch.tensor(positives, dtype=torch.float64)
    return cls(cls.Config(**settings), counts, torch.full_like(counts, float(counts.sum())))


def data(rows: int = 9, seed: int = 0, classes: int = 3):
    g = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(rows, classes, dtype=torch.float64, generator=g)
    return x, torch.randint(classes, (rows,), generator=g)


def near(value, expected, tolerance=1e-12):
    assert float(value) == pytest.approx(float(expected), abs=tolerance)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smooth_ce_is_torchs(smoothing):
    x, k = data()
    near(
        make(SmoothCE, smoothing=smoothing)(x, k), F.cross_entropy(x, k, label_smoothing=smoothing)
    )


def test_smoothing_spreads_over_all_classes_the_rows_own_among_them():
    x, k = data()
    q = np.eye(3)[k.numpy()] * 0.9 + 0.1 / 3
    log_p = x.numpy() - np.log(np.exp(x.numpy()).sum(1, keepdims=True))
    near(make(SmoothCE)(x, k), -(q * log_p).sum(1).mean())


def test_smooth_ce_with_weights_is_torchs():
    x, k = data()
    weights = torch.tensor([100 / 180, 100 / 90, 100 / 30], dtype=torch.float64)
    expected = F.cross_entropy(x, k, weight=weights, label_smoothing=0.1)
    near(make(SmoothCE, pos_weight="auto")(x, k), expected, 1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_focal_ce_is_the_formula(gamma, smoothing):
    x, k = data()
    p = np.exp(x.numpy()) / np.exp(x.numpy()).sum(1, keepdims=True)
    q = np.eye(3)[k.numpy()] * (1 - smoothing) + smoothing / 3
    true = p[np.arange(9), k.numpy()]
    expected = ((1 - true) ** gamma * -(q * np.log(p)).sum(1)).mean()
    near(make(FocalCE, gamma=gamma, smoothing=smoothing)(x, k), expected)


def test_identities():
    x, k = data(rows=40)
    near(make(FocalCE, gamma=0)(x, k), make(CE)(x, k))
    near(make(SmoothCE, smoothing=0)(x, k), make(CE)(x, k))
    near(make(FocalCE, gamma=0, smoothing=0.1)(x, k), make(SmoothCE)(x, k))


def test_two_classes_are_one_logit():
    """2-way cross-entropy is binary cross-entropy of the difference."""
    x, k = data(classes=2)
    z = x[:, 1] - x[:, 0]
    near(make(CE, [5, 5])(x, k), F.binary_cross_entropy_with_logits(z, k.double()))


def test_focal_ce_weighs_rows_and_divides_by_their_number():
    x, k = data()
    weights = torch.tensor([100 / 180, 100 / 90, 100 / 30], dtype=torch.float64)
    log_p = x.log_softmax(1)[torch.arange(9), k]
    expected = (weights[k] * (1 - log_p.exp()) ** 2 * -log_p).mean()
    near(make(FocalCE, pos_weight="auto")(x, k), expected, 1e-6)


@every
def test_a_sum_counts_every_known_row(cls):
    x, k = data()
    total = make(cls, reduction="sum")(x, k)
    near(total, 9 * make(cls)(x, k))
    unknown = torch.cat([k, torch.tensor([-1, -1])])
    more = torch.cat([x, 50 * torch.ones(2, 3).double()])
    near(make(cls, reduction="sum")(more, unknown), total)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (SmoothCE, {}),
        (SmoothCE, {"pos_weight": "auto", "smoothing": 0.3}),
        (FocalCE, {}),
        (FocalCE, {"gamma": 0.5, "pos_weight": "cap"}),
        (FocalCE, {"gamma": 3.0, "smoothing": 0.2, "pos_weight": "auto"}),
    ],
)
def test_no_constant_is_better_than_the_prior(cls, settings):
    counts = torch.tensor([300, 60, 5, 0])
    k = torch.repeat_interleave(torch.arange(4), counts + 1)  # the prior counts one row more
    loss = cls(cls.Config(**settings), counts.double(), torch.full((4,), 365.0))
    prior = loss.prior().double().requires_grad_()
    best = loss(prior.expand(len(k), -1), k)
    (slope,) = torch.autograd.grad(best, prior)
    assert slope.abs().max() < 1e-5
    g = torch.Generator().manual_seed(0)
    for spread in (0.01, 0.1, 1.0, 4.0):
        other = prior.detach() + spread * torch.randn(4, generator=g).double()
        assert loss(other.expand(len(k), -1), k) >= best.detach() - 1e-9


@every
def test_the_gradient_is_that_of_finite_differences_with_unknown_rows(cls):
    x, k = data(rows=5)
    k[2] = -1
    loss = make(cls, pos_weight="auto")
    assert torch.autograd.gradcheck(lambda z: loss(z, k), (x.requires_grad_(),))


@pytest.mark.parametrize(
    ("config", "settings", "named"),
    [
        (SmoothCEConfig, {"smoothing": 1.0}, "loss.smoothing"),
        (FocalCEConfig, {"gamma": -1.0}, "loss.gamma"),
        (FocalCEConfig, {"smoothing": -0.1}, "loss.smoothing"),
        (FocalCEConfig, {"pos_weight_cap": 0.0}, "loss.pos_weight_cap"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config, settings, named):
    with pytest.raises(InputError, match=named):
        config(**settings)
