"""Small pictures of a store's rows, for pages and previews."""

import io
from typing import TYPE_CHECKING

import pyarrow as pa
from PIL import Image

from mmc.extract.content import Content
from mmc.extract.images import ImageError, decode_rgb

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

SIDE, QUALITY = 160, 70


class Thumbnails:
    """Row -> a small JPEG of its picture, upright, without metadata."""

    def __init__(self, store: "EmbeddingStore", *, side: int = SIDE) -> None:
        columns = ("image", "image_offset", "size", "_source", "text")
        samples = pa.table({name: store.column(name) for name in columns})
        self._image, self._source = samples["image"], samples["_source"]
        self._sources = store.sources
        self._content = Content(samples, store.sources)
        self._side = side

    def __call__(self, row: int) -> bytes:
        """The bytes of a JPEG whose longer side is 160 pixels at most.

        Raises:
            ImageError: the row has no picture, or it cannot be used any more.
        """
        source = self._sources[self._source[row].as_py()]
        if not self._image[row].is_valid or source.get("image_root") is None:
            raise ImageError("not recorded where it lies")
        pixels = decode_rgb(self._content.image_bytes(row))
        picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        picture.thumbnail((self._side, self._side))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=QUALITY)
        return file.getvalue()
