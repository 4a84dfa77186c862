"""The masked contrastive loss, and the step that computes it in parts: against the plain ones."""

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from mmc.extract.training.cached import contrastive_step
from mmc.extract.training.contrast import PairMask, contrastive_loss
from mmc.extract.training.distributed import World
from mmc.store.errors import InputError

SCALE = torch.tensor(9.0, dtype=torch.float64)


def pairs(count: int, width: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, count, width, generator=draw, dtype=torch.float64)
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("mask", [None, "valid", "matrix"])
def test_without_a_gap_it_is_the_loss_of_clip(mask: str | None):
    image, text = (side.requires_grad_() for side in pairs(9))
    scale = SCALE.clone().requires_grad_()
    given = {
        None: None,
        "valid": PairMask.of(torch.ones(9, dtype=torch.bool)),
        "matrix": torch.eye(9),
    }[mask]
    found = contrastive_loss(image, text, scale, given)
    wanted = ClipLoss()(image, text, scale)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-15)
    for ours, theirs in zip(
        gradients(found, image, text, scale), gradients(wanted, image, text, scale), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [1 / 0.07, 1.0])
def test_pairs_that_are_alike_and_pairs_that_are_random(scale: float):
    """Known without any reference: equal orthonormal pairs, and features of many numbers."""
    count, inverse = 12, torch.tensor(scale, dtype=torch.float64)
    alike = torch.eye(count, 16, dtype=torch.float64)
    wanted = -math.log(math.exp(scale) / (math.exp(scale) + count - 1))
    assert float(contrastive_loss(alike, alike, inverse)) == pytest.approx(wanted, rel=1e-9)
    drawn = torch.randn(2, count, 65536, generator=torch.Generator().manual_seed(0))
    image, text = F.normalize(drawn.double(), dim=-1)
    found = float(contrastive_loss(image, text, inverse))
    assert found == pytest.approx(math.log(count), abs=0.1)


def test_rows_that_are_not_valid_add_nothing():
    image, text = pairs(8)
    image.requires_grad_()
    valid = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1]).bool()
    found = contrastive_loss(image, text, SCALE, PairMask.of(valid))
    torch.testing.assert_close(found, ClipLoss()(image[valid], text[valid], SCALE))
    (gradient,) = gradients(found, image)
    assert not gradient[~valid].any()
    assert gradient[valid].any(1).all()


def test_no_valid_pair_is_a_loss_of_zero_and_gradients_of_zero():
    image, text = (side.requires_grad_() for side in pairs(4))
    scale = SCALE.clone().requires_grad_()
    loss = contrastive_loss(image, text, scale, PairMask.of(torch.zeros(4, dtype=torch.bool)))
    assert loss == 0
    for gradient in gradients(loss, image, text, scale):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def by_hand(image: Tensor, text: Tensor, positives: Tensor, counted: Tensor) -> float:
    """Sums of Python numbers, one entry at a time."""
    similar = (SCALE * image @ text.T).tolist()
    count = len(similar)
    means = []
    for rows, right, seen in (
        (similar, positives.tolist(), counted.tolist()),
        (list(zip(*similar, strict=True)), positives.T.tolist(), counted.T.tolist()),
    ):
        losses = []
        for i in range(count):
            own = [j for j in range(count) if right[i][j]]
            if not own:
                continue
            total = sum(math.exp(rows[i][j]) for j in range(count) if seen[i][j])
            losses.append(-sum(rows[i][j] - math.log(total) for j in own) / len(own))
        means.append(sum(losses) / len(losses))
    return sum(means) / 2


GROUPS = torch.tensor([0, 1, 0, -1, 1, -1, 0])


@pytest.mark.parametrize("rule", ["own", "positives", "exclude"])
def test_pairs_of_one_class(rule: str):
    image, text = pairs(7)
    valid = torch.tensor([1, 1, 1, 1, 1, 0, 1]).bool()
    eye, both = torch.eye(7).bool(), valid[:, None] & valid
    alike = (GROUPS[:, None] == GROUPS) & (GROUPS >= 0)
    positives, counted = {
        "own": (eye & both, both),
        "positives": ((eye | alike) & both, both),
        "exclude": (eye & both, both & ~(alike & ~eye)),
    }[rule]
    found = contrastive_loss(image, text, SCALE, PairMask.of(valid, groups=GROUPS, rule=rule))
    assert float(found) == pytest.approx(by_hand(image, text, positives, counted), abs=1e-12)
    assert rule == "own" or float(found) != pytest.approx(
        by_hand(image, text, eye & both, both), abs=1e-3
    )


