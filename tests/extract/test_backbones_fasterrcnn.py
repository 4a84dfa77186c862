"""torchvision's detector: its own detections, features of exactly those boxes, and what follows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vision import blocks_of_colour, fasterrcnn_model
from torch import Tensor
from torchvision.models import detection
from torchvision.ops import box_iou

from mmc.extract.backbones import load_backbone
from mmc.extract.backbones.base import Backbone
from mmc.extract.backbones.fasterrcnn import build
from mmc.store.errors import InputError

SIDE = 96
FIELDS = ("regions", "boxes", "region_scores", "region_classes", "region_mask")


@pytest.fixture(scope="module")
def models() -> dict[int, Any]:
    found = {version: fasterrcnn_model(version) for version in (1, 2)}
    for model in found.values():
        model.transform.min_size, model.transform.max_size = (SIDE,), round(SIDE * 1333 / 800)
        few_proposals(model)
    return found


def few_proposals(model: Any) -> None:
    """The box head is what takes the time."""
    model.rpn._post_nms_top_n = {"training": 120, "testing": 120}


@pytest.fixture(scope="module")
def files(models: dict[int, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detectors")
    for version, model in models.items():
        torch.save(model.state_dict(), folder / f"v{version}.pth")
    return folder


@pytest.fixture(scope="module")
def backbones(files: Path) -> dict[int, Backbone]:
    spec = "fasterrcnn:{}/v{}.pth[shortest={}]"
    found = {
        version: load_backbone(spec.format(files, version, SIDE), device="cpu", precision="float32")
        for version in (1, 2)
    }
    for backbone in found.values():
        few_proposals(backbone._find._model)
    return found


def pictures() -> list[Tensor]:
    sizes = ((70, 110), (120, 60))
    return [blocks_of_colour(1, size, seed=at)[0] for at, size in enumerate(sizes)]


@torch.no_grad()
@pytest.mark.parametrize("version", [1, 2])
def test_detections_are_the_models_own(
    version: int, models: dict[int, Any], backbones: dict[int, Backbone]
):
    model, backbone = models[version], backbones[version]
    found = backbone.encode_image(pictures(), FIELDS)
    assert found["regions"].shape == (2, 36, 1024)
    for at, picture in enumerate(pictures()):
        wanted = model([picture.float() / 255])[0]
        count = min(36, len(wanted["scores"]))
        assert count > 3
        torch.testing.assert_close(found["region_scores"][at, :count], wanted["scores"][:count])
        assert torch.equal(found["region_classes"][at, :count].long(), wanted["labels"][:count])
        height, width = picture.shape[1:]
        sides = torch.tensor([width, height, width, height])
        boxes = found["boxes"][at]
        torch.testing.assert_close(
            boxes[:count, :4] * sides, wanted["boxes"][:count], atol=1e-3, rtol=1e-5
        )
        extent = boxes[:, 2:4] - boxes[:, :2]
        torch.testing.assert_close(boxes[:, 4], extent.prod(1))
        assert found["region_mask"][at].all()
        check_features(model, picture, boxes, found["regions"][at])


def check_features(model: Any, picture: Tensor, boxes: Tensor, regions: Tensor) -> None:
    """They are the box head's of the very boxes, pooled in the resized picture."""
    images, _ = model.transform([picture.float() / 255])
    height, width = images.image_sizes[0]
    resized = boxes[:, :4] * torch.tensor([width, height, width, height])
    maps = model.backbone(images.tensors)
    pooled = model.roi_heads.box_roi_pool(maps, [resized], images.image_sizes)
    wanted = model.roi_heads.box_head(pooled)
    torch.testing.assert_close(regions, wanted, atol=1e-3, rtol=1e-3)
    assert regions.min() == 0
    assert (regions - regions.mean(0)).norm() > 0.1 * regions.norm()


@torch.no_grad()
def test_proposals_fill_up_what_detections_leave(
    models: dict[int, Any], files: Path, monkeypatch: pytest.MonkeyPatch
):
    from mmc.extract.backbones.fasterrcnn import Finder

    model, picture = models[1], pictures()[0]
    monkeypatch.setattr(model.roi_heads, "detections_per_img", 4)
    found = Finder(model, 20)(picture)
    assert found.features.shape == (20, 1024)
    detected = model([picture.float() / 255])[0]
    torch.testing.assert_close(found.scores[:4], detected["scores"])
    assert (found.scores[4:].diff() <= 0).all()
    for row in range(4, 20):
        same = found.classes[:row] == found.classes[row]
        earlier = box_iou(found.corners[row : row + 1], found.corners[:row][same])
        assert (earlier <= 0.5 + 1e-4).all()
    check_features(model, picture, found.corners, found.features)


def test_pictures_do_not_see_each_other(backbones: dict[int, Backbone]):
    together = backbones[1].encode_image(pictures(), FIELDS)
    for at, picture in enumerate(pictures()):
        alone = backbones[1].encode_image([picture], FIELDS)
        assert all(torch.equal(alone[name][0], together[name][at]) for name in FIELDS)


