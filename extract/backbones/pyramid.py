"""Pyramid-Forwarding: any image backbone on the tiles of a picture at several sizes.

``[pyramid=L]`` after any backbone with an image tower of fixed size S. Level i is the picture as
the backbone itself takes it but at 2^i times the size, cut into 2^i x 2^i tiles of size S; all
K = 1 + 4 + 16 + … tiles go through the unchanged network (Xu et al. 2022, arXiv:2208.09562).

Fields, tiles in order of level, row and column:

- ``image_tokens`` (K * P, Dv): the tokens of each tile, tile after tile, in the backbone's order
  within a tile. Level 0 comes first: the first P are those of the backbone without a pyramid.
- ``image_class`` (K, Dv): the class token of each tile, where the backbone has one.
- ``image_places`` (K * P, 3): level, row and column of the tile that a token is from, (K, 3) for
  backbones without tokens.
- all others (``image``, ``regions``, texts …) are the backbone's own, of level 0.

A network costs K times as much: 5 for two levels, 21 for three. Fields of level 0 alone cost no
more than without.

Shapes: B pictures, K tiles, P tokens of a tile, Dv features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from mmc.extract.backbones.base import Backbone, FusedBackbone, TokenBatch, check_fields
from mmc.extract.transforms import ImageTransform, Pyramid, Transform
from mmc.store.errors import InputError
from mmc.store.schema import FieldSpec

PLACES = "image_places"
_OF_ALL_TILES = ("image_tokens", "image_class")
_TILES_AT_ONCE = 256
"""On an accelerator: as many as pictures in a batch without a pyramid."""


def with_pyramid(backbone: Backbone, levels: str, *, device: str, spec: str) -> Backbone:
    """``backbone`` on all tiles of ``levels`` levels.

    Args:
        backbone: loaded.
        levels: the option as typed.
        device: where it runs.
        spec: the backbone as typed, for messages.

    Raises:
        InputError: not a number of levels, or a backbone that takes no pictures of a fixed size.
    """
    if not levels.isdecimal():
        raise InputError(f"{spec}: pyramid={levels}: give a number of levels, such as pyramid=2")
    transform = backbone.image_transform
    if transform is None:
        raise InputError(f"{spec}: a pyramid needs an image tower, and this backbone has none")
    if not isinstance(transform, ImageTransform):
        raise InputError(
            f"{spec}: a pyramid needs a backbone that takes pictures of one size; "
            "this one resizes them itself"
        )
    pyramid = Pyramid(base=transform, levels=int(levels))
    wrapper = _FusedOnTiles if hasattr(backbone, "encode_fused") else _OnTiles
    return wrapper(backbone, pyramid, device)


class _OnTiles:
    """A :class:`mmc.extract.backbones.base.Backbone` around another."""

    def __init__(self, backbone: Backbone, pyramid: Pyramid, device: str) -> None:
        self._backbone = backbone
        self._tiles = pyramid.shape[0]
        self.image_transform: Transform | None = pyramid
        self.fields: Mapping[str, FieldSpec] = self._fields()
        self.default_fields = backbone.default_fields
        self.identity: dict[str, Any] = {
            **backbone.identity,
            "preprocessing": pyramid.as_dict(),
        }
        self.context = backbone.context
        self.prompt_template = backbone.prompt_template
        own = getattr(backbone, "batch_size", None)
        # All tiles of a batch are in memory at once; a CPU's batches are small anyway.
        on_cpu = torch.device(device).type == "cpu"
        self.batch_size: int | None = own if on_cpu else max(1, _TILES_AT_ONCE // self._tiles)
        tokens = backbone.fields.get("image_tokens")
        places = torch.from_numpy(pyramid.places).to(torch.int16)
        self._places = places.repeat_interleave(tokens.shape[0] if tokens else 1, dim=0)
        self._device = torch.device(device)

    def _fields(self) -> dict[str, FieldSpec]:
        fields = dict(self._backbone.fields)
        count = self._tiles
        if "image_tokens" in fields:
            length, width = fields["image_tokens"].shape
            count = self._tiles * length
            fields["image_tokens"] = replace(fields["image_tokens"], shape=(count, width))
        if "image_class" in fields:
            shape = (self._tiles, *fields["image_class"].shape)
            fields["image_class"] = replace(fields["image_class"], shape=shape)
        fields[PLACES] = FieldSpec(name=PLACES, shape=(count, 3), dtype="int16", tower="image")
        return fields

    def tokenize(self, texts: list[str]) -> TokenBatch:
        """As the backbone does."""
        return self._backbone.tokenize(texts)

    def encode_text(self, tokens: TokenBatch, fields: Sequence[str]) -> dict[str, Tensor]:
        """As the backbone does."""
        return self._backbone.encode_text(tokens, fields)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor, fields: Sequence[str]) -> dict[str, Tensor]:
        """``fields`` of uint8 tiles (B, K, 3, H, W)."""
        check_fields(fields, self.fields, "image")
        of_first = [name for name in fields if name != PLACES]
        of_others = [name for name in of_first if name in _OF_ALL_TILES]
        # A tile's place in its batch is its picture's: level 0 is computed as without a pyramid.
        found = [self._backbone.encode_image(pixels[:, 0], of_first)] if of_first else []
        if of_others:
            found += [
                self._backbone.encode_image(pixels[:, tile], of_others)
                for tile in range(1, self._tiles)
            ]
        given = found[0] if found else {}
        for name in of_others:
            join = torch.cat if name == "image_tokens" else torch.stack
            given[name] = join([tile[name] for tile in found], dim=1)
        if PLACES in fields:
            given[PLACES] = self._places.to(self._device).expand(len(pixels), -1, -1)
        return {name: given[name] for name in fields}


class _FusedOnTiles(_OnTiles):
    """The same around a backbone that joins picture and text: what it joins is level 0."""

    @torch.no_grad()
    def encode_fused(
        self, pixels: Tensor, tokens: TokenBatch, fields: Sequence[str]
    ) -> dict[str, Tensor]:
        """``fields`` of uint8 tiles (B, K, 3, H, W) and the texts of the same samples."""
        many = [name for name in fields if name in (*_OF_ALL_TILES, PLACES)]
        once = [name for name in fields if name not in many]
        found = self.encode_image(pixels, many) if many else {}
        if once:
            fused = cast(FusedBackbone, self._backbone)
            found |= fused.encode_fused(pixels[:, 0], tokens, once)
        return {name: found[name] for name in fields}
