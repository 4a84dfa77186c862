"""The heads' own behaviour: input scales, known numbers, what each head is for."""

import math

import numpy as np
import pytest
import torch

from mmc.heads.models.dropout import Dropout, InputDropoutLinear
from mmc.heads.models.inputs import FieldNorm, InputNorm
from mmc.heads.models.linear import Linear, LinearConfig
from mmc.heads.models.mlp import MLP, MLPConfig
from mmc.heads.models.router import Router, RouterConfig
from mmc.heads.models.zero_shot import ZeroShot, ZeroShotConfig
from mmc.heads.optim import trained_parameters
from mmc.store.errors import InputError


def features(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Vectors of different lengths with a large common part."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.1, 3, width)
    return 4 + spread * torch.randn(rows, width, generator=g)


# -- scales ----------------------------------------------------------------------------------------


def fitted(mode: str, x: torch.Tensor) -> FieldNorm:
    norm = InputNorm({"image": (x.shape[1],)}, mode)
    norm.fit([{"image": x[:30]}, {"image": x[30:]}])  # moments do not depend on the blocks
    return norm.fields[0]


def test_center_is_unit_length_minus_the_mean_at_one_scale():
    x = features(100, 6)
    unit = x.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    expected = (unit - unit.mean(0)) / np.sqrt(unit.var(0).mean())
    np.testing.assert_allclose(fitted("center", x)(x).numpy(), expected, atol=1e-4)


def test_standardize_gives_every_value_of_unit_vectors_mean_zero_and_variance_one():
    x = features(100, 6)
    z = fitted("standardize", x)(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(fitted("standardize", x)(7 * x), z)  # lengths do not matter


def test_zscore_gives_columns_of_any_scale_mean_zero_and_variance_one():
    x = features(100, 4) * torch.tensor([1e-3, 1.0, 1e4, 0.0]) + torch.tensor([5.0, 0, -3e4, 7])
    z = fitted("zscore", x)(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        z.var(0, correction=0), torch.tensor([1.0, 1, 1, 0]), atol=1e-3, rtol=0
    )
    assert (fitted("zscore", x)(x + 1)[:, 3] == 0).all()  # it never changed, so it says nothing


def test_l2_needs_no_training_rows():
    norm = InputNorm({"image": (6,)}, "l2")
    norm.fit(iter(()))
    z = norm({"image": features(9, 6)})["image"]
    torch.testing.assert_close(z.norm(dim=1), torch.full((9,), 6**0.5))


def test_none_leaves_values_alone():
    x = features(9, 6)
    assert torch.equal(fitted("none", x)(x), x)


@pytest.mark.parametrize("mode", ["center", "l2", "standardize", "zscore", "none"])
def test_constant_and_zero_features_stay_finite(mode):
    x = torch.zeros(40, 3)
    x[:, 1] = 5
    assert fitted(mode, x)(x).isfinite().all()
    assert fitted(mode, x[:1].expand(40, -1))(x).isfinite().all()


@pytest.mark.parametrize("mode", ["center", "l2", "standardize", "zscore", "none"])
def test_what_is_stored_is_never_written_to(mode):
    """Sums are done in place, in memory that must be the head's own."""
    x = features(40, 6)
    norm, before = fitted(mode, x), x.clone()
    first = norm(x)
    assert torch.equal(x, before)
    assert torch.equal(norm(x), first)
    joined = InputNorm({"image": (6,)}, mode).joined({"image": x})
    assert joined.shape == (40, 6)
    assert torch.equal(x, before)


def test_a_single_number_keeps_its_size():
    """Of unit length every match score would be 1."""
    norm = InputNorm({"itm": (1,)}, "center")
    scores = torch.tensor([[0.1], [0.2], [0.9]])
    norm.fit([{"itm": scores}])
    got = norm({"itm": scores})["itm"]
    torch.testing.assert_close(got, (scores - scores.mean()) / scores.std(correction=0))


def test_a_value_that_hardly_changes_is_not_made_the_loudest():
    norm = FieldNorm(3, "standardize")
    norm.fit(torch.zeros(3), torch.tensor([1e-14, 1.0, 2.0]))
    torch.testing.assert_close(norm.scale, torch.tensor([100.0, 1.0, 2**-0.5]))
    assert norm(torch.tensor([[1e-7, 1.0, 1.0]]))[0, 0] < 1e-4


def test_a_role_may_hold_a_dot():
    head = Linear({"clip.image": (4,), "dino.image": (3,)}, 2, LinearConfig())
    assert head({"clip.image": torch.ones(5, 4), "dino.image": torch.ones(5, 3)}).shape == (5, 2)


# -- known numbers ---------------------------------------------------------------------------------


def test_linear_is_the_product_on_concatenated_fields():
    head = Linear({"image": (4,), "text": (3,)}, 2, LinearConfig(normalize="l2"))
    w, b = torch.randn(2, 7), torch.randn(2)
    head.load_state_dict(head.state_dict() | {"classifier.weight": w, "classifier.bias": b})
    image, text = features(5, 4), features(5, 3, seed=1)
    x = np.concatenate(
        [
            v.double().numpy() / np.linalg.norm(v.double().numpy(), axis=1, keepdims=True) * d**0.5
            for v, d in ((image, 4), (text, 3))
        ],
        axis=1,
    )
    expected = x @ w.double().numpy().T + b.double().numpy()
    logits = head({"image": image, "text": text})
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=1e-5)


def test_mlp_is_the_formula():
    head = MLP({"image": (4,)}, 2, MLPConfig(hidden=3, layers=2, normalize="none")).eval()
    state = {k: torch.randn_like(v) for k, v in head.state_dict().items() if "normalize" not in k}
    head.load_state_dict(head.state_dict() | state)
    x = features(5, 4)
    h = x.double().numpy()
    p = {k: v.double().numpy() for k, v in state.items()}
    for layer in ("hidden.0", "hidden.3"):
        z = h @ p[f"{layer}.weight"].T + p[f"{layer}.bias"]
        h = z * 0.5 * (1 + np.vectorize(math.erf)(z / 2**0.5))
    expected = h @ p["classifier.weight"].T + p["classifier.bias"]
    np.testing.assert_allclose(head({"image": x}).detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def make_router(**settings) -> Router:
    torch.manual_seed(0)
    head = Router({"image": (4,), "text": (3,)}, 2, RouterConfig(normalize="none", **settings))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return head.eval()


def test_router_adds_the_weighted_evidence_of_its_fields_to_the_prior():
    head = make_router()
    head.prior.copy_(torch.tensor([-1.0, 0.5]))
    batch = {"image": features(6, 4), "text": features(6, 3)}
    weights = head.weights(batch)
    assert weights.shape == (6, 2)
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    assert weights.std(0).max() > 0.01  # each sample has its own
    expected = head.prior + sum(
        2 * weights[:, i : i + 1] * (head.classifiers[i](batch[role]) - head.prior)
        for i, role in enumerate(("image", "text"))
    )
    torch.testing.assert_close(head(batch), expected)


def test_router_trains_each_classifier_alone_and_then_the_router():
    names = [stage.name for stage in make_router().stages()]
    assert names == ["classifier image", "classifier text", "router"]
    head = make_router(classifier_lr=0.0)
    trained = [
        {name.split(".")[0] + name.split(".")[1] for g in groups.values() for name in g}
        for groups in (trained_parameters(head, stage.trains) for stage in head.stages())
    ]
    assert trained == [{"classifiers0"}, {"classifiers1"}, {"router0", "router3"}]
    shares = trained_parameters(head, make_router(classifier_lr=0.1).stages()[2].trains)
    assert set(shares) == {0.1, 1.0}


def test_router_stage_scores_one_field_alone():
    head = make_router()
    stage = head.stages()[1]
    text = features(6, 3)
    assert stage.score is not None
    torch.testing.assert_close(stage.score({"text": text}), head.classifiers[1](text))


@pytest.mark.parametrize(
    "settings", [{"hidden": -1}, {"router_hidden": 0}, {"dropout": 1.0}, {"classifier_lr": -0.1}]
)
def test_router_settings_are_checked(settings):
    with pytest.raises(InputError, match=r"head\."):
        RouterConfig(**settings)


@pytest.mark.parametrize(
    "settings", [{"hidden": 0}, {"layers": 0}, {"dropout": 1.0}, {"input_dropout": -0.1}]
)
def test_mlp_settings_are_checked(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        MLPConfig(**settings)


# -- zero shot -------------------------------------------------------------------------------------


def make_zero_shot(**settings) -> tuple[ZeroShot, torch.Tensor]:
    text = features(3, 5, seed=4)
    head = ZeroShot({"image": (5,)}, 3, ZeroShotConfig(**settings), label_text=text)
    return head, text


def test_zero_shot_is_the_scaled_cosine():
    head, text = make_zero_shot(scale=20.0)
    x = features(6, 5)
    cosine = torch.nn.functional.cosine_similarity(x[:, None], text[None], dim=-1)
    torch.testing.assert_close(head({"image": x}), 20 * cosine, rtol=1e-4, atol=1e-4)
    assert head.stages() == []


def test_zero_shot_fits_scale_and_bias_on_validation_rows():
    """Labels drawn from sigmoid(8 cos - 2): the fit finds these numbers, and ranks stay."""
    head, _ = make_zero_shot()
    g = torch.Generator().manual_seed(0)
    cosine = torch.rand(20_000, 3, generator=g) * 2 - 1
    truth = (8 * cosine - 2).sigmoid()
    targets = (torch.rand(20_000, 3, generator=g) < truth).to(torch.int8)
    head.fit_validation([{"cosine": cosine}], targets, "multilabel")
    assert float(head.log_scale.exp()) == pytest.approx(8, rel=0.05)
    assert head.bias.tolist() == pytest.approx([-2, -2, -2], abs=0.2)
    order = head.score({"cosine": cosine}).argsort(0)
    assert torch.equal(order, cosine.argsort(0))


def test_zero_shot_calibrates_classes_too():
    head, _ = make_zero_shot()
    g = torch.Generator().manual_seed(0)
    cosine = torch.rand(20_000, 3, generator=g)
    probabilities = (5 * cosine + torch.tensor([0.0, 1.0, -1.0])).softmax(1)
    targets = torch.multinomial(probabilities, 1, generator=g)[:, 0]
    head.fit_validation([{"cosine": cosine}], targets, "multiclass")
    fitted_bias = head.bias - head.bias.mean()
    assert float(head.log_scale.exp()) == pytest.approx(5, rel=0.05)
    assert fitted_bias.tolist() == pytest.approx([0, 1, -1], abs=0.1)


def test_zero_shot_stays_finite_where_the_rows_do_not_tell():
    head, _ = make_zero_shot()
    cosine = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.1, 0.2]])
    head.fit_validation([{"cosine": cosine}], torch.zeros(2, 3, dtype=torch.int8), "multilabel")
    assert head.score({"cosine": cosine}).isfinite().all()