@pytest.mark.parametrize("size", [(1, 700), (700, 1), (1, 1), (3, 5)])
def test_strips_and_specks(size: tuple[int, int], backbones: dict[int, Backbone]):
    picture = blocks_of_colour(1, size, cells=1)[0]
    found = backbones[1].encode_image([picture], FIELDS)
    assert found["region_mask"].any()
    assert found["boxes"].min() >= 0
    assert found["boxes"].max() <= 1
    assert found["regions"].isfinite().all()


def test_absent_regions_are_zero(models: dict[int, Any], backbones: dict[int, Backbone]):
    backbone = backbones[2]
    finder = backbone._find
    few = [getattr(finder(pictures()[0]), name)[:5] for name in ("features", "corners")]
    backbone._find = lambda _: type(finder(pictures()[0]))(
        *few, torch.ones(5), torch.ones(5, dtype=torch.int64)
    )
    try:
        found = backbone.encode_image([pictures()[0]], FIELDS)
    finally:
        backbone._find = finder
    assert found["region_mask"][0].tolist() == [True] * 5 + [False] * 31
    for name in ("regions", "boxes", "region_scores"):
        assert found[name][0, :5].any()
        assert not found[name][0, 5:].any()
    assert found["region_classes"][0, 5:].eq(-1).all()


def test_published_weights_run_without_an_epsilon(models: dict[int, Any]):
    state = {k: v for k, v in models[1].state_dict().items() if "num_batches" not in k}
    ours = build(state, "x", published=True)
    norms = [m for m in ours.modules() if type(m).__name__ == "FrozenBatchNorm2d"]
    assert len(norms) == 53
    assert {norm.eps for norm in norms} == {0.0}
    with torch.device("meta"):
        theirs = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    published = {k for k in theirs.state_dict() if "num_batches" not in k}
    assert set(state) == published


@torch.no_grad()
@pytest.mark.parametrize("version", [1, 2])
def test_bf16_features_of_the_same_regions(
    version: int, files: Path, backbones: dict[int, Backbone]
):
    """Which regions are chosen may change with a rounding; what is pooled from one may not."""
    spec = f"fasterrcnn:{files}/v{version}.pth[shortest={SIDE}]"
    rounded = load_backbone(spec, device="cpu", precision="bf16")._find
    boxes = torch.tensor([[0.0, 0, 60, 60], [20, 30, 110, 90], [50, 8, 100, 70]])
    found = []
    for finder in (backbones[version]._find, rounded):
        images, _ = finder._model.transform([pictures()[0].float() / 255])
        maps = finder._model.backbone(images.tensors)
        found.append(finder._states(maps, boxes, images.image_sizes).double())
    assert torch.cosine_similarity(*found).min() > 0.999


def test_identity_and_options(files: Path, backbones: dict[int, Backbone]):
    spec = f"fasterrcnn:{files}/v1.pth"
    identities = [backbones[1].identity, backbones[2].identity]
    for options in ("regions=10,shortest=96", "shortest=64"):
        backbone = load_backbone(f"{spec}[{options}]", device="cpu", precision="float32")
        identities.append(backbone.identity)
    assert len({str(identity) for identity in identities}) == 4
    assert backbone.default_fields == FIELDS
    assert backbone.image_transform.shape is None
    assert {name: field.dtype for name, field in backbone.fields.items()} == {
        "regions": "float16",
        "boxes": "float32",
        "region_scores": "float16",
        "region_classes": "int16",
        "region_mask": "bool",
    }
    assert {field.tower for field in backbone.fields.values()} == {"image"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("coko", "no such file, and not one of coco, coco_v2"),
        ("{}/none.pth", "no such file"),
        ("{}/v1.pth[regions=0]", "regions=0: choose 1 to 1000"),
        ("{}/v1.pth[shortest=8]", "shortest=8: choose 32 to 4000"),
        ("{}/v1.pth[region=5]", "has no setting 'region'; did you mean regions"),
        ("{}/other.pth", "missing roi_heads.box_predictor.cls_score.weight"),
        ("{}/part.pth", "do not fit the model: missing backbone.fpn"),
    ],
)
def test_what_cannot_be_loaded(spec: str, message: str, files: Path):
    torch.save({"weight": torch.zeros(2)}, files / "other.pth")
    state = torch.load(files / "v1.pth", weights_only=True)
    torch.save({k: v for k, v in state.items() if ".fpn." not in k}, files / "part.pth")
    with pytest.raises(InputError, match=message) as found:
        load_backbone(f"fasterrcnn:{spec.format(files)}", device="cpu", precision="float32")
    assert "\n" not in str(found.value)


def test_weights_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        load_backbone("fasterrcnn:coco", device="cpu", precision="float32")
