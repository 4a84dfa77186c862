"""The Visual Genome detector: the published names, and the equations written out slowly."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_vision import TINY_DEPTH, blocks_of_colour, vg_model
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from mmc.extract.backbones import fasterrcnn_vg_boxes as boxes
from mmc.extract.backbones import load_backbone
from mmc.extract.backbones.fasterrcnn_vg import Finder, confidences, prepare
from mmc.extract.backbones.fasterrcnn_vg_model import DEPTHS, VisualGenomeDetector
from mmc.store.errors import InputError

FIELDS = ("regions", "boxes", "region_scores", "region_classes", "region_mask")


@pytest.fixture(scope="module")
def model() -> Any:
    return vg_model()


@pytest.fixture(scope="module")
def files(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detectors")
    state = model.state_dict()
    torch.save({"model": state, "epoch": 3, "class_agnostic": False}, folder / "whole.pth")
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "plain.safetensors")
    torch.save({"model": {**state, "RCNN_att.weight": torch.zeros(2)}}, folder / "more.pth")
    torch.save({k: v for k, v in state.items() if "RPN_Conv" not in k}, folder / "less.pth")
    torch.save(
        {**state, "RCNN_rpn.RPN_cls_score.weight": torch.zeros(18, 512, 1, 1)},
        folder / "anchors.pth",
    )
    torch.save({"layer1.weight": torch.zeros(2)}, folder / "other.pth")
    return folder


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the 634 entries of the published file, written out."""
    found: dict[str, tuple[int, ...]] = {}

    def norm(name: str, width: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.{part}"] = (width,)
        found[f"{name}.num_batches_tracked"] = ()

    def layer(name: str, blocks: int, before: int, width: int) -> None:
        for block in range(blocks):
            at = f"{name}.{block}"
            found[f"{at}.conv1.weight"] = (width, before if block == 0 else 4 * width, 1, 1)
            found[f"{at}.conv2.weight"] = (width, width, 3, 3)
            found[f"{at}.conv3.weight"] = (4 * width, width, 1, 1)
            for number, size in ((1, width), (2, width), (3, 4 * width)):
                norm(f"{at}.bn{number}", size)
        found[f"{name}.0.downsample.0.weight"] = (4 * width, before, 1, 1)
        norm(f"{name}.0.downsample.1", 4 * width)

    found["RCNN_base.0.weight"] = (64, 3, 7, 7)
    norm("RCNN_base.1", 64)
    layer("RCNN_base.4", 3, 64, 64)
    layer("RCNN_base.5", 4, 256, 128)
    layer("RCNN_base.6", 23, 512, 256)
    layer("RCNN_top.0", 3, 1024, 512)
    for name, *shape in (
        ("RCNN_rpn.RPN_Conv", 512, 1024, 3, 3),
        ("RCNN_rpn.RPN_cls_score", 24, 512, 1, 1),
        ("RCNN_rpn.RPN_bbox_pred", 48, 512, 1, 1),
        ("RCNN_cls_score", 1601, 2048),
        ("RCNN_bbox_pred", 6404, 2048),
    ):
        found[f"{name}.weight"] = tuple(shape)
        found[f"{name}.bias"] = (shape[0],)
    return found


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        model = VisualGenomeDetector(DEPTHS[101], 1601)
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert len(ours) == 634
    assert ours == published_shapes()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(63.66e6, rel=1e-3)


def test_the_published_file_loads_by_name(tmp_path: Path):
    """Its real size, with weights that cost nothing to write."""
    state = {}
    for name, shape in published_shapes().items():
        dtype = torch.int64 if name.endswith("tracked") else torch.float32
        one = torch.ones((), dtype=dtype) if "running_var" in name else torch.zeros((), dtype=dtype)
        state[name] = one.expand(shape)  # torch.save keeps one number of each
    torch.save({"session": 1, "epoch": 20, "model": state, "optimizer": {}}, tmp_path / "vg.pth")
    spec = f"fasterrcnn_vg:{tmp_path}/vg.pth"
    backbone = load_backbone(spec, device="cpu", precision="float32")
    shapes = {name: field.shape for name, field in backbone.fields.items()}
    assert shapes == {
        "regions": (36, 2048),
        "boxes": (36, 5),
        "region_scores": (36,),
        "region_classes": (36,),
        "region_mask": (36,),
    }
    assert backbone.default_fields == FIELDS


def test_anchors():
    table = boxes.base_anchors().tolist()
    assert len(table) == 12
    assert table[0] == [-38, -16, 53, 31]
    assert table[4] == [-24, -24, 39, 39]
    assert table[8] == [-14, -36, 29, 51]
    assert table[11] == [-168, -344, 183, 359]
    everywhere = boxes.anchors(2, 3)
    assert everywhere[12 * (1 * 3 + 2)].tolist() == [-38 + 32, -16 + 16, 53 + 32, 31 + 16]


def slow_prepare(picture: np.ndarray) -> tuple[np.ndarray, float]:
    """Blue first, mean off, bilinear by the factor: pixel by pixel."""
    height, width = picture.shape[:2]
    scale = 600 / min(height, width)
    if round(scale * max(height, width)) > 1000:
        scale = 1000 / max(height, width)
    values = picture[:, :, ::-1].astype(np.float64) - (102.9801, 115.9465, 122.7717)

    def places(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.maximum((np.arange(round(scale * side)) + 0.5) / scale - 0.5, 0)
        first = np.minimum(np.floor(at).astype(int), side - 1)
        return first, np.minimum(first + 1, side - 1), at - first

    top, bottom, down = places(height)
    left, right, across = places(width)
    rows = values[top] * (1 - down)[:, None, None] + values[bottom] * down[:, None, None]
    return rows[:, left] * (1 - across)[:, None] + rows[:, right] * across[:, None], scale


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (180, 1000), (61, 83)])
def test_preprocessing(size: tuple[int, int]):
    picture = blocks_of_colour(1, size)[0]
    inputs, factors = prepare(picture)
    wanted, scale = slow_prepare(picture.permute(1, 2, 0).numpy())
    assert inputs.shape == (1, 3, *wanted.shape[:2])
    np.testing.assert_allclose(inputs[0].permute(1, 2, 0), wanted, atol=0.02)
    assert factors.tolist() == pytest.approx([scale] * 4)


