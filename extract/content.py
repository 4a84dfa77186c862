"""The bytes and texts of a store's rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmc.extract.images import ImageError, read_image
from mmc.extract.plan import Rows
from mmc.extract.sources import resolve_image
from mmc.extract.sources.embedded import read_picture, table_of


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
        file, column = table_of(self._image[row].as_py())
        offset = self._offset[row].as_py()
        try:
            path = resolve_image(self._sources[self._source[row]], file)
            if column is not None and offset is not None:
                return read_picture(path, column, offset)
        except (ValueError, OSError) as error:
            raise ImageError(str(error)) from None
        return (
            read_image(path)
            if offset is None
            else read_image(path, offset, self._size[row].as_py())
        )


def holds(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """(N,) rows that have something in a column."""
    present: NDArray[np.bool_] = column.is_valid().to_numpy()
    return present


def content_keys(samples: pa.Table, tower: str) -> pa.ChunkedArray:
    """(N,) key of what a tower reads of each row; null where it shares that with no other row."""
    if tower == "fused":
        return pc.binary_join_element_wise(samples["image_key"], samples["text_key"], " ")
    keys = samples[f"{tower}_key"]
    # A sample without text has the empty one, as many of them as there are.
    return keys.fill_null("") if tower == "text" else keys
