"""Image encoders of transformers (ViT, DINOv2), and where in the picture grid tokens lie."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tiny_models import (
    OPEN_CLIP_CONFIG,
    tiny_bert,
    tiny_blip,
    tiny_dinov2,
    tiny_hf_clip,
    tiny_hf_siglip,
    tiny_open_clip,
    tiny_vit,
)
from torch import Tensor

from mmc.extract.backbones import hf_vision, load_backbone
from mmc.extract.backbones.base import Backbone
from mmc.extract.backbones.encoder import Encoder, ImageTower
from mmc.extract.backbones.hf_files import Files
from mmc.extract.backbones.hf_parts import Options
from mmc.extract.images import decode
from mmc.extract.pipeline import ExtractConfig, extract
from mmc.extract.transforms import ImageTransform
from mmc.store import EmbeddingStore
from mmc.store.errors import InputError

ENCODERS: dict[str, Callable[[Path], str]] = {
    "vit": tiny_vit,
    "dinov2": tiny_dinov2,
    "registers": partial(tiny_dinov2, registers=3),
}
OBLONG = {
    **OPEN_CLIP_CONFIG,
    "vision_cfg": {**OPEN_CLIP_CONFIG["vision_cfg"], "image_size": [32, 48]},
}


def load(spec: str, **settings: Any) -> Backbone:
    return load_backbone(spec, **{"device": "cpu", "precision": "float32", **settings})


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("models")
    builders: dict[str, Callable[[Path], str]] = {
        **ENCODERS,
        "clip": tiny_hf_clip,
        "siglip": tiny_hf_siglip,
        "blip": tiny_blip,
        "bert": tiny_bert,
        "open_clip": tiny_open_clip,
        "oblong": partial(tiny_open_clip, config=OBLONG),
    }
    made: dict[str, str] = {}

    def get(case: str) -> str:
        if case not in made:
            made[case] = builders[case](folder / case)
        return made[case]

    return get


def jpegs(count: int = 4) -> list[bytes]:
    files = []
    for seed in range(count):
        cells = np.random.default_rng(seed).integers(0, 255, (5, 6, 3)).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(cells).resize((57 + 19 * seed, 70), 3).save(file, "JPEG")
        files.append(file.getvalue())
    return files


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("case", ENCODERS)
def test_image_encoders_equal_the_library(case: str, specs: Callable[[str], str]):
    spec = specs(case)
    folder = spec.partition(":")[2]
    backbone = load(spec)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    images = [Image.open(io.BytesIO(data)) for data in jpegs()]
    inputs = processor(images=images, return_tensors="pt")["pixel_values"]
    pixels = torch.stack([decode(data, backbone.image_transform) for data in jpegs()])
    transform = backbone.image_transform
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (transform.mean, transform.std))
    normalised = (pixels * transform.scale - mean) / std
    assert (normalised - inputs).abs().max() < 1e-5  # the processor's very pixels

    prefix = {"vit": 1, "dinov2": 1, "registers": 4}[case]
    if case == "vit":
        whole = transformers.ViTForImageClassification.from_pretrained(folder).eval()
        # What the classifier reads is what we keep.
        wanted = whole.vit(pixel_values=inputs).last_hidden_state
        found = backbone.encode_image(pixels, ["image"])["image"]
        close(whole.classifier(found), whole(pixel_values=inputs).logits)
    else:
        model = transformers.AutoModel.from_pretrained(folder).eval()
        out = model(pixel_values=inputs)
        wanted = out.last_hidden_state
        close(out.pooler_output, wanted[:, 0])
    found = backbone.encode_image(pixels, ["image", "image_tokens", "image_class"])
    spread = wanted[:, 0]
    assert ((spread - spread.mean(0)).norm(dim=1) / spread.norm(dim=1)).min() > 0.05
    close(found["image"], wanted[:, 0])
    assert torch.equal(found["image_class"], found["image"])
    close(found["image_tokens"], wanted[:, prefix:])
    assert found["image_tokens"].shape[1:] == (16, 32)
    for row in range(len(pixels)):
        alone = backbone.encode_image(pixels[[row]], ["image", "image_tokens"])
        for name, array in alone.items():
            close(array[0], found[name][row])


def test_heads_and_poolers_are_no_part_of_the_weights(specs: Callable[[str], str], tmp_path: Path):
    """A classifier and the bare model under it, saved with its pooler, are one backbone."""
    whole = load(specs("vit"))
    model = transformers.ViTForImageClassification.from_pretrained(specs("vit").partition(":")[2])
    bare = transformers.ViTModel(model.config)
    bare.load_state_dict(model.vit.state_dict(), strict=False)
    bare.save_pretrained(tmp_path / "bare")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "bare"
    )
    assert any(key.startswith("pooler") for key in load_file(tmp_path / "bare/model.safetensors"))
    other = load(f"hf:{tmp_path / 'bare'}")
    assert other.identity["weights"] == whole.identity["weights"]


def test_positions_are_for_one_size(specs: Callable[[str], str], tmp_path: Path):
    spec = tiny_vit(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 40, "width": 40}).save_pretrained(
        tmp_path / "vit"
    )
    with pytest.raises(InputError, match="gives 40 x 40 pixels, the model takes 32 x 32"):
        load(spec)
    # DINOv2 interpolates: trained at 48 here, used at 32.
    assert load(specs("dinov2")).fields["image_tokens"].shape[0] == 16


@pytest.mark.parametrize(
    ("kind", "config", "millions", "patches"),
    [
        ("ViT", {}, 85.8, 196),
        ("Dinov2", {"image_size": 518, "patch_size": 14}, 86.6, 256),
        ("Dinov2WithRegisters", {"image_size": 518, "patch_size": 14}, 86.6, 256),
    ],
)
def test_real_sizes(kind: str, config: dict, millions: float, patches: int, monkeypatch: Any):
    """vit-base-patch16-224, dinov2-base and -with-registers-base, without their weights."""
    settings = getattr(transformers, f"{kind}Config")(**config)
    with torch.device("meta"):
        named = {"add_pooling_layer": False} if kind == "ViT" else {}
        model = getattr(transformers, f"{kind}Model")(settings, **named).eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    monkeypatch.setattr(hf_vision, "load_model", lambda *_: model)
    parts = hf_vision.image_encoder(Files("me/model"), settings, Options())
    encoder = Encoder(
        image=ImageTower(transform=ImageTransform(size=(224, 224)), forward=parts.image),
        text=None,
        device="meta",
        dtype=torch.float32,
        identity={},
        context={},
    )
    assert {name: spec.shape for name, spec in encoder.fields.items()} == {
        "image": (768,),
        "image_tokens": (patches, 768),
        "image_class": (768,),
    }


@pytest.mark.parametrize(
    ("case", "grid"),
    [
        ("open_clip", (4, 4)),
        ("oblong", (4, 6)),
        ("clip", (4, 4)),
        ("siglip", (4, 4)),
        ("blip", (4, 4)),
        ("vit", (4, 4)),
        ("dinov2", (4, 4)),
        ("registers", (4, 4)),
    ],
)
def test_tokens_are_in_reading_order(case: str, grid: tuple[int, int], specs: Any):
    """The token of the one patch that differs changes most (all change: they attend)."""
    backbone = load(specs(case))
    rows, columns = grid
    height, width = backbone.image_transform.size
    assert backbone.fields["image_tokens"].shape[0] == rows * columns
    blocks = torch.randint(
        0, 256, (1, 3, rows, columns), generator=torch.Generator().manual_seed(0)
    )
    plain = torch.nn.functional.interpolate(blocks.to(torch.uint8), size=(height, width))
    places = [(0, columns - 1), (1, 2), (rows - 1, 0), (2, columns - 2)]
    changed = plain.repeat(len(places), 1, 1, 1)
    down, across = height // rows, width // columns
    for picture, (row, column) in zip(changed, places, strict=True):
        patch = picture[:, row * down : (row + 1) * down, column * across : (column + 1) * across]
        patch.copy_(255 - patch)
    before = backbone.encode_image(plain, ["image_tokens"])["image_tokens"]
    after = backbone.encode_image(changed, ["image_tokens"])["image_tokens"]
    most = (after - before).norm(dim=2).argmax(1)
    assert most.tolist() == [row * columns + column for row, column in places]


def test_the_grid_of_the_real_clip():
    """ViT-B/32 at 224 pixels: 7 x 7 tokens and the class token apart."""
    import open_clip

    from mmc.extract.backbones.openclip_image import image_forward

    with torch.device("meta"):
        visual = open_clip.create_model("ViT-B-32", pretrained=None, device="meta").visual.eval()
    pictures = torch.empty(2, 3, 224, 224, device="meta")
    for projected, width in ((False, 768), (True, 512)):
        found = image_forward(visual, "float32", projected=projected, where="x")(pictures)
        assert {name: tuple(array.shape[1:]) for name, array in found.items()} == {
            "image": (512,),
            "image_tokens": (49, width),
            "image_class": (width,),
        }


@torch.no_grad()
@pytest.mark.parametrize("case", ["open_clip", "clip"])
def test_projected_tokens(case: str, specs: Callable[[str], str]):
    spec = specs(case)
    states, projected = load(spec), load(f"{spec}[tokens=projected]")
    pixels = torch.stack([decode(data, states.image_transform) for data in jpegs()])
    fields = ["image", "image_tokens", "image_class"]
    plain, found = (one.encode_image(pixels, fields) for one in (states, projected))
    assert torch.equal(found["image"], plain["image"])
    # The class token is what the model pools.
    close(found["image_class"], found["image"])
    folder = spec.partition(":")[2]
    if case == "clip":
        model = transformers.CLIPModel.from_pretrained(folder).eval()
        normed = model.vision_model.post_layernorm(plain["image_tokens"])
        wanted = model.visual_projection(normed)
    else:
        weights = load_file(f"{folder}/open_clip_model.safetensors")
        wanted = plain["image_tokens"] @ weights["visual.proj"]
    assert found["image_tokens"].shape[1:] == (16, 16)
    assert (found["image_tokens"] - found["image_tokens"].mean(1, keepdim=True)).norm() > 1
    close(found["image_tokens"], wanted)
    assert projected.identity["tokens"] == "projected"
    assert "tokens" not in states.identity


def test_both_families_project_alike(tmp_path: Path):
    """One checkpoint in both formats: the same features, so the same projected tokens."""
    hf = tiny_hf_clip(tmp_path / "hf")
    folder = tmp_path / "hf"
    model = transformers.CLIPModel.from_pretrained(folder)
    model.config.vision_config.hidden_act = "gelu"  # open_clip's own
    model.save_pretrained(folder)
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 8,
            "width": 32,
            "layers": 2,
            "head_width": 16,
            "mlp_ratio": 2.0,
        },
        "text_cfg": OPEN_CLIP_CONFIG["text_cfg"],
    }
    own = tiny_open_clip(tmp_path / "own", config)
    _copy_vision(load_file(folder / "model.safetensors"), tmp_path / "own")
    backbones = [load(f"{spec}[tokens=projected]") for spec in (hf, own)]
    pixels = torch.stack([decode(data, backbones[0].image_transform) for data in jpegs()])
    fields = ["image", "image_tokens", "image_class"]
    first, second = (one.encode_image(pixels, fields) for one in backbones)
    for name in fields:
        close(first[name], second[name])


def _copy_vision(state: dict[str, Tensor], folder: Path) -> None:
    """Write transformers' vision weights into an open_clip checkpoint."""
    from safetensors.torch import save_file

    file = folder / "open_clip_model.safetensors"
    own = load_file(file)
    v = "vision_model."
    own["visual.class_embedding"] = state[f"{v}embeddings.class_embedding"]
    own["visual.conv1.weight"] = state[f"{v}embeddings.patch_embedding.weight"]
    own["visual.positional_embedding"] = state[f"{v}embeddings.position_embedding.weight"]
    own["visual.proj"] = state["visual_projection.weight"].T
    names = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    for layer in range(2):
        block, theirs = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        names |= {
            f"{block}ln_1": f"{theirs}layer_norm1",
            f"{block}ln_2": f"{theirs}layer_norm2",
            f"{block}mlp.c_fc": f"{theirs}mlp.fc1",
            f"{block}mlp.c_proj": f"{theirs}mlp.fc2",
            f"{block}attn.out_proj": f"{theirs}self_attn.out_proj",
        }
        for kind in ("weight", "bias"):
            own[f"visual.{block}attn.in_proj_{kind}"] = torch.cat(
                [state[f"{v}{theirs}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            )
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            own[f"visual.{ours}.{kind}"] = state[f"{v}{theirs}.{kind}"]
    save_file({name: array.contiguous() for name, array in own.items()}, file)


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("siglip", "tokens=projected", "tokens is an option of CLIP; siglip does not have it"),
        ("vit", "tokens=projected", "tokens is an option of CLIP; vit does not have it"),
        ("vit", "pooling=mean", "pooling is an option of text encoders; vit does not"),
        ("bert", "enc_token=enc", "enc_token is an option of BLIP; bert does not"),
        ("clip", "tokens=normalised", "choose from states, projected"),
        ("open_clip", "pooling=cls", "pooling"),
    ],
)
def test_options_of_other_families(case: str, options: str, message: str, specs: Any):
    with pytest.raises(InputError, match=message) as found:
        load(f"{specs(case)}[{options}]")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("case", "field", "message"),
    [
        ("vit", "text", "has no field 'text'; choose from image, image_tokens, image_class"),
        ("dinov2", "fused", "has no field 'fused'; choose from image"),
        ("bert", "image", "has no field 'image'; choose from text, text_tokens, text_mask"),
        ("clip", "itm", "has no field 'itm'"),
        ("siglip", "image_class", "has no field 'image_class'"),
    ],
)
def test_fields_that_a_model_lacks(case: str, field: str, message: str, specs: Any, tmp_path: Path):
    _write_source(tmp_path)
    with pytest.raises(InputError, match=message) as found:
        _extract(tmp_path, specs(case), fields=(field,))
    assert "\n" not in str(found.value)
    assert not (tmp_path / "store").exists()


