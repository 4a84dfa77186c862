"""Backbone families, chosen by name; each is imported when a backbone is loaded.

An entry's target is a function ``load(name, options, *, device, precision, max_text_tokens)`` that
returns an object with the interface of :class:`mmc.extract.backbones.base.Backbone`. The option
``pyramid`` (:mod:`mmc.extract.backbones.pyramid`) is one of all families with an image tower.
"""

import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmc.store.errors import InputError
from mmc.store.registry import Entry, load, lookup

if TYPE_CHECKING:
    from mmc.extract.backbones.base import Backbone

GROUP = "mmc.backbones"
"""Entry point group in which other packages register families."""

BACKBONES: tuple[Entry, ...] = (
    Entry(
        "open_clip",
        "mmc.extract.backbones.openclip:load",
        "any open_clip model: image, text, the grid of image_tokens, image_class, text_tokens",
        "open_clip:MODEL/TAG, open_clip:MODEL/CHECKPOINT, open_clip:FOLDER",
    ),
    Entry(
        "hf",
        "mmc.extract.backbones.hf:load",
        "transformers: CLIP, SigLIP, BLIP (image and text, fused), ViT, DINOv2, BERT-like encoders",
        "hf:HUB_NAME or hf:FOLDER",
    ),
    Entry(
        "torchvision",
        "mmc.extract.backbones.torchvision_models:load",
        "any torchvision classifier: image, image_tokens; CNNs: a 6 x 6 grid of regions with boxes",
        "torchvision:MODEL, torchvision:MODEL/TAG, torchvision:MODEL/CHECKPOINT",
    ),
    Entry(
        "timm",
        "mmc.extract.backbones.timm_models:load",
        "any timm model: image, image_tokens; CNNs: a 6 x 6 grid of regions with boxes",
        "timm:MODEL.TAG, timm:MODEL/CHECKPOINT, timm:FOLDER, timm:hf-hub:REPO",
    ),
    Entry(
        "fasterrcnn",
        "mmc.extract.backbones.fasterrcnn:load",
        "torchvision's detector: 36 regions of 1024 (it has no 2048) with boxes, scores, classes",
        "fasterrcnn:coco, fasterrcnn:coco_v2, fasterrcnn:CHECKPOINT",
    ),
    Entry(
        "fasterrcnn_vg",
        "mmc.extract.backbones.fasterrcnn_vg:load",
        "Visual Genome detector, ResNet-101: 36 regions of 2048 with boxes, scores, 1600 classes",
        "fasterrcnn_vg:CHECKPOINT (faster_rcnn_res101_vg.pth)",
    ),
    Entry(
        "python",
        "mmc.extract.backbones.custom:load",
        "your own class: docs/own-backbone.md has one of 30 lines",
        "python:package.module:Class",
    ),
)

_SPEC = re.compile(r"(?P<family>[A-Za-z_][\w-]*):(?P<name>.*?)(?:\[(?P<options>[^\[\]]*)\])?", re.S)


@dataclass(frozen=True)
class BackboneSpec:
    """Which backbone: ``family:name[key=value,…]``; ``str()`` writes it so again."""

    family: str
    name: str
    options: dict[str, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in sorted(self.options.items()))
        return f"{self.family}:{self.name}" + (f"[{options}]" if options else "")


def parse_spec(spec: str) -> BackboneSpec:
    """Split ``family:name[key=value,…]`` and check that the family exists.

    Raises:
        InputError: no such form, an unknown family, or an option that is not ``key=value``.
    """
    match = _SPEC.fullmatch(spec.strip())
    if match is None or not match["name"]:
        raise InputError(
            f"backbone {spec!r} is not of the form family:name[option=value,…], "
            "for example open_clip:ViT-B-32/laion2b_s34b_b79k"
        )
    lookup(BACKBONES, match["family"], kind="backbone", group=GROUP)
    options: dict[str, str] = {}
    for part in filter(None, (match["options"] or "").split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise InputError(f"backbone {spec!r}: option {part!r} must be key=value")
        if key in options:
            raise InputError(f"backbone {spec!r}: option {key!r} is given twice")
        options[key] = value
    return BackboneSpec(match["family"], match["name"], options)


def load_backbone(
    spec: str, *, device: str, precision: str, max_text_tokens: int | None = None
) -> "Backbone":
    """Load the backbone that ``spec`` names, in evaluation mode.

    Args:
        spec: as :func:`parse_spec` takes it.
        device: a torch device such as ``cpu`` or ``cuda:0``.
        precision: ``float32``, or ``bf16`` to cast the weights to bfloat16.
        max_text_tokens: texts are cut to so many tokens; None: the model's own length.

    Returns:
        The backbone; its context holds the spec as typed and, with paths made absolute, as
        ``resolved_spec``.

    Raises:
        InputError: unknown family, model, weights, option or device; weights that are not on this
            machine and cannot be fetched; weights that do not fit.
    """
    if precision not in ("bf16", "float32"):
        raise InputError(f"precision {precision!r}: choose bf16 or float32")
    if max_text_tokens is not None and max_text_tokens < 2:
        raise InputError(f"max_text_tokens must be at least 2, got {max_text_tokens}")
    parsed = parse_spec(spec)
    from mmc.extract.backbones.base import check_device
    from mmc.extract.backbones.hub import FAMILIES, quick_when_offline

    check_device(device)
    loader = load(lookup(BACKBONES, parsed.family, kind="backbone", group=GROUP))
    options = dict(parsed.options)
    levels = options.pop("pyramid", None)
    with quick_when_offline(parsed.name) if parsed.family in FAMILIES else nullcontext():
        backbone: Backbone = loader(
            parsed.name,
            options,
            device=device,
            precision=precision,
            max_text_tokens=max_text_tokens,
        )
    if levels is not None:
        from mmc.extract.backbones.pyramid import with_pyramid

        backbone = with_pyramid(backbone, levels, device=device, spec=str(parsed))
    context = backbone.context
    context["spec"] = str(parsed)
    # A relative path would mean another folder when a run is used from elsewhere.
    absolute = {**parsed.options, **context.pop("options", {})}
    resolved = BackboneSpec(parsed.family, context.get("name", parsed.name), absolute)
    context["resolved_spec"] = str(resolved)
    return backbone
