"""From bytes to the uint8 RGB tensor that a model takes.

``decode`` gives the pixels of the reference path (``decode_reference``: Pillow, as open_clip uses
it) at two and a half times its speed and more: libjpeg through torchvision's operator where the
file is a plain JPEG, Pillow for the rest, and an antialiased resize on uint8. With bicubic
resampling 99 % of all values and more are those of Pillow and the rest differ by 1 or 2 of 255;
bilinear ties are rounded the other way, by 1. Whether a file is accepted is Pillow's decision.

Functions here are safe to call from many threads: decoding and resizing release the GIL.
"""

import io
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.io  # noqa: F401  (registers the operators)
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as resizing

from mmc.extract.transforms import ImageTransform, OriginalSize, Pyramid, Transform
from mmc.store.errors import MmcError

DEFAULT_MAX_PIXELS = 89_478_485
"""Pictures with more pixels are refused before anything is decoded (Pillow's own warning level)."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Formats that are read where Pillow was built with them (JPEG includes MPO). Left out on purpose:
those that run other programs (EPS) or hold files whose size the header does not tell (ICO)."""

Image.init()
_READABLE = [name for name in FORMATS if name in Image.OPEN]
# The limit is an argument of every call here; Pillow's is one number for the whole process, and
# between its two thresholds it only warns.
Image.MAX_IMAGE_PIXELS = None
# Pillow warns about odd metadata of pictures that it reads well; catch_warnings is not thread-safe.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# The operator itself: its Python wrapper warns at every call that torchvision will drop it one day.
# Where it is gone, Pillow decodes, with the same pixels.
_JPEG_OPERATOR = getattr(torch.ops.image, "decode_jpeg", None)
_JPEG_END = b"\xff\xd9"
_RGB = 3  # torchvision's ImageReadMode.RGB

_TORCH_MODES = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
}
_PILLOW_MODES = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# A strip of 5000 x 1 pixels would be resized to 1,120,000 x 224 before the crop. Past this many
# times the pixels of the crop, Pillow resamples the crop alone, with the same geometry.
_MOST_RESIZED_PER_CROP = 8


class ImageError(MmcError):
    """One image cannot be used; the message is the reason, in a few words."""


def read_image(path: str | os.PathLike[str], offset: int | None = None, size: int = -1) -> bytes:
    """Bytes of an image file, or ``size`` bytes from ``offset`` of a file that holds many.

    Raises:
        ImageError: no such file, a directory, a dangling link, not readable.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ImageError("a directory, not a file")
        if not stat.S_ISREG(mode):
            raise ImageError("not a regular file")  # reading a pipe would wait for ever
        with path.open("rb") as file:
            file.seek(offset or 0)
            return file.read(size)
    except FileNotFoundError:
        reason = "a link to a file that does not exist" if path.is_symlink() else "no such file"
        raise ImageError(reason) from None
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from None


def decode(data: bytes, transform: Transform, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Tensor:
    """Decode one image file and bring it to the size, or the sizes, that a model takes.

    Args:
        data: the file's bytes; the format is recognised from them, not from a name.
        transform: geometry and resampling; normalisation is the backbone's, on the device.
        max_pixels: pictures with more are refused from the header alone.

    Returns:
        uint8 of ``transform.shape``, contiguous; with ``OriginalSize`` (3, H, W) of the file.

    Raises:
        ImageError: not an image, truncated, damaged, or too large.
    """
    return fit(decode_rgb(data, max_pixels=max_pixels), transform)


def decode_rgb(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Tensor:
    """The upright picture in its own size, uint8 (3, H, W); see :func:`decode`."""
    image = _open(data, max_pixels)
    pixels = _jpeg_pixels(data, image)
    return _as_tensor(_load_rgb(image)) if pixels is None else pixels


def shrink(
    data: bytes, *, max_side: int, quality: int, max_pixels: int = DEFAULT_MAX_PIXELS
) -> bytes:
    """The picture as an upright RGB JPEG whose longest side is ``max_side`` at most.

    It is never enlarged. A JPEG that is small enough and upright, gray or RGB, is given back as it
    is: no generation is lost, and the pixels that a model sees stay the same.

    Args:
        quality: of the JPEG that is written, 1 to 100.

    Raises:
        ImageError: as :func:`decode`.
    """
    pixels = decode_rgb(data, max_pixels=max_pixels)
    height, width = pixels.shape[1:]
    if max(height, width) <= max_side:
        header = _open(data, max_pixels)
        if header.format == "JPEG" and header.mode in ("RGB", "L") and _orientation(header) == 1:
            return data
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if max(height, width) > max_side:
        scale = max_side / max(height, width)
        sides = (max(1, round(width * scale)), max(1, round(height * scale)))
        picture = picture.resize(sides, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def fit(pixels: Tensor, transform: Transform) -> Tensor:
    """Bring an upright picture uint8 (3, H, W) to what ``transform`` says; ``pixels`` stays."""
    if isinstance(transform, OriginalSize):
        return pixels.contiguous()
    if isinstance(transform, Pyramid):
        levels = [_fit(pixels, transform.level(number)) for number in range(transform.levels)]
        return torch.cat([_tiles(level, transform.base.size) for level in levels])
    return _fit(pixels, transform)


def _tiles(level: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, n * H, m * W) cut into (n * m, 3, H, W), row by row; size is (H, W)."""
    height, width = size
    cut = level.unflatten(1, (-1, height)).unflatten(3, (-1, width))
    return cut.permute(1, 3, 0, 2, 4).flatten(0, 1)


