"""LoRA adapters: merged as peft merges them, part of the identity, refused when they do not fit."""

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    tiny_bert,
    tiny_blip,
    tiny_hf_clip,
    tiny_hf_siglip,
    tiny_open_clip,
    tiny_vit,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mmc.extract.backbones import load_backbone
from mmc.extract.backbones.base import Backbone
from mmc.extract.backbones.lora import add_adapter
from mmc.extract.pipeline import ExtractConfig, extract
from mmc.store import EmbeddingStore
from mmc.store.errors import FingerprintMismatchError, InputError

TEXTS = ["a photo of the dog", "two small green cars under the tree", "one"]
BUILDERS: dict[str, Callable[[Path], str]] = {
    "open_clip": tiny_open_clip,
    "clip": tiny_hf_clip,
    "siglip": tiny_hf_siglip,
    "bert": tiny_bert,
    "blip": tiny_blip,
    "vit": tiny_vit,
}


@pytest.fixture(scope="module")
def spec_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("models")
    made: dict[str, str] = {}

    def get(case: str) -> str:
        if case not in made:
            made[case] = BUILDERS[case](folder / case)
        return made[case]

    return get


def load(spec: str, adapter: Path | None = None, **settings: Any) -> Backbone:
    spec += f"[lora={adapter}]" if adapter else ""
    return load_backbone(spec, **{"device": "cpu", "precision": "float32", **settings})


def outputs(backbone: Backbone) -> dict[str, Tensor]:
    """Every field of every tower, for three samples."""
    by_tower: dict[str, list[str]] = {"image": [], "text": [], "fused": []}
    for name, spec in backbone.fields.items():
        by_tower[spec.tower].append(name)
    found: dict[str, Tensor] = {}
    if by_tower["image"]:
        draw = torch.Generator().manual_seed(1)
        blocks = torch.randint(0, 256, (3, 3, 4, 4), generator=draw).to(torch.uint8)
        pixels = nn.functional.interpolate(blocks, size=backbone.image_transform.size)
        found |= backbone.encode_image(pixels, by_tower["image"])
    if by_tower["text"]:
        tokens = backbone.tokenize(TEXTS)
        found |= backbone.encode_text(tokens, by_tower["text"])
    if by_tower["fused"]:
        found |= backbone.encode_fused(pixels, tokens, by_tower["fused"])
    return found


def change(first: Backbone, second: Backbone, field: str) -> float:
    a, b = outputs(first)[field], outputs(second)[field]
    return float((a - b).norm() / a.norm())


def save_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """An adapter as `mmc tune` writes it: what is needed, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def factors(module: str, out: int, width: int, rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, width, generator=draw),
        f"{module}.lora_B.weight": 0.2 * torch.randn(out, rank, generator=draw),
    }


def with_weights(spec: str, folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> str:
    """A copy of a saved model with other weights."""
    family, _, name = spec.partition(":")
    shutil.copytree(name, folder)
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    edit(state)
    save_file({k: v.contiguous() for k, v in state.items()}, file, metadata={"format": "pt"})
    return f"{family}:{folder}"


def assert_same(first: Backbone, second: Backbone, tolerance: float = 1e-5) -> None:
    wanted, found = outputs(first), outputs(second)
    assert wanted.keys() == found.keys()
    for name, array in wanted.items():
        if array.dtype == torch.float32:
            torch.testing.assert_close(found[name], array, atol=tolerance, rtol=tolerance)


def test_by_hand_in_transformers(spec_of: Any, tmp_path: Path):
    """W + (alpha / r) B A, computed here and saved as a model of its own."""
    module = "vision_model.encoder.layers.0.self_attn.out_proj"
    deep = "text_model.encoder.layers.1.mlp.fc1"
    tensors = {**factors(module, 32, 32), **factors(deep, 64, 32, seed=1)}
    adapter = save_adapter(tmp_path / "adapter", tensors)

    def merge(state: dict[str, Tensor]) -> None:
        for name in (module, deep):
            a, b = (tensors[f"{name}.lora_{x}.weight"] for x in "AB")
            state[f"{name}.weight"] += 8 / 4 * (b @ a)

    plain, tuned = load(spec_of("clip")), load(spec_of("clip"), adapter)
    assert_same(load(with_weights(spec_of("clip"), tmp_path / "merged", merge)), tuned)
    assert change(plain, tuned, "image") > 0.05
    assert change(plain, tuned, "text") > 0.05


@pytest.mark.parametrize(
    ("module", "rows"),
    [
        ("attn.q_proj", slice(0, 32)),
        ("attn.k_proj", slice(32, 64)),
        ("attn.v_proj", slice(64, 96)),
        ("attn.in_proj", slice(0, 96)),
        ("attn", slice(0, 96)),
        ("attn.out_proj", None),
        ("mlp.c_fc", None),
    ],
)
def test_by_hand_in_open_clip(module: str, rows: slice | None, spec_of: Any, tmp_path: Path):
    """The parts of nn.MultiheadAttention, which open_clip's transformers keep in one array."""
    block = "visual.transformer.resblocks.0"
    width = {"mlp.c_fc": 128}.get(module, 32 if rows is None else rows.stop - rows.start)
    tensors = factors(f"{block}.{module}", width, 32)
    adapter = save_adapter(tmp_path / "adapter", tensors)

    def merge(state: dict[str, Tensor]) -> None:
        a, b = tensors.values()
        if rows is None:
            state[f"{block}.{module}.weight"] += 2 * (b @ a)
        else:
            state[f"{block}.attn.in_proj_weight"][rows] += 2 * (b @ a)

    plain, tuned = load(spec_of("open_clip")), load(spec_of("open_clip"), adapter)
    assert_same(load(with_weights(spec_of("open_clip"), tmp_path / "merged", merge)), tuned)
    assert change(plain, tuned, "image") > 0.02
    assert change(plain, tuned, "text") == 0


