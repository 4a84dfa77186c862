"""The multi-label losses against formulas written out in float64, and against each other."""

import math

import numpy as np
import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from mmc.heads.losses.aam import AAM, AAMConfig
from mmc.heads.losses.asl import ASL, ASLConfig
from mmc.heads.losses.base import reduced
from mmc.heads.losses.bce import BCE
from mmc.heads.losses.focal import Focal, FocalConfig
from mmc.heads.losses.smooth_bce import SmoothBCE, SmoothBCEConfig
from mmc.heads.losses.zlpr import ZLPR, ZLPRConfig
from mmc.store.errors import InputError

POSITIVES, KNOWN = [50.0, 20.0, 1.0, 5.0], 100.0
every = pytest.mark.parametrize(
    "cls", [BCE, SmoothBCE, Focal, ASL, ZLPR, AAM], ids=lambda cls: cls.__name__
)


def make(cls, positives=POSITIVES, **settings):
    counts = torch.tensor(positives, dtype=torch.float64)
    return cls(cls.Config(**settings), counts, torch.full_like(counts, KNOWN))


def data(rows: int = 7, spread: float = 3.0, seed: int = 0, labels: int = 4):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(0, spread, (rows, labels)), rng.random((rows, labels)) < 0.4
    return torch.from_numpy(x), torch.from_numpy(y.astype(float))


def near(value, expected, tolerance=1e-12):
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(float(expected), abs=tolerance)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# -- the formulas ----------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_smooth_bce_is_bce_of_smoothed_targets(smoothing):
    x, y = data()
    t = y.numpy() * (1 - smoothing) + smoothing / 2
    p = sigmoid(x.numpy())
    expected = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    near(make(SmoothBCE, smoothing=smoothing)(x, y), expected)


def test_smooth_bce_towards_the_prior():
    x, y = data()
    share = (np.array(POSITIVES) + 1) / (KNOWN + 2)
    t = y.numpy() * 0.8 + 0.2 * share
    p = sigmoid(x.numpy())
    expected = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    near(make(SmoothBCE, smoothing=0.2, towards="prior")(x, y), expected)


def test_the_least_of_smooth_bce_is_an_entropy():
    e = 0.1
    y = torch.tensor([[1.0, 0, 1, 0]], dtype=torch.float64)
    best = torch.logit(y * (1 - e) + e / 2)
    h = -(e / 2 * math.log(e / 2) + (1 - e / 2) * math.log(1 - e / 2))
    near(make(SmoothBCE)(best, y), h)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("alpha", [None, 0.25, 0.75])
def test_focal_is_torchvisions(gamma, alpha):
    x, y = data()
    expected = sigmoid_focal_loss(x, y, -1 if alpha is None else alpha, gamma, "mean")
    near(make(Focal, gamma=gamma, alpha=alpha)(x, y), expected)


def test_focal_takes_soft_targets():
    x, _ = data()
    t = torch.rand(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = torch.sigmoid(x)
    bce = -(t * p.log() + (1 - t) * (1 - p).log())
    near(make(Focal)(x, t), ((t - p).square() * bce).mean())


@pytest.mark.parametrize("clip", [0.0, 0.05, 0.2])
@pytest.mark.parametrize(("positive", "negative"), [(0, 4), (1, 4), (2, 3.5), (0, 0), (0.5, 0.5)])
def test_asl_is_the_formula(clip, positive, negative):
    x, y = data()
    p = sigmoid(x.numpy())
    pm = np.maximum(p - clip, 0)
    y_ = y.numpy()
    expected = -(
        y_ * (1 - p) ** positive * np.log(p) + (1 - y_) * pm**negative * np.log(1 - pm)
    ).mean()
    loss = make(ASL, clip=clip, gamma_pos=positive, gamma_neg=negative)
    near(loss(x, y), expected, 1e-10)


def test_asl_with_detached_weights_has_the_gradient_of_constant_weights():
    x, y = data(spread=2.0)
    x.requires_grad_()
    make(ASL, detach_weight=True, gamma_pos=1.0)(x, y).backward()
    z = x.detach().requires_grad_()
    p = torch.sigmoid(z)
    pm = (p - 0.05).clamp(min=0)
    elements = -y * (1 - p).detach() * p.log() - (1 - y) * pm.detach() ** 4 * (1 - pm).log()
    elements.mean().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-10, atol=1e-12)
    whole = x.detach().requires_grad_()
    make(ASL, gamma_pos=1.0)(whole, y).backward()
    assert (whole.grad - x.grad).abs().max() > 1e-3  # and that is not the whole gradient


def test_a_negative_below_the_margin_has_exactly_no_gradient():
    p = torch.tensor([[0.001, 0.049, 0.0501, 0.9]], dtype=torch.float64)
    x = p.logit().requires_grad_()
    make(ASL)(x, torch.zeros_like(p)).backward()
    assert x.grad[0, :2].tolist() == [0.0, 0.0]
    assert (x.grad[0, 2:] > 0).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_powers_have_finite_gradients_where_their_base_is_zero(gamma):
    x = torch.tensor([[-100.0, -100, 100, 100]], requires_grad=True)
    y = torch.tensor([[0.0, 1, 0, 1]])
    for loss in (make(ASL, gamma_neg=gamma, gamma_pos=gamma), make(Focal, gamma=gamma)):
        (grad,) = torch.autograd.grad(loss(x, y), x)
        assert grad.isfinite().all()


