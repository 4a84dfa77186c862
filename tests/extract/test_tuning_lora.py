"""Adapters: where they are put, that they work there, and what they leave of the model."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    OPEN_CLIP_CONFIG,
    draw_weights,
    tiny_blip,
    tiny_hf_clip,
    tiny_hf_siglip,
    tiny_open_clip,
)
from torch import Tensor, nn

from mmc.extract.backbones.base import weights_sha256
from mmc.extract.backbones.lora import add_adapter
from mmc.extract.tuning.adapters import Adapters
from mmc.extract.tuning.guards import Probe, check_beginning, check_end, used_targets
from mmc.extract.tuning.options import LoraConfig
from mmc.extract.tuning.saving import write_adapter
from mmc.extract.tuning.targets import find_targets
from mmc.extract.tuning.towers import Towers, load_towers
from mmc.store.errors import InputError, MmcError

CPU = torch.device("cpu")
BUILDERS: dict[str, Callable[[Path], str]] = {
    "open_clip": tiny_open_clip,
    "clip": tiny_hf_clip,
    "siglip": tiny_hf_siglip,
    "blip": tiny_blip,
}
LORA = LoraConfig(rank=4)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Towers]:
    """Towers of their own for a test."""
    folder = tmp_path_factory.mktemp("models")
    made: dict[str, Towers] = {}

    def get(case: str) -> Towers:
        if case not in made:
            made[case] = load_towers(BUILDERS[case](folder / case), CPU, "float32")
        return made[case]

    return get


def adapted(towers: Towers, kinds: tuple[str, ...] = ("out",), **lora: Any) -> tuple[Any, Adapters]:
    """Adapters on what is used; remove them, since towers are shared among tests."""
    probe = Probe.of(towers)
    targets = used_targets(towers, find_targets(towers.model, kinds), probe)
    return probe, Adapters(towers.model, targets, LoraConfig(rank=4, **lora), seed=0)


def stirred(adapters: Adapters, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, part in adapters:
            part.B.copy_(0.2 * torch.randn(part.B.shape, generator=draw))


@torch.no_grad()
def outputs(towers: Towers, probe: Probe) -> dict[str, Tensor]:
    return probe.features(towers)


LAYERS = [0, 1]
NAMES = {
    "open_clip": [
        *(f"visual.transformer.resblocks.{i}.attn.out_proj" for i in LAYERS),
        *(f"transformer.resblocks.{i}.attn.out_proj" for i in LAYERS),
    ],
    "clip": [
        *(f"text_model.encoder.layers.{i}.self_attn.out_proj" for i in LAYERS),
        *(f"vision_model.encoder.layers.{i}.self_attn.out_proj" for i in LAYERS),
    ],
    "siglip": [
        *(f"text_model.encoder.layers.{i}.self_attn.out_proj" for i in LAYERS),
        *(f"vision_model.encoder.layers.{i}.self_attn.out_proj" for i in LAYERS),
        "vision_model.head.attention.out_proj",
    ],
    "blip": [  # and not the cross-attention, which reads pictures into texts
        *(f"vision_model.encoder.layers.{i}.self_attn.projection" for i in LAYERS),
        *(f"text_encoder.encoder.layer.{i}.attention.output.dense" for i in LAYERS),
    ],
}


@pytest.mark.parametrize("case", NAMES)
def test_every_output_projection_of_both_towers_and_no_other(case: str, fresh: Any):
    _, adapters = adapted(fresh(case))
    names = [name for name, _ in adapters]
    adapters.remove()
    assert sorted(names) == sorted(NAMES[case])


@pytest.mark.parametrize("case", BUILDERS)
def test_new_adapters_change_nothing_and_every_one_can_be_trained(case: str, fresh: Any):
    towers = fresh(case)
    before = outputs(towers, Probe.of(towers))
    probe, adapters = adapted(towers, ("out", "q", "k", "v", "mlp"))
    try:
        for name, value in outputs(towers, probe).items():
            assert torch.equal(value, before[name])
        check_beginning(towers, adapters, probe, before)
        assert all(not part.B.any() for _, part in adapters)
        for tower in ("image", "text"):
            loss = probe.features(towers)[tower].square().sum()
            grads = torch.autograd.grad(loss, [p.B for _, p in adapters], allow_unused=True)
            assert any(g is not None and g.any() for g in grads)
        frozen = [p for p in towers.model.parameters() if not p.requires_grad]
        assert len(frozen) + 2 * len(list(adapters)) == len(list(towers.model.parameters()))
    finally:
        adapters.remove()


def test_wrapping_the_output_projection_has_no_effect_and_parametrizing_it_has(fresh: Any):
    """The trap: peft's wrapper is there, its numbers are trained, and no feature moves."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    towers = fresh("open_clip")
    probe = Probe.of(towers)
    ids = probe.tokens.ids
    model = copy.deepcopy(towers.model)
    with torch.no_grad():
        before = model.encode_text(ids)
        wrapped = get_peft_model(model, PeftConfig(r=4, target_modules=["out_proj"]))
        factors = [p for name, p in wrapped.named_parameters() if "lora_B" in name]
        for factor in factors:
            factor.normal_()
        assert len(factors) == 4
        assert torch.equal(wrapped.base_model.model.encode_text(ids), before)

    before = outputs(towers, probe)
    _, adapters = adapted(towers)
    stirred(adapters)
    after = outputs(towers, probe)
    adapters.remove()
    for name, value in after.items():
        assert (value - before[name]).norm() > 0.02 * before[name].norm()