@pytest.mark.parametrize("case", BUILDERS)
def test_a_zero_adapter_changes_no_bit(case: str, spec_of: Any, tmp_path: Path):
    plain = load(spec_of(case))
    module, width = {
        "open_clip": ("transformer.resblocks.1.attn.out_proj", 24),
        "clip": ("text_model.encoder.layers.0.self_attn.q_proj", 32),
        "siglip": ("text_model.encoder.layers.0.self_attn.q_proj", 32),
        "bert": ("encoder.layer.0.attention.self.query", 32),
        "blip": ("text_encoder.encoder.layer.0.attention.self.query", 32),
        "vit": ("layers.0.attention.q_proj", 32),
    }[case]
    tensors = factors(module, width, width)
    zero = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in tensors.items()}
    none = load(spec_of(case), save_adapter(tmp_path / "zero", zero))
    before, after = outputs(plain), outputs(none)
    assert all(torch.equal(before[name], after[name]) for name in before)
    tuned = load(spec_of(case), save_adapter(tmp_path / "some", tensors))
    field = "image" if case == "vit" else "text"
    assert change(plain, tuned, field) > 0.005
    assert {k for k in tuned.identity if tuned.identity[k] != plain.identity.get(k)} == {"adapter"}
    assert none.identity["adapter"] != tuned.identity["adapter"]


def test_scales_ranks_and_patterns(spec_of: Any, tmp_path: Path):
    """Each way to write an adapter of one and the same sum."""
    layer = "encoder.layer.{}.attention.self.query"
    first, second = layer.format(0), layer.format(1)
    a, b = factors(first, 32, 32).values()
    double = {f"{first}.lora_A.weight": a, f"{first}.lora_B.weight": 2 * b}
    wide = factors(second, 32, 32, rank=8, seed=3)

    def saved(name: str, tensors: dict[str, Tensor], **config: Any) -> Backbone:
        return load(spec_of("bert"), save_adapter(tmp_path / name, tensors, **config))

    plain = saved("plain", factors(first, 32, 32), lora_alpha=16)
    assert_same(plain, saved("double", double, lora_alpha=8))
    rslora = {"use_rslora": True, "lora_alpha": 8}  # 8 / sqrt(4) = 16 / 4
    assert_same(plain, saved("rslora", factors(first, 32, 32), **rslora))
    alpha = {"alpha_pattern": {r"layer\.0\..*query": 16, "query": 1000}}
    assert_same(plain, saved("alpha", factors(first, 32, 32), **alpha))
    both = {**factors(first, 32, 32), **wide}
    ranks = {"rank_pattern": {r"layer\.1\..*query": 8}, "lora_alpha": 16}
    mixed = saved("ranks", both, **ranks)

    def merge(state: dict[str, Tensor]) -> None:
        for name, rank in ((first, 4), (second, 8)):
            down, up = (both[f"{name}.lora_{x}.weight"] for x in "AB")
            state[f"{name}.weight"] += 16 / rank * (up @ down)

    assert_same(load(with_weights(spec_of("bert"), tmp_path / "merged", merge)), mixed)
    identities = [one.identity["adapter"] for one in (plain, mixed)]
    assert len(set(identities)) == 2