def zlpr(x, y):
    """Sample by sample, as the paper writes it."""
    rows = []
    for row, truth in zip(x.numpy(), y.numpy(), strict=True):
        rows.append(
            math.log(1 + sum(math.exp(-v) for v in row[truth == 1]))
            + math.log(1 + sum(math.exp(v) for v in row[truth == 0]))
        )
    return rows


def test_zlpr_is_the_formula():
    x, y = data()
    y[0], y[1] = 0, 1  # no positives, no negatives
    near(make(ZLPR, smoothing=0.0)(x, y), np.mean(zlpr(x, y)))


def test_soft_zlpr_is_the_formula():
    x, y = data()
    t = y * 0.95 + 0.025
    first = torch.log(1 + (t * torch.exp(-x)).sum(1))
    second = torch.log(1 + ((1 - t) * torch.exp(x)).sum(1))
    near(make(ZLPR)(x, y), (first + second).mean())
    near(make(ZLPR, smoothing=0.0)(x, t), (first + second).mean())


def test_zlpr_leaves_out_single_unknown_entries():
    x, y = data()
    loss = make(ZLPR, smoothing=0.0)
    unknown = y.clone()
    unknown[:, 2] = -1
    others = [0, 1, 3]
    near(loss(x, unknown), np.mean(zlpr(x[:, others], y[:, others])))


@pytest.mark.parametrize("kind", ["angle", "cosine"])
def test_aam_is_the_formula(kind):
    s, m = 30.0, 0.5
    loss = make(AAM, scale=s, margin=m, kind=kind)
    offsets = loss.prior().double()
    c = torch.linspace(-1, 1, 28, dtype=torch.float64).view(7, 4)
    _, y = data()
    cosine, truth = c.numpy(), y.numpy()
    turned = np.where(
        cosine > math.cos(math.pi - m),
        cosine * math.cos(m) - np.sqrt(np.maximum(1 - cosine**2, 1e-7)) * math.sin(m),
        cosine - m * math.sin(m),
    )
    phi = turned if kind == "angle" else cosine - m
    z = s * (truth * phi + (1 - truth) * cosine) + offsets.numpy()
    expected = (np.logaddexp(0, z) - z * truth).mean()
    near(loss(s * c + offsets, y), expected, 1e-10)


def test_the_margin_turns_the_angle_and_never_rewards_a_smaller_cosine():
    loss = make(AAM, margin=0.5)
    angle = torch.linspace(0.01, math.pi - 0.51, 200, dtype=torch.float64)
    torch.testing.assert_close(loss.phi(angle.cos()), (angle + 0.5).cos(), atol=1e-4, rtol=0)
    assert (loss.phi(torch.linspace(-1, 1, 999, dtype=torch.float64)).diff() > 0).all()


def test_the_margin_leaves_negatives_alone():
    x, _ = data()
    no = torch.zeros_like(x)
    near(make(AAM, margin=0.5)(x, no), make(BCE)(x, no))


# -- identities ------------------------------------------------------------------------------------


def test_identities():
    x, y = data(rows=50)
    bce = make(BCE)(x, y)
    near(make(Focal, gamma=0)(x, y), bce)
    near(make(ASL, gamma_pos=0, gamma_neg=0, clip=0)(x, y), bce)
    near(make(SmoothBCE, smoothing=0)(x, y), bce)
    near(make(AAM, margin=0)(x, y), bce)
    near(make(ASL, gamma_pos=3, gamma_neg=3, clip=0)(x, y), make(Focal, gamma=3)(x, y))


@pytest.mark.parametrize("weight", ["auto", "cap"])
def test_weights_of_positives_are_those_of_bce(weight):
    x, y = data(rows=50)
    settings = {"pos_weight": weight, "pos_weight_cap": 6.0}
    bce = make(BCE, **settings)(x, y)
    near(make(Focal, gamma=0, **settings)(x, y), bce)
    near(make(ASL, gamma_pos=0, gamma_neg=0, clip=0, **settings)(x, y), bce)
    near(make(SmoothBCE, smoothing=0, **settings)(x, y), bce)
    near(make(AAM, margin=0, **settings)(x, y), bce)
    assert abs(float(bce - make(BCE)(x, y))) > 0.1