def decode_reference(
    data: bytes, transform: ImageTransform, *, max_pixels: int = DEFAULT_MAX_PIXELS
) -> Tensor:
    """As :func:`decode`, every step by Pillow: the pixels that the model's own library computes."""
    return _as_tensor(_fit_with_pillow(_load_rgb(_open(data, max_pixels)), transform))


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The image with its header read and its size checked; pixels are not decoded yet."""
    try:
        image = Image.open(io.BytesIO(data), formats=_READABLE)
    except UnidentifiedImageError:
        raise ImageError(_what_it_is(data)) from None
    except Exception as error:  # what a decoder raises on hostile bytes is anyone's guess
        raise ImageError(f"damaged: {_first_line(error)}") from None
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"too large: {image.width} x {image.height} pixels, the limit is {max_pixels}"
        )
    return image


def _jpeg_pixels(data: bytes, image: Image.Image) -> Tensor | None:
    """Upright pixels uint8 (3, H, W) of a plain JPEG, or None where Pillow has to decode.

    Gray and colour files only: CMYK is converted by another formula. A file that does not end as
    it should may be truncated, and then Pillow decides.
    """
    plain = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
    if _JPEG_OPERATOR is None or not plain or not data.endswith(_JPEG_END):
        return None
    try:
        pixels: Tensor = _JPEG_OPERATOR(torch.frombuffer(bytearray(data), dtype=torch.uint8), _RGB)
    except RuntimeError:
        return None
    if tuple(pixels.shape) != (3, image.height, image.width):
        return None
    return _upright(pixels, _orientation(image))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where there is none or the block is damaged."""
    if not any(key in image.info for key in ("exif", "xmp", "XML:com.adobe.xmp")):
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # a damaged block of metadata says nothing about the pixels
        return 1
    return value if value in range(1, 9) else 1


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    """Undo an EXIF orientation on (3, H, W); a view."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 2)
    # After the transposition of 5 to 8: which axes run backwards.
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation)
    return pixels.flip(flips) if flips else pixels


def _load_rgb(image: Image.Image) -> Image.Image:
    """Decode with Pillow, turn upright, convert to RGB; the first frame of an animation."""
    try:
        image.load()
        orientation = _orientation(image)
        if image.mode.startswith("I;16"):
            # convert("RGB") would clip everything above 255 to white.
            wide = np.asarray(image).astype(np.uint32)
            image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
        image.info.pop("transparency", None)  # dropped; Pillow warns about some of its forms
        rgb = image.convert("RGB")
        if orientation != 1:
            method = _TURNS[orientation]
            rgb = rgb.transpose(method)
        return rgb
    except Exception as error:  # what a decoder raises on hostile bytes is anyone's guess
        raise ImageError(_why_damaged(image, error)) from None


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _as_tensor(rgb: Image.Image) -> Tensor:
    """uint8 (3, H, W), contiguous."""
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def _is_strip(height: int, width: int, transform: ImageTransform) -> bool:
    resized_height, resized_width = transform.resized(height, width)
    crop_height, crop_width = transform.size
    return resized_height * resized_width > _MOST_RESIZED_PER_CROP * crop_height * crop_width


def _fit(pixels: Tensor, transform: ImageTransform) -> Tensor:
    """Resize and crop or pad uint8 (3, H, W) to the model's size."""
    if _is_strip(pixels.shape[1], pixels.shape[2], transform):
        rgb = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        return _as_tensor(_fit_with_pillow(rgb, transform))
    new_height, new_width = transform.resized(pixels.shape[1], pixels.shape[2])
    pixels = _resize(pixels, new_height, new_width, transform)
    height, width = transform.size
    top = transform.crop_start(new_height, height)
    left = transform.crop_start(new_width, width)
    if new_height < height or new_width < width:
        canvas = torch.full((3, height, width), transform.fill, dtype=torch.uint8)
        part = pixels[:, max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width]
        y, x = max(-top, 0), max(-left, 0)
        canvas[:, y : y + part.shape[1], x : x + part.shape[2]] = part
        return canvas
    return pixels[:, top : top + height, left : left + width].contiguous()


