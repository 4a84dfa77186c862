"""timm models: the library's own numbers and preprocessing; names, folders, files."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import draw_weights
from tiny_vision import blocks_of_colour, timm_model, tiny_timm

from mmc.extract.backbones import load_backbone
from mmc.extract.backbones.base import Backbone
from mmc.extract.backbones.timm_models import image_transform
from mmc.extract.images import decode, decode_reference
from mmc.store.errors import InputError


def load(spec: str, precision: str = "float32") -> Backbone:
    return load_backbone(spec, device="cpu", precision=precision)


def photo(height: int, width: int) -> bytes:
    cells = np.random.default_rng(0).integers(0, 255, (5, 6, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


CASES = {
    "test_resnet": {"image_tokens": (25, 96), "regions": (36, 96)},
    "test_convnext": {"image_tokens": (25, 64), "regions": (36, 64)},
    "test_mambaout": {"image_tokens": (25, 64), "regions": (36, 64)},  # channels last
    "test_vit": {"image_tokens": (100, 64), "image_class": (64,)},
    "test_vit2": {"image_tokens": (100, 64)},  # one register token, no class token
    "deit_tiny_distilled_patch16_224": {"image_tokens": (196, 192), "image_class": (192,)},
    "xcit_nano_12_p16_224": {"image_tokens": (196, 128), "image_class": (128,)},
    "mixer_s32_224": {"image_tokens": (49, 512)},
}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_numbers_are_the_networks_own(name: str, tmp_path: Path):
    model = timm_model(name)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    backbone = load(f"timm:{name}/{tmp_path}/w.pth")
    shapes = {key: spec.shape for key, spec in backbone.fields.items()}
    assert CASES[name].items() <= shapes.items()
    for field in ("regions", "image_class"):
        assert (field in shapes) == (field in CASES[name])
    data = [photo(150, 200), photo(230, 170), photo(160, 160)]
    cfg = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**cfg)
    inputs = torch.stack([transform(Image.open(io.BytesIO(file))) for file in data])
    pixels = torch.stack([decode_reference(file, backbone.image_transform) for file in data])
    found = backbone.encode_image(pixels, list(backbone.fields))
    states = model.forward_features(inputs)
    wanted = model.forward_head(states, pre_logits=True)
    assert (wanted - wanted.mean(0)).norm() > 0.01 * wanted.norm()
    torch.testing.assert_close(found["image"], wanted, atol=1e-5, rtol=1e-4)
    tokens = found["image_tokens"]
    if name == "test_mambaout":
        assert torch.allclose(tokens, states.flatten(1, 2), atol=1e-4)
    elif states.ndim == 4:
        assert torch.allclose(tokens, states.flatten(2).transpose(1, 2), atol=1e-4)
    else:
        assert torch.allclose(tokens, states[:, states.shape[1] - tokens.shape[1] :], atol=1e-4)
    if "image_class" in found:
        assert torch.allclose(found["image_class"], states[:, 0], atol=1e-4)


@pytest.mark.parametrize(
    "cfg",
    [
        {"crop_pct": 0.95, "crop_mode": "center", "interpolation": "bilinear"},
        {"crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic"},
        {"crop_pct": 0.9, "crop_mode": "squash", "interpolation": "bicubic"},
        {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"},
        {"crop_pct": 0.9, "crop_mode": "center", "size": (120, 80), "interpolation": "bicubic"},
    ],
    ids=str,
)
def test_preprocessing_is_the_librarys(cfg: dict[str, Any]):
    cfg = {"size": (96, 96), **cfg}
    cfg |= {"input_size": (3, *cfg.pop("size")), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    transform = image_transform("x", cfg, "crop")
    mean, std = (torch.tensor(cfg[name])[:, None, None] for name in ("mean", "std"))
    assert (transform.mean, transform.std) == (cfg["mean"], cfg["std"])
    for height, width in ((375, 500), (500, 375), (101, 99), (40, 50)):
        data = photo(height, width)
        inputs = timm.data.create_transform(**cfg)(Image.open(io.BytesIO(data)))
        wanted = (inputs * std + mean) * 255
        assert (decode_reference(data, transform) - wanted).abs().max() < 0.01
        assert (decode(data, transform) - wanted).abs().max() < 2.01


def test_preprocessing_that_cannot_be_followed():
    cfg = {"input_size": (3, 96, 96), "crop_pct": 1.0, "mean": (0, 0, 0), "std": (1, 1, 1)}
    border = {**cfg, "crop_mode": "border", "interpolation": "bicubic"}
    with pytest.raises(InputError, match=r"crop mode border.*\[resize=squash\]"):
        image_transform("x", border, "crop")
    assert image_transform("x", border, "squash").resize == "squash"
    with pytest.raises(InputError, match=r"nearest resampling .* not supported"):
        image_transform("x", {**cfg, "crop_mode": "center", "interpolation": "nearest"}, "crop")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny_timm(folder / "model")
    state = load_file(folder / "model" / "model.safetensors")
    torch.save(state, folder / "plain.pth")
    save_file(state, folder / "same.safetensors")
    trunk = {key: value for key, value in state.items() if not key.startswith("fc.")}
    torch.save(trunk, folder / "trunk.pth")
    torch.save({**state, "more.weight": torch.zeros(2)}, folder / "extra.pth")
    torch.save({k: v for k, v in state.items() if "layer4" not in k}, folder / "missing.pth")
    torch.save({**state, "bn1.weight": torch.zeros(3)}, folder / "shape.pth")
    torch.save({"state_dict": state, "args": Path("x")}, folder / "objects.pth")
    return folder


def test_one_identity_whatever_the_file(files: Path):
    folder = load(f"timm:{files}/model")
    for name in ("plain.pth", "same.safetensors", "trunk.pth"):
        other = load(f"timm:test_resnet/{files}/{name}")
        assert other.identity == folder.identity
    assert load(f"timm:local-dir:{files}/model").identity == folder.identity
    assert load(f"timm:{files}/model", "bf16").identity["batch_norms"] == "folded"
    assert load(f"timm:{files}/model[resize=squash]").identity != folder.identity


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("test_resnet/{}/extra.pth", "do not fit the model: unexpected more.weight"),
        ("test_resnet/{}/missing.pth", "do not fit the model: missing layer4"),
        ("test_resnet/{}/shape.pth", r"bn1.weight is \[3\], the model has"),
        ("test_resnet/{}/objects.pth", "holds more than tensors, and is not unpickled"),
        ("test_resnet/{}/none.pth", "no such checkpoint file"),
        ("test_resnte", "no model 'test_resnte' and no such folder; did you mean test_resnet"),
        ("resnet50.a1_in2k", "resnet50 has no weights 'a1_in2k'; did you mean a1_in1k"),
        ("local-dir:/no/such", r"no such folder, or it holds no config\.json"),
        ("{}/model[crop=1]", "has no setting 'crop'"),
    ],
)
def test_what_cannot_be_loaded(spec: str, message: str, files: Path):
    with pytest.raises(InputError, match=message) as found:
        load(f"timm:{spec.format(files)}")
    assert "\n" not in str(found.value)


def test_folders_that_hold_no_model(files: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load(f"timm:{tmp_path}")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="is not JSON"):
        load(f"timm:{tmp_path}")
    (tmp_path / "config.json").write_text('{"architecture": "nothing"}', encoding="utf-8")
    with pytest.raises(InputError, match="names no architecture"):
        load(f"timm:{tmp_path}")
    config = json.loads((files / "model" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match="holds no weights"):
        load(f"timm:{tmp_path}")


@pytest.mark.parametrize("name", ["resnet50.a1_in1k", "hf-hub:no/where"])
def test_weights_that_are_not_here(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set") as found:
        load(f"timm:{name}")
    assert "\n" not in str(found.value)


def test_hub_weights_on_disk_work_with_the_hub_switched_off(tmp_path: Path):
    """In its own process: the cache's place is read when the library is imported."""
    base = tmp_path / "models--me--net"
    tiny_timm(base / "snapshots" / "abc", "test_vit")
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text("abc", encoding="utf-8")
    code = (
        "from mmc.extract.backbones import load_backbone\n"
        "b = load_backbone('timm:hf-hub:me/net', device='cpu', precision='float32')\n"
        "print(sorted(b.fields), b.context['resolved_spec'])"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    fields = "['image', 'image_class', 'image_tokens']"
    assert done.stdout.strip() == f"{fields} timm:hf-hub:me/net"


@torch.no_grad()
def test_networks_of_several_branches_give_pooled_numbers_alone():
    from mmc.extract.backbones.timm_models import _forward

    model = timm.create_model("crossvit_tiny_240").eval()
    draw_weights(model)
    found = _forward(model, "float32")(blocks_of_colour(1, (240, 240)).float() / 255)
    assert set(found) == {"image"}
