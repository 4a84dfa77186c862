"""Reading tokens: scales, masks, attention; and tasks that pooled vectors cannot tell."""

import pytest
import torch
import torch.nn.functional as F

from mmc.heads.models import vilbert
from mmc.heads.models.attention import MultiheadAttention, attend, attention_heads
from mmc.heads.models.base import Head
from mmc.heads.models.dm_decoder import DMDecoder, DMDecoderConfig
from mmc.heads.models.fusion import Fusion, FusionConfig, mean_of, token_levels
from mmc.heads.models.linear import Linear, LinearConfig
from mmc.heads.models.ml_decoder import MLDecoder, MLDecoderConfig
from mmc.heads.models.mlp import MLP, MLPConfig
from mmc.heads.models.tokens import TokenInputs, never_empty, sources, split
from mmc.heads.models.vilbert_trunk import Sizes
from mmc.store.errors import InputError

# -- inputs ----------------------------------------------------------------------------------------


def test_sources_are_the_roles_that_hold_tokens():
    inputs = {
        "a.text_tokens": (5, 4),
        "a.text_mask": (5,),
        "image": (8,),
        "regions": (3, 6),
        "boxes": (3, 5),
        "region_mask": (3,),
    }
    found = {s.role: s for s in sources(inputs)}
    assert list(found) == ["a.text_tokens", "image", "regions"]
    assert found["a.text_tokens"].mask == "a.text_mask"
    assert (found["image"].tokens, found["image"].width, found["image"].pooled) == (1, 8, True)
    assert dict(found["regions"].extras) == {"boxes": "boxes"}


@pytest.mark.parametrize("inputs", [{"boxes": (3, 5)}, {"image_tokens": (2, 3, 4)}, {"image": ()}])
def test_what_is_no_tokens_is_refused(inputs):
    with pytest.raises(InputError):
        sources(inputs)


