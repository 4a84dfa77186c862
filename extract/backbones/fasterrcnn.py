"""torchvision's Faster R-CNN on COCO: ``fasterrcnn:coco``, ``fasterrcnn:coco_v2``, or a file.

Fields: ``regions``, 36 of them by score, each the 1024 numbers of the box head's last layer, not
negative: this network has no layer of 2048 numbers, as the Visual Genome detector has. ``boxes``,
``region_scores``, ``region_classes`` (COCO's numbers, 1 to 90) and ``region_mask``.

The first regions are the detections, with the very boxes, scores and classes that the model
returns; each is pooled again where it was found, in the coordinates of the resized picture. Where
there are fewer than asked for, proposals follow: with their own boxes, by their best class's score,
those left out that cover a region of the same class.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d, batched_nms

from mmc.extract.backbones.base import device_name, versions, weights_sha256
from mmc.extract.backbones.checkpoints import fit, read_state, without_counters
from mmc.extract.backbones.detector import (
    Detector,
    Found,
    InBfloat16,
    check_regions,
    check_shortest,
)
from mmc.extract.backbones.folding import folded
from mmc.extract.backbones.torchvision_weights import fetch
from mmc.extract.transforms import OriginalSize
from mmc.store import config
from mmc.store.errors import InputError

PUBLISHED: dict[str, Any] = {
    "coco": detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    "coco_v2": detection.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
}
WIDTH = 1024
LONGEST = 1333
"""Pixels of the longest side at most, where the shortest has 800."""
_SCORES = "roi_heads.box_predictor.cls_score.weight"
_ONLY_V2 = "roi_heads.box_head.0.0.weight"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What goes in the brackets of a fasterrcnn spec."""

    regions: int = 36
    """Regions of each picture, at most 1000."""
    shortest: int = 800
    """Pixels of the shortest side after resizing (the longest: at most 5/3 of it); fewer are
    faster."""

    def __post_init__(self) -> None:
        check_regions(self.regions, 1000)
        check_shortest(self.shortest)


def load(
    name: str, options: dict[str, str], *, device: str, precision: str, max_text_tokens: int | None
) -> Detector:
    """The detector that ``name`` (what follows ``fasterrcnn:``) stands for.

    Raises:
        InputError: see :func:`mmc.extract.backbones.load_backbone`.
    """
    settings = config.build(Options, options, where=f"backbone fasterrcnn:{name}")
    file, resolved = _file(name)
    state = read_state(file, f"fasterrcnn:{name}")
    model = build(state, f"fasterrcnn:{name}", published=_is_published(file))
    digest = weights_sha256(without_counters(model.state_dict()))
    epsilon = _epsilon(model)
    if precision == "bf16":
        lower(model)
    model.to(device)
    model.transform.min_size = (settings.shortest,)
    model.transform.max_size = round(settings.shortest * LONGEST / 800)
    heads = model.roi_heads
    identity = {
        "architecture": f"torchvision fasterrcnn_resnet50_fpn{'_v2' if _ONLY_V2 in state else ''}",
        "weights": digest,
        "batch_norm_eps": epsilon,
        "preprocessing": {
            **OriginalSize().as_dict(),
            "shortest": model.transform.min_size[-1],
            "longest": model.transform.max_size,
            "mean": model.transform.image_mean,
            "std": model.transform.image_std,
        },
        "regions": {
            "count": settings.regions,
            "box": "detections, then proposals",
            "score": heads.score_thresh,
            "nms": heads.nms_thresh,
            "detections": heads.detections_per_img,
        },
        "precision": precision,
        "batch_norms": "folded" if precision == "bf16" else "apart",
    }
    context = {
        "name": resolved,
        "versions": versions("torchvision", "pillow"),
        "device": device_name(device),
    }
    finder = Finder(model, settings.regions)
    # Anchors and the scales of the levels are set in the first forward: here, in one thread.
    finder(torch.zeros(3, 64, 64, dtype=torch.uint8, device=device))
    return Detector(
        find=finder,
        regions=settings.regions,
        width=WIDTH,
        device=device,
        identity=identity,
        context=context,
    )


def _file(name: str) -> tuple[Path, str]:
    """The weights file, and ``name`` with its path made absolute."""
    if name in PUBLISHED:
        return fetch(PUBLISHED[name].url, name, "fasterrcnn"), name
    path = Path(name).expanduser()
    if not path.is_file():
        known = ", ".join(PUBLISHED)
        raise InputError(f"fasterrcnn:{name}: no such file, and not one of {known}")
    return path, str(path.absolute())


def _is_published(file: Path) -> bool:
    return any(tag.url.rpartition("/")[2] == file.name for tag in PUBLISHED.values())


