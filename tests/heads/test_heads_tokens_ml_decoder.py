"""ML-Decoder against its equations in float64, its official names, and labels it never saw."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmc.heads.models.ml_decoder import MLDecoder, MLDecoderConfig
from mmc.store.errors import InputError


def decoder(
    num_labels: int,
    *,
    channels: int = 16,
    tokens: int = 6,
    label_text: torch.Tensor | None = None,
    seed: int = 0,
    random: bool = True,
    **settings,
) -> MLDecoder:
    torch.manual_seed(seed)
    small = {"width": 24, "feedforward": 32, "normalize": "none", "heads": 4}
    config = MLDecoderConfig(**{**small, **settings})
    inputs = {"image_tokens": (tokens, channels)}
    head = MLDecoder(inputs, num_labels, config, label_text=label_text).eval()
    if random:
        with torch.no_grad():
            for name, parameter in head.named_parameters():
                around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(around + torch.randn_like(parameter) * 0.3)
    return head


def images(rows: int = 3, tokens: int = 6, channels: int = 16, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, channels, generator=g)


# -- the equations, in numpy -----------------------------------------------------------------------


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def attention(query, memory, w, b, wo, bo, heads):
    """One sample: query (K, D), memory (N, D)."""
    width = query.shape[-1]
    q, k, v = (
        source @ w[i * width : (i + 1) * width].T + b[i * width : (i + 1) * width]
        for i, source in enumerate((query, memory, memory))
    )
    size = width // heads
    out = np.empty_like(q)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[:, part] = weights @ v[:, part]
    return out @ wo.T + bo


def reference(state: dict, x: np.ndarray, num_labels: int, heads: int) -> np.ndarray:
    """Logits (B, C), sample by sample and query by query."""
    s = {key.removeprefix("decoder."): value.double().numpy() for key, value in state.items()}
    layer = "layers.0."
    rows = []
    for tokens in x:
        memory = np.maximum(tokens @ s["embed_standart.weight"].T + s["embed_standart.bias"], 0)
        norm = [(s[f"{layer}norm{i}.weight"], s[f"{layer}norm{i}.bias"]) for i in (1, 2, 3)]
        u = layer_norm(2 * s["query_embed.weight"], *norm[0])
        mha = f"{layer}multihead_attn."
        read = attention(
            u,
            memory,
            s[f"{mha}in_proj_weight"],
            s[f"{mha}in_proj_bias"],
            s[f"{mha}out_proj.weight"],
            s[f"{mha}out_proj.bias"],
            heads,
        )
        u = layer_norm(u + read, *norm[1])
        hidden = np.maximum(u @ s[f"{layer}linear1.weight"].T + s[f"{layer}linear1.bias"], 0)
        u = layer_norm(
            u + hidden @ s[f"{layer}linear2.weight"].T + s[f"{layer}linear2.bias"], *norm[2]
        )
        pooling = s["duplicate_pooling"]
        group = pooling.shape[2]
        logits = [u[i // group] @ pooling[i // group][:, i % group] for i in range(num_labels)]
        rows.append(np.array(logits) + s["duplicate_pooling_bias"])
    return np.stack(rows)


@pytest.mark.parametrize(("num_labels", "groups"), [(80, 80), (9605, 200), (925, 100), (5, 5)])
def test_the_logits_are_those_of_the_equations(num_labels, groups):
    head = decoder(num_labels, groups=groups).double()
    x = images()
    state = {k: v for k, v in head.state_dict().items() if k.startswith("decoder.")}
    expected = reference(state, x.double().numpy(), num_labels, heads=4)
    assert expected.std(0).mean() > 0.1  # the samples differ, so the comparison is sharp
    logits = head.score({"image_tokens": x.double()})
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=1e-5)  # it ends in float32
    np.testing.assert_allclose(head.float()({"image_tokens": x}).detach(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("num_labels", "groups", "count"), [(80, 80, 7_212_112), (9605, 200, 14_778_757)]
)
def test_the_number_of_weights_is_the_official_one(num_labels, groups, count):
    config = MLDecoderConfig(groups=groups, width=768, feedforward=2048)
    with torch.device("meta"):
        head = MLDecoder({"image_tokens": (49, 2048)}, num_labels, config)
    assert sum(t.numel() for t in head.decoder.state_dict().values()) == count
    assert sum(p.numel() for p in head.parameters()) == count - min(groups, num_labels) * 768


def test_the_names_are_the_official_ones():
    head = decoder(80, groups=40)
    layer = {
        f"decoder.layers.0.{name}"
        for name in (
            "multihead_attn.in_proj_weight",
            "multihead_attn.in_proj_bias",
            *(
                f"{module}.{kind}"
                for module in (
                    "multihead_attn.out_proj",
                    "linear1",
                    "linear2",
                    "norm1",
                    "norm2",
                    "norm3",
                )
                for kind in ("weight", "bias")
            ),
        )
    }
    shapes = {k: tuple(v.shape) for k, v in head.state_dict().items() if k.startswith("decoder.")}
    assert set(shapes) == layer | {
        "decoder.embed_standart.weight",
        "decoder.embed_standart.bias",
        "decoder.query_embed.weight",
        "decoder.duplicate_pooling",
        "decoder.duplicate_pooling_bias",
    }
    assert shapes["decoder.duplicate_pooling"] == (40, 24, 2)
    assert shapes["decoder.layers.0.multihead_attn.in_proj_weight"] == (72, 24)


def test_a_label_depends_on_its_own_group_alone():
    head = decoder(10, groups=4)  # groups of 3
    head({"image_tokens": images()})[:, 7].sum().backward()
    moved = head.decoder.duplicate_pooling.grad.abs().sum((1, 2))
    assert (moved > 0).tolist() == [False, False, True, False]


def test_the_order_of_the_tokens_does_not_matter():
    head = decoder(10)
    x = images()
    torch.testing.assert_close(
        head({"image_tokens": x[:, torch.randperm(6)]}),
        head({"image_tokens": x}),
        atol=1e-5,
        rtol=0,
    )


def test_queries_do_not_train():
    head = decoder(10, random=False).train()
    before = head.decoder.query_embed.weight.clone()
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(10):
        head({"image_tokens": images()}).square().sum().backward()
        optimizer.step()
    assert torch.equal(head.decoder.query_embed.weight, before)
    assert "decoder.query_embed.weight" in head.state_dict()


def test_with_official_weights_it_has_their_sizes():
    assert (MLDecoderConfig(weights="x").inner, MLDecoderConfig(weights="x").hidden) == (768, 2048)
    assert MLDecoderConfig(weights="x").scale == "none"
    assert (MLDecoderConfig().inner, MLDecoderConfig().hidden) == (192, 384)
    assert MLDecoderConfig().scale == "center"


def test_groups_are_never_more_than_labels():
    assert decoder(5).queries == 5
    assert decoder(500).queries == 100


# -- official weights ------------------------------------------------------------------------------


def official(num_labels: int = 10, **settings) -> tuple[MLDecoder, dict[str, torch.Tensor]]:
    head = decoder(num_labels, seed=5, **settings)
    state = {k: v.clone() for k, v in head.state_dict().items() if k.startswith("decoder.")}
    return head, state


@pytest.mark.parametrize(
    ("prefix", "wrap"), [("", None), ("head.", "model"), ("module.fc.", "state_dict")]
)
def test_official_weights_load_with_their_queries(tmp_path, prefix, wrap):
    theirs, state = official()
    content = {f"{prefix}{key}": value for key, value in state.items()}
    content[f"{prefix.removesuffix('head.').removesuffix('fc.')}body.conv1.weight"] = torch.ones(3)
    path = tmp_path / "model.pth"
    torch.save({wrap: content, "epoch": 3} if wrap else content, path)
    head = decoder(10, weights=str(path))
    head.load_weights()
    batch = {"image_tokens": images()}
    assert torch.equal(head(batch), theirs(batch))


def test_safetensors_load_too(tmp_path):
    theirs, state = official()
    save_file(state, tmp_path / "head.safetensors")
    head = decoder(10, weights=str(tmp_path / "head.safetensors"))
    head.load_weights()
    assert torch.equal(head({"image_tokens": images()}), theirs({"image_tokens": images()}))


def test_weights_of_other_labels_lend_queries_and_layer(tmp_path):
    _, state = official(12, groups=5)
    save_file(state, tmp_path / "head.safetensors")
    head = decoder(9, groups=5, weights=str(tmp_path / "head.safetensors"))
    before = head.decoder.duplicate_pooling.clone()
    head.load_weights()
    assert torch.equal(head.decoder.query_embed.weight, state["decoder.query_embed.weight"])
    assert torch.equal(head.decoder.duplicate_pooling, before)


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path):
    _, state = official()
    path = tmp_path / "head.safetensors"
    head = decoder(10, weights=str(path))
    with pytest.raises(InputError, match="is not there"):
        head.load_weights()
    path.write_bytes(b"not tensors")
    with pytest.raises(InputError, match="not a file of tensors"):
        head.load_weights()
    lacking = {k: v for k, v in state.items() if "norm2.bias" not in k}
    save_file(lacking, path)
    with pytest.raises(
        InputError, match=r"lacks 1 of the 19 tensors .* decoder.layers.0.norm2.bias"
    ):
        head.load_weights()
    save_file(state, path)
    wide = decoder(10, channels=20, weights=str(path))
    with pytest.raises(InputError, match=r"embed_standart.weight is \(24, 16\) .* \(24, 20\)"):
        wide.load_weights()


def test_a_file_with_code_in_it_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="not a file of tensors"):
        decoder(10, weights=str(tmp_path / "evil.pth")).load_weights()


# -- label texts as queries ------------------------------------------------------------------------


def by_text(num_labels: int = 6, **settings) -> tuple[MLDecoder, torch.Tensor]:
    text = torch.randn(num_labels, 7, generator=torch.Generator().manual_seed(9))
    head = decoder(num_labels, label_text=text, queries="label_text", **settings)
    head.set_prior(torch.linspace(-2, 1, num_labels))
    return head, text


def test_labels_do_not_see_each_other():
    head, text = by_text()
    some = torch.tensor([1, 4])
    fewer = decoder(2, label_text=text[some], queries="label_text")
    fewer.load_state_dict(head.for_labels(text[some], some))
    batch = {"image_tokens": images()}
    torch.testing.assert_close(fewer(batch), head(batch)[:, some])


def test_a_new_label_gets_the_score_of_its_text():
    head, text = by_text()
    new = torch.cat([torch.randn(1, 7), text[2:3]])
    state = head.for_labels(new, torch.tensor([-1, 2]))
    other = decoder(2, label_text=new, queries="label_text")
    other.load_state_dict(state)
    batch = {"image_tokens": images()}
    logits = other(batch)
    torch.testing.assert_close(logits[:, 1], head(batch)[:, 2])
    assert logits[:, 0].std() > 0
    assert float(state["labels.prior"][0]) == pytest.approx(float(head.labels.prior.mean()))


def test_in_pieces_the_queries_give_the_same(monkeypatch):
    head, _ = by_text()
    batch = {"image_tokens": images()}
    expected = head(batch)
    monkeypatch.setattr("mmc.heads.models.ml_decoder.QUERIES_AT_ONCE", 4)
    with torch.no_grad():
        torch.testing.assert_close(head(batch), expected)


def test_a_saved_head_knows_the_width_of_its_texts():
    head, _ = by_text()
    again = decoder(6, queries="label_text")
    again.load_state_dict(head.state_dict())
    batch = {"image_tokens": images()}
    assert torch.equal(again(batch), head(batch))


def test_without_label_texts_it_says_so():
    head = decoder(6, queries="label_text")
    with pytest.raises(InputError, match="needs label texts"):
        head.fit_inputs([{"image_tokens": images()}])


def test_fixed_queries_know_no_other_labels():
    with pytest.raises(InputError, match=r"head\.queries=label_text"):
        decoder(6).for_labels(torch.ones(2, 7), torch.tensor([0, -1]))


@pytest.mark.parametrize(
    "settings",
    [{"groups": 0}, {"width": -1}, {"dropout": 1.0}, {"input_dropout": -0.1}, {"label_budget": -1}],
)
def test_settings_are_checked(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        MLDecoderConfig(**settings)