def test_zero_shot_without_calibration_keeps_the_scale():
    head, _ = make_zero_shot(calibrate=False)
    head.fit_validation([{"cosine": torch.rand(9, 3)}], torch.ones(9, 3), "multilabel")
    assert float(head.log_scale.exp()) == pytest.approx(100)


def test_zero_shot_refuses_label_texts_of_another_width():
    with pytest.raises(InputError, match="7 values and image 5"):
        ZeroShot({"image": (5,)}, 3, ZeroShotConfig(), label_text=torch.ones(3, 7))


# -- dropout ---------------------------------------------------------------------------------------


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = Dropout(0.3)
    x = torch.ones(400, 333)
    y = layer(x)
    kept = (y > 0).float().mean()
    assert float(kept) == pytest.approx(0.7, abs=0.01)
    assert float(y.mean()) == pytest.approx(1, abs=0.01)
    assert len(y[y > 0].unique()) == 1
    assert (y > 0).float().mean(1).std() < 0.05  # no row or column is favoured
    assert (y > 0).float().mean(0).std() < 0.05


def test_dropout_passes_the_gradient_of_what_it_kept():
    torch.manual_seed(0)
    x = torch.ones(10, 10, dtype=torch.float64, requires_grad=True)
    y = Dropout(0.5)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_dropout_does_nothing_at_zero_and_in_evaluation():
    x = torch.randn(4, 4)
    assert Dropout(0.0)(x) is x
    assert Dropout(0.9).eval()(x) is x


def test_input_dropout_ignores_the_same_inputs_for_the_whole_batch():
    torch.manual_seed(0)
    layer = InputDropoutLinear(1000, 2, share=0.4)
    x = torch.ones(3, 1000, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    ignored = x.grad == 0
    assert (ignored == ignored[0]).all()
    assert float(ignored.float().mean()) == pytest.approx(0.4, abs=0.05)
    kept = ~ignored[0]
    torch.testing.assert_close(x.grad[0, kept], layer.weight.sum(0)[kept] / 0.6)
    assert layer.weight.grad is not None
    assert (layer.weight.grad[:, ignored[0]] == 0).all()


def test_input_dropout_does_nothing_in_evaluation():
    layer = InputDropoutLinear(5, 2, share=0.9).eval()
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)
