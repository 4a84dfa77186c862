"""The Visual Genome detector: ``fasterrcnn_vg:WEIGHTS`` (``faster_rcnn_res101_vg.pth``).

Faster R-CNN with a ResNet-101 (Ren et al. 2015, arXiv:1506.01497), trained on 1600 object classes.
Fields: ``regions``, 36 of them, each the mean of 2048 channels over a region, not negative;
``boxes``, ``region_scores``, ``region_classes`` (1 to 1600: the line of that number in the
vocabulary of the data set) and ``region_mask``.

Regions are chosen as bottom-up attention does it (Anderson et al. 2018, arXiv:1707.07998): a
proposal's confidence is the highest score of a class in which no better proposal covers it; the 36
of the highest confidence are kept. A box is the proposal that the numbers were pooled from, not
what a class would make of it; the class is the one that gave the confidence.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import roi_align

from mmc.extract.backbones.base import device_name, versions, weights_sha256
from mmc.extract.backbones.checkpoints import read_state, without_counters
from mmc.extract.backbones.detector import (
    NO_CLASS,
    Detector,
    Found,
    InBfloat16,
    check_regions,
    check_shortest,
)
from mmc.extract.backbones.fasterrcnn_vg_boxes import (
    CELL,
    greedy_survivors,
    overlaps,
    proposals,
)
from mmc.extract.backbones.fasterrcnn_vg_model import WIDTH, VisualGenomeDetector, build
from mmc.extract.backbones.folding import folded
from mmc.extract.transforms import OriginalSize
from mmc.store import config

MEAN = (102.9801, 115.9465, 122.7717)
"""Of blue, green and red, 0 to 255."""
SHORTEST, LONGEST = 600, 1000
"""Pixels of the picture's sides after resizing, as the network was trained."""
LEAST = 16
"""Pixels of a side after resizing, below which the network has no cell."""
PROPOSALS = 300
CLASS_OVERLAP = 0.3
_IN_ONE_GO = 100
"""Regions that are pooled at once: 300 would take 60 MB more."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What goes in the brackets of a fasterrcnn_vg spec."""

    regions: int = 36
    """Regions of each picture, at most 300."""
    shortest: int = 600
    """Pixels of the shortest side after resizing (the longest: at most 5/3 of it); fewer are
    faster."""

    def __post_init__(self) -> None:
        check_regions(self.regions, PROPOSALS)
        check_shortest(self.shortest)


def load(
    name: str, options: dict[str, str], *, device: str, precision: str, max_text_tokens: int | None
) -> Detector:
    """The detector whose weights are the file ``name``.

    Raises:
        InputError: see :func:`mmc.extract.backbones.load_backbone`.
    """
    where = f"fasterrcnn_vg:{name}"
    settings = config.build(Options, options, where=f"backbone {where}")
    path = Path(name).expanduser()
    model = build(read_state(path, where), where)
    digest = weights_sha256(without_counters(model.state_dict()))
    if precision == "bf16":
        # What is costly; scores and boxes are decoded and chosen in float32.
        model.RCNN_base = InBfloat16(folded(model.RCNN_base, torch.rand(1, 3, 64, 64)))
        model.RCNN_top = InBfloat16(folded(model.RCNN_top, torch.rand(1, 1024, 7, 7)))
        model.RCNN_rpn.RPN_Conv = InBfloat16(model.RCNN_rpn.RPN_Conv)
    model.to(device)
    identity = {
        "architecture": "Visual Genome Faster R-CNN (ResNet, caffe strides)",
        "weights": digest,
        "preprocessing": {
            **OriginalSize().as_dict(),
            "shortest": settings.shortest,
            "longest": _longest(settings.shortest),
            "mean of BGR": list(MEAN),
        },
        "regions": {
            "count": settings.regions,
            "proposals": PROPOSALS,
            "box": "proposal",
            "rule": "highest confidence after NMS per class",
            "nms": CLASS_OVERLAP,
            "nms pixels": "inclusive",
        },
        "precision": precision,
        "batch_norms": "folded" if precision == "bf16" else "apart",
    }
    context = {
        "name": str(path.absolute()),
        "versions": versions("torchvision", "pillow"),
        "device": device_name(device),
    }
    return Detector(
        find=Finder(model, settings.regions, settings.shortest),
        regions=settings.regions,
        width=WIDTH,
        device=device,
        identity=identity,
        context=context,
    )