def test_scales_are_of_the_real_tokens():
    torch.manual_seed(0)
    x = 3 + torch.randn(40, 6, 5)
    mask = torch.rand(40, 6) < 0.5
    batch = {"text_tokens": x.masked_fill(~mask[..., None], 1e4), "text_mask": mask}
    tokens = TokenInputs({"text_tokens": (6, 5), "text_mask": (6,)}, "standardize")
    tokens.fit([{k: v[:10] for k, v in batch.items()}, {k: v[10:] for k, v in batch.items()}])
    prepared = tokens(batch)
    real = prepared["text_tokens"][mask]
    torch.testing.assert_close(real.mean(0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(real.var(0, correction=0), torch.ones(5), atol=1e-3, rtol=0)
    assert (prepared["text_tokens"][~mask] == 0).all()


def test_a_field_without_any_real_token_is_no_trouble():
    tokens = TokenInputs({"text_tokens": (6, 5), "text_mask": (6,)}, "center")
    batch = {"text_tokens": torch.full((3, 6, 5), torch.nan), "text_mask": torch.zeros(3, 6)}
    tokens.fit([batch])
    assert (tokens(batch)["text_tokens"] == 0).all()


def test_a_batch_in_pieces_keeps_what_is_not_per_sample():
    batch = {"x": torch.arange(7), "labels": torch.arange(3)}
    pieces = split(batch, 3)
    assert [p["x"].tolist() for p in pieces] == [[0, 1, 2], [3, 4, 5], [6]]
    assert all(p["labels"].tolist() == [0, 1, 2] for p in pieces)


def test_levels_are_of_tokens_or_of_their_tiles():
    places = torch.tensor([[[0, 0, 0], [1, 0, 0], [1, 0, 1]]], dtype=torch.int16)
    assert token_levels(places, 3).tolist() == [[0, 1, 1]]
    assert token_levels(places, 6).tolist() == [[0, 0, 1, 1, 1, 1]]


def test_means_are_of_real_tokens():
    x = torch.tensor([[[1.0], [3.0], [100.0]], [[5.0], [6.0], [7.0]]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert mean_of(x, mask)[:, 0, 0].tolist() == [2.0, 0.0]


# -- attention -------------------------------------------------------------------------------------


def test_it_is_torchs_multi_head_attention():
    torch.manual_seed(0)
    mine = MultiheadAttention(12, 3, 0.0)
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(mine.state_dict())
    query, memory = torch.randn(4, 2, 12), torch.randn(4, 5, 12)
    mask = torch.rand(4, 5) < 0.6
    mask[:, 0] = True
    expected = theirs(query, memory, memory, key_padding_mask=~mask, need_weights=False)[0]
    torch.testing.assert_close(mine(query, memory, mask), expected)
    with torch.no_grad():  # another kernel
        torch.testing.assert_close(mine(query, memory, mask), expected)
    shared = mine(query[:1], memory, mask)
    torch.testing.assert_close(shared[3], mine(query[:1], memory[3:], mask[3:])[0])


def test_a_sample_without_tokens_gives_numbers():
    x = torch.randn(2, 3, 4, requires_grad=True)
    mask = never_empty(torch.tensor([[False] * 3, [True, False, True]]))
    assert mask.tolist() == [[True] * 3, [True, False, True]]
    out = attend(x, x, x, mask, 2)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("width", "most", "heads"), [(768, 8, 8), (12, 8, 4), (7, 8, 1)])
def test_heads_divide_the_width(width, most, heads):
    assert attention_heads(width, most) == heads


# -- what tokens are for ---------------------------------------------------------------------------


def learn(head: Head, batch, targets, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr)
    head.train()
    with torch.no_grad():
        head.fit_inputs([batch])
        prepared = head.prepare(batch)
    for step in range(steps):
        rows = torch.randperm(len(targets), generator=torch.Generator().manual_seed(step))[:64]
        logits = head.score({key: values[rows] for key, values in prepared.items()})
        F.binary_cross_entropy_with_logits(logits, targets[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    head.eval()


def accuracy(head: Head, batch, targets) -> float:
    with torch.no_grad():
        return float(((head(batch) > 0) == (targets > 0.5)).float().mean())


def hidden_pairs(rows: int, seed: int):
    """A label is there if its pattern is a token (and its negative another): means say nothing."""
    g = torch.Generator().manual_seed(seed)
    patterns = (
        3 * torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))[0]
    )
    targets = (torch.rand(rows, 3, generator=g) < 0.5).float()
    tokens = 0.3 * torch.randn(rows, 8, 12, generator=g)
    for c in range(3):
        shown = torch.where(targets[:, c : c + 1] > 0, patterns[c], patterns[c + 3])
        tokens[:, 2 * c] += shown
        tokens[:, 2 * c + 1] -= shown
    tokens -= tokens.mean(1, keepdim=True)
    return {"image_tokens": tokens[:, torch.randperm(8, generator=g)]}, targets


def on_means(batch):
    """What a head on pooled vectors sees of the tokens."""
    return {role: values.mean(1) for role, values in batch.items() if values.ndim == 3}


def linear_accuracy(batch, targets, new, truth) -> float:
    seen = on_means(batch)
    inputs = {role: tuple(values.shape[1:]) for role, values in seen.items()}
    head = Linear(inputs, targets.shape[1], LinearConfig(normalize="none"))
    learn(head, seen, targets, steps=200, lr=1e-2)
    return accuracy(head, on_means(new), truth)


def decoders():
    ml = {"width": 32, "feedforward": 64, "input_dropout": 0, "heads": 4}
    inputs, texts = {"image_tokens": (8, 12)}, torch.eye(3, 12)
    yield "ml_decoder", lambda: MLDecoder(inputs, 3, MLDecoderConfig(**ml))
    by_text = MLDecoderConfig(**ml, queries="label_text")
    yield "ml_decoder by texts", lambda: MLDecoder(inputs, 3, by_text, label_text=texts)
    wide = FusionConfig(width=32, feedforward=64, input_dropout=0, dropout=0)
    yield "fusion", lambda: Fusion(inputs, 3, wide)
    dm = DMDecoderConfig(width=32, input_dropout=0, dropout=0)
    yield "dm_decoder", lambda: DMDecoder(inputs, 3, dm, label_text=texts)


@pytest.mark.parametrize("make", [m for _, m in decoders()], ids=[n for n, _ in decoders()])
def test_it_finds_what_the_mean_of_the_tokens_does_not_tell(make):
    batch, targets = hidden_pairs(600, 1)
    new, truth = hidden_pairs(300, 2)
    assert new["image_tokens"].mean(1).abs().max() < 1e-5
    torch.manual_seed(0)
    head = make()
    learn(head, batch, targets, steps=150, lr=3e-3)
    assert accuracy(head, new, truth) > 0.9
    assert linear_accuracy(batch, targets, new, truth) < 0.6


def agreeing(rows: int, seed: int):
    """Whether a sign in some image token and one in some text token agree: needs both."""
    g = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (rows, 2), generator=g) * 2.0 - 1
    image, text = (0.3 * torch.randn(rows, 4, 6, generator=g) for _ in range(2))
    image[torch.arange(rows), torch.randint(4, (rows,), generator=g), 0] += 2 * signs[:, 0]
    text[torch.arange(rows), torch.randint(4, (rows,), generator=g), 1] += 2 * signs[:, 1]
    targets = (signs.prod(1, keepdim=True) > 0).float()
    boxes = torch.zeros(rows, 4, 5)
    mask = torch.ones(rows, 4, dtype=torch.bool)
    return {"regions": image, "boxes": boxes, "region_mask": mask} | {
        "text_tokens": text,
        "text_mask": mask,
    }, targets


def test_an_mlp_puts_image_and_text_together_and_a_linear_head_cannot():
    batch, targets = agreeing(1000, 1)
    new, truth = agreeing(300, 2)
    assert linear_accuracy(batch, targets, new, truth) < 0.6
    torch.manual_seed(0)
    config = MLPConfig(hidden=64, input_dropout=0, normalize="standardize")
    head = MLP({"regions": (6,), "text_tokens": (6,)}, 1, config)
    learn(head, on_means(batch), targets, steps=300, lr=1e-2)
    assert accuracy(head, on_means(new), truth) > 0.75  # the means are noisy


INPUTS = {
    "regions": (4, 6),
    "boxes": (4, 5),
    "region_mask": (4,),
    "text_tokens": (4, 6),
    "text_mask": (4,),
}
TINY = Sizes(
    positions=8,
    text_layers=2,
    text_width=32,
    text_heads=2,
    text_feedforward=64,
    region_layers=1,
    region_width=32,
    region_heads=2,
    region_feedforward=64,
    joint=32,
    joint_heads=2,
)


def test_fusion_puts_image_and_text_together():
    batch, targets = agreeing(1000, 1)
    new, truth = agreeing(300, 2)
    torch.manual_seed(0)
    config = FusionConfig(width=32, feedforward=64, input_dropout=0, dropout=0)
    head = Fusion(INPUTS, 1, config)
    learn(head, batch, targets, steps=200, lr=3e-3)
    assert accuracy(head, new, truth) > 0.9


def test_vilbert_puts_image_and_text_together(monkeypatch):
    monkeypatch.setattr(vilbert, "SMALL", TINY)
    batch, targets = agreeing(1000, 1)
    new, truth = agreeing(300, 2)
    torch.manual_seed(0)
    head = vilbert.Vilbert(INPUTS, 1, vilbert.VilbertConfig(dropout=0))
    learn(head, batch, targets, steps=200, lr=3e-3)
    assert accuracy(head, new, truth) > 0.9
