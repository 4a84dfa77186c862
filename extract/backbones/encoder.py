"""A backbone made of an image tower, a text tower, or both, and what joins the two.

Families describe their towers as small functions; what is the same for all (moving to the device,
normalising, choosing fields, masking, float32 out) is here once.

Shapes: B samples, T tokens, P patches, D features of the shared space, Dv and Dt of the towers.
"""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmc.extract.backbones.base import (
    PROMPT,
    Normalizer,
    TokenBatch,
    check_fields,
    field_table,
    masked_tokens,
)
from mmc.extract.transforms import ImageTransform
from mmc.store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ImageTower:
    """How normalised images (B, 3, H, W) become features."""

    transform: ImageTransform
    forward: Callable[[Tensor], Mapping[str, Tensor]]
    """The image fields by name, such as ``image`` (B, D), ``image_tokens`` (B, P, Dv) and
    ``image_class`` (B, Dv); always the same ones."""


@dataclass(frozen=True, kw_only=True)
class TextTower:
    """How texts become tokens and tokens features."""

    tokenize: Callable[[list[str]], TokenBatch]
    """Called by one thread at a time."""
    forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
    """Ids (B, any) and lengths (B,) on the device to pooled (B, D) and token states."""
    length: int
    """T: tokens kept per text."""


@dataclass(frozen=True, kw_only=True)
class FusedTower:
    """How the image tower's fields and a text of the same sample become fused features."""

    forward: Callable[[Mapping[str, Tensor], Tensor, Tensor], Mapping[str, Tensor]]
    """What the image tower gave, ids (B, T) and lengths (B,) to the fused fields by name, among
    them ``fused_tokens`` (B, T, D); the mask of these is added here."""


def as_given_out(array: Tensor) -> Tensor:
    """Numbers as float32; masks, places and classes as they are."""
    return array.float() if array.is_floating_point() else array


class Encoder:
    """A :class:`mmc.extract.backbones.base.Backbone` from one or two towers.

    The fields are what a first forward of a gray image and of an empty text gives.
    """

    def __init__(
        self,
        *,
        image: ImageTower | None,
        text: TextTower | None,
        fused: FusedTower | None = None,
        device: str,
        dtype: torch.dtype,
        identity: dict[str, Any],
        context: dict[str, Any],
        prompt_template: str = PROMPT,
        model: nn.Module | None = None,
    ) -> None:
        self.model = model
        """What the towers are parts of, where it can be tuned."""
        self._image = image
        self._text = text
        self._fused = fused
        self._device = torch.device(device)
        self._dtype = dtype
        self._normalize = Normalizer(image.transform).to(self._device) if image else None
        self._tokenizing = threading.Lock()
        self.image_transform = image.transform if image else None
        self.prompt_template = prompt_template
        self.identity = identity
        self.context = context
        self.fields = field_table(self._shapes())
        self.default_fields = tuple(name for name in ("image", "text") if name in self.fields)

    def tokenize(self, texts: list[str]) -> TokenBatch:
        """Token ids of ``texts``, truncated to the model's length; deterministic."""
        if self._text is None:
            raise InputError("this backbone has no text tower")
        with self._tokenizing:
            return self._text.tokenize(list(texts))

    def embed_image(self, pixels: Tensor) -> Tensor:
        """``image`` (B, D) float32 of uint8 (B, 3, H, W), with gradients where they are enabled."""
        return self._image_fields(pixels)["image"].float()

    def embed_text(self, tokens: TokenBatch) -> Tensor:
        """``text`` (B, D) float32 of tokenized texts, with gradients where they are enabled."""
        return self._text_fields(tokens, ("text",))["text"]

    @torch.no_grad()
    def encode_image(self, pixels: Tensor, fields: Sequence[str]) -> dict[str, Tensor]:
        """``image`` (B, D), ``image_tokens`` (B, P, Dv), …: float32, of uint8 (B, 3, H, W)."""
        check_fields(fields, self.fields, "image")
        found = self._image_fields(pixels)
        return {name: as_given_out(found[name]) for name in fields}

    @torch.no_grad()
    def encode_text(self, tokens: TokenBatch, fields: Sequence[str]) -> dict[str, Tensor]:
        """``text`` (B, D), ``text_tokens`` (B, T, Dt) float32, ``text_mask`` (B, T) bool, and
        ``text_ids`` (B, T) int32; for the last two alone the network does not run.
        """
        check_fields(fields, self.fields, "text")
        found = self._text_fields(tokens, fields)
        return {name: found[name] for name in fields}

    @torch.no_grad()
    def encode_fused(
        self, pixels: Tensor, tokens: TokenBatch, fields: Sequence[str]
    ) -> dict[str, Tensor]:
        """Fused and image fields of uint8 images (B, 3, H, W) and the texts of the same samples.

        The image tower runs once. Texts are used at their full length T, whatever the batch.
        """
        from_image = [name for name in fields if self._tower(name) == "image"]
        check_fields([name for name in fields if name not in from_image], self.fields, "fused")
        image = self._image_fields(pixels)
        found = {name: as_given_out(image[name]) for name in from_image}
        if len(from_image) < len(fields):
            found |= self._fused_fields(image, tokens)
        return {name: found[name] for name in fields}

    def _tower(self, field: str) -> str | None:
        return self.fields[field].tower if field in self.fields else None

    def _image_fields(self, pixels: Tensor) -> Mapping[str, Tensor]:
        assert self._image is not None
        assert self._normalize is not None
        inputs = self._normalize(pixels.to(self._device, non_blocking=True), self._dtype)
        return self._image.forward(inputs)

    def _text_fields(self, tokens: TokenBatch, wanted: Collection[str]) -> dict[str, Tensor]:
        """The wanted fields, and others that cost nothing beside them."""
        assert self._text is not None
        lengths = tokens.lengths.to(self._device, non_blocking=True)
        mask = torch.arange(self._text.length, device=self._device) < lengths[:, None]
        ids = tokens.ids[:, : self._text.length].to(self._device, torch.int32)
        read = {"text_mask": mask, "text_ids": ids.masked_fill(~mask, 0)}
        if read.keys() >= set(wanted):
            return read
        seen = tokens.cut().to(self._device, non_blocking=True)
        pooled, states = self._text.forward(seen, lengths)
        found = {"text": pooled.float()}
        if states is not None and "text_tokens" in wanted:
            found["text_tokens"], _ = masked_tokens(states, lengths, self._text.length)
        return found | read

    def _fused_fields(self, image: Mapping[str, Tensor], tokens: TokenBatch) -> dict[str, Tensor]:
        assert self._fused is not None
        assert self._text is not None
        ids = tokens.ids.to(self._device, non_blocking=True)
        lengths = tokens.lengths.to(self._device, non_blocking=True)
        given = self._fused.forward(image, ids, lengths)
        found = {name: array.float() for name, array in given.items()}
        found["fused_tokens"], found["fused_mask"] = masked_tokens(
            given["fused_tokens"], lengths, self._text.length
        )
        return found

    @torch.no_grad()
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape per sample of every field, from one forward of each tower."""
        found: dict[str, Tensor] = {}
        if self._image is not None:
            gray = torch.full((1, 3, *self._image.transform.size), 128, dtype=torch.uint8)
            found |= self._image_fields(gray)
        if self._text is not None:
            empty = self._text.tokenize([""])
            found |= self._text_fields(empty, ("text", "text_tokens"))
            if self._fused is not None:
                found |= self._fused_fields(found, empty)
        return {name: tuple(array.shape[1:]) for name, array in found.items()}
