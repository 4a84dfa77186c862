"""Your own backbone: ``python:package.module:Class``; ``docs/own-backbone.md`` has an example.

The class has the interface of :class:`mmc.extract.backbones.base.Backbone` and is built as
``Class(device=…, precision=…, max_text_tokens=…, **options)``, where the options are the strings in
the spec's brackets. ``identity`` must hold whatever decides its numbers: a hash of its weights
(``base.weights_sha256``), the preprocessing (``ImageTransform.as_dict()``), the precision.

For a network with an image tower only, :class:`ImageBackbone` does all of this.
"""

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmc.extract.backbones.base import (
    Backbone,
    cast,
    device_name,
    one_line,
    versions,
    weights_sha256,
)
from mmc.extract.backbones.checkpoints import fit, read_state, without_counters
from mmc.extract.backbones.encoder import Encoder, ImageTower
from mmc.extract.backbones.folding import folded
from mmc.extract.transforms import ImageTransform, OriginalSize
from mmc.store.errors import InputError
from mmc.store.schema import FieldSpec

__all__ = ["ImageBackbone", "ImageTransform", "load"]

_ATTRIBUTES = (
    "fields",
    "default_fields",
    "image_transform",
    "identity",
    "context",
    "prompt_template",
    "tokenize",
    "encode_image",
    "encode_text",
)


class ImageBackbone(Encoder):
    """Base of backbones that are one network for pictures, with its weights in one file.

    A subclass gives ``transform`` and ``network``; the spec gives the file:
    ``python:module:Class[weights=FILE]``. The weights must fit the network, name by name. In bf16
    the batch norms are folded into the convolutions.
    """

    transform: ClassVar[ImageTransform]
    """How pictures are brought to the network's size and normalised."""
    network: Any
    """What makes the network: a class or a function. It is called with the other options of the
    spec, which are strings. The network takes normalised pictures (B, 3, H, W) and gives one
    tensor (B, D), which is the field ``image``, or a dict of fields by name."""

    def __init__(
        self,
        *,
        device: str,
        precision: str,
        max_text_tokens: int | None,
        weights: str | None = None,
        **options: str,
    ) -> None:
        kind = f"{type(self).__module__}:{type(self).__qualname__}"
        where = f"python:{kind}"
        if weights is None:
            raise InputError(f"{where} needs its weights: {where}[weights=FILE]")
        path = Path(weights).expanduser()
        model: nn.Module = type(self).network(**options)
        fit(model, read_state(path, where), where)
        model = model.eval().requires_grad_(False)
        digest = weights_sha256(without_counters(model.state_dict()))
        if precision == "bf16":
            model = folded(model, torch.rand(1, *self.transform.shape))
        dtype = cast(model.to(device), precision)

        def forward(images: Tensor) -> Mapping[str, Tensor]:
            given = model(images)
            return given if isinstance(given, Mapping) else {"image": given}

        super().__init__(
            image=ImageTower(transform=self.transform, forward=forward),
            text=None,
            device=device,
            dtype=dtype,
            identity={
                "architecture": f"python {kind}",
                "options": options,
                "weights": digest,
                "preprocessing": self.transform.as_dict(),
                "precision": precision,
            },
            context={
                "options": {"weights": str(path.absolute())},
                "versions": versions("torchvision", "pillow"),
                "device": device_name(device),
            },
        )


def load(
    name: str, options: dict[str, str], *, device: str, precision: str, max_text_tokens: int | None
) -> Backbone:
    """Import the class that ``name`` points to and build it.

    Raises:
        InputError: it cannot be imported or built, or lacks a part of the interface.
    """
    cls = _find(name)
    try:
        backbone = cls(
            device=device, precision=precision, max_text_tokens=max_text_tokens, **options
        )
    except TypeError as error:
        raise InputError(
            f"python:{name}: cannot be built with device, precision, max_text_tokens"
            f"{''.join(f', {key}' for key in options)}: {one_line(error)}"
        ) from error
    _check(name, backbone)
    checked: Backbone = backbone
    return checked


def _find(name: str) -> Any:
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise InputError(f"python:{name} is not of the form python:package.module:Class")
    here = str(Path.cwd())
    if here not in sys.path:
        # Last, so that nothing in the folder hides an installed package.
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise InputError(
            f"python:{name}: no module {error.name!r} in this environment or in {here}"
        ) from None
    except AttributeError:
        raise InputError(f"python:{name}: {module} has no {attribute!r}") from None


def _check(name: str, backbone: Any) -> None:
    """Raises InputError where ``backbone`` breaks the interface in a way that shows at once."""
    missing = [part for part in _ATTRIBUTES if not hasattr(backbone, part)]
    if missing:
        raise InputError(
            f"python:{name} has no {', '.join(missing)}; see the interface of Backbone"
        )
    for key, spec in backbone.fields.items():
        if not isinstance(spec, FieldSpec) or spec.name != key:
            raise InputError(f"python:{name}: fields[{key!r}] is not a FieldSpec of that name")
    unknown = set(backbone.default_fields) - set(backbone.fields)
    if unknown or not backbone.default_fields:
        raise InputError(
            f"python:{name}: default_fields {backbone.default_fields} must be some of its fields"
        )
    images = any(spec.tower != "text" for spec in backbone.fields.values())
    if images and backbone.image_transform is None:
        raise InputError(f"python:{name} has image fields and no image_transform")
    if any(spec.tower == "fused" for spec in backbone.fields.values()):
        if not callable(getattr(backbone, "encode_fused", None)):
            raise InputError(f"python:{name} has fused fields and no encode_fused")
        if isinstance(backbone.image_transform, OriginalSize):
            raise InputError(f"python:{name}: fused fields need pictures of one size")
    if "{label}" not in backbone.prompt_template:
        raise InputError(f"python:{name}: prompt_template must contain {{label}}")
    if not backbone.identity:
        raise InputError(
            f"python:{name}: identity is empty, so its features could not be told apart"
        )
    try:
        json.dumps([backbone.identity, backbone.context])
    except TypeError as error:
        raise InputError(f"python:{name}: identity and context must be JSON: {error}") from None
