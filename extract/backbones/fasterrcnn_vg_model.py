"""The network of the Visual Genome detector, with the names of the published weights.

Shapes: B pictures, h x w cells of 16 pixels, A = 12 anchors per cell, n regions.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from mmc.extract.backbones.checkpoints import fit
from mmc.extract.backbones.fasterrcnn_vg_boxes import RATIOS, SCALES
from mmc.store.errors import InputError

WIDTH = 2048
DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Blocks of each layer by the ResNet's name; the published detector is of 101."""
_BLOCK = re.compile(r"(?:RCNN_base\.([456])|RCNN_top\.(0))\.(\d+)\.conv1\.weight")
_CLASSES = "RCNN_cls_score.weight"


class ProposalNetwork(nn.Module):
    """Scores and shifts of the anchors of each cell."""

    def __init__(self) -> None:
        super().__init__()
        count = len(RATIOS) * len(SCALES)
        self.RPN_Conv: nn.Module = nn.Conv2d(1024, 512, 3, padding=1)
        self.RPN_cls_score = nn.Conv2d(512, 2 * count, 1)
        self.RPN_bbox_pred = nn.Conv2d(512, 4 * count, 1)

    def forward(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 2A, h, w) background, then foreground; (B, 4A, h, w), four for each anchor."""
        states = self.RPN_Conv(feature_map).relu()
        return self.RPN_cls_score(states), self.RPN_bbox_pred(states)


class VisualGenomeDetector(nn.Module):
    """Parts of the detector; :class:`mmc.extract.backbones.fasterrcnn_vg.Finder` joins them.

    The blocks are the Caffe variant: where a layer halves the map, the first 1 x 1 convolution of
    its first block takes every second cell. torchvision's own take them in the 3 x 3 convolution:
    the same weights load there and give other features.
    """

    def __init__(self, depth: tuple[int, ...], classes: int) -> None:
        super().__init__()
        trunk = ResNet(Bottleneck, list(depth))
        for layer in (trunk.layer2, trunk.layer3, trunk.layer4):
            layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
        self.RCNN_base: nn.Module = nn.Sequential(
            trunk.conv1,
            trunk.bn1,
            trunk.relu,
            nn.MaxPool2d(3, stride=2, padding=0, ceil_mode=True),
            trunk.layer1,
            trunk.layer2,
            trunk.layer3,
        )
        self.RCNN_rpn = ProposalNetwork()
        self.RCNN_top: nn.Module = nn.Sequential(trunk.layer4)
        self.RCNN_cls_score = nn.Linear(WIDTH, classes)
        self.RCNN_bbox_pred = nn.Linear(WIDTH, 4 * classes)


def build(state: Mapping[str, Tensor], where: str) -> VisualGenomeDetector:
    """The detector with ``state``, in evaluation mode, float32 on the CPU.

    Args:
        state: what is under ``model`` in the published file.
        where: the backbone as typed, for messages.

    Raises:
        InputError: a name is missing or left over, or a shape differs.
    """
    if _CLASSES not in state:
        raise InputError(f"{where}: the weights do not fit the model: missing {_CLASSES}")
    with torch.device("meta"):  # drawing 64 million weights to throw away takes a second
        model = VisualGenomeDetector(_depth(state), len(state[_CLASSES]))
    model = model.to_empty(device="cpu")
    fit(model, state, where)
    return model.eval().requires_grad_(False)


def _depth(state: Mapping[str, Any]) -> tuple[int, ...]:
    """Blocks of each layer: of the known network that fits best, so that a gap is seen."""
    counts = {"4": 0, "5": 0, "6": 0, "0": 0}
    for key in state:
        if found := _BLOCK.fullmatch(key):
            counts[found[1] or found[2]] += 1
    blocks = tuple(counts.values())
    return min(
        DEPTHS.values(),
        key=lambda depth: sum(abs(a - b) for a, b in zip(depth, blocks, strict=True)),
    )