def test_embeddings_convolutions_and_whole_parameters(spec_of: Any, tmp_path: Path):
    words = "text_model.embeddings.token_embedding"
    patches = "vision_model.embeddings.patch_embedding"
    state = load_file(Path(spec_of("clip").partition(":")[2]) / "model.safetensors")
    rows = len(state[f"{words}.weight"])
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"{words}.lora_embedding_A": torch.randn(4, rows, generator=draw),
        f"{words}.lora_embedding_B": 0.2 * torch.randn(32, 4, generator=draw),
        f"{patches}.lora_A.weight": 0.2 * torch.randn(4, 3, 8, 8, generator=draw),
        f"{patches}.lora_B.weight": torch.randn(32, 4, 1, 1, generator=draw),
        "visual_projection.weight": torch.randn(16, 32, generator=draw),
    }
    adapter = save_adapter(tmp_path / "adapter", tensors, modules_to_save=["visual_projection"])

    def merge(state: dict[str, Tensor]) -> None:
        a, b, conv_a, conv_b, projection = tensors.values()
        state[f"{words}.weight"] += 2 * (b @ a).T
        stacked = torch.einsum("orxy,rikl->oikl", conv_b, conv_a)
        state[f"{patches}.weight"] += 2 * stacked
        state["visual_projection.weight"] = projection

    merged = load(with_weights(spec_of("clip"), tmp_path / "merged", merge))
    tuned = load(spec_of("clip"), adapter)
    assert_same(merged, tuned)
    assert change(load(spec_of("clip")), tuned, "text") > 0.05


def test_weights_that_lie_the_other_way_round(tmp_path: Path):
    """Conv1D of transformers keeps (in, out): what peft calls fan_in_fan_out."""
    model = nn.Sequential(Conv1D(6, 4))
    tensors = factors("0", 6, 4, rank=2)
    adapter = save_adapter(tmp_path / "adapter", tensors, r=2, fan_in_fan_out=True)
    before = model[0].weight.detach().clone()
    add_adapter(model, str(adapter), base_weights="", where="x")
    a, b = tensors.values()
    torch.testing.assert_close(model[0].weight.detach(), before + 4 * (b @ a).T)


def test_names_from_under_a_head(spec_of: Any, tmp_path: Path):
    """peft names modules from the model that was trained, such as BertForSequenceClassification."""
    module = "encoder.layer.0.attention.self.query"
    bare = save_adapter(tmp_path / "bare", factors(module, 32, 32))
    below = save_adapter(tmp_path / "below", factors(f"bert.{module}", 32, 32))
    assert_same(load(spec_of("bert"), bare), load(spec_of("bert"), below))


def peft_model(case: str, spec: str) -> Any:
    folder = spec.partition(":")[2]
    if case == "open_clip":
        import open_clip

        return open_clip.create_model(f"local-dir:{folder}")
    import transformers

    kinds = {"blip": "BlipForImageTextRetrieval", "vit": "ViTModel"}
    kind = getattr(transformers, kinds.get(case, "AutoModel"))
    return kind.from_pretrained(folder, dtype=torch.float32)


PEFT = {
    "open_clip": {"target_modules": ["attn", "c_fc", "c_proj"]},
    "clip": {"target_modules": ["out_proj", "q_proj", "patch_embedding", "token_embedding"]},
    "siglip": {"target_modules": ["out_proj", "fc1"], "use_rslora": True},
    "bert": {
        "target_modules": ["query", "dense"],
        "rank_pattern": {"layer.1.attention.self.query": 2},
        "alpha_pattern": {"intermediate.dense": 3},
    },
    "blip": {"target_modules": ["qkv", "projection", "query", "key", "dense"]},
    "vit": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
}


def _saved(spec: str, model: Any, folder: Path) -> str:
    """A copy of a saved model with the weights of ``model``, in its library's own format."""
    if spec.startswith("open_clip:"):
        return with_weights(spec, folder, lambda state: state.update(model.state_dict()))
    shutil.copytree(spec.partition(":")[2], folder)
    model.save_pretrained(folder)
    return f"hf:{folder}"


@pytest.mark.parametrize("case", PEFT)
def test_peft_itself(case: str, spec_of: Any, tmp_path: Path):
    """What peft trained and saved gives the model that peft itself merges."""
    peft = pytest.importorskip("peft")
    if case == "open_clip" and peft.__version__ != "0.21.2":
        pytest.skip("versions of peft differ in how they count nn.MultiheadAttention's out_proj")
    spec = spec_of(case)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **PEFT[case])
        tuned = peft.get_peft_model(peft_model(case, spec), config)
        if case == "vit":
            for name, parameter in tuned.named_parameters():
                if name.endswith("bias") and parameter.requires_grad:
                    parameter.data += 0.1
        tuned.save_pretrained(tmp_path / "adapter")
        merged = tuned.merge_and_unload()
    reference = load(_saved(spec, merged, tmp_path / "merged"))
    mine = load(spec, tmp_path / "adapter")
    assert_same(reference, mine)
    for field in ("image", "text", "fused"):
        if field in mine.fields:
            assert change(load(spec), mine, field) > 0.01, field


