"""open_clip models: ``open_clip:MODEL/TAG``, ``open_clip:MODEL/CHECKPOINT``, ``open_clip:FOLDER``.

Fields: ``image`` and ``text`` as ``encode_image`` and ``encode_text`` give them, not normalised;
``image_tokens``: the grid of tokens (P, Dv) in reading order, and ``image_class`` the class token,
where there is one (see ``openclip_image``); ``text_tokens``: token states after the last layer
norm, before the projection.
"""

from dataclasses import dataclass
from typing import Any, Literal

from mmc.extract.backbones.attention import lay_out_inputs
from mmc.extract.backbones.base import (
    cast,
    device_name,
    sha256_json,
    versions,
    weights_sha256,
)
from mmc.extract.backbones.encoder import Encoder, ImageTower
from mmc.extract.backbones.lora import add_adapter
from mmc.extract.backbones.openclip_image import image_forward
from mmc.extract.backbones.openclip_text import text_tower, tokenizer_digest, tokenizer_for
from mmc.extract.backbones.openclip_weights import find_source, load_model
from mmc.extract.transforms import ImageTransform
from mmc.store import config


@dataclass(frozen=True, kw_only=True)
class Options:
    """What goes in the brackets of an open_clip spec."""

    quick_gelu: bool = False
    """Use QuickGELU, as OpenAI's weights need; set by itself for tags that are known to need it."""
    tokens: Literal["states", "projected"] = "states"
    """Image tokens and class token as the tower's states, or each projected into the shared space
    (last layer norm and projection), where they can be compared with texts."""
    lora: str | None = None
    """Folder of a LoRA adapter that is merged into the weights."""


def load(
    name: str, options: dict[str, str], *, device: str, precision: str, max_text_tokens: int | None
) -> Encoder:
    """The backbone that ``name`` (what follows ``open_clip:``) stands for.

    Raises:
        InputError: see :func:`mmc.extract.backbones.load_backbone`.
    """
    where = f"open_clip:{name}"
    settings = config.build(Options, options, where=f"backbone {where}")
    source = find_source(name)
    model, model_config = load_model(source, quick_gelu=settings.quick_gelu)
    digest = weights_sha256(model.state_dict())
    adapter = add_adapter(model, settings.lora, base_weights=digest, where=where)
    lay_out_inputs(model)
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
        **adapter.identity,
    }
    projected = settings.tokens == "projected"
    if projected:
        identity["tokens"] = settings.tokens
    context = {
        "name": source.resolved,
        "versions": versions("open_clip_torch", "torchvision", "pillow"),
        "device": device_name(device),
        **adapter.context,
    }
    return Encoder(
        image=ImageTower(
            transform=transform,
            forward=image_forward(model.visual, precision, projected=projected, where=where),
        ),
        text=text,
        device=device,
        dtype=dtype,
        identity=identity,
        context=context,
        model=model,
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
