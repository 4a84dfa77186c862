"""Small networks for pictures saved in their real formats, with weights that tell inputs apart.

Drawn weights alone make deep convolutional networks chaotic: a last bit of the input changes the
output. Trained ones are not, for their batch norms hold the statistics of what they see; so do
these after :func:`settle`.
"""

from pathlib import Path
from typing import Any

import torch
from tiny_models import draw_weights
from torch import Tensor, nn


def blocks_of_colour(count: int, size: tuple[int, int], cells: int = 8, seed: int = 0) -> Tensor:
    """Random uint8 pictures (count, 3, *size) of ``cells`` x ``cells`` blocks."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (count, 3, cells, cells), generator=generator).byte()
    return nn.functional.interpolate(blocks, size=size)


@torch.no_grad()
def settle(model: nn.Module, inputs: Tensor, part: Any = None) -> None:
    """Set the statistics of ``model``'s batch norms to those of ``part(inputs)``."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    (part or model)(inputs)
    for norm in norms:
        norm.eval()


def normalised(pictures: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) as ImageNet's networks take it, near enough."""
    return (pictures.float() / 255 - 0.45) / 0.225


def torchvision_model(name: str, **settings: Any) -> nn.Module:
    """torchvision's own, drawn and settled."""
    from torchvision.models import get_model

    model = get_model(name, weights=None, **settings).eval()
    draw_weights(model)
    for key, weight in model.named_parameters():  # as in trained ones, a block adds a little
        if key.endswith("bn2.weight"):
            weight.data *= 0.5
    settle(model, normalised(blocks_of_colour(4, (224, 224))))
    return model


def tiny_torchvision(folder: str | Path) -> str:
    """Save a ResNet-18 as ``torch.save`` writes it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = Path(folder) / "weights.pth"
    torch.save(torchvision_model("resnet18").state_dict(), file)
    return f"torchvision:resnet18/{file}"


def timm_model(name: str, **settings: Any) -> Any:
    """timm's own, drawn and settled."""
    import timm

    model = timm.create_model(name, **settings).eval()
    draw_weights(model)
    side = model.pretrained_cfg["input_size"][1]
    settle(model, normalised(blocks_of_colour(4, (side, side))))
    return model


def tiny_timm(folder: str | Path, name: str = "test_resnet") -> str:
    """Save timm's smallest ResNet as a folder, as the hub has it."""
    import timm

    model = timm_model(name, num_classes=7)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return f"timm:{folder}"


def fasterrcnn_model(version: int = 1, classes: int = 11) -> Any:
    """torchvision's detector, drawn and settled; its scores spread over the classes."""
    from torchvision.models import detection

    build = {1: detection.fasterrcnn_resnet50_fpn, 2: detection.fasterrcnn_resnet50_fpn_v2}[version]
    model = build(weights=None, weights_backbone=None, num_classes=classes).eval()
    draw_weights(model)
    for key, weight in model.named_parameters():
        if key.endswith("bn3.weight"):  # as in trained ones, a block adds a little
            weight.data *= 0.2
    pictures = normalised(blocks_of_colour(2, (128, 128)))
    settle(model, pictures, model.backbone)
    if version == 2:
        generator = torch.Generator().manual_seed(5)
        settle(model.roi_heads.box_head, torch.rand(8, 256, 7, 7, generator=generator))
    # Boxes of some size, near their anchors; scores from 0 to 1.
    model.rpn.head.bbox_pred.weight.data *= 0.02
    model.rpn.head.cls_logits.weight.data *= 0.1
    model.roi_heads.box_predictor.bbox_pred.weight.data *= 0.02
    model.roi_heads.box_predictor.cls_score.weight.data *= 0.5
    return model


def tiny_fasterrcnn(folder: str | Path) -> str:
    """Save torchvision's detector with ten classes, to be used on small pictures."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = Path(folder) / "detector.pth"
    torch.save(fasterrcnn_model().state_dict(), file)
    return f"fasterrcnn:{file}[regions=9,shortest=64]"


TINY_DEPTH = (1, 1, 1, 1)


def vg_model(depth: tuple[int, ...] = TINY_DEPTH, classes: int = 21) -> Any:
    """The Visual Genome detector with few blocks and classes, drawn and settled."""
    from mmc.extract.backbones.fasterrcnn_vg_model import DEPTHS, VisualGenomeDetector

    if depth == TINY_DEPTH:
        DEPTHS[14] = TINY_DEPTH
    model = VisualGenomeDetector(depth, classes).eval()
    draw_weights(model)
    pictures = blocks_of_colour(2, (160, 160)).float() - 115
    settle(model.RCNN_base, pictures)
    generator = torch.Generator().manual_seed(5)  # not what the tests before left of the global one
    settle(model.RCNN_top, torch.rand(8, 1024, 7, 7, generator=generator) * 2)
    model.RCNN_rpn.RPN_bbox_pred.weight.data *= 0.05
    model.RCNN_rpn.RPN_cls_score.weight.data *= 0.05
    model.RCNN_cls_score.weight.data *= 3
    return model


def tiny_fasterrcnn_vg(folder: str | Path) -> str:
    """Save it as its trainer did: the model beside the rest of a training's state."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = Path(folder) / "detector.pth"
    whole = {
        "session": 1,
        "epoch": 20,
        "model": vg_model().state_dict(),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.001}]},
        "pooling_mode": "align",
        "class_agnostic": False,
    }
    torch.save(whole, file, _use_new_zipfile_serialization=False)  # as torch did in 2018
    return f"fasterrcnn_vg:{file}[regions=9,shortest=64]"
