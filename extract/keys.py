"""Content keys: what a sample's picture and text are, whatever it is called.

A key is the first 128 bits of SHA-256, in hex, over a picture's bytes or a text's UTF-8. On a CPU
with SHA instructions it was twice as fast as BLAKE2b on files of 14 and 100 kB. A file whose path,
size and modification time are those of the store's table keeps its key without being read, as in
git's index.
"""

import hashlib
import io
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmc.extract.sources import Samples, resolve_image
from mmc.extract.sources.duplicates import settle
from mmc.extract.sources.embedded import read_picture, table_of

_DIGITS = 32
_CHUNK = 64
"""Files per task: enough that handing tasks out costs nothing beside reading."""

Progress = Callable[[int, int], None]
_Place = tuple[str, int | None, int | None]
"""A picture: file, offset (None = the whole file) and bytes there."""
_Found = tuple[str | None, int | None, int | None]
"""Key, size, mtime_ns; all None when it cannot be read."""


def add_keys(
    samples: Samples, known: pa.Table | None, *, workers: int, progress: Progress | None = None
) -> pa.Table:
    """``samples.table`` with image_key, text_key (string), size and mtime_ns (int64).

    Args:
        samples: what a source gave.
        known: the store's table as it is now; None = no store yet.
        workers: threads that read files.
        progress: called with (pictures looked at, pictures).

    A picture that cannot be read has null in its three columns; so has a sample without one.
    """
    table = samples.table
    places, codes = _places(table)
    found = _look_at(places, samples.source, _known_keys(known), workers, progress)
    columns = {
        "image_key": pa.array([key for key, _, _ in found], pa.string()),
        "size": pa.array([size for _, size, _ in found], pa.int64()),
        "mtime_ns": pa.array([mtime for _, _, mtime in found], pa.int64()),
    }
    for name, values in columns.items():
        table = _set(table, name, values.take(codes))
    return _set(table, "text_key", _text_keys(table["text"]))


def drop_duplicates(samples: Samples, *, workers: int, report: Callable[[str], None]) -> None:
    """Leave out of ``samples`` what repeats another, as ``--dedupe`` asks, for who keeps no keys.

    Args:
        samples: what a source gave; its table and counts change.
        workers: threads that read files.
        report: called with each line on what was dropped.
    """
    kept = settle(samples, add_keys(samples, None, workers=workers), True, report)
    ids = samples.table["id"]
    samples.table = samples.table.filter(pc.is_in(ids, kept["id"].combine_chunks()))


def content_key(data: bytes) -> str:
    """The key of a content."""
    return hashlib.sha256(data).hexdigest()[:_DIGITS]


def _set(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, values)
    return table.append_column(name, values)


def _text_keys(texts: pa.ChunkedArray) -> pa.Array:
    encoded = texts.combine_chunks().dictionary_encode()
    keys = [content_key(text.encode()) for text in encoded.dictionary.to_pylist()]
    return pa.array(keys, pa.string()).take(encoded.indices)


def _places(table: pa.Table) -> tuple[list[_Place], pa.Array]:
    """The distinct pictures and, for each row, which of them it has (null = none)."""
    offsets = table["image_offset"]
    if offsets.null_count == len(offsets):
        encoded = table["image"].combine_chunks().dictionary_encode()
        return [(path, None, None) for path in encoded.dictionary.to_pylist()], encoded.indices
    columns = [table[name].to_pylist() for name in ("image", "image_offset", "size")]
    index: dict[_Place, int] = {}
    codes = [
        None
        if path is None
        else index.setdefault((path, offset, None if offset is None else size), len(index))
        for path, offset, size in zip(*columns, strict=True)
    ]
    return list(index), pa.array(codes, pa.int64())


def _known_keys(known: pa.Table | None) -> dict[tuple[Any, ...], str]:
    """{(image, offset, size, mtime_ns): key} of the pictures that the store has looked at."""
    if known is None:
        return {}
    names = ["image", "image_offset", "size", "mtime_ns", "image_key"]
    rows = known.select(names).filter(pc.is_valid(known["image_key"]))
    columns = [rows[name].to_pylist() for name in names]
    return {tuple(row[:-1]): row[-1] for row in zip(*columns, strict=True)}


def _look_at(
    places: list[_Place],
    source: dict[str, Any],
    known: dict[tuple[Any, ...], str],
    workers: int,
    progress: Progress | None,
) -> list[_Found]:
    def look_at(start: int) -> list[_Found]:
        with _Files(source) as files:
            return [_picture(place, files, known) for place in places[start : start + _CHUNK]]

    found: list[_Found] = []
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        for some in pool.map(look_at, range(0, len(places), _CHUNK)):
            found += some
            if progress is not None:
                progress(len(found), len(places))
    return found


class _Files:
    """Files of pictures, the last one kept open: pictures that are neighbours lie in one tar."""

    def __init__(self, source: dict[str, Any]) -> None:
        self._source = source
        self._image: str | None = None
        self._path = Path()
        self._column: str | None = None
        self._status: os.stat_result | None = None
        self._file: io.FileIO | None = None

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._status = self._image = None

    def status(self, image: str) -> os.stat_result:
        """Raises OSError when it is not there."""
        if image != self._image or self._status is None:
            self._close()
            file, self._column = table_of(image)
            self._path = resolve_image(self._source, file)
            self._status, self._image = os.stat(self._path), image
        return self._status

    def read(self, offset: int | None, size: int) -> bytes:
        """Bytes of the picture whose status was asked for last."""
        if offset is None:
            return _read(self._path)
        if self._column is not None:
            return read_picture(self._path, self._column, offset)
        if self._file is None:
            self._file = open(self._path, "rb", buffering=0)  # noqa: SIM115 (closed by _close)
        self._file.seek(offset)
        return self._file.read(size)


def _picture(place: _Place, files: _Files, known: dict[tuple[Any, ...], str]) -> _Found:
    image, offset, size = place
    try:
        status = files.status(image)
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device never end
            return None, None, None
        size = status.st_size if size is None else size
        key = known.get((image, offset, size, status.st_mtime_ns))
        if key is None:
            key = content_key(files.read(offset, size))
    except OSError:
        return None, None, None
    return key, size, status.st_mtime_ns


def _read(path: Path) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.readall()
