"""torchvision classifiers: the library's own numbers and preprocessing; names, files, tags."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import draw_weights
from tiny_vision import blocks_of_colour, torchvision_model
from torch import Tensor, nn
from torchvision import models

from mmc.extract.backbones import load_backbone
from mmc.extract.backbones.base import Backbone
from mmc.extract.backbones.torchvision_models import (
    STATES,
    Forward,
    Options,
    image_transform,
    last_layer,
)
from mmc.extract.backbones.torchvision_weights import Source
from mmc.extract.images import decode, decode_reference
from mmc.store.errors import InputError

SMALL = "shufflenet_v2_x0_5"


def load(spec: str, precision: str = "float32") -> Backbone:
    return load_backbone(spec, device="cpu", precision=precision)


def photo(height: int, width: int, seed: int = 0) -> bytes:
    draw = np.random.default_rng(seed)
    cells = Image.fromarray(draw.integers(0, 255, (5, 6, 3)).astype(np.uint8))
    file = io.BytesIO()
    cells.resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def inputs_of(backbone: Backbone, pixels: Tensor) -> Tensor:
    transform = backbone.image_transform
    mean, std = (torch.tensor(v)[:, None, None] for v in (transform.mean, transform.std))
    return (pixels.float() / 255 - mean) / std


@pytest.mark.parametrize(
    "tag",
    [
        models.ResNet152_Weights.IMAGENET1K_V1,
        models.ResNet152_Weights.IMAGENET1K_V2,
        models.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1,
        models.Inception_V3_Weights.IMAGENET1K_V1,
        models.EfficientNet_B3_Weights.IMAGENET1K_V1,
        models.EfficientNet_V2_L_Weights.IMAGENET1K_V1,
        models.VGG16_Weights.IMAGENET1K_FEATURES,
        models.Swin_V2_B_Weights.IMAGENET1K_V1,
    ],
    ids=str,
)
def test_preprocessing_is_that_of_the_weights(tag: Any):
    transform = image_transform(Source("x", "x", Path("x"), tag, "x"), Options())
    mean, std = (torch.tensor(v)[:, None, None] for v in (transform.mean, transform.std))
    for height, width in ((375, 500), (500, 375), (301, 299), (90, 1200), (40, 40)):
        data = photo(height, width)
        inputs = tag.transforms()(Image.open(io.BytesIO(data)))
        wanted = (inputs * std + mean) * 255
        exact = decode_reference(data, transform)
        # Of a strip only what is kept is resized: see images.py.
        assert (exact - wanted).abs().max() < (0.01 if width < 1200 else 2.01)
        assert (decode(data, transform) - wanted).abs().max() < 2.01


def test_every_tag_has_a_preprocessing_that_can_be_followed():
    count = 0
    for name in models.list_models(module=models):
        for tag in models.get_model_weights(name):
            transform = image_transform(Source("x", name, Path("x"), tag, "x"), Options())
            assert transform.size == (tag.transforms().crop_size[0],) * 2
            count += 1
    assert count > 100


SMALLEST = {
    "AlexNet": "alexnet",
    "ConvNeXt": "convnext_tiny",
    "DenseNet": "densenet121",
    "EfficientNet": "efficientnet_b0",
    "GoogLeNet": "googlenet",
    "Inception3": "inception_v3",
    "MNASNet": "mnasnet0_5",
    "MaxVit": "maxvit_t",
    "MobileNetV2": "mobilenet_v2",
    "MobileNetV3": "mobilenet_v3_small",
    "RegNet": "regnet_y_400mf",
    "ResNet": "resnet18",
    "ShuffleNetV2": SMALL,
    "SqueezeNet": "squeezenet1_0",
    "SwinTransformer": "swin_t",
    "VGG": "vgg11",
    "VisionTransformer": "vit_b_32",
}
NETWORKS = {
    SMALL: ("fc", 49, 1024),
    "mobilenet_v3_small": ("classifier.3", 49, 576),
    "densenet121": ("classifier", 49, 1024),
    "googlenet": ("fc", 49, 1024),
    "mnasnet0_5": ("classifier.1", 49, 1280),
}


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_numbers_are_the_networks_own(name: str, tmp_path: Path):
    layer, places, width = NETWORKS[name]
    ported = {"transform_input": True, "init_weights": False} if name == "googlenet" else {}
    model = torchvision_model(name, **ported)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    backbone = load(f"torchvision:{name}/{tmp_path}/w.pth")
    pixels = blocks_of_colour(2, backbone.image_transform.size)
    found = backbone.encode_image(pixels, list(backbone.fields))
    assert found["image_tokens"].shape == (2, places, width)
    wanted = model(inputs_of(backbone, pixels))
    assert (wanted - wanted.mean(0)).norm() > 0.05 * wanted.norm()
    scores = model.get_submodule(layer)(found["image"])
    torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=1e-4)
    check_grid(found)


@torch.no_grad()
def test_tokens_of_transformers():
    from torchvision.models.swin_transformer import SwinTransformer
    from torchvision.models.vision_transformer import VisionTransformer

    inputs = torch.rand(2, 3, 32, 32)
    vit = VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=5).eval()
    draw_weights(vit)
    with_class = torch.cat([vit.class_token.expand(2, -1, -1), vit._process_input(inputs)], dim=1)
    tokens = vit.encoder(with_class)
    vit.heads.head = nn.Identity()
    found = Forward(vit, "float32")(inputs)
    assert torch.equal(found["image"], vit(inputs))
    assert torch.equal(found["image_tokens"], tokens[:, 1:])
    assert torch.equal(found["image_class"], tokens[:, 0])
    assert "regions" not in found
    swin = SwinTransformer([4, 4], 24, [2, 2], [2, 2], [4, 4]).eval()
    draw_weights(swin)
    swin.head = nn.Identity()
    found = Forward(swin, "float32")(inputs)
    grid = swin.norm(swin.features(inputs))  # channels last
    assert torch.equal(found["image_tokens"], grid.flatten(1, 2))
    torch.testing.assert_close(found["image"], grid.mean((1, 2)))
    check_grid(found)


@pytest.mark.parametrize("kind", STATES)
def test_every_class_of_classifiers_has_a_last_layer_and_states(kind: str):
    name = SMALLEST[kind]
    more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("cpu" if kind == "RegNet" else "meta"):
        model = models.get_model(name, weights=None, **more)
    assert type(model).__name__ == kind
    layer = model.get_submodule(last_layer(model))
    assert (getattr(layer, "out_features", None) or layer.out_channels) == 1000
    assert model.get_submodule(STATES[kind]) is not None


def test_all_classifiers_are_of_these_classes():
    starts = {re.split(r"\d|_", name)[0] for name in SMALLEST.values()}
    starts |= {"wide", "resnext"}  # ResNets
    for name in models.list_models(module=models):
        assert name.startswith(tuple(starts)), name


def check_grid(found: dict[str, Tensor]) -> None:
    """Regions are means over the cells that touch each part of a 6 x 6 grid."""
    tokens = found["image_tokens"]
    side = int(tokens.shape[1] ** 0.5)
    cells = tokens.unflatten(1, (side, side))
    assert found["region_mask"].all()
    for region, (x1, y1, x2, y2, area) in enumerate(found["boxes"][0].tolist()):
        column, row = region % 6, region // 6
        assert (x1, y1) == pytest.approx((column / 6, row / 6))
        assert (x2, y2) == pytest.approx(((column + 1) / 6, (row + 1) / 6))
        assert area == pytest.approx(1 / 36)
        rows = [i for i in range(side) if i + 1 > y1 * side + 1e-4 and i < y2 * side - 1e-4]
        columns = [i for i in range(side) if i + 1 > x1 * side + 1e-4 and i < x2 * side - 1e-4]
        mean = cells[:, rows][:, :, columns].mean((1, 2))
        torch.testing.assert_close(found["regions"][:, region], mean, atol=1e-5, rtol=1e-4)


def test_resnet152_gives_2048_numbers_and_36_regions(tmp_path: Path):
    with torch.device("meta"):
        model = models.resnet152()
    state = {
        key: torch.ones(value.shape) if key.endswith("running_var") else torch.zeros(value.shape)
        for key, value in model.state_dict().items()
    }
    save_file(state, tmp_path / "w.safetensors")
    backbone = load(f"torchvision:resnet152/{tmp_path}/w.safetensors")
    shapes = {name: spec.shape for name, spec in backbone.fields.items()}
    assert shapes == {
        "image": (2048,),
        "image_tokens": (49, 2048),
        "regions": (36, 2048),
        "boxes": (36, 5),
        "region_mask": (36,),
    }
    assert backbone.default_fields == ("image",)
    assert backbone.image_transform.resize_to == (232, 232)  # IMAGENET1K_V2, the default


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    model = torchvision_model(SMALL)
    state = model.state_dict()
    torch.save(state, folder / "plain.pth")
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "same.safetensors")
    torch.save(
        {"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, folder / "training.pth"
    )
    no_head = {k: v for k, v in state.items() if not k.startswith("fc.")}
    torch.save(no_head, folder / "trunk.pth")
    torch.save({**no_head, "fc.weight": torch.zeros(7, 1024)}, folder / "seven.pth")
    counters = {k: v for k, v in state.items() if "num_batches_tracked" not in k}
    torch.save(counters, folder / "old.pth")
    torch.save({**state, "layer9.weight": torch.zeros(2)}, folder / "extra.pth")
    torch.save({k: v for k, v in state.items() if "conv5.0" not in k}, folder / "missing.pth")
    torch.save({**state, "conv1.0.weight": torch.zeros(24, 1, 3, 3)}, folder / "gray.pth")
    torch.save({"state_dict": state, "args": Path("x")}, folder / "objects.pth")
    torch.save([1, 2], folder / "list.pth")
    nan = {**state, "conv1.0.weight": torch.full((24, 3, 3, 3), float("nan"))}
    torch.save(nan, folder / "nan.pth")
    (folder / "cut.pth").write_bytes((folder / "plain.pth").read_bytes()[:9000])
    (folder / "cut.safetensors").write_bytes((folder / "same.safetensors").read_bytes()[:9000])
    v1 = models.MobileNet_V2_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    torch.save(models.mobilenet_v2().state_dict(), folder / v1)
    return folder


@pytest.mark.parametrize(
    "name", ["same.safetensors", "training.pth", "trunk.pth", "seven.pth", "old.pth"]
)
def test_one_identity_whatever_the_file_and_its_classes(name: str, files: Path):
    plain = load(f"torchvision:{SMALL}/{files}/plain.pth")
    other = load(f"torchvision:{SMALL}/{files}/{name}")
    assert other.identity == plain.identity
    pixels = blocks_of_colour(1, (224, 224))
    assert torch.equal(
        other.encode_image(pixels, ["image"])["image"],
        plain.encode_image(pixels, ["image"])["image"],
    )


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("extra.pth", "do not fit the model: unexpected layer9.weight"),
        ("missing.pth", "do not fit the model: missing conv5.0.weight"),
        ("gray.pth", r"conv1.0.weight is \[24, 1, 3, 3\], the model has \[24, 3, 3, 3\]"),
        ("objects.pth", "holds more than tensors, and is not unpickled"),
        ("list.pth", "holds no state_dict"),
        ("cut.pth", "cannot be read|damaged"),
        ("cut.safetensors", "cannot be read"),
        ("nan.pth", "conv1.0.weight in .* is not all numbers"),
        ("none.pth", "no such checkpoint file"),
    ],
)
def test_weights_that_do_not_fit(file: str, message: str, files: Path):
    with pytest.raises(InputError, match=message) as found:
        load(f"torchvision:{SMALL}/{files}/{file}")
    assert "\n" not in str(found.value)


def test_preprocessing_of_a_file(files: Path):
    spec = f"torchvision:{SMALL}/{files}/plain.pth"
    plain = load(spec)
    assert plain.image_transform.resize == "shortest"
    squashed = load(f"{spec}[resize=squash]")
    assert squashed.image_transform.resized(90, 1200) == (224, 224)
    assert squashed.identity != plain.identity
    v1 = models.MobileNet_V2_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    assert load(f"torchvision:mobilenet_v2/{files}/{v1}").image_transform.resize_to == (256, 256)
    told = load(f"torchvision:mobilenet_v2/{files}/{v1}[preprocessing=IMAGENET1K_V2]")
    assert told.image_transform.resize_to == (232, 232)


def test_folded_batch_norms_are_part_of_the_identity(files: Path):
    spec = f"torchvision:{SMALL}/{files}/plain.pth"
    assert load(spec).identity["batch_norms"] == "apart"
    assert load(spec, "bf16").identity["batch_norms"] == "folded"


def test_a_tag_is_found_in_torchs_cache(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = models.get_model_weights(SMALL).DEFAULT.url
    cached = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    cached.write_bytes((files / "plain.pth").read_bytes())
    backbone = load(f"torchvision:{SMALL}")
    assert backbone.identity == load(f"torchvision:{SMALL}/{files}/plain.pth").identity
    assert backbone.context["resolved_spec"] == f"torchvision:{SMALL}/IMAGENET1K_V1"
    assert load(f"torchvision:{SMALL}/IMAGENET1K_V1").identity == backbone.identity


def test_weights_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"resnet152-.*HF_HUB_OFFLINE is set") as found:
        load("torchvision:resnet152")
    assert "\n" not in str(found.value)
    assert str(tmp_path) in str(found.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet51", "no classification model 'resnet51'; did you mean resnet50"),
        ("fasterrcnn_resnet50_fpn", "no classification model"),
        ("resnet50/IMAGENET_V2", "has no weights 'IMAGENET_V2'; did you mean IMAGENET1K_V2"),
        ("resnet50/IMAGENET1K_V2[preprocessing=IMAGENET1K_V1]", "an option of weights files"),
        ("resnet50[resize=stretch]", "choose from crop, squash"),
        ("resnet50[size=3]", "has no setting 'size'"),
    ],
)
def test_what_cannot_be_asked(spec: str, message: str):
    with pytest.raises(InputError, match=message) as found:
        load(f"torchvision:{spec}")
    assert "\n" not in str(found.value)


def test_unknown_preprocessing(files: Path):
    with pytest.raises(InputError, match=re.escape("no weights 'V7'; choose from: IMAGENET1K_V1")):
        load(f"torchvision:{SMALL}/{files}/plain.pth[preprocessing=V7]")


class Branches(nn.Module):
    """A convolution that two layers read: its batch norm cannot go into it."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.shared = shared
        self.norm.running_mean.copy_(torch.arange(4.0))
        self.norm.running_var.copy_(torch.arange(4.0) + 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y if self.shared else self.norm(y)


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
def test_folding_changes_no_result(shared: bool):
    from mmc.extract.backbones.folding import folded

    model = Branches(shared).eval()
    example = torch.rand(1, 3, 8, 8)
    once = folded(model, example)
    torch.testing.assert_close(once(example), model(example))
    assert (once is model) == shared
    assert isinstance(model.norm, nn.BatchNorm2d)
