"""open_clip: the numbers of the library's own call, and what names a model and its weights."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import OPEN_CLIP_CONFIG, tiny_bert, tiny_hf_clip, tiny_open_clip
from torch import Tensor

from mmc.extract.backbones import load_backbone
from mmc.extract.backbones.base import Backbone
from mmc.extract.images import decode, decode_reference
from mmc.store.errors import InputError

TEXTS = ["a photo of the dog", "", "two small cars, and a house!", "horse " * 90, "ünïcødé !!!"]


def with_parts(vision: dict | None = None, text: dict | None = None, **top: Any) -> dict[str, Any]:
    config = json.loads(json.dumps({**OPEN_CLIP_CONFIG, **top}))
    config["vision_cfg"] = {**config["vision_cfg"], **(vision or {})}
    config["text_cfg"] = {**config["text_cfg"], **(text or {})}
    return config


RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
CASES: dict[str, dict[str, Any]] = {
    "clip": with_parts(),
    "quick gelu": with_parts(quick_gelu=True),
    "average pooling, no pre-norm": with_parts({"pool_type": "avg", "no_ln_pre": True}),
    "norm after pooling": with_parts({"final_ln_after_pool": True}),
    "resnet": with_parts(RESNET),
    "oblong": with_parts({"image_size": [32, 48]}),
    "siglip": with_parts(
        {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
        {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "context_length": 20},
        custom_text=True,
        init_logit_bias=-10,
        embed_dim=64,
    ),
    "convnext": with_parts(
        {"timm_model_name": "test_convnext", "timm_pool": "", "image_size": 160}, custom_text=True
    ),
    "eva": with_parts(
        {
            "timm_model_name": "eva02_tiny_patch14_224",
            "timm_pool": "token",
            "timm_proj": "linear",
            "image_size": 224,
        },
        custom_text=True,
    ),
    "eos": with_parts(text={"pool_type": "eos", "eos_id": 49407}, custom_text=True),
    "bert": with_parts(
        text={"hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler", "context_length": 40}
    ),
    "coca": with_parts(
        {
            "attentional_pool": True,
            "attn_pooler_queries": 6,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        {"embed_cls": True, "context_length": 30, "output_tokens": True},
        multimodal_cfg={
            "context_length": 30,
            "vocab_size": 49408,
            "width": 24,
            "heads": 2,
            "layers": 1,
        },
        custom_text=True,
    ),
}


@dataclass(frozen=True)
class Pair:
    """A backbone and the library's own model, transform and tokenizer from the same folder."""

    backbone: Backbone
    model: Any
    transform: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    kept: dict[str, Pair] = {}

    def get(case: str) -> Pair:
        if case not in kept:
            folder = tmp_path_factory.mktemp("models") / "model"
            config = CASES[case]
            if "hf_pooler_type" in config["text_cfg"]:
                tiny_bert(folder)
                for name in ("hf_model_name", "hf_tokenizer_name"):
                    config["text_cfg"][name] = str(folder)
                (folder / "model.safetensors").unlink()
            spec = tiny_open_clip(folder, config)
            name = f"local-dir:{folder}"
            model, _, transform = open_clip.create_model_and_transforms(name, pretrained_text=False)
            kept[case] = Pair(
                load_backbone(spec, device="cpu", precision="float32"),
                model.eval(),
                transform,
                open_clip.get_tokenizer(name),
            )
        return kept[case]

    return get


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def jpegs(count: int = 4) -> list[bytes]:
    files = []
    for seed in range(count):
        draw = np.random.default_rng(seed)
        cells = draw.integers(0, 255, (5, 6, 3)).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(cells).resize((97 + seed, 70), 3).save(file, "JPEG")
        files.append(file.getvalue())
    return files


def centred_cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity((a - a.mean(0)).flatten(), (b - b.mean(0)).flatten(), dim=0)


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    """Within 1e-5, of the features' own scale where that is more than 1."""
    scale = wanted.std().clamp(min=1)
    torch.testing.assert_close(found / scale, wanted / scale, atol=1e-5, rtol=1e-5)


def assert_spread(features: Tensor) -> None:
    """Equal outputs for all inputs would make every comparison here pass."""
    assert ((features - features.mean(0)).norm(dim=1) / features.norm(dim=1)).min() > 0.05


