"""Pixels that are not one picture of the model's size: pyramids of tiles, the file's own size."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mmc.extract.images import decode, decode_rgb, fit
from mmc.extract.transforms import ImageTransform, OriginalSize, Pyramid
from mmc.store.errors import InputError

BASE = ImageTransform(
    size=(12, 16), resize="squash", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), crop="floor"
)


def encoded(height: int, width: int, kind: str = "JPEG", **options: object) -> bytes:
    """A picture in which every pixel differs from its neighbours."""
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def put_together(tiles: torch.Tensor, side: int) -> torch.Tensor:
    """(side * side, 3, H, W), row by row, to (3, side * H, side * W)."""
    rows = [torch.cat(list(tiles[r * side : (r + 1) * side]), dim=2) for r in range(side)]
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("resize", ["squash", "shortest", "cover", "contain"])
def test_tiles_of_each_level_are_the_picture_resized_to_it(kind, resize):
    base = ImageTransform(size=(12, 16), resize=resize, fill=7)
    pyramid = Pyramid(base=base, levels=3)
    data = encoded(75, 50, kind)
    tiles = decode(data, pyramid)
    assert tiles.shape == pyramid.shape == (21, 3, 12, 16)
    assert tiles.is_contiguous()
    first = 0
    for level, side in enumerate((1, 2, 4)):
        whole = ImageTransform(size=(12 * side, 16 * side), resize=resize, fill=7)
        assert pyramid.level(level) == whole
        found = put_together(tiles[first : first + side * side], side)
        np.testing.assert_array_equal(found, decode(data, whole))
        first += side * side


def test_a_larger_size_before_the_crop_grows_with_the_level():
    base = ImageTransform(size=(8, 8), resize_to=(10, 10))
    tiles = decode(encoded(40, 60), Pyramid(base=base, levels=2))
    whole = decode(encoded(40, 60), ImageTransform(size=(16, 16), resize_to=(20, 20)))
    np.testing.assert_array_equal(put_together(tiles[1:], 2), whole)


def test_places_say_level_row_and_column():
    pyramid = Pyramid(base=BASE, levels=2)
    expected = [[0, 0, 0], [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]]
    assert pyramid.places.tolist() == expected
    tiles = decode(encoded(24, 32, "PNG"), pyramid)
    whole = decode(encoded(24, 32, "PNG"), pyramid.level(1))
    for tile, (level, row, column) in zip(tiles, pyramid.places, strict=True):
        if level == 1:
            part = whole[:, row * 12 : row * 12 + 12, column * 16 : column * 16 + 16]
            np.testing.assert_array_equal(tile, part)


def test_the_original_size_is_the_upright_file():
    plain = encoded(30, 50)
    pixels = decode(plain, OriginalSize())
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (3, 30, 50))
    reference = np.asarray(Image.open(io.BytesIO(plain)).convert("RGB"))
    np.testing.assert_array_equal(pixels.permute(1, 2, 0), reference)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = decode(encoded(30, 50, exif=exif), OriginalSize())
    np.testing.assert_array_equal(turned, pixels.rot90(-1, (1, 2)))
    assert turned.is_contiguous()


def test_one_decoded_picture_serves_every_size_and_stays_as_it_is():
    data = encoded(40, 60)
    picture = decode_rgb(data)
    before = picture.clone()
    for transform in (BASE, Pyramid(base=BASE, levels=2), OriginalSize()):
        np.testing.assert_array_equal(fit(picture, transform), decode(data, transform))
    np.testing.assert_array_equal(picture, before)


def test_shapes_and_geometry():
    pyramid = Pyramid(base=BASE, levels=2)
    assert BASE.shape == (3, 12, 16)
    assert pyramid.shape == (5, 3, 12, 16)
    assert OriginalSize().shape is None
    plain = ImageTransform(size=(12, 16), resize="squash", crop="floor", scale=1.0)
    assert BASE.geometry == plain
    assert pyramid.geometry == Pyramid(base=plain, levels=2)
    assert OriginalSize().geometry == OriginalSize()


def test_fingerprints_tell_them_apart():
    transforms = [BASE, Pyramid(base=BASE, levels=1), Pyramid(base=BASE, levels=2), OriginalSize()]
    found = [transform.as_dict() for transform in transforms]
    assert all(found[i] != found[j] for i in range(4) for j in range(i))
    assert found[2] == {**BASE.as_dict(), "pyramid": 2}


@pytest.mark.parametrize("levels", [0, -1, 7])
def test_levels_out_of_range(levels):
    with pytest.raises(InputError, match=f"1 to 6 levels, got {levels}"):
        Pyramid(base=BASE, levels=levels)