class Finder:
    """Finds the regions of one picture."""

    def __init__(self, model: VisualGenomeDetector, regions: int, shortest: int = SHORTEST) -> None:
        self._model, self._regions, self._shortest = model, regions, shortest

    def __call__(self, picture: Tensor) -> Found:
        """The regions of a picture, uint8 (3, H, W)."""
        inputs, scale = prepare(picture, self._shortest)
        height, width = inputs.shape[2:]
        feature_map = self._model.RCNN_base(inputs)
        scores, deltas = self._model.RCNN_rpn(feature_map)
        rois = proposals(scores[0], deltas[0], height, width, PROPOSALS)
        states = torch.cat([self._pool(feature_map, part) for part in rois.split(_IN_ONE_GO)])
        probabilities = self._model.RCNN_cls_score(states).softmax(-1)
        corners = rois / scale
        confidence, classes = confidences(corners, probabilities)
        best = confidence.argsort(descending=True, stable=True)[: self._regions]
        sides = picture.shape[2], picture.shape[1]
        return Found(
            states[best],
            corners[best] / corners.new_tensor([*sides, *sides]),
            confidence[best],
            classes[best],
        )

    def _pool(self, feature_map: Tensor, rois: Tensor) -> Tensor:
        """(n, 2048): the mean of each region (n, 4) after the last blocks."""
        cells = roi_align(
            feature_map, [rois], output_size=7, spatial_scale=1 / CELL, sampling_ratio=0
        )
        states: Tensor = self._model.RCNN_top(cells).mean((2, 3))
        return states


def _longest(shortest: int) -> int:
    return round(shortest * LONGEST / SHORTEST)


def prepare(picture: Tensor, shortest: int = SHORTEST) -> tuple[Tensor, Tensor]:
    """The network's input, and its pixels for each pixel of the picture.

    The mean is taken off before resizing. The shortest side becomes 600 pixels, or less so that
    the longest is at most 1000; the factor itself places the pixels, not the quotient of the
    rounded sides, as in OpenCV's bilinear resize.

    Args:
        picture: uint8 (3, H, W), red first.
        shortest: pixels to use instead of 600, with as many more at most along the longest side.

    Returns:
        float32 (1, 3, h, w), blue first; (4,) the factors of x, y, x and y.
    """
    height, width = picture.shape[1:]
    scale = shortest / min(height, width)
    if round(scale * max(height, width)) > _longest(shortest):
        scale = _longest(shortest) / max(height, width)
    sides = [max(LEAST, round(scale * side)) for side in (height, width)]
    # Only strips fall below the least; their short side is then stretched by more.
    factors = [scale if round(scale * side) >= LEAST else LEAST / side for side in (height, width)]
    mean = torch.tensor(MEAN, device=picture.device)[:, None, None]
    blue_first = picture.flip(0).float() - mean
    inputs = torch.ops.aten.upsample_bilinear2d(blue_first[None], sides, False, *factors)
    return inputs, blue_first.new_tensor([factors[1], factors[0]] * 2)


def confidences(corners: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence (n,) of each proposal, and the class that gives it (-1: it is always covered).

    Args:
        corners: (n, 4) in the picture's pixels.
        probabilities: (n, classes), the background first.
    """
    by_class = probabilities[:, 1:].T
    survives = greedy_survivors(overlaps(corners) > CLASS_OVERLAP, by_class)
    confidence, classes = (by_class * survives).max(0)
    return confidence, torch.where(survives.any(0), classes + 1, NO_CLASS)