def _resize(pixels: Tensor, new_height: int, new_width: int, transform: ImageTransform) -> Tensor:
    """Resample uint8 (3, H, W) as the transform's library does, to the rounding."""
    height, width = pixels.shape[1:]
    # Pillow (13) resamples columns first where that saves more than twice as many rows as doing
    # rows first saves columns; torch always begins with rows.
    columns_first = height - new_height > max(0, 2 * (width - new_width))
    if columns_first and transform.resampler == "pillow":
        pixels = _resample(pixels, new_height, width, transform)
    return _resample(pixels, new_height, new_width, transform)


def _resample(pixels: Tensor, height: int, width: int, transform: ImageTransform) -> Tensor:
    if pixels.shape[1:] == (height, width):
        return pixels
    mode = _TORCH_MODES[transform.interpolation]
    resized: Tensor = resizing.resize(pixels, [height, width], interpolation=mode, antialias=True)
    return resized


def _fit_with_pillow(rgb: Image.Image, transform: ImageTransform) -> Image.Image:
    """Resize and crop or pad to the model's size, as the libraries do it."""
    new_height, new_width = transform.resized(rgb.height, rgb.width)
    height, width = transform.size
    top = transform.crop_start(new_height, height)
    left = transform.crop_start(new_width, width)
    method = _PILLOW_MODES[transform.interpolation]
    y, x = max(top, 0), max(left, 0)
    part_size = min(width, new_width - x), min(height, new_height - y)
    if _is_strip(rgb.height, rgb.width, transform):
        # A box in source coordinates keeps the geometry (rounding may differ by 1 or 2 of 255:
        # Pillow orders its two passes by their cost). Its far edge must not leave the picture.
        across, down = rgb.width / new_width, rgb.height / new_height
        right = min((x + part_size[0]) * across, rgb.width)
        bottom = min((y + part_size[1]) * down, rgb.height)
        part = rgb.resize(part_size, method, box=(x * across, y * down, right, bottom))
    else:
        part = rgb.resize((new_width, new_height), method)
        part = part.crop((x, y, x + part_size[0], y + part_size[1]))
    if part.size == (width, height):
        return part
    canvas = Image.new("RGB", (width, height), (transform.fill,) * 3)
    canvas.paste(part, (max(-left, 0), max(-top, 0)))
    return canvas


_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the image (run `git lfs pull`)"),
    (b"<!doctype html", "not an image: an HTML page"),
    (b"<html", "not an image: an HTML page"),
    (b"<svg", "not a raster image: SVG"),
    (b"<?xml", "not an image: an XML document"),
    (b"<error", "not an image: an XML document"),
    (b"%pdf", "not an image: a PDF document"),
    (b"{", "not an image: JSON text"),
    (b"[", "not an image: JSON text"),
    (b"pk\x03\x04", "not an image: a ZIP archive"),
    (b"\x1f\x8b", "not an image: gzip data"),
)


def _what_it_is(data: bytes) -> str:
    """Why Pillow does not recognise these bytes."""
    if not data:
        return "an empty file"
    if data.startswith((b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF")):
        return f"truncated or damaged header ({len(data)} bytes)"
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"<?xml") and b"<svg" in data[:4096].lower():
        return "not a raster image: SVG"
    for signature, reason in _SIGNATURES:
        if start.startswith(signature):
            return reason
    return "not an image in a known format"


def _why_damaged(image: Image.Image, error: Exception) -> str:
    text = _first_line(error)
    kind = image.format or "image"
    if "truncated" in text:
        return f"truncated {kind} ({text})"
    return f"damaged {kind}: {text}"


def _first_line(error: Exception) -> str:
    lines: list[Any] = str(error).strip().splitlines()
    return str(lines[0]) if lines else type(error).__name__
