"""What a model wants of an image: geometry, resampling and normalisation, as plain numbers.

Three libraries resize and crop by three slightly different rules. ``ImageTransform`` names each
rule, so that one decoder serves them all, and its fields go into the fingerprint of the features.
No torch here: the numbers are applied in :mod:`mmc.extract.images` and in the backbones.

A backbone takes one picture (``ImageTransform``), the tiles of several sizes of it (``Pyramid``),
or the file's own pixels (``OriginalSize``). What they share: ``shape`` of the pixels of one
picture, ``geometry`` (what decoding depends on) and ``as_dict()`` for the fingerprint.

Sizes are (height, width) in pixels.
"""

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mmc.store.errors import InputError

Resize = Literal["shortest", "cover", "contain", "squash"]
Crop = Literal["round", "floor"]
Resampler = Literal["pillow", "torchvision"]
Interpolation = Literal["bilinear", "bicubic"]

DECODING = 1
"""Version of how bytes become upright RGB in :mod:`mmc.extract.images`; part of the fingerprint."""

MOST_LEVELS = 6
"""Of a pyramid; more are 5,461 tiles and more for each picture."""

_CHOICES = {
    "resize": Resize,
    "crop": Crop,
    "interpolation": Interpolation,
    "resampler": Resampler,
}


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """Evaluation preprocessing of one model: EXIF turn, RGB, resize, centre crop or pad, normalise.

    The picture is first turned upright by its EXIF orientation (as Pillow's ``exif_transpose``,
    transformers' ``load_image`` and cv2 do; open_clip leaves files to its caller) and converted to
    RGB as Pillow's ``convert("RGB")`` does: transparency is dropped, not composited. Only then is
    it resized.
    """

    size: tuple[int, int]
    """Height and width that the model takes."""
    resize: Resize = "shortest"
    """``shortest``: the shortest side becomes ``resize_to[0]``, the other is rounded down;
    ``cover`` / ``contain``: the smallest / largest scale that covers / fits ``resize_to``, both
    sides rounded to nearest; ``squash``: exactly ``resize_to``, whatever the aspect ratio."""
    resize_to: tuple[int, int] | None = None
    """Height and width before the crop; None: ``size``."""
    crop: Crop = "round"
    """How half a pixel is settled when the crop is centred: to even (torchvision) or down."""
    interpolation: Interpolation = "bicubic"
    """Antialiased resampling."""
    resampler: Resampler = "pillow"
    """Whose resampling is followed to the rounding: the two run their two passes in another
    order for tall pictures, where a fifth of all values then differ by 1 of 255."""
    fill: int = 0
    """Value of pixels (0 to 255) where the resized picture is smaller than ``size``."""
    scale: float = 1 / 255
    """Factor on 8-bit values before normalising."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Subtracted from the scaled red, green and blue."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """What the difference is divided by."""

    def __post_init__(self) -> None:
        for name in ("size", "resize_to"):
            sides = getattr(self, name)
            if sides is not None and (len(sides) != 2 or min(sides) < 1):
                raise InputError(f"image {name} must be two positive sides, got {sides!r}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(f"three means and positive stds, got {self.mean!r}, {self.std!r}")
        for name, kind in _CHOICES.items():
            value, allowed = getattr(self, name), get_args(kind)
            if value not in allowed:
                raise InputError(f"image {name} {value!r}: choose from {', '.join(allowed)}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the pixels of one picture: (3, H, W)."""
        return (3, *self.size)

    @property
    def geometry(self) -> "ImageTransform":
        """The same without normalisation: backbones that differ in no more share their pixels."""
        return replace(self, scale=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, for the fingerprint of the features."""
        fields = dataclasses.asdict(self)
        fields["resize_to"] = self.resize_to or self.size
        fields["decoding"] = DECODING
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
        }

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize of a picture of ``height`` x ``width``, at least 1."""
        to_height, to_width = self.resize_to or self.size
        if self.resize == "squash":
            return to_height, to_width
        if self.resize == "shortest":
            # Both libraries truncate a float quotient, so this does too: // could differ by one.
            if height <= width:
                return to_height, max(1, int(to_height * width / height))
            return max(1, int(to_height * height / width)), to_height
        ratios = height / to_height, width / to_width
        ratio = max(ratios) if self.resize == "contain" else min(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def crop_start(self, resized: int, side: int) -> int:
        """First row (or column) of the centred crop of ``side`` from ``resized`` pixels.

        Negative where the picture is smaller: then that many pixels of padding come first.
        """
        if resized < side:
            return -((side - resized) // 2)
        half = (resized - side) / 2
        return round(half) if self.crop == "round" else int(half)


@dataclass(frozen=True, kw_only=True)
class Pyramid:
    """A picture at sizes that double from level to level, each cut into tiles of the model's size.

    Level i is the base transform at 2^i times its size, cut into 2^i x 2^i tiles. Tiles are in
    order of level, then row, then column. Pyramid-Forwarding of Xu et al. 2022 (arXiv:2208.09562):
    a model sees a large picture in detail without being trained for it.
    """

    base: ImageTransform
    """Level 0: the picture as the model itself takes it."""
    levels: int
    """At least 1, which is the base alone."""

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= MOST_LEVELS:
            raise InputError(f"a pyramid has 1 to {MOST_LEVELS} levels, got {self.levels}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the pixels of one picture: (K, 3, H, W) with K = 1 + 4 + 16 + … tiles."""
        return (sum(4**level for level in range(self.levels)), *self.base.shape)

    @property
    def places(self) -> NDArray[np.int64]:
        """(K, 3): level, row and column of each tile."""
        return np.array(
            [
                (level, row, column)
                for level in range(self.levels)
                for row in range(2**level)
                for column in range(2**level)
            ]
        )

    def level(self, number: int) -> ImageTransform:
        """What the whole of a level is resized by, before it is cut."""
        height, width = self.base.size
        to = self.base.resize_to
        return replace(
            self.base,
            size=(height << number, width << number),
            resize_to=to and (to[0] << number, to[1] << number),
        )

    @property
    def geometry(self) -> "Pyramid":
        """The same without normalisation."""
        return replace(self, base=self.base.geometry)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, for the fingerprint of the features."""
        return {**self.base.as_dict(), "pyramid": self.levels}


@dataclass(frozen=True, kw_only=True)
class OriginalSize:
    """The upright RGB picture in its own size: the backbone itself resizes, as detectors do."""

    @property
    def shape(self) -> None:
        """Each picture has its own."""
        return None

    @property
    def geometry(self) -> "OriginalSize":
        """The same."""
        return self

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, for the fingerprint of the features."""
        return {"size": "original", "decoding": DECODING}


Transform = ImageTransform | Pyramid | OriginalSize
"""What a backbone may ask for."""
