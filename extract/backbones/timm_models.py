"""timm models: ``timm:MODEL.TAG``, ``timm:MODEL/FILE``, ``timm:FOLDER``, ``timm:hf-hub:REPO``.

Fields: ``image``, what enters the classifier (``forward_head`` with ``pre_logits``). Networks with
a feature map: ``image_tokens``, its cells in reading order, and ``regions``, a 6 x 6 grid of means
over it with ``boxes`` and ``region_mask``. ViTs: ``image_tokens``, the patches without class and
register tokens, and ``image_class`` where there is a class token. Boxes are parts of what the model
sees: with ``[resize=squash]`` that is the whole picture, else its centre.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import floor
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from mmc.extract.backbones.base import (
    cast,
    device_name,
    sha256_json,
    versions,
    weights_sha256,
)
from mmc.extract.backbones.checkpoints import without_counters
from mmc.extract.backbones.encoder import Encoder, ImageTower
from mmc.extract.backbones.folding import folded
from mmc.extract.backbones.regions import grid_fields
from mmc.extract.backbones.timm_weights import find_source, load_model
from mmc.extract.transforms import ImageTransform
from mmc.store import config
from mmc.store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Options:
    """What goes in the brackets of a timm spec."""

    resize: Literal["crop", "squash"] = "crop"
    """crop: as the weights were made for; squash: the whole picture, its aspect ratio changed."""


def load(
    name: str, options: dict[str, str], *, device: str, precision: str, max_text_tokens: int | None
) -> Encoder:
    """The backbone that ``name`` (what follows ``timm:``) stands for.

    Raises:
        InputError: see :func:`mmc.extract.backbones.load_backbone`.
    """
    settings = config.build(Options, options, where=f"backbone timm:{name}")
    source = find_source(name)
    model = load_model(source).eval().requires_grad_(False)
    transform = image_transform(name, timm.data.resolve_model_data_config(model), settings.resize)
    digest = weights_sha256(_without_classifier(model))
    with_norms = model
    if precision == "bf16":
        model = folded(model, torch.rand(1, *transform.shape))
    dtype = cast(model.to(device), precision)
    architecture, _, _ = str(model.pretrained_cfg["architecture"]).partition(".")
    identity = {
        "architecture": f"timm {architecture}",
        "config": sha256_json(_unusual(model, source.arguments)),
        "weights": digest,
        "preprocessing": transform.as_dict(),
        "pooling": "model",
        "precision": precision,
        "batch_norms": "apart" if model is with_norms else "folded",
    }
    context = {
        "name": source.resolved,
        "versions": versions("timm", "torchvision", "pillow"),
        "device": device_name(device),
    }
    return Encoder(
        image=ImageTower(transform=transform, forward=_forward(model, precision)),
        text=None,
        device=device,
        dtype=dtype,
        identity=identity,
        context=context,
    )


def image_transform(name: str, cfg: dict[str, Any], resize: str) -> ImageTransform:
    """timm's evaluation transform as numbers, from a model's data config.

    Raises:
        InputError: a kind of crop or of resampling that has no exact counterpart here.
    """
    height, width = cfg["input_size"][1:]
    to = floor(height / cfg["crop_pct"]), floor(width / cfg["crop_pct"])
    mode = "squash" if resize == "squash" else cfg["crop_mode"]
    if mode not in ("center", "squash") or cfg["interpolation"] not in ("bilinear", "bicubic"):
        raise InputError(
            f"timm:{name}: its preprocessing (crop mode {mode}, {cfg['interpolation']}) is not "
            "supported; with [resize=squash] the whole picture is resized instead"
            if mode == "border"
            else f"timm:{name}: {cfg['interpolation']} resampling in crop mode {mode} is not "
            "supported; bilinear and bicubic are"
        )
    transform = ImageTransform(
        size=(height, width),
        # timm resizes to oblong sizes by another class, which rounds instead of truncating.
        resize="shortest" if height == width else "cover",
        resize_to=to,
        interpolation=cfg["interpolation"],
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
    )
    if mode == "squash":
        whole = (height, width) if resize == "squash" else to
        transform = replace(transform, resize="squash", resize_to=whole)
    return transform


def _unusual(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments`` that are not what the network's class takes by itself, nor its classifier's."""
    usual = {
        name: parameter.default
        for name, parameter in inspect.signature(type(model).__init__).parameters.items()
    }
    usual["num_classes"] = arguments.get("num_classes")
    return {name: value for name, value in arguments.items() if usual.get(name) != value}


def _without_classifier(model: Any) -> dict[str, Tensor]:
    """The weights that the fields depend on."""
    layers = model.pretrained_cfg.get("classifier") or ()
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    heads = tuple(f"{layer}." for layer in layers)
    state = without_counters(model.state_dict())
    return {name: value for name, value in state.items() if not name.startswith(heads)}


def _forward(model: Any, precision: str) -> Callable[[Tensor], dict[str, Tensor]]:
    """The function from normalised images to named arrays."""
    # Convolutions of bfloat16 are about twice as fast in this layout; float32 keeps the library's
    # own, for its very rounding.
    layout = torch.channels_last if precision == "bf16" else torch.contiguous_format
    model.to(memory_format=layout)
    prefix = getattr(model, "num_prefix_tokens", None)
    has_class = isinstance(getattr(model, "cls_token", None), nn.Parameter)
    if prefix is None:  # XCiT-like networks keep one in front without saying so
        prefix = int(has_class)

    def forward(inputs: Tensor) -> dict[str, Tensor]:
        states = model.forward_features(inputs.contiguous(memory_format=layout))
        found = {"image": model.forward_head(states, pre_logits=True)}
        if not isinstance(states, Tensor):  # several branches: no one grid
            return found
        if states.ndim == 4:
            channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
            return found | grid_fields(states.permute(0, 3, 1, 2) if channels_last else states)
        found["image_tokens"] = states[:, prefix:]
        if has_class and prefix:
            found["image_class"] = states[:, 0]
        return found

    return forward