def attention_by_hand(attention: Any, x: Tensor, out: Tensor, joined: Tensor) -> Tensor:
    """Softmax attention of (B, T, D) in matrix products, with the given weights."""
    heads, width = attention.num_heads, attention.embed_dim
    q, k, v = (x @ joined.T + attention.in_proj_bias).chunk(3, dim=2)
    q, k, v = (t.unflatten(2, (heads, width // heads)).transpose(1, 2) for t in (q, k, v))
    mixed = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(width // heads), 3) @ v
    return mixed.transpose(1, 2).flatten(2) @ out.T + attention.out_proj.bias


@pytest.mark.parametrize("grad", [True, False])
def test_the_adapted_attention_is_that_of_changed_weights(grad: bool):
    """In float64, with and without gradients, as PyTorch has another kernel for each."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    nn.init.normal_(attention.in_proj_bias)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    adapters = Adapters(
        attention, find_targets(nn.ModuleDict({"attn": attention}), ("out", "q", "v")), LORA, seed=0
    )
    stirred(adapters)
    parts = dict(adapters)
    joined = attention.parametrizations.in_proj_weight.original.detach().clone()
    out = attention.out_proj.parametrizations.weight.original.detach().clone()
    change = {name: 2 * part.B.detach() @ part.A.detach() for name, part in parts.items()}
    joined[:8] += change["attn.q_proj"]
    joined[16:] += change["attn.v_proj"]
    out += change["attn.out_proj"]
    with torch.set_grad_enabled(grad):
        found = attention(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(
        found.detach(), attention_by_hand(attention, x, out, joined), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("case", ["open_clip", "clip", "blip"])
def test_what_is_saved_and_merged_gives_the_tuned_features(case: str, fresh: Any, tmp_path: Path):
    towers = fresh(case)
    state = copy.deepcopy(towers.model.state_dict())
    base = weights_sha256(towers.model.state_dict())
    probe, adapters = adapted(towers, ("out", "q", "mlp"))
    stirred(adapters)
    tuned = outputs(towers, probe)
    settings = {"rank": 4, "alpha": 8, "dropout": 0.0, "base_model": "m", "base_weights": base}
    write_adapter(tmp_path, adapters.state(), **settings)
    adapters.remove()
    assert weights_sha256(towers.model.state_dict()) == base
    try:
        check_end(
            towers,
            base,
            probe,
            tuned,
            lambda: add_adapter(towers.model, str(tmp_path), base_weights=base, where="m"),
        )
    finally:
        towers.model.load_state_dict(state)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # between peft and transformers
def test_peft_reads_the_adapter_of_a_transformers_model(fresh: Any, tmp_path: Path):
    from peft import PeftModel

    towers = fresh("clip")
    plain = copy.deepcopy(towers.model)
    probe, adapters = adapted(towers, ("out", "v", "mlp"))
    stirred(adapters)
    tuned = outputs(towers, probe)
    settings = {"rank": 4, "alpha": 8, "dropout": 0.0, "base_model": "m", "base_weights": "h"}
    write_adapter(tmp_path, adapters.state(), **settings)
    adapters.remove()
    with pytest.warns(UserWarning, match="base_weights"):
        model = PeftModel.from_pretrained(plain, tmp_path)
    pixels = torch.zeros(2, 3, 32, 32)
    with torch.no_grad():
        found = model.get_text_features(input_ids=probe.tokens.cut()).pooler_output
        image = model.get_image_features(pixel_values=pixels).pooler_output
        plain_image = towers.model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(found, tuned["text"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(image, plain_image, rtol=1e-2)


def test_an_adapter_without_effect_stops_the_training(fresh: Any):
    """BLIP's cross-attention is not in the path of its text features."""
    towers = fresh("blip")
    probe = Probe.of(towers)
    before = outputs(towers, probe)
    dead = [
        target for target in find_targets(towers.model, ("q",)) if "crossattention" in target.name
    ]
    adapters = Adapters(towers.model, dead, LORA, seed=0)
    with pytest.raises(MmcError, match=r"crossattention.* no effect"):
        check_beginning(towers, adapters, probe, before)
    adapters.remove()


def test_a_model_that_has_moved_is_noticed(fresh: Any):
    towers = fresh("clip")
    base = weights_sha256(towers.model.state_dict())
    probe, adapters = adapted(towers)
    tuned = outputs(towers, probe)
    adapters.remove()
    bias = towers.model.text_model.final_layer_norm.bias
    kept = bias.detach().clone()
    bias.data[0] += 1e-3
    try:
        with pytest.raises(MmcError, match="own weights have changed"):
            check_end(towers, base, probe, tuned, lambda: None)
    finally:
        bias.data.copy_(kept)
    stirred_features = {name: value * 1.001 for name, value in tuned.items()}
    with pytest.raises(MmcError, match="merged adapter changes the image features by"):
        check_end(towers, base, probe, stirred_features, lambda: None)


def test_dropout_is_of_the_step_and_not_of_the_measurement(fresh: Any):
    towers = fresh("clip")
    probe, adapters = adapted(towers, dropout=0.5)
    stirred(adapters)
    try:
        whole = outputs(towers, probe)["image"]
        seen = []
        for step in (0, 1, 0):
            adapters.drop(step)
            seen.append(outputs(towers, probe)["image"])
        kept = next(iter(dict(adapters).values())).kept
        adapters.drop(None)
        assert torch.equal(outputs(towers, probe)["image"], whole)
    finally:
        adapters.remove()
    assert torch.equal(seen[0], seen[2])
    assert not torch.allclose(seen[0], seen[1])
    assert not torch.allclose(seen[0], whole)
    assert set(kept.tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("case", ["open_clip", "clip"])
def test_checkpointed_blocks_have_the_same_gradients(
    case: str, fresh: Any, monkeypatch: pytest.MonkeyPatch
):
    towers = fresh(case)
    probe, adapters = adapted(towers, ("out", "q"))
    stirred(adapters)

    def gradients() -> list[Tensor]:
        total = sum(value.square().sum() for value in probe.features(towers).values())
        return list(torch.autograd.grad(total, adapters.parameters))

    wanted = gradients()
    computed = 0
    forward = F.layer_norm

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal computed
        computed += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(F, "layer_norm", counted)
    gradients()
    once, computed = computed, 0
    targets = find_targets(towers.model, ("out",))
    assert towers.checkpoint_blocks(targets) == 4
    try:
        found = gradients()
    finally:
        for module in towers.model.modules():
            module.__dict__.pop("forward", None)
        adapters.remove()
    assert computed == once + 2 * 4  # each block has two norms
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


CNN = {
    **OPEN_CLIP_CONFIG,
    "vision_cfg": {
        "image_size": 32,
        "timm_model_name": "test_resnet",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
    },
}


def test_a_tower_without_attention_says_what_it_has(tmp_path: Path):
    towers = load_towers(tiny_open_clip(tmp_path / "cnn", CNN), CPU, "float32")
    with pytest.raises(InputError, match=r"image tower has no layer .* it has conv: add one"):
        adapted(towers)
    with pytest.raises(InputError, match=r"text tower has no .* it has out, q, k, v, mlp: add"):
        adapted(towers, ("conv",))
    probe = Probe.of(towers)
    before = outputs(towers, probe)
    base = weights_sha256(towers.model.state_dict())
    _, adapters = adapted(towers, ("out", "conv"))
    check_beginning(towers, adapters, probe, before)
    stirred(adapters)
    tuned = outputs(towers, probe)
    settings = {"rank": 4, "alpha": 8, "dropout": 0.0, "base_model": "m", "base_weights": base}
    write_adapter(tmp_path, adapters.state(), **settings)
    adapters.remove()
    assert not torch.allclose(tuned["image"], before["image"], rtol=1e-2)
    check_end(
        towers,
        base,
        probe,
        tuned,
        lambda: add_adapter(towers.model, str(tmp_path), base_weights=base, where="m"),
    )


def test_attention_of_open_clip_that_is_no_multihead(tmp_path: Path):
    """Its custom blocks call their output projection; the name is the same, and so is the way."""
    custom = {**OPEN_CLIP_CONFIG["vision_cfg"], "block_type": "custom", "qk_norm": True}
    model = open_clip.CLIP(**{**OPEN_CLIP_CONFIG, "vision_cfg": custom}).eval()
    draw_weights(model)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    targets = [t for t in find_targets(model, ("out",)) if t.name.startswith("visual.")]
    adapters = Adapters(model, targets, LORA, seed=0)
    with torch.no_grad():
        before = model.encode_image(x)
        stirred(adapters)
        assert len(targets) == 2
        assert not torch.allclose(model.encode_image(x), before, rtol=1e-2)
