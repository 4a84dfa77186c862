"""The dual-modal decoder against its equations, the choice of labels, labels it never saw."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmc.heads.models.dm_decoder import DMDecoder, DMDecoderConfig, DualModalLayer
from mmc.heads.models.tokens_labels import OUT, selective
from mmc.heads.models.zero_shot import ZeroShot, ZeroShotConfig
from mmc.store.errors import InputError

WIDTH, TOKENS, LABELS = 8, 5, 6


def texts(num_labels: int = LABELS, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(num_labels, width, generator=torch.Generator().manual_seed(9))


def decoder(num_labels: int = LABELS, *, pooled: bool = True, text=None, **settings) -> DMDecoder:
    torch.manual_seed(0)
    inputs = {"image_tokens": (TOKENS, 10)} | ({"image": (WIDTH,)} if pooled else {})
    text = texts(num_labels) if text is None else text
    head = DMDecoder(inputs, num_labels, DMDecoderConfig(**settings), label_text=text).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    head.set_prior(torch.linspace(-2, 1, num_labels))
    return head


def images(rows: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "image_tokens": torch.randn(rows, TOKENS, 10, generator=g),
        "image": torch.randn(rows, WIDTH, generator=g),
    }


# -- the layer, in numpy ---------------------------------------------------------------------------


def norm(x, module):
    weight, bias = (p.detach().numpy() for p in (module.weight, module.bias))
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + module.eps) * weight + bias


def linear(x, module):
    return x @ module.weight.detach().numpy().T + module.bias.detach().numpy()


def read(module, query, memory):
    """Multi-head attention of one sample, query by query and head by head."""
    width = query.shape[1]
    weight = module.in_proj_weight.detach().numpy()
    bias = module.in_proj_bias.detach().numpy()
    q, k, v = (
        source @ weight[i * width : (i + 1) * width].T + bias[i * width : (i + 1) * width]
        for i, source in enumerate((query, memory, memory))
    )
    out = np.zeros_like(q)
    size = width // module.heads
    for h in range(module.heads):
        part = slice(h * size, (h + 1) * size)
        for i in range(len(query)):
            scores = np.exp(k[:, part] @ q[i, part] / math.sqrt(size))
            out[i, part] = (scores / scores.sum()) @ v[:, part]
    return linear(out, module.out_proj)


def test_a_layer_is_its_equations():
    torch.manual_seed(0)
    layer = DualModalLayer(DMDecoderConfig(heads=2), WIDTH, last=False).double().eval()
    q, tokens = torch.randn(LABELS, WIDTH).double(), torch.randn(3, TOKENS, WIDTH).double()
    labels, seen = layer(q[None], tokens, None)
    for b in range(3):
        v = tokens[b].numpy()
        q1 = norm(2 * q.numpy(), layer.norm1)
        q3 = norm(read(layer.read_tokens, q1, v) + q1, layer.norm2)
        q4 = linear(np.maximum(linear(q3, layer.linear1), 0), layer.linear2)
        q5 = norm(q4 + q3, layer.norm3)
        after = norm(read(layer.read_labels, v, q5) + v, layer.norm4)
        np.testing.assert_allclose(labels[b].detach().numpy(), q5, atol=1e-12)
        np.testing.assert_allclose(seen[b].detach().numpy(), after, atol=1e-12)


def test_the_layer_has_the_gradient_of_finite_differences():
    torch.manual_seed(0)
    layer = DualModalLayer(DMDecoderConfig(heads=2, feedforward=1), 4, last=False).double().eval()
    q = torch.randn(1, 2, 4).double().requires_grad_()
    tokens = torch.randn(1, 3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: layer(a, b, None), (q, tokens))


def test_one_label_is_read_alike_by_all_tokens():
    layer = DualModalLayer(DMDecoderConfig(heads=2), WIDTH, last=False).eval()
    read = layer.read_labels(torch.randn(2, TOKENS, WIDTH), torch.randn(2, 1, WIDTH))
    torch.testing.assert_close(read, read[:, :1].expand_as(read))


def test_a_sample_does_not_depend_on_its_batch():
    head = decoder().double()
    batch = {role: values.double() for role, values in images(16).items()}
    one = head({role: values[3:4] for role, values in batch.items()})
    torch.testing.assert_close(head(batch)[3:4], one, atol=1e-6, rtol=0)


def test_the_order_of_tokens_does_not_matter_and_that_of_labels_is_that_of_the_logits():
    head = decoder()
    batch = images()
    logits = head(batch)
    shuffled = {**batch, "image_tokens": batch["image_tokens"][:, torch.randperm(TOKENS)]}
    torch.testing.assert_close(head(shuffled), logits, atol=1e-5, rtol=0)
    order = torch.randperm(LABELS)
    state = head.for_labels(texts()[order], order)
    head.load_state_dict(state)
    torch.testing.assert_close(head(batch), logits[:, order], atol=1e-5, rtol=0)


def test_logits_depend_a_little_on_the_other_labels():
    """As the equations have it: the tokens read all labels that are asked about."""
    head = decoder(40, pooled=False)
    batch = {"image_tokens": images()["image_tokens"]}
    full = head(batch)
    half = torch.arange(0, 40, 2)
    prepared = head.prepare(batch)
    some = head.score({**prepared, "labels": half})[:, half]
    change = (some - full[:, half]).abs().max()
    assert 0 < change < full.std()


def test_without_layers_it_ranks_as_the_cosine_does():
    head = decoder(layers=0)
    assert [name for name, _ in head.named_parameters()] == ["cosine"]
    with torch.no_grad():
        head.cosine.fill_(3.0)
    head.set_prior(torch.zeros(LABELS))
    batch = images(30)
    floor = ZeroShot({"image": (WIDTH,)}, LABELS, ZeroShotConfig(), label_text=texts())
    assert torch.equal(head(batch).argsort(1), floor({"image": batch["image"]}).argsort(1))
    assert torch.equal(head(batch).argsort(0), floor({"image": batch["image"]}).argsort(0))


def test_the_cosine_is_standardised_over_the_training_rows():
    head = decoder(layers=0)
    batch = images(50)
    head.fit_inputs([{k: v[:20] for k, v in batch.items()}, {k: v[20:] for k, v in batch.items()}])
    with torch.no_grad():
        head.cosine.fill_(1.0)
    evidence = (head(batch) - head.labels.prior).detach()
    assert float(evidence.mean()) == pytest.approx(0, abs=1e-5)
    assert float(evidence.std()) == pytest.approx(1, abs=1e-2)


def test_levels_of_a_pyramid_have_embeddings_that_start_at_nothing():
    torch.manual_seed(0)
    inputs = {"image_tokens": (TOKENS, 10), "image_places": (TOKENS, 3)}
    head = DMDecoder(inputs, LABELS, DMDecoderConfig(cosine=False), label_text=texts()).eval()
    with torch.no_grad():
        head.readout.weight.normal_()
    batch = {"image_tokens": images()["image_tokens"]}
    first, second = torch.zeros(4, TOKENS, 3, dtype=torch.int16), torch.zeros(4, TOKENS, 3)
    second[:, 1:, 0] = 1
    second = second.to(torch.int16)
    assert torch.equal(
        head({**batch, "image_places": first}), head({**batch, "image_places": second})
    )
    with torch.no_grad():
        head.projections[0].level[1] = torch.randn(WIDTH)
    logits = head({**batch, "image_places": second})
    assert not torch.allclose(head({**batch, "image_places": first}), logits)


def test_padding_of_regions_changes_nothing():
    inputs = {"regions": (TOKENS, 10), "region_mask": (TOKENS,), "boxes": (TOKENS, 5)}
    torch.manual_seed(0)
    head = DMDecoder(inputs, LABELS, DMDecoderConfig(cosine=False), label_text=texts()).eval()
    with torch.no_grad():
        head.readout.weight.normal_()
    mask = torch.ones(4, TOKENS, dtype=torch.bool)
    mask[:, 3:] = False
    batch = {"regions": images()["image_tokens"], "region_mask": mask, "boxes": torch.rand(4, 5, 5)}
    noisy = {role: values.clone() for role, values in batch.items()}
    noisy["regions"][:, 3:] = torch.nan
    noisy["boxes"][:, 3:] = 1e9
    assert torch.equal(head(noisy), head(batch))


# -- other labels ----------------------------------------------------------------------------------


def test_a_label_never_seen_in_training_is_found_by_its_text():
    """Pictures show label texts among noise; half of the labels are held back."""
    torch.manual_seed(0)
    labels, held = 40, 10
    text = F.normalize(torch.randn(labels, WIDTH * 2), dim=-1)

    def pictures(rows: int, among: torch.Tensor):
        truth = among[torch.randint(len(among), (rows,))]
        tokens = 0.5 * torch.randn(rows, TOKENS, WIDTH * 2) / 4
        tokens[torch.arange(rows), torch.randint(TOKENS, (rows,))] += text[truth]
        return tokens, truth

    seen = torch.arange(held, labels)
    config = DMDecoderConfig(cosine=False, layers=2, dropout=0, input_dropout=0, normalize="none")
    head = DMDecoder(
        {"image_tokens": (TOKENS, WIDTH * 2)}, labels - held, config, label_text=text[seen]
    )
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(150):
        tokens, truth = pictures(48, seen)
        loss = F.cross_entropy(head({"image_tokens": tokens}), truth - held)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    new = torch.arange(held)
    state = head.for_labels(text[new], torch.full((held,), -1))
    other = DMDecoder({"image_tokens": (TOKENS, WIDTH * 2)}, held, config, label_text=None).eval()
    other.load_state_dict(state)
    tokens, truth = pictures(300, new)
    found = (other({"image_tokens": tokens}).argmax(1) == truth).float().mean()
    assert found > 0.4  # guessing: 0.1


def test_texts_of_another_width_are_projected_and_remembered():
    head = decoder(text=texts(width=12), pooled=False, width=8)
    again = DMDecoder(head.inputs, LABELS, head.config, label_text=None).eval()
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(images()), head(images()))


# -- selective language supervision ----------------------------------------------------------------


def targets(rows: int, labels: int, share: float, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, labels, generator=g) < share).float()


def test_all_positives_are_there_and_the_budget_is_kept():
    y = targets(16, 1000, 0.005)
    chosen = selective(y, 1000, 200)
    assert len(chosen) == 200
    assert torch.equal(chosen, chosen.unique())
    assert set(y.any(0).nonzero()[:, 0].tolist()) <= set(chosen.tolist())


def test_negatives_are_drawn_evenly():
    y = torch.zeros(4, 60)
    y[:, :10] = 1
    counts = torch.zeros(60)
    torch.manual_seed(0)
    for _ in range(1000):
        counts[selective(y, 60, 20)] += 1
    assert (counts[:10] == 1000).all()
    expected = 1000 * 10 / 50
    chi2 = ((counts[10:] - expected) ** 2 / (expected * (1 - 10 / 50))).sum()
    assert chi2 < 86  # 49 degrees of freedom: 99.9 % are below


def test_where_positives_are_too_many_each_sample_keeps_one():
    y = targets(12, 500, 0.3)
    chosen = selective(y, 500, 30)
    assert len(chosen) == 30
    assert (y[:, chosen].sum(1) >= 1).all()
    assert y.any(0)[chosen].all()


def test_a_positive_each_counts_for_more_than_the_budget():
    y = torch.eye(50)
    assert len(selective(torch.cat([y, torch.zeros(50, 100)], 1), 150, 20)) == 50


def test_single_label_targets_and_unknown_ones():
    chosen = selective(torch.tensor([3, 99, -1]), 1000, 10)
    assert {3, 99} <= set(chosen.tolist())
    assert len(chosen) == 10


def test_few_labels_are_all_scored():
    assert selective(targets(4, 10, 0.5), 10, 10) is None
    assert selective(targets(4, 10, 0.5), 10, 0) is None


def test_the_choice_follows_from_the_seed():
    y = targets(4, 100, 0.05)
    torch.manual_seed(4)
    first = selective(y, 100, 30)
    torch.manual_seed(4)
    assert torch.equal(selective(y, 100, 30), first)
    assert not torch.equal(selective(y, 100, 30), first)


def test_processes_choose_the_same_labels(monkeypatch):
    """Two processes, taken one after the other: they share the draw and the positives of both."""
    y = torch.zeros(2, 3, 80)
    y[0, :, :3], y[1, :, 50:52] = 1, 1
    shared = torch.rand(80)
    calls: list[int] = []

    def all_reduce(numbers, op):
        other = y[1 - rank].bool()
        if len(calls) % 2 == 0:
            numbers |= other.any(0).int()
        else:
            best = torch.where(other, shared, -1.0).argmax(1)
            numbers[best] = 1
        calls.append(1)

    module = "mmc.heads.models.tokens_labels"
    monkeypatch.setattr(f"{module}._several", lambda: True)
    monkeypatch.setattr(f"{module}.dist.broadcast", lambda x, source: x.copy_(shared))
    monkeypatch.setattr(f"{module}.dist.all_reduce", all_reduce)
    chosen = []
    for rank in range(2):
        chosen.append(selective(y[rank], 80, 20))
    assert torch.equal(*chosen)
    assert {0, 1, 2, 50, 51} <= set(chosen[0].tolist())


def test_labels_that_are_left_out_count_for_nothing():
    head = decoder(label_budget=3)
    y = torch.zeros(4, LABELS)
    y[:, 1] = 1
    labels = head.select_labels(y)
    logits = head.score({**head.prepare(images()), "labels": labels})
    out = [i for i in range(LABELS) if i not in labels.tolist()]
    assert logits.shape == (4, LABELS)
    assert (logits[:, out] == OUT).all()
    assert logits[:, labels].abs().max() < 100


@pytest.mark.parametrize(
    "settings", [{"layers": -1}, {"heads": 0}, {"dropout": 1}, {"layers": 0, "cosine": False}]
)
def test_settings_are_checked(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        DMDecoderConfig(**settings)


def test_the_cosine_needs_the_space_of_the_label_texts():
    with pytest.raises(InputError, match=r"have 8 and 12 values: set head\.cosine=false"):
        decoder(text=texts(width=12))
    with pytest.raises(InputError, match="extract it too"):
        decoder(pooled=False, layers=0)


def test_labels_are_chosen_where_no_row_of_a_batch_is():
    """Of several processes all choose, also one whose part of the batch is empty."""
    assert len(selective(torch.zeros(0, 60), 60, 20)) == 20
    assert len(selective(torch.zeros(0, dtype=torch.int64), 60, 20)) == 20
