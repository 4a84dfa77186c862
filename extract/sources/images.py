"""The image column of a source: which folder, which file, what is missing."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from mmc.extract.sources.base import SourceOptions
from mmc.extract.sources.paths import BESIDE, SUSPECT, Listing, choose_root, safe_path
from mmc.store.errors import InputError

_SUSPECT = re.compile(SUSPECT)
_FIRST = 50
"""So many images of each table decide which folder they are in."""

Where = Callable[[int], str]


@dataclass(frozen=True, kw_only=True)
class ImageColumn:
    """One table's images as written; null = none."""

    values: pa.ChunkedArray
    folder: str
    """The table's folder, absolute."""
    sure: bool
    """Surely meant as images; otherwise an id that may name them."""
    where: Where
    """`file:line` of a row of this table."""


@dataclass(frozen=True, kw_only=True)
class Located:
    """The images of all tables, as paths below one root."""

    root: str | None
    columns: list[pa.ChunkedArray]
    """One for each table; null = none."""
    missing: int = 0
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def locate_images(
    columns: Sequence[ImageColumn | None],
    lengths: Sequence[int],
    has_text: bool,
    options: SourceOptions,
) -> Located:
    """Find the files of every table's image column.

    Args:
        columns: one for each table; None = it has none.
        lengths: rows of each table.
        has_text: the source can do without images.

    Raises:
        InputError: no image is there at all, a path leaves the root, or the root is no folder.
    """
    none = [pa.chunked_array([pa.nulls(rows, pa.string())]) for rows in lengths]
    given = [column for column in columns if column is not None]
    if not any(column.values.null_count < len(column.values) for column in given):
        return Located(root=None, columns=none)
    listings = _listings(given, options)
    tables = [
        None if column is None else _Table(column, listings[column.folder], options)
        for column in columns
    ]
    named = sum(table.named for table in tables if table)
    missing = sum(table.missing for table in tables if table)
    tried = _tried(given, options)
    if missing == named:
        if options.need_images and (not has_text or any(column.sure for column in given)):
            raise InputError(
                f"none of the {named} images is there, such as {_first(tables)} (looked in"
                f" {tried}); give --image-root, or --image-column - to do without images"
            )
        message = (
            f"no image found for {_first(tables)} and the others (looked in {tried}): read as texts"
            " only; give --image-root if there are images"
        )
        return Located(root=None, columns=none, warnings=[message] if options.need_images else [])
    root = os.path.commonpath([listing.root for listing in listings.values()])
    notes = [f"images: {named - missing} found under {root}"]
    notes += sorted({note for table in tables if table for note in table.notes})
    warnings = []
    if missing and options.need_images:
        warnings.append(
            f"{missing} of {named} images are not there, first {_first(tables)}; these samples will"
            " be counted as failed"
        )
    found = [
        empty if table is None else table.below(root)
        for empty, table in zip(none, tables, strict=True)
    ]
    return Located(root=root, columns=found, missing=missing, notes=notes, warnings=warnings)


def _tried(columns: Sequence[ImageColumn], options: SourceOptions) -> str:
    if options.image_root is not None:
        return os.path.abspath(options.image_root)
    folders = sorted({column.folder for column in columns})
    beside = ", ".join(f"{name}/" for name in BESIDE if name)
    return f"{', '.join(folders)} and its {beside}"


def _listings(columns: Sequence[ImageColumn], options: SourceOptions) -> dict[str, Listing]:
    """The image root of each table's folder."""
    if options.image_root is not None:
        root = os.path.abspath(os.path.expanduser(options.image_root))
        if not os.path.isdir(root):
            raise InputError(f"the image root {root} is not a folder; correct --image-root")
        return {column.folder: Listing(root) for column in columns}
    listings = {}
    for folder in {column.folder for column in columns}:
        first = [
            value
            for column in columns
            if column.folder == folder
            for value in pc.drop_null(column.values).slice(0, _FIRST).to_pylist()
            if not _SUSPECT.search(value)
        ]
        listings[folder] = choose_root([os.path.join(folder, name) for name in BESIDE], first)
    for listing in listings.values():
        listing.root = os.path.normpath(listing.root)
    return listings


class _Table:
    """The images of one table, located."""

    def __init__(self, column: ImageColumn, listing: Listing, options: SourceOptions) -> None:
        self._column = column
        self._listing = listing
        self._encoded = column.values.combine_chunks().dictionary_encode()
        self.notes: list[str] = []
        self.first_missing: str | None = None
        missing = []
        self._paths: list[str] = []
        for code, written in enumerate(self._encoded.dictionary.to_pylist()):
            path = self._safe(code, written, options)
            found = listing.locate(path)
            if found is None:
                missing.append(code)
            elif found != path and not self.notes:
                self.notes.append(f"images: {written!r} is the file {found!r}, and so on")
            self._paths.append(path if found is None else found)
        self.named = len(self._encoded) - self._encoded.null_count
        self.missing = 0
        if missing:
            is_missing = pc.is_in(self._encoded.indices, value_set=pa.array(missing, pa.int32()))
            self.missing = int(pc.sum(is_missing).as_py())
            row = pc.index(is_missing, True).as_py()
            self.first_missing = f"{column.where(row)} {column.values[row].as_py()!r}"

    def _safe(self, code: int, written: str, options: SourceOptions) -> str:
        if not _SUSPECT.search(written):
            return written
        try:
            return safe_path(written, self._listing.root, options.allow_absolute_paths)
        except InputError as error:
            row = pc.index(self._encoded.indices, code).as_py()
            raise InputError(f"{self._column.where(row)}: {error}") from None

    def below(self, root: str) -> pa.ChunkedArray:
        """(N,) string: each row's path from ``root``, the common root of all tables."""
        prefix = os.path.relpath(self._listing.root, root)
        paths = self._paths
        if prefix != ".":
            paths = [path if os.path.isabs(path) else f"{prefix}/{path}" for path in paths]
        return pa.chunked_array([pa.array(paths, pa.string()).take(self._encoded.indices)])


def _first(tables: Sequence[_Table | None]) -> str:
    return next(table.first_missing for table in tables if table and table.first_missing)