@torch.no_grad()
def test_images_equal_the_library(case: str, pairs: Callable[[str], Pair]):
    pair = pairs(case)
    backbone = pair.backbone
    files = jpegs()
    inputs = torch.stack([pair.transform(Image.open(io.BytesIO(data))) for data in files])
    wanted = pair.model.encode_image(inputs, normalize=False)
    pixels = torch.stack([decode_reference(data, backbone.image_transform) for data in files])
    found = backbone.encode_image(pixels, ["image"])["image"]
    assert_spread(wanted)
    assert_equal(found, wanted)
    fast = torch.stack([decode(data, backbone.image_transform) for data in files])
    near = backbone.encode_image(fast, ["image"])["image"]
    assert torch.cosine_similarity(near, wanted).min() > 0.999
    assert centred_cosine(near, wanted) > 0.999


@torch.no_grad()
def test_texts_equal_the_library(case: str, pairs: Callable[[str], Pair]):
    pair = pairs(case)
    wanted = pair.model.encode_text(pair.tokenizer(TEXTS), normalize=False)
    tokens = pair.backbone.tokenize(TEXTS)
    assert_spread(wanted)
    found = pair.backbone.encode_text(tokens, ["text"])["text"]
    assert_equal(found, wanted)
    for row in range(len(TEXTS)):
        alone = pair.backbone.encode_text(tokens.take([row]), ["text"])["text"]
        torch.testing.assert_close(alone, wanted[row : row + 1], atol=1e-5, rtol=1e-5)


def test_bf16_works_in_every_tower(case: str, pairs: Callable[[str], Pair]):
    """0.99, not 0.999: random weights with 16 outputs amplify rounding more than trained ones."""
    exact = pairs(case).backbone
    rounded = load_backbone(exact.context["spec"], device="cpu", precision="bf16")
    pixels = torch.stack([decode(data, exact.image_transform) for data in jpegs(8)])
    tokens = exact.tokenize(TEXTS)
    for wanted, found in (
        (exact.encode_image(pixels, ["image"]), rounded.encode_image(pixels, ["image"])),
        (exact.encode_text(tokens, ["text"]), rounded.encode_text(tokens, ["text"])),
    ):
        for name in wanted:
            assert torch.cosine_similarity(wanted[name], found[name]).min() > 0.99
            assert centred_cosine(wanted[name], found[name]) > 0.99


@pytest.mark.parametrize(
    ("name", "image_tokens", "text_tokens", "cuts"),
    [
        ("clip", (16, 32), (77, 24), True),
        ("resnet", (4, 512), (77, 24), True),
        ("oblong", (24, 32), (77, 24), True),
        ("siglip", (100, 64), (20, 24), False),
        ("convnext", (25, 64), (77, 24), True),
        ("eva", (256, 192), (77, 24), True),
        ("eos", (16, 32), (77, 24), True),
        ("bert", (16, 32), (40, 32), True),
        ("coca", (5, 16), (30, 24), False),
    ],
)
def test_shapes_and_cutting(
    name: str,
    image_tokens: tuple[int, int],
    text_tokens: tuple[int, int],
    cuts: bool,
    pairs: Callable[[str], Pair],
):
    backbone = pairs(name).backbone
    assert backbone.fields["image_tokens"].shape == image_tokens
    assert backbone.fields["text_tokens"].shape == text_tokens
    buckets = backbone.tokenize(["one", "one two three four five six seven eight nine"]).buckets
    assert (buckets < backbone.tokenize(["one"]).ids.shape[1]).all() == cuts
    has_class = name not in ("resnet", "convnext", "coca")
    assert ("image_class" in backbone.fields) == has_class
    if has_class:
        assert backbone.fields["image_class"].shape == image_tokens[1:]


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "average pooling, no pre-norm", "norm after pooling"])
def test_tokens_are_what_the_model_pools(name: str, pairs: Callable[[str], Pair]):
    """Pooled by hand from the tokens and the class token, projected or not."""
    pair = pairs(name)
    visual, spec = pair.model.visual, pair.backbone.context["spec"]
    pixels = torch.stack([decode_reference(d, pair.backbone.image_transform) for d in jpegs()])
    fields = ["image", "image_tokens", "image_class"]
    found = pair.backbone.encode_image(pixels, fields)
    by_mean = visual.pool_type == "avg"
    pooled = found["image_tokens"].mean(1) if by_mean else found["image_class"]
    pooled = visual.ln_post(pooled) if visual.final_ln_after_pool else pooled
    assert_equal(pooled @ visual.proj, found["image"])
    projected = load(f"{spec}[tokens=projected]").encode_image(pixels, fields)
    assert_equal(projected["image"], found["image"])
    pooled = projected["image_tokens"].mean(1) if by_mean else projected["image_class"]
    assert_equal(pooled, found["image"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet", "ModifiedResNet"),
        ("coca", "CoCa's attentional pooler"),
        ("siglip", "timm VisionTransformer"),
        ("eva", "timm Eva"),
    ],
)
def test_towers_whose_tokens_are_not_projected(name: str, kind: str, pairs: Callable[[str], Pair]):
    spec = pairs(name).backbone.context["spec"]
    with pytest.raises(InputError, match=f"tokens=projected needs .* this one \\({kind}\\)"):
        load(f"{spec}[tokens=projected]")


