"""Small pictures of a store's rows."""

from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from mmc.extract.images import ImageError
from mmc.extract.thumbnails import Thumbnails
from mmc.store import EmbeddingStore


def test_thumbnails_are_small_upright_and_without_metadata(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a secret"
    Image.new("RGB", (400, 200), (200, 30, 30)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (40, 30), (0, 0, 250)).save(tmp_path / "small.png")
    table = pa.table(
        {
            "id": ["a", "b", "c", "d", "e"],
            "image": ["turned.jpg", "small.png", "gone.jpg", None, "../outside.jpg"],
        }
    )
    source = {"spec": "x", "image_root": str(tmp_path), "options": {}}
    EmbeddingStore.create(tmp_path / "s", table, label_set=(), task="unlabelled", source=source)
    thumbnail = Thumbnails(EmbeddingStore.open(tmp_path / "s"))
    turned = Image.open(BytesIO(thumbnail(0)))
    assert (turned.format, turned.size) == ("JPEG", (80, 160))
    assert not turned.getexif()
    assert b"secret" not in thumbnail(0)
    assert Image.open(BytesIO(thumbnail(1))).size == (40, 30)
    for row in (2, 3, 4):
        with pytest.raises(ImageError):
            thumbnail(row)
