"""Small pictures of a store's rows, for pages and previews."""

import io
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from PIL import Image

from mmc.extract.content import Content
from mmc.extract.images import ImageError, decode_rgb
from mmc.extract.sources import resolve_image
from mmc.extract.sources.embedded import table_of

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

SIDE, QUALITY = 160, 70


class Thumbnails:
    """Row -> a small JPEG of its picture, upright, without metadata, and where the picture is."""

    def __init__(self, store: "EmbeddingStore", *, side: int = SIDE) -> None:
        columns = ("image", "image_offset", "size", "_source", "text")
        samples = pa.table({name: store.column(name) for name in columns})
        self._image, self._source = samples["image"], samples["_source"]
        self._offset = samples["image_offset"]
        self._sources = store.sources
        self._content = Content(samples, store.sources)
        self._side = side

    def __call__(self, row: int) -> bytes:
        """The bytes of a JPEG whose longer side is 160 pixels at most.

        Raises:
            ImageError: the row has no picture, or it cannot be used any more.
        """
        if self._known_source(row) is None:
            raise ImageError("not recorded where it lies")
        pixels = decode_rgb(self._content.image_bytes(row))
        picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        picture.thumbnail((self._side, self._side))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=QUALITY)
        return file.getvalue()

    def path(self, row: int) -> str | None:
        """Absolute path of a picture that is a file of its own and lies where it may, else None."""
        source = self._known_source(row)
        if source is None or self._offset[row].is_valid:
            return None
        file, column = table_of(self._image[row].as_py())
        if column is not None:
            return None
        try:
            return str(resolve_image(source, file).absolute())
        except ValueError:
            return None

    def _known_source(self, row: int) -> dict[str, Any] | None:
        """The recipe of the row's source; None where no picture can be found by it."""
        source = self._sources[self._source[row].as_py()]
        there = self._image[row].is_valid and source.get("image_root") is not None
        return source if there else None
