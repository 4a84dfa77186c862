"""Your own backbone: ``python:package.module:Class``.

The class has the interface of :class:`mmc.extract.backbones.base.Backbone` and is built as
``Class(device=…, precision=…, max_text_tokens=…, **options)``, where the options are the strings in
the spec's brackets. ``identity`` must hold whatever decides its numbers: a hash of its weights
(``base.weights_sha256``), the preprocessing (``ImageTransform.as_dict()``), the precision.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from mmc.extract.backbones.base import Backbone, one_line
from mmc.store.errors import InputError
from mmc.store.schema import FieldSpec

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
