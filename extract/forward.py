"""Forward passes: which towers of a backbone run together, and how often each kind ran.

Legend: B = places in a batch, T = token positions.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from mmc.extract.backbones.base import Backbone, FusedBackbone, TokenBatch
from mmc.store import FieldSpec

Outputs = dict[str, Tensor]
Pixels = Tensor | list[Tensor]
"""uint8 (B, *shape), or where pictures keep their own size a list of (3, H, W)."""

SAMPLES_KEPT = 4
"""Batches of pictures in their own size that are kept to measure the bare forward rate with."""


@dataclass(frozen=True, eq=False)
class Pass:
    """One kind of forward pass of one backbone."""

    alias: str
    backbone: Backbone
    fields: tuple[FieldSpec, ...]
    """What it gives, of one tower, or of the image and the fused tower at once."""
    batch_size: int
    length: int = 0
    """Token positions of a text batch; 0 for others."""

    @property
    def towers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(spec.tower for spec in self.fields))

    @property
    def key(self) -> tuple[str, tuple[str, ...], int]:
        """Equal for passes that take equally long."""
        return self.alias, self.towers, self.length

    def run(self, pixels: Pixels | None, tokens: TokenBatch | None) -> Outputs:
        """The fields in the dtypes of the store, still on the device.

        Args:
            pixels: on the device; None for texts.
            tokens: None for images.
        """
        names = [spec.name for spec in self.fields]
        if pixels is None:
            assert tokens is not None
            values = self.backbone.encode_text(tokens, names)
        elif tokens is None:
            # A list only where the transform is OriginalSize: the backbone asked for it.
            values = self.backbone.encode_image(cast(Tensor, pixels), names)
        else:
            fused = cast(FusedBackbone, self.backbone)
            values = fused.encode_fused(cast(Tensor, pixels), tokens, names)
        return {
            spec.name: values[spec.name].to(getattr(torch, str(spec.dtype))) for spec in self.fields
        }


@dataclass
class Ran:
    """How often one kind of pass ran, and what to run it on again."""

    step: Pass
    count: int = 0
    tokens: TokenBatch | None = None
    pictures: list[list[Tensor]] = field(default_factory=list)
    """Some batches of pictures in their own size."""


class Tally:
    """Passes of this run by kind; safe to use from several threads."""

    def __init__(self) -> None:
        self._ran: dict[tuple[str, tuple[str, ...], int], Ran] = {}
        self._lock = threading.Lock()

    def note(self, step: Pass, pixels: Pixels | None, tokens: TokenBatch | None) -> None:
        """A pass is about to run."""
        with self._lock:
            ran = self._ran.setdefault(step.key, Ran(step, tokens=tokens))
            ran.count += 1
            if isinstance(pixels, list) and len(ran.pictures) < SAMPLES_KEPT:
                ran.pictures.append(pixels)

    def all(self) -> Sequence[Ran]:
        """Every kind, in the order in which they ran first."""
        with self._lock:
            return list(self._ran.values())
