"""The bytes and texts of a store's rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmc.extract.images import ImageError, read_image
from mmc.extract.plan import Rows
from mmc.extract.sources import resolve_image


class Content:
    """Pictures and texts by row; safe to use from several threads."""

    def __init__(self, samples: pa.Table, sources: Sequence[dict[str, Any]]) -> None:
        self._image = samples["image"].combine_chunks()
        self._offset = samples["image_offset"].combine_chunks()
        self._size = samples["size"].combine_chunks()
        self._source = samples["_source"].to_numpy()
        self._text = samples["text"].combine_chunks()
        self._sources = sources

    def texts(self, rows: Rows) -> list[str]:
        """The text of each row; a row without text has the empty one."""
        return [text or "" for text in self._text.take(pa.array(rows)).to_pylist()]

    def image_bytes(self, row: int) -> bytes:
        """The encoded picture of a row.

        Raises:
            ImageError: it cannot be read, or lies outside the image root.
        """
        try:
            path = resolve_image(self._sources[self._source[row]], self._image[row].as_py())
        except ValueError as error:
            raise ImageError(str(error)) from None
        offset = self._offset[row].as_py()
        return (
            read_image(path)
            if offset is None
            else read_image(path, offset, self._size[row].as_py())
        )


def without_image(samples: pa.Table) -> NDArray[np.bool_]:
    """(N,) rows that name no image."""
    missing: NDArray[np.bool_] = samples["image"].is_null().to_numpy()
    return missing