def slow_nms(rois: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """Greedy, pixels counted inclusively."""
    left = sorted(range(len(rois)), key=lambda i: (-scores[i], i))
    kept = []
    while left:
        best = left.pop(0)
        kept.append(best)
        left = [i for i in left if overlap(rois[best], rois[i]) <= threshold]
    return kept


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    across = min(a[2], b[2]) - max(a[0], b[0]) + 1
    down = min(a[3], b[3]) - max(a[1], b[1]) + 1
    shared = max(across, 0) * max(down, 0)
    area = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return shared / (area[0] + area[1] - shared)


def random_boxes(count: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=draw) * 60
    return torch.cat([corner, corner + torch.rand(count, 2, generator=draw) * 40], dim=1)


def test_nms_of_inclusive_pixels():
    rois, scores = random_boxes(300), torch.rand(300, generator=torch.Generator().manual_seed(9))
    for threshold in (0.3, 0.7):
        wanted = slow_nms(rois.double().numpy(), scores.numpy(), threshold)
        assert nms(boxes.inclusive(rois), scores, threshold).tolist() == wanted
        alive = boxes.greedy_survivors(boxes.overlaps(rois) > threshold, scores[None])
        assert set(alive[0].nonzero()[:, 0].tolist()) == set(wanted)
    assert nms(rois, scores, 0.3).tolist() != slow_nms(rois.double().numpy(), scores.numpy(), 0.3)


def test_a_tie_goes_to_the_first():
    same = torch.tensor([[0.0, 0, 9, 9]] * 3)
    alive = boxes.greedy_survivors(boxes.overlaps(same) > 0.3, torch.ones(2, 3))
    assert alive.tolist() == [[True, False, False]] * 2


def test_confidence_is_the_best_class_that_survives():
    rois = random_boxes(60)
    draw = torch.Generator().manual_seed(4)
    probabilities = (torch.randn(60, 9, generator=draw) * 3).softmax(1)
    confidence, classes = confidences(rois, probabilities)
    wanted, of = np.zeros(60), np.full(60, -1)
    for number in range(1, 9):
        scores = probabilities[:, number].numpy()
        for roi in slow_nms(rois.double().numpy(), scores, 0.3):
            if scores[roi] > wanted[roi]:
                wanted[roi], of[roi] = scores[roi], number
    np.testing.assert_allclose(confidence, wanted, rtol=1e-6)
    assert classes.tolist() == of.tolist()


def slow_network(model: Any, inputs: Tensor) -> tuple[Tensor, nn.Module]:
    """The feature map by plain calls of convolutions: the stride is in the first of a block."""
    state = model.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        parts = [state[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias")]
        return nn.functional.batch_norm(x, *parts, eps=1e-5)

    def layer(x: Tensor, name: str, stride: int) -> Tensor:
        at = f"{name}.0"
        skip = nn.functional.conv2d(x, state[f"{at}.downsample.0.weight"], stride=stride)
        y = nn.functional.conv2d(x, state[f"{at}.conv1.weight"], stride=stride)
        y = norm(y, f"{at}.bn1").relu()
        y = nn.functional.conv2d(y, state[f"{at}.conv2.weight"], padding=1)
        y = norm(y, f"{at}.bn2").relu()
        y = norm(nn.functional.conv2d(y, state[f"{at}.conv3.weight"]), f"{at}.bn3")
        return (y + norm(skip, f"{at}.downsample.1")).relu()

    x = nn.functional.conv2d(inputs, state["RCNN_base.0.weight"], stride=2, padding=3)
    x = norm(x, "RCNN_base.1").relu()
    x = nn.functional.max_pool2d(x, 3, stride=2, ceil_mode=True)
    for name, stride in (("RCNN_base.4", 1), ("RCNN_base.5", 2), ("RCNN_base.6", 2)):
        x = layer(x, name, stride)
    return x, lambda cells: layer(cells, "RCNN_top.0", 2).mean((2, 3))


@torch.no_grad()
def slow_regions(model: Any, inputs: Tensor, scale: float, count: int) -> dict[str, np.ndarray]:
    """The detector from its equations, one anchor and one class at a time; boxes in pixels."""
    height, width = inputs.shape[2:]
    feature_map, top = slow_network(model, inputs)
    hidden = model.RCNN_rpn.RPN_Conv(feature_map).relu()
    scores = model.RCNN_rpn.RPN_cls_score(hidden)[0].double().numpy()
    deltas = model.RCNN_rpn.RPN_bbox_pred(hidden)[0].double().numpy()
    base = boxes.base_anchors().double().numpy()
    candidates = []
    for row in range(scores.shape[1]):
        for column in range(scores.shape[2]):
            for anchor in range(12):
                margin = scores[anchor, row, column] - scores[anchor + 12, row, column]
                x1, y1, x2, y2 = base[anchor] + 16 * np.array([column, row, column, row])
                dx, dy, dw, dh = deltas[4 * anchor : 4 * anchor + 4, row, column]
                w, h = x2 - x1 + 1, y2 - y1 + 1
                cx, cy = x1 + 0.5 * w + dx * w, y1 + 0.5 * h + dy * h
                w, h = w * math.exp(dw), h * math.exp(dh)
                box = np.array([cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h])
                limits = np.array([width - 1, height - 1] * 2)
                candidates.append((1 / (1 + math.exp(margin)), np.clip(box, 0, limits)))
    candidates.sort(key=lambda item: -item[0])
    candidates = candidates[:6000]
    rois = np.array([box for _, box in candidates])
    rois = rois[slow_nms(rois, np.array([score for score, _ in candidates]), 0.7)[:300]]
    cells = roi_align(feature_map, [torch.from_numpy(rois).float()], 7, 1 / 16, 0)
    features = top(cells)
    probabilities = model.RCNN_cls_score(features).softmax(1).numpy()
    confidence, classes = np.zeros(len(rois)), np.full(len(rois), -1)
    for number in range(1, probabilities.shape[1]):
        for roi in slow_nms(rois / scale, probabilities[:, number], 0.3):
            if probabilities[roi, number] > confidence[roi]:
                confidence[roi], classes[roi] = probabilities[roi, number], number
    best = np.argsort(-confidence, kind="stable")[:count]
    return {
        "features": features[best].numpy(),
        "corners": rois[best] / scale,
        "scores": confidence[best],
        "classes": classes[best],
    }


@torch.no_grad()
def test_regions_are_those_of_the_equations(model: Any):
    """At a size where loops end, with fewer proposals than a real picture has."""
    picture = blocks_of_colour(1, (120, 150))[0]
    found = Finder(model, 36, 96)(picture)
    inputs, factors = prepare(picture, 96)
    wanted = slow_regions(model, inputs, float(factors[0]), 36)
    assert len(found.scores) == len(wanted["scores"]) > 20
    assert found.scores.std() > 0.01
    np.testing.assert_allclose(found.scores, wanted["scores"], atol=1e-5)
    pixels = found.corners * torch.tensor([150, 120, 150, 120])
    np.testing.assert_allclose(pixels, wanted["corners"], atol=1e-3)
    np.testing.assert_allclose(found.features, wanted["features"], atol=1e-4, rtol=1e-4)
    assert found.classes.tolist() == wanted["classes"].tolist()
    assert found.features.min() >= 0
    assert (found.scores.diff() <= 0).all()


@torch.no_grad()
def test_torchvisions_strides_would_give_other_features(model: Any):
    inputs = blocks_of_colour(1, (96, 96)).float() - 115
    wanted = slow_network(model, inputs)[0]
    torch.testing.assert_close(model.RCNN_base(inputs), wanted, atol=1e-4, rtol=1e-4)
    other = VisualGenomeDetector(TINY_DEPTH, 21).eval()
    other.load_state_dict(model.state_dict())
    for number in (5, 6):
        other.RCNN_base[number][0].conv1.stride = (1, 1)
        other.RCNN_base[number][0].conv2.stride = (2, 2)
    assert (other.RCNN_base(inputs) - wanted).norm() > 0.1 * wanted.norm()


@torch.no_grad()
def test_a_constant_map_gives_its_constant_wherever_a_region_lies(model: Any):
    flat = torch.rand(1, 1024, 1, 1).expand(1, 1024, 12, 12)
    finder = Finder(model, 36)
    rois = torch.tensor([[8.0, 8, 120, 120], [30, 40, 100, 90]])
    wanted = model.RCNN_top(flat[:, :, :7, :7]).mean((2, 3))
    found = finder._pool(flat, rois)
    torch.testing.assert_close(found, wanted.expand(2, -1), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_bf16_features_of_the_same_regions(files: Path):
    """Which regions are chosen may change with a rounding; what is pooled from one may not."""
    found = []
    for precision in ("float32", "bf16"):
        spec = f"fasterrcnn_vg:{files}/whole.pth"
        finder = load_backbone(spec, device="cpu", precision=precision)._find
        inputs, _ = prepare(blocks_of_colour(1, (120, 150))[0], 96)
        rois = torch.tensor([[0.0, 0, 60, 60], [20, 30, 110, 90], [50, 8, 100, 70]])
        found.append(finder._pool(finder._model.RCNN_base(inputs), rois).double())
    exact, rounded = found
    assert rounded.dtype == torch.float64
    assert torch.cosine_similarity(exact, rounded).min() > 0.999
    exact, rounded = exact - exact.mean(0), rounded - rounded.mean(0)
    assert torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.99


def test_rows_files_and_strips(files: Path):
    spec = f"fasterrcnn_vg:{files}/whole.pth[regions=40,shortest=64]"
    backbone = load_backbone(spec, device="cpu", precision="float32")
    plain = load_backbone(
        f"fasterrcnn_vg:{files}/plain.safetensors[shortest=64,regions=40]",
        device="cpu",
        precision="float32",
    )
    assert plain.identity == backbone.identity
    sizes = ((64, 80), (1, 900), (900, 1), (1, 1), (2, 3))
    pictures = [blocks_of_colour(1, size, cells=1 if 1 in size else 2)[0] for size in sizes]
    found = backbone.encode_image(pictures, FIELDS)
    counts = found["region_mask"].sum(1)
    assert counts.min() >= 1
    assert counts.min() < 40
    for row, count in enumerate(counts.tolist()):
        assert found["region_mask"][row].tolist() == [True] * count + [False] * (40 - count)
        for name in ("regions", "boxes", "region_scores"):
            assert not found[name][row, count:].any()
        assert found["region_classes"][row, count:].eq(-1).all()
        alone = backbone.encode_image([pictures[row]], FIELDS)
        assert all(torch.equal(alone[name][0], found[name][row]) for name in FIELDS)
    assert found["boxes"].min() >= 0
    assert found["boxes"].max() <= 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("more.pth", "do not fit the model: unexpected RCNN_att.weight"),
        ("less.pth", "missing RCNN_rpn.RPN_Conv.weight, RCNN_rpn.RPN_Conv.bias"),
        ("anchors.pth", r"RPN_cls_score.weight is \[18, 512, 1, 1\], the model has \[24,"),
        ("other.pth", "missing RCNN_cls_score.weight"),
        ("none.pth", "no such checkpoint file"),
        ("whole.pth[regions=301]", "regions=301: choose 1 to 300"),
        ("whole.pth[vocab=x]", "has no setting 'vocab'"),
    ],
)
def test_what_cannot_be_loaded(spec: str, message: str, files: Path):
    with pytest.raises(InputError, match=message) as found:
        load_backbone(f"fasterrcnn_vg:{files}/{spec}", device="cpu", precision="float32")
    assert "\n" not in str(found.value)


def test_a_missing_block_is_named(tmp_path: Path):
    state = {
        name: torch.zeros(shape).expand(shape)
        for name, shape in published_shapes().items()
        if not name.startswith("RCNN_base.6.22.")
    }
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(InputError, match=r"missing RCNN_base\.6\.22\.conv1\.weight"):
        load_backbone(f"fasterrcnn_vg:{tmp_path}/short.pth", device="cpu", precision="float32")