def test_the_path_is_remembered_in_full(spec_of: Any, tmp_path: Path, monkeypatch: Any):
    module = "encoder.layer.0.attention.self.query"
    adapter = save_adapter(tmp_path / "adapter", factors(module, 32, 32))
    monkeypatch.chdir(tmp_path)
    backbone = load(spec_of("bert"), Path("./adapter"))
    assert backbone.context["spec"] == f"{spec_of('bert')}[lora=adapter]"
    assert backbone.context["resolved_spec"] == f"{spec_of('bert')}[lora={adapter}]"
    monkeypatch.chdir("/")
    again = load(backbone.context["resolved_spec"])
    assert again.identity == backbone.identity
    assert "options" not in backbone.context


def test_a_store_does_not_mix_adapters(spec_of: Any, tmp_path: Path):
    module = "encoder.layer.0.attention.self.query"
    adapter = save_adapter(tmp_path / "adapter", factors(module, 32, 32))
    (tmp_path / "samples.csv").write_text("text,label\na dog,x\na cat,y\nred,x\n", encoding="utf-8")

    def run(spec: str) -> None:
        config = ExtractConfig(
            backbones=(spec,), names=("words",), device="cpu", precision="float32"
        )
        source, store = str(tmp_path / "samples.csv"), str(tmp_path / "store")
        extract(source, store, config, report=lambda _: None)

    run(spec_of("bert"))
    with pytest.raises(FingerprintMismatchError, match="adapter: the store has nothing"):
        run(f"{spec_of('bert')}[lora={adapter}]")
    assert EmbeddingStore.open(tmp_path / "store")["words/text"].done.all()


def good(tmp_path: Path, **config: Any) -> Path:
    module = "encoder.layer.0.attention.self.query"
    return save_adapter(tmp_path / "adapter", factors(module, 32, 32), **config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "of the kind 'LOHA'; only LORA is supported"),
        ({"use_dora": True}, "uses use_dora, which is not supported"),
        ({"lora_bias": True}, "uses lora_bias"),
        ({"layer_replication": [[0, 1]]}, "uses layer_replication"),
        ({"use_some_future_thing": {"x": 1}}, "uses use_some_future_thing"),
        ({"init_lora_weights": "pissa"}, "uses init_lora_weights=pissa"),
        ({"r": 8}, "lora_A.weight is of rank 4, adapter_config.json says 8"),
        ({"r": 0}, "gives no usable r"),
        ({"lora_alpha": None}, "gives no usable lora_alpha"),
        ({"rank_pattern": {"(": 4}}, "gives no usable rank_pattern"),
        ({"alpha_pattern": [8]}, "gives no usable alpha_pattern"),
        ({"base_weights": "0" * 64}, r"trained on other weights \(000000000000…\)"),
    ],
)
def test_kinds_that_are_refused(config: dict, message: str, spec_of: Any, tmp_path: Path):
    with pytest.raises(InputError, match=message) as found:
        load(spec_of("bert"), good(tmp_path, **config))
    assert "\n" not in str(found.value)
    assert str(tmp_path / "adapter") in str(found.value)


QUERY = "encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (factors("encoder.layer.7.attention.self.query", 32, 32), "another model: .*layer.7"),
        (factors("encoder.layer.0.attention.self.dropout", 32, 32), "another model: .*dropout"),
        (factors(QUERY, 48, 48), r"lora_A.weight is for \[48, 48\], the model has \[32, 32\]"),
        (factors(QUERY, 16, 64), r"is for \[16, 64\], the model has \[32, 32\]"),
        ({**factors(QUERY, 32, 32), "classifier.weight": torch.zeros(2)}, "classifier.weight"),
        ({**factors(QUERY, 32, 32), f"{QUERY}.bias": torch.zeros(2)}, r"bias is for \[2\]"),
        ({f"{QUERY}.lora_A.weight": torch.zeros(4, 32)}, "lora_A.weight without the other factor"),
        (
            {**factors(QUERY, 32, 32), f"{QUERY}.lora_magnitude_vector": torch.zeros(32)},
            "lora_magnitude_vector, a kind of adapter that is not supported",
        ),
        (
            {**factors(QUERY, 32, 32), **factors(f"{QUERY}.base_layer", 32, 32)},
            "adapts one module twice",
        ),
    ],
)
def test_adapters_of_another_model(tensors: dict, message: str, spec_of: Any, tmp_path: Path):
    adapter = save_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(InputError, match=message) as found:
        load(spec_of("bert"), adapter)
    assert "\n" not in str(found.value)