def test_a_mask_that_is_not_symmetric():
    image, text = pairs(5)
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(3)) > 0.6
    mask[2] = False
    found = contrastive_loss(image, text, SCALE, mask)
    wanted = by_hand(image, text, mask, torch.ones_like(mask))
    assert float(found) == pytest.approx(wanted, abs=1e-12)


def test_the_same_picture_or_text_is_no_negative():
    image, text = pairs(4)
    text[2] = text[0]
    same = torch.tensor([[10, 1], [11, 2], [12, 1], [10, 3]])  # texts 0 = 2, pictures 0 = 3
    counted = torch.ones(4, 4).bool()
    for i, j in ((0, 2), (2, 0), (0, 3), (3, 0)):
        counted[i, j] = False
    mask = PairMask.of(torch.ones(4, dtype=torch.bool), same=same)
    found = contrastive_loss(image, text, SCALE, mask)
    wanted = by_hand(image, text, torch.eye(4).bool(), counted)
    assert float(found) == pytest.approx(wanted, abs=1e-12)


def test_the_order_of_pairs_does_not_matter():
    image, text = pairs(7)
    order = torch.tensor([3, 0, 6, 5, 1, 2, 4])
    mask = PairMask.of(GROUPS > -2, groups=GROUPS, rule="positives")
    moved = PairMask.of(GROUPS > -2, groups=GROUPS[order], rule="positives")
    torch.testing.assert_close(
        contrastive_loss(image, text, SCALE, mask),
        contrastive_loss(image[order], text[order], SCALE, moved),
    )


@pytest.mark.parametrize(
    ("image", "text", "mask", "said"),
    [
        ((4, 3), (5, 3), None, "as many pictures as texts"),
        ((4, 3), (4, 2), None, "of one width"),
        ((4, 3), (4, 3), (4, 3), r"the pair mask is \(4, 3\), 4 pairs need \(4, 4\)"),
        ((4, 3), (4, 3), (4,), r"the pair mask is \(4,\)"),
    ],
)
def test_shapes_that_do_not_fit(image: tuple, text: tuple, mask: tuple | None, said: str):
    with pytest.raises(InputError, match=said):
        contrastive_loss(
            torch.ones(image), torch.ones(text), SCALE, None if mask is None else torch.ones(mask)
        )


class Two(nn.Module):
    """Two towers and a logit scale in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.image = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)).double()
        self.text = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 4)).double()
        self.log_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.image(x), dim=1), F.normalize(self.text(y), dim=1)


@pytest.mark.parametrize("micro_batch", [12, 5, 1])
def test_parts_have_the_gradient_of_the_whole_batch(micro_batch: int):
    """Of the towers, and of the logit scale, which takes part once, not once a part."""
    model = Two()
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(12, 6, generator=draw, dtype=torch.float64)
    y = torch.randn(12, 5, generator=draw, dtype=torch.float64)
    parameters = list(model.parameters())
    wanted = ClipLoss()(*model(x, y), model.log_scale.exp())
    plain = torch.autograd.grad(wanted, parameters)
    loss = contrastive_step(
        lambda part: model(x[part], y[part]),
        lambda image, text, rows: contrastive_loss(image, text, model.log_scale.exp(), rows=rows),
        12,
        micro_batch,
        parameters,
        World(torch.device("cpu")),
    )
    torch.testing.assert_close(loss, wanted.detach())
    for parameter, gradient in zip(parameters, plain, strict=True):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-13)


def test_shares_of_the_processes_sum_to_the_loss_and_its_gradients():
    image, text = (side.requires_grad_() for side in pairs(6))
    mask = PairMask.of(torch.tensor([1, 1, 0, 1, 0, 0]).bool())  # as many as you like in each
    whole = contrastive_loss(image, text, SCALE, mask)
    shares = [
        contrastive_loss(image, text, SCALE, mask, World(torch.device("cpu"), rank, 3).slice(6))
        for rank in range(3)
    ]
    torch.testing.assert_close(sum(shares), whole)
    assert len({round(share.item(), 6) for share in shares}) == 3
    for ours, theirs in zip(
        gradients(sum(shares), image, text), gradients(whole, image, text), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