def test_known_values():
    zeros, one = torch.zeros(3, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[:3]
    near(make(BCE)(zeros, one), 0.693147, 1e-6)
    near(make(ZLPR, smoothing=0.0)(zeros, one), math.log(2) + math.log(4))
    near(make(Focal, alpha=0.25)(zeros, torch.ones_like(zeros)), 0.25 * 0.25 * math.log(2))


# -- what holds for all ----------------------------------------------------------------------------


@every
def test_reductions(cls):
    x, y = data()
    y[3] = -1
    y[0, 1] = -1
    loss = {r: make(cls, reduction=r) for r in ("mean", "sum", "sum_per_sample_mean")}
    total = loss["sum"](x, y)
    near(loss["mean"](x, y), total / 23)  # 24 entries in six known rows, one of them unknown
    near(loss["sum_per_sample_mean"](x, y), total / 6)
    x, y = data()
    total = loss["sum"](x, y)
    near(loss["mean"](x, y), total / 28)
    near(loss["sum_per_sample_mean"](x, y), total / 7)


def test_the_mean_over_samples_does_not_count_a_row_of_unknown_labels():
    elements, known = torch.ones(3, 2), torch.tensor([[1.0, 1], [1, 0], [0, 0]])
    assert float(reduced(elements, known, "sum_per_sample_mean")) == 1.5


@every
def test_the_gradient_is_that_of_finite_differences_with_unknown_entries(cls):
    x, y = data(rows=5, spread=1.5, seed=3)
    y[1, 2] = y[4, 0] = -1
    assert torch.autograd.gradcheck(lambda z: make(cls)(z, y), (x.requires_grad_(),))


@every
def test_the_order_of_labels_does_not_matter(cls):
    x, y = data()
    order = [2, 0, 3, 1]
    permuted = make(cls, positives=[POSITIVES[i] for i in order])
    near(permuted(x[:, order], y[:, order]), make(cls)(x, y), 1e-7)


@every
def test_a_call_without_gradients_leaves_the_mode_as_it_was(cls):
    x, y = data()
    with torch.no_grad():
        assert not make(cls)(x, y).requires_grad
        assert not torch.is_grad_enabled()
    make(cls)(x, y)
    assert torch.is_grad_enabled()


@every
def test_half_precision_logits_give_the_value_of_the_same_numbers_in_float32(cls):
    x, y = data()
    loss, rounded = make(cls), x.bfloat16()
    value = loss(rounded, y.float())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(rounded.float(), y.float()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (SmoothBCE, {}),
        (SmoothBCE, {"towards": "prior", "pos_weight": "auto"}),
        (Focal, {}),
        (Focal, {"alpha": 0.75}),
        (Focal, {"pos_weight": "cap", "gamma": 0.5}),
        (ASL, {}),
        (ASL, {"gamma_pos": 1.0, "clip": 0.0}),
        (ASL, {"pos_weight": "auto"}),
    ],
)
def test_no_constant_is_better_than_the_prior(cls, settings):
    """By trying logits from -12 to 12, label by label; the prior counts one row more of each."""
    rows, counts = 400, torch.tensor([180, 40, 6, 1])
    y = (torch.arange(rows + 2)[:, None] < counts + 1).double()
    loss = cls(cls.Config(**settings), counts.double(), torch.full((4,), float(rows)))
    prior = loss.prior().double()
    best = loss(prior.expand(len(y), -1), y)
    for label in range(4):
        for tried in torch.linspace(-12, 12, 61, dtype=torch.float64):
            other = prior.clone()
            other[label] = tried
            assert loss(other.expand(len(y), -1), y) >= best - 1e-9, (label, tried)


def test_the_prior_of_zlpr_is_as_good_as_the_best_constant():
    """It knows how often labels occur, and not which occur together: nearly as good."""
    g = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.5, 0.3, 0.1, 0.02])
    y = (torch.rand(4000, 4, generator=g) < shares).double()
    loss = ZLPR(ZLPRConfig(), y.sum(0), torch.full((4,), 4000.0))
    start = loss.prior().double()
    free = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([free], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(free.expand(len(y), -1), y)
        value.backward()
        return value

    optimizer.step(closure)
    least = loss(free.detach().expand(len(y), -1), y)
    assert loss(start.expand(len(y), -1), y) < 1.01 * least
    assert loss(torch.zeros(4000, 4).double(), y) > 1.1 * least


def test_aam_asks_for_cosines_of_its_scale():
    assert AAM.head_settings(AAMConfig(scale=20.0)) == {"output": "cosine", "scale": 20.0}
    assert BCE.head_settings(BCE.Config()) == {}


@pytest.mark.parametrize(
    ("config", "settings", "named"),
    [
        (SmoothBCEConfig, {"smoothing": 1.0}, "loss.smoothing"),
        (ZLPRConfig, {"smoothing": -0.1}, "loss.smoothing"),
        (FocalConfig, {"gamma": -1.0}, "loss.gamma"),
        (FocalConfig, {"alpha": 1.5}, "loss.alpha"),
        (FocalConfig, {"alpha": 0.5, "pos_weight": "auto"}, "set one of them"),
        (ASLConfig, {"gamma_neg": -1.0}, "loss.gamma_neg"),
        (ASLConfig, {"clip": 1.0}, "loss.clip"),
        (AAMConfig, {"scale": 0.0}, "loss.scale"),
        (AAMConfig, {"margin": 2.0}, "loss.margin"),
        (AAMConfig, {"pos_weight_cap": 0.0}, "loss.pos_weight_cap"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config, settings, named):
    with pytest.raises(InputError, match=named):
        config(**settings)