@torch.no_grad()
def test_the_grid_of_a_resnet_is_in_reading_order(pairs: Callable[[str], Pair]):
    """What attention pooling begins with, and the pooled result from it."""
    pair = pairs("resnet")
    pixels = torch.stack([decode_reference(d, pair.backbone.image_transform) for d in jpegs()])
    found = pair.backbone.encode_image(pixels, ["image", "image_tokens"])
    grid = found["image_tokens"].transpose(1, 2).unflatten(2, (2, 2))
    assert_equal(pair.model.visual.attnpool(grid), found["image"])


@torch.no_grad()
def test_image_tokens_are_the_last_block_without_the_class_token(pairs: Callable[[str], Pair]):
    pair = pairs("clip")
    pixels = torch.stack([decode_reference(d, pair.backbone.image_transform) for d in jpegs()])
    inputs = torch.stack([pair.transform(Image.open(io.BytesIO(data))) for data in jpegs()])
    found = pair.backbone.encode_image(pixels, ["image", "image_tokens"])
    blocks = pair.model.visual.forward_intermediates(
        inputs, indices=1, normalize_intermediates=True, output_fmt="NLC"
    )
    wanted = blocks["image_intermediates"][-1]
    torch.testing.assert_close(found["image_tokens"], wanted, atol=1e-5, rtol=1e-5)
    only = pair.backbone.encode_image(pixels, ["image"])
    assert torch.equal(only["image"], found["image"])


@torch.no_grad()
def test_text_tokens_are_the_states_before_pooling(pairs: Callable[[str], Pair]):
    pair = pairs("clip")
    tokens = pair.backbone.tokenize(TEXTS)
    found = pair.backbone.encode_text(tokens, ["text", "text_tokens"])
    ends = tokens.lengths - 1  # the end token is the one that is pooled
    pooled = found["text_tokens"][torch.arange(len(TEXTS)), ends]
    torch.testing.assert_close(
        pooled @ pair.model.text_projection, found["text"], atol=1e-5, rtol=1e-5
    )
    assert tokens.lengths.tolist() == [7, 2, 10, 77, 10]


