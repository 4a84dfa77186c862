"""open_clip models: ``open_clip:MODEL/TAG``, ``open_clip:MODEL/CHECKPOINT``, ``open_clip:FOLDER``.

Fields: ``image`` and ``text`` as ``encode_image`` and ``encode_text`` give them, not normalised;
``image_tokens``: the patch tokens (P, Dv) after the last layer norm and before the projection,
class token left out (ResNets: the last 7 x 7 grid in reading order; CoCa: the queries of its
attentional pooler); ``text_tokens``: token states after the last layer norm, before the projection.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor

from mmc.extract.backbones.base import (
    cast,
    device_name,
    sha256_json,
    versions,
    weights_sha256,
)
from mmc.extract.backbones.encoder import Encoder, ImageTower
from mmc.extract.backbones.openclip_text import text_tower, tokenizer_digest, tokenizer_for
from mmc.extract.backbones.openclip_weights import find_source, load_model
from mmc.extract.transforms import ImageTransform
from mmc.store import config


@dataclass(frozen=True, kw_only=True)
class Options:
    """What goes in the brackets of an open_clip spec."""

    quick_gelu: bool = False
    """Use QuickGELU, as OpenAI's weights need; set by itself for tags that are known to need it."""


def load(
    name: str, options: dict[str, str], *, device: str, precision: str, max_text_tokens: int | None
) -> Encoder:
    """The backbone that ``name`` (what follows ``open_clip:``) stands for.

    Raises:
        InputError: see :func:`mmc.extract.backbones.load_backbone`.
    """
    settings = config.build(Options, options, where=f"backbone open_clip:{name}")
    source = find_source(name)
    model, model_config = load_model(source, quick_gelu=settings.quick_gelu)
    digest = weights_sha256(model.state_dict())
    dtype = cast(model.eval().requires_grad_(False).to(device), precision)
    transform = image_transform(model.visual.preprocess_cfg)
    tokenizer = tokenizer_for(source)
    text = text_tower(model, tokenizer, max_text_tokens)
    identity = {
        "architecture": f"open_clip {type(model).__name__}",
        "config": sha256_json(model_config),
        "weights": digest,
        "preprocessing": transform.as_dict(),
        "tokenizer": tokenizer_digest(tokenizer),
        "max_text_tokens": text.length,
        "pooling": "model",
        "precision": precision,
    }
    context = {
        "name": source.resolved,
        "versions": versions("open_clip_torch", "torchvision", "pillow"),
        "device": device_name(device),
    }
    return Encoder(
        image=ImageTower(transform=transform, forward=_image_forward(model.visual, precision)),
        text=text,
        device=device,
        dtype=dtype,
        identity=identity,
        context=context,
    )


def image_transform(cfg: dict[str, Any]) -> ImageTransform:
    """open_clip's evaluation transform as numbers, from a model's ``preprocess_cfg``."""
    size = cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    mode = cfg["resize_mode"]
    # open_clip builds non-square "shortest" from another class, with its own interpolation.
    oblong = mode == "shortest" and height != width
    resize = {"shortest": "shortest", "longest": "contain", "squash": "squash"}[mode]
    bilinear = cfg["interpolation"] == "bilinear" and not oblong
    return ImageTransform(
        size=(height, width),
        resize="cover" if oblong else resize,  # type: ignore[arg-type]
        crop="round",
        interpolation="bilinear" if bilinear else "bicubic",
        fill=cfg["fill_color"],
        mean=_three(cfg["mean"]),
        std=_three(cfg["std"]),
    )


def _three(values: float | tuple[float, ...] | list[float]) -> tuple[float, float, float]:
    numbers = (
        [float(v) for v in values] if isinstance(values, (tuple, list)) else [float(values)] * 3
    )
    red, green, blue = numbers
    return red, green, blue


def _image_forward(visual: Any, precision: str) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """The function from normalised images to pooled features and patch tokens."""
    if isinstance(visual, VisionTransformer):
        visual.output_tokens = True
        return lambda x: visual(x)
    # Convolutions of bfloat16 are about twice as fast in this layout; float32 keeps the library's
    # own, for its very rounding.
    layout = torch.channels_last if precision == "bf16" else torch.contiguous_format
    visual.to(memory_format=layout)
    if isinstance(visual, ModifiedResNet):
        return lambda x: _resnet_forward(visual, x.contiguous(memory_format=layout))
    if isinstance(visual, TimmModel):
        return lambda x: _timm_forward(visual, x.contiguous(memory_format=layout))
    return lambda x: (visual(x), None)


def _resnet_forward(visual: ModifiedResNet, x: Tensor) -> tuple[Tensor, Tensor]:
    found = visual.forward_intermediates(x, indices=1)
    return found["image_features"], found["image_intermediates"][-1].flatten(2).transpose(1, 2)


def _timm_forward(visual: TimmModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """timm: a model is its features followed by its head."""
    trunk = visual.trunk
    features = trunk.forward_features(x)
    pooled = visual.head(trunk.forward_head(features))
    if features.ndim == 3:
        return pooled, features[:, getattr(trunk, "num_prefix_tokens", 0) :]
    if getattr(trunk, "output_fmt", "NCHW") == "NHWC":
        return pooled, features.flatten(1, 2)
    return pooled, features.flatten(2).transpose(1, 2)
