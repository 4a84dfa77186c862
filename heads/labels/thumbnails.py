"""Small pictures of samples, inside a page: ``data:`` addresses, so that nothing else is needed."""

import base64
import io
import os
import warnings
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

SIDE, QUALITY = 96, 70


class Thumbnails:
    """Pictures of a store's samples, as far as their files are still where they were."""

    def __init__(self, store: "EmbeddingStore") -> None:
        names = ("image", "image_offset", "size", "_source")
        self._columns = {name: store.column(name) for name in names}
        self._roots = [source.get("image_root") for source in store.sources]

    def of(self, row: int) -> str | None:
        """The picture of a row of the store as a ``data:`` address; None where it cannot be had."""
        image, offset, size, source = (c[row].as_py() for c in self._columns.values())
        root = self._roots[source] if source < len(self._roots) else None
        if image is None or "://" in image or not isinstance(root, str) or "://" in root:
            return None
        return _data_address(os.path.join(root, image), offset, size)


def _data_address(path: str, offset: int | None, size: int | None) -> str | None:
    try:
        with open(path, "rb") as file:
            if offset is not None:
                file.seek(offset)
            data = file.read(size if offset is not None and size is not None else -1)
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as opened:
            warnings.simplefilter("ignore")  # of metadata and of large pictures: thumbnails only
            opened.draft("RGB", (2 * SIDE, 2 * SIDE))
            small: Any = ImageOps.exif_transpose(opened)
            small.thumbnail((SIDE, SIDE))
            out = io.BytesIO()
            small.convert("RGB").save(out, "JPEG", quality=QUALITY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # moved, or no picture any more: the page does without
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