def test_an_image_encoder_fills_a_store(specs: Callable[[str], str], tmp_path: Path):
    _write_source(tmp_path)
    spec = specs("vit")
    _extract(tmp_path, spec, fields=("image", "image_tokens"))
    store = EmbeddingStore.open(tmp_path / "store")
    assert set(store.features) == {"vit/image", "vit/image_tokens"}
    backbone = load(spec)
    pixels = torch.stack([decode(data, backbone.image_transform) for data in jpegs()])
    wanted = backbone.encode_image(pixels, ["image"])["image"]
    np.testing.assert_allclose(store["vit/image"][:], wanted, rtol=2e-3, atol=2e-3)
    assert store.label_text("vit") is None


def _write_source(folder: Path) -> None:
    lines = ["image,text,label"]
    for number, data in enumerate(jpegs()):
        (folder / f"{number}.jpg").write_bytes(data)
        lines.append(f"{number}.jpg,the dog {number},{'ab'[number % 2]}")
    (folder / "samples.csv").write_text("\n".join(lines), encoding="utf-8")


def _extract(folder: Path, spec: str, fields: tuple[str, ...]) -> None:
    config = ExtractConfig(
        backbones=(spec,), names=("vit",), fields=fields, device="cpu", precision="float32"
    )
    extract(str(folder / "samples.csv"), str(folder / "store"), config, report=lambda _: None)