def build(state: dict[str, Tensor], where: str, *, published: bool) -> Any:
    """torchvision's model with ``state``, in evaluation mode, float32 on the CPU.

    Args:
        state: of ``fasterrcnn_resnet50_fpn`` or its ``_v2``, with any number of classes.
        where: the backbone as typed, for messages.
        published: whether these are torchvision's own weights, which it runs with its ported batch
            norms at eps 0.

    Raises:
        InputError: not the state of such a model.
    """
    if _SCORES not in state:
        raise InputError(f"{where}: the weights do not fit the model: missing {_SCORES}")
    classes = len(state[_SCORES])
    if _ONLY_V2 in state:
        model = detection.fasterrcnn_resnet50_fpn_v2(
            weights=None, weights_backbone=None, num_classes=classes
        )
    else:
        # torchvision builds it with either kind; only the trainable one counts batches.
        trainable = any(key.endswith("num_batches_tracked") for key in state)
        norm = nn.BatchNorm2d if trainable else FrozenBatchNorm2d
        body = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=norm)
        model = detection.FasterRCNN(body, num_classes=classes)
    fit(model, state, where)
    if published and _ONLY_V2 not in state:
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.eps = 0.0
    return model.eval().requires_grad_(False)


def _epsilon(model: nn.Module) -> float:
    """What is added to the variance in the backbone's batch norms."""
    norms = (nn.BatchNorm2d, FrozenBatchNorm2d)
    found = {m.eps for m in model.modules() if isinstance(m, norms)}
    return max(found, default=0.0)


def lower(model: Any) -> None:
    """Run what is costly in bfloat16, in place; boxes are decoded and chosen in float32."""
    model.backbone = InBfloat16(folded(model.backbone, torch.rand(1, 3, 64, 64)))
    model.rpn.head = InBfloat16(model.rpn.head)
    model.roi_heads.box_head = InBfloat16(model.roi_heads.box_head)


class Finder:
    """Finds the regions of one picture."""

    def __init__(self, model: Any, regions: int) -> None:
        self._model, self._regions = model, regions

    def __call__(self, picture: Tensor) -> Found:
        """The regions of a picture, uint8 (3, H, W)."""
        model, heads = self._model, self._model.roi_heads
        images, _ = model.transform([_thick_enough(picture, model.transform).float() / 255])
        features = model.backbone(images.tensors)
        proposals, _ = model.rpn(images, features)
        height, width = images.image_sizes[0]
        if len(proposals[0]) == 0:
            proposals = [picture.new_tensor([[0, 0, width, height]], dtype=torch.float32)]
        states = self._states(features, proposals[0], images.image_sizes)
        logits, deltas = heads.box_predictor(states)
        boxes, scores, classes = (
            found[0][: self._regions]
            for found in heads.postprocess_detections(logits, deltas, proposals, images.image_sizes)
        )
        detected = Found(self._states(features, boxes, images.image_sizes), boxes, scores, classes)
        best, best_class = logits.softmax(-1)[:, 1:].max(-1)
        spare = self._fill(detected, Found(states, proposals[0], best, best_class + 1))
        size = boxes.new_tensor([width, height, width, height])
        return Found(
            torch.cat([detected.features, spare.features]),
            torch.cat([detected.corners, spare.corners]) / size,
            torch.cat([detected.scores, spare.scores]),
            torch.cat([detected.classes, spare.classes]),
        )

    def _states(self, features: Any, boxes: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """(n, 1024) of ``boxes`` (n, 4) in the resized picture."""
        if len(boxes) == 0:
            return boxes.new_zeros(0, WIDTH)
        heads = self._model.roi_heads
        states: Tensor = heads.box_head(heads.box_roi_pool(features, [boxes], sizes))
        return states

    def _fill(self, taken: Found, proposals: Found) -> Found:
        """The best proposals beside what is ``taken``, as many as are still wanted."""
        count = len(taken.scores)
        order = batched_nms(
            torch.cat([taken.corners, proposals.corners]),
            torch.cat([taken.scores + 1, proposals.scores]),  # what is taken goes first
            torch.cat([taken.classes, proposals.classes]),
            self._model.roi_heads.nms_thresh,
        )
        rows = order[order >= count][: self._regions - count] - count
        return Found(
            proposals.features[rows],
            proposals.corners[rows],
            proposals.scores[rows],
            proposals.classes[rows],
        )


def _thick_enough(picture: Tensor, transform: Any) -> Tensor:
    """``picture``, its rows or columns repeated where resizing would leave none of them.

    The short side of a strip of 5000 x 1 pixels would be resized to 0.3.
    """
    height, width = picture.shape[1:]
    scale = min(
        transform.min_size[-1] / min(height, width), transform.max_size / max(height, width)
    )
    times = int(-(-2 // (scale * min(height, width))))
    axis = 1 if height < width else 2
    return picture.repeat_interleave(times, dim=axis) if times > 1 else picture