def test_one_weight_is_not_adapted_under_two_names(spec_of: Any, tmp_path: Path):
    attention = "visual.transformer.resblocks.0.attn"
    tensors = {**factors(attention, 96, 32), **factors(f"{attention}.in_proj", 96, 32, seed=1)}
    with pytest.raises(InputError, match="adapts one weight under two names"):
        load(spec_of("open_clip"), save_adapter(tmp_path / "adapter", tensors))


@pytest.mark.parametrize(("version", "times"), [("0.17.1", 2), ("0.21.2", 2), (None, 2)])
def test_how_peft_counts_multihead_attention(
    version: str | None, times: int, spec_of: Any, tmp_path: Path
):
    """Its files name the output projection in their own way; up to 0.21.2 it counts twice."""
    attention = "visual.transformer.resblocks.0.attn"
    theirs = factors(f"{attention}.base_layer.out_proj", 32, 32)
    ours = dict(zip(factors(f"{attention}.out_proj", 32, 32), theirs.values(), strict=True))
    written = {"peft_version": version} if version else {}
    first = load(spec_of("open_clip"), save_adapter(tmp_path / "theirs", theirs, **written))
    second = load(spec_of("open_clip"), save_adapter(tmp_path / "ours", ours, lora_alpha=8 * times))
    assert_same(first, second)


def test_a_newer_peft_with_multihead_attention(spec_of: Any, tmp_path: Path):
    theirs = factors("visual.transformer.resblocks.0.attn.base_layer.out_proj", 32, 32)
    adapter = save_adapter(tmp_path / "theirs", theirs, peft_version="0.22.0")
    with pytest.raises(InputError, match=r"peft 0\.22\.0; how that counts .* not known"):
        load(spec_of("open_clip"), adapter)


def test_the_adapter_of_a_pooler_stays_with_it(spec_of: Any, tmp_path: Path):
    tensors = {**factors(QUERY, 32, 32), **factors("pooler.dense", 32, 32)}
    with_pooler = load(spec_of("bert"), save_adapter(tmp_path / "with", tensors))
    assert_same(load(spec_of("bert"), good(tmp_path)), with_pooler)


def test_base_weights_that_are_the_right_ones(spec_of: Any, tmp_path: Path):
    digest = load(spec_of("bert")).identity["weights"]
    tuned = load(spec_of("bert"), good(tmp_path, base_weights=digest))
    assert tuned.identity["weights"] == digest


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: shutil.rmtree(f), "is no folder; give the folder that"),
        (lambda f: (f / "adapter_config.json").unlink(), r"holds no adapter_config\.json"),
        (
            lambda f: (f / "adapter_config.json").write_text("{"),
            r"adapter_config\.json is not JSON",
        ),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "of the kind None"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "save it as safetensors"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 99), "cannot be read"),
    ],
)
def test_folders_that_hold_no_adapter(break_it: Any, message: str, spec_of: Any, tmp_path: Path):
    adapter = good(tmp_path)
    break_it(adapter)
    with pytest.raises(InputError, match=message) as found:
        load(spec_of("bert"), adapter)
    assert "\n" not in str(found.value)


def test_a_path_that_no_spec_can_hold(spec_of: Any, tmp_path: Path, monkeypatch: Any):
    good(tmp_path / "a,b")
    monkeypatch.chdir(tmp_path / "a,b")
    with pytest.raises(InputError, match="rename the folder"):
        load(spec_of("bert"), Path("adapter"))


def test_bf16_is_cast_after_merging(spec_of: Any, tmp_path: Path):
    """A small change would be lost in bfloat16 weights, were it added to them."""
    module = "vision_model.encoder.layers.0.self_attn.out_proj"
    tensors = {k: 0.3 * v for k, v in factors(module, 32, 32).items()}
    adapter = save_adapter(tmp_path / "adapter", tensors)
    exact, rounded = (
        load(spec_of("clip"), adapter),
        load(spec_of("clip"), adapter, precision="bf16"),
    )
    a, b = (outputs(one)["image"].double() for one in (exact, rounded))
    assert torch.cosine_similarity(a, b).min() > 0.999
    assert math.isclose(float(a.norm()), float(b.norm()), rel_tol=0.02)
