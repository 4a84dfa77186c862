"""A backbone made of a function that finds regions in one picture.

Shapes: B pictures, R regions asked for, n found, D numbers of a region.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmc.extract.backbones.base import TokenBatch, check_fields, field_table
from mmc.extract.backbones.regions import with_area
from mmc.extract.transforms import OriginalSize, Transform
from mmc.store.errors import InputError
from mmc.store.schema import FieldSpec

NO_CLASS = -1
"""Class of a region that is absent, or that the detector gives none."""


@dataclass(frozen=True)
class Found:
    """The regions of one picture, best first; n is at most what was asked for."""

    features: Tensor
    """(n, D)."""
    corners: Tensor
    """(n, 4): x1, y1, x2, y2 divided by the picture's width and height."""
    scores: Tensor
    """(n,)."""
    classes: Tensor
    """(n,) integers."""


class Detector:
    """A :class:`mmc.extract.backbones.base.Backbone` that runs one picture at a time.

    Pictures of a batch would be padded to the largest, and features near the padding would then
    depend on the other pictures.
    """

    image_transform: Transform | None = OriginalSize()
    batch_size: int | None = 2
    prompt_template = "{label}"

    def __init__(
        self,
        *,
        find: Callable[[Tensor], Found],
        regions: int,
        width: int,
        device: str,
        identity: dict[str, Any],
        context: dict[str, Any],
    ) -> None:
        self._find = find
        self._regions, self._width = regions, width
        self._device = torch.device(device)
        self.identity = identity
        self.context = context
        self.fields: Mapping[str, FieldSpec] = field_table(
            {
                "regions": (regions, width),
                "boxes": (regions, 5),
                "region_scores": (regions,),
                "region_classes": (regions,),
                "region_mask": (regions,),
            }
        )
        self.default_fields = tuple(self.fields)

    def tokenize(self, texts: list[str]) -> TokenBatch:
        """Raises InputError: a detector has no text tower."""
        raise InputError("this backbone has no text tower")

    def encode_text(self, tokens: TokenBatch, fields: Sequence[str]) -> dict[str, Tensor]:
        """Raises InputError: a detector has no text tower."""
        raise InputError("this backbone has no text tower")

    @torch.no_grad()
    def encode_image(
        self, pixels: Sequence[Tensor] | Tensor, fields: Sequence[str]
    ) -> dict[str, Tensor]:
        """``fields`` of uint8 pictures (3, H, W); absent regions are zero, their class -1."""
        check_fields(fields, self.fields, "image")
        rows = [self._one(picture.to(self._device, non_blocking=True)) for picture in pixels]
        return {name: torch.stack([row[name] for row in rows]) for name in fields}

    def _one(self, picture: Tensor) -> dict[str, Tensor]:
        found = self._find(picture)
        count = len(found.features)
        boxes = with_area(found.corners.float())
        device = picture.device
        row = {
            "regions": torch.zeros(self._regions, self._width, device=device),
            "boxes": torch.zeros(self._regions, 5, device=device),
            "region_scores": torch.zeros(self._regions, device=device),
            "region_classes": torch.full(
                (self._regions,), NO_CLASS, dtype=torch.int16, device=device
            ),
            "region_mask": torch.arange(self._regions, device=device) < count,
        }
        row["regions"][:count] = found.features.float()
        row["boxes"][:count] = boxes
        row["region_scores"][:count] = found.scores.float()
        row["region_classes"][:count] = found.classes.to(torch.int16)
        return row


def check_regions(regions: int, most: int) -> None:
    """Raises InputError where ``regions`` is not between 1 and ``most``."""
    if not 1 <= regions <= most:
        raise InputError(f"regions={regions}: choose 1 to {most}")


def check_shortest(pixels: int) -> None:
    """Raises InputError where a picture of so many pixels has no regions to speak of."""
    if not 32 <= pixels <= 4000:
        raise InputError(f"shortest={pixels}: choose 32 to 4000 pixels")


class InBfloat16(nn.Module):
    """A part of a network in bfloat16 that takes and gives float32."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part.to(torch.bfloat16).to(memory_format=torch.channels_last)

    def forward(self, *inputs: Any) -> Any:
        """What the part gives, its tensors in float32."""
        return _converted(self.part(*_converted(inputs, torch.bfloat16)), torch.float32)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with all its tensors, in whatever dicts and lists, as ``dtype``."""
    if isinstance(value, Tensor):
        if value.ndim == 4:
            return value.to(dtype, memory_format=torch.channels_last)
        return value.to(dtype)
    if isinstance(value, Mapping):
        return {key: _converted(item, dtype) for key, item in value.items()}
    return type(value)(_converted(item, dtype) for item in value)