@pytest.fixture(scope="module")
def known_model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model that open_clip knows by the name ``tiny-test``, and its weights in every format."""
    folder = tmp_path_factory.mktemp("known")
    tiny_open_clip(folder / "model")
    (folder / "tiny-test.json").write_text(json.dumps(OPEN_CLIP_CONFIG), encoding="utf-8")
    open_clip.add_model_config(folder / "tiny-test.json")
    state = load_file(folder / "model" / "open_clip_model.safetensors")
    torch.save(state, folder / "plain.pt")
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3},
        folder / "training.pt",
    )
    torch.save({key: value.half() for key, value in state.items()}, folder / "half.bin")
    save_file(state, folder / "weights.safetensors")
    torch.save({"state_dict": state, "args": Path("x")}, folder / "objects.pt")
    torch.save({k: v for k, v in state.items() if "ln_post" not in k}, folder / "missing.pt")
    torch.save({**state, "text_projection": torch.zeros(24, 8)}, folder / "narrow.pt")
    torch.save({**state, "visual.extra": torch.zeros(2)}, folder / "extra.pt")
    (folder / "broken.pt").write_bytes((folder / "plain.pt").read_bytes()[:5000])
    return {path.name: path for path in folder.iterdir()}


def load(spec: str) -> Backbone:
    return load_backbone(spec, device="cpu", precision="float32")


def test_weights_have_one_identity_whatever_the_file(known_model: dict[str, Path]):
    folder = load(f"open_clip:{known_model['model']}")
    for name in ("plain.pt", "training.pt", "weights.safetensors"):
        by_name = load(f"open_clip:tiny-test/{known_model[name]}")
        assert by_name.identity == folder.identity
        assert by_name.context["spec"].endswith(name)
    assert load(f"open_clip:tiny-test/{known_model['half.bin']}").identity != folder.identity
    gelu = load(f"open_clip:tiny-test/{known_model['plain.pt']}[quick_gelu=true]")
    assert gelu.identity["weights"] == folder.identity["weights"]
    assert gelu.identity != folder.identity


def test_relative_checkpoint(known_model: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(known_model["plain.pt"].parent)
    backbone = load("open_clip:tiny-test/plain.pt")
    assert backbone.identity == load("open_clip:model").identity
    full = f"open_clip:tiny-test/{known_model['plain.pt']}"
    assert backbone.context["resolved_spec"] == full
    assert load(full).identity == backbone.identity


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("objects.pt", "holds more than tensors"),
        ("missing.pt", "missing visual.ln_post.weight, visual.ln_post.bias"),
        ("narrow.pt", r"text_projection is \[24, 8\], the model has \[24, 16\]"),
        ("extra.pt", "unexpected visual.extra"),
        ("broken.pt", "the weights cannot be read"),
        ("none.pt", "no such checkpoint file"),
    ],
)
def test_weights_that_do_not_fit(file: str, message: str, known_model: dict[str, Path]):
    path = known_model["plain.pt"].parent / file
    with pytest.raises(InputError, match=message) as found:
        load(f"open_clip:tiny-test/{path}")
    assert "\n" not in str(found.value)
    assert str(path) in str(found.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-23/openai", "no model 'ViT-B-23'; did you mean ViT-B-32"),
        ("ViT-B-32", "names no weights: add /TAG .*laion2b_s34b_b79k.* or /PATH"),
        ("ViT-B-32/laion2b_s34b_b97k", "has no weights .*did you mean laion2b_s34b_b79k"),
        ("/no/such/folder", "neither a folder nor a model"),
        ("local-dir:/no/such/folder", "no such folder"),
    ],
)
def test_unknown_names(name: str, message: str):
    with pytest.raises(InputError, match=message) as found:
        load(f"open_clip:{name}")
    assert "\n" not in str(found.value)


def test_folders_that_hold_no_model(tmp_path: Path):
    with pytest.raises(InputError, match=r"holds no open_clip_config\.json"):
        load(f"open_clip:{tmp_path}")
    tiny_open_clip(tmp_path / "model")
    (tmp_path / "model" / "open_clip_model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        load(f"open_clip:{tmp_path / 'model'}")
    (tmp_path / "model" / "open_clip_config.json").write_text("{", encoding="utf-8")
    (tmp_path / "model" / "x.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"open_clip_config\.json is not JSON"):
        load(f"open_clip:{tmp_path / 'model'}")


def test_a_folder_without_its_tokenizer_says_which_files_are_missing(tmp_path: Path):
    tiny_bert(tmp_path / "bert")
    text = {"hf_model_name": str(tmp_path / "bert"), "hf_pooler_type": "mean_pooler"}
    text |= {"hf_tokenizer_name": str(tmp_path / "bert"), "hf_proj_type": "linear"}
    spec = tiny_open_clip(tmp_path / "model", {**OPEN_CLIP_CONFIG, "text_cfg": text})
    with pytest.raises(InputError, match=r"tokenizer\.json and tokenizer_config\.json belong into"):
        load(spec)


@pytest.mark.parametrize("name", ["ViT-B-32/laion2b_s34b_b79k", "hf-hub:no/where"])
def test_weights_that_are_not_here(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set") as found:
        load(f"open_clip:{name}")
    assert "\n" not in str(found.value)


@pytest.mark.filterwarnings("error")
def test_known_tags_settle_quick_gelu(known_model: dict[str, Path], monkeypatch: Any):
    from open_clip import pretrained

    tag = {"file": str(known_model["plain.pt"]), "quick_gelu": True, "mean": (0.1, 0.2, 0.3)}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-test", {"own": tag})
    by_tag = load("open_clip:tiny-test/own")
    assert by_tag.image_transform.mean == (0.1, 0.2, 0.3)
    by_option = load(f"open_clip:tiny-test/{known_model['plain.pt']}[quick_gelu=true]")
    assert by_tag.identity["config"] == by_option.identity["config"]
    assert by_tag.identity["weights"] == by_option.identity["weights"]


def test_hub_weights_on_disk_work_with_the_hub_switched_off(tmp_path: Path):
    """In its own process: the cache's place is read when the library is imported."""
    for repository, build in (("me--pictures", tiny_open_clip), ("me--pairs", tiny_hf_clip)):
        base = tmp_path / f"models--{repository}"
        build(base / "snapshots" / "abc")
        (base / "refs").mkdir()
        (base / "refs" / "main").write_text("abc", encoding="utf-8")
    code = """
from mmc.extract.backbones import load_backbone
for spec in ("open_clip:hf-hub:me/pictures", "hf:me/pairs"):
    backbone = load_backbone(spec, device="cpu", precision="float32")
    print(spec, sorted(backbone.fields))
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    fields = str(
        ["image", "image_class", "image_tokens", "text", "text_ids", "text_mask", "text_tokens"]
    )
    assert done.stdout.splitlines() == [
        f"open_clip:hf-hub:me/pictures {fields}",
        f"hf:me/pairs {fields}",
    ]
