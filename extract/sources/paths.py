"""Image paths: which folder they start from, which file each one means, and that none leaves it.

A path in a table is data from someone else. It names a file at or below the image root, with `/`
between folders; absolute paths, `..` that climbs out and URLs are refused unless
``allow_absolute_paths``. Symbolic links are followed: only who owns the folder can put one there,
and linked image folders are usual.
"""

import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmc.extract.sources.embedded import table_of
from mmc.store.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".JPG", ".JPEG", ".PNG")
"""Tried, in this order, on names that are not files as they stand."""
BESIDE = ("", "data", "images", "Images", "img")
"""Folders beside a table that image paths may start from."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://?")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
SUSPECT = r"^[/\\]|^[A-Za-z][A-Za-z0-9+.-]*:[/\\]|(^|[/\\])\.\.?([/\\]|$)|//|\x00"
"""Matches every path that :func:`safe_path` may refuse or change (an RE2 pattern)."""


def safe_path(image: str, root: str, allow_absolute: bool = False) -> str:
    """``image`` as a path relative to ``root``; absolute where that is allowed and it lies outside.

    Raises:
        InputError: it leaves ``root``, or is a URL or no possible file name.
    """
    if "\x00" in image:
        raise InputError(f"image path {image!r} holds a NUL character")
    if _URL.match(image):
        raise InputError(
            f"image {image!r} is a URL; download the images and give paths to the files"
        )
    path = posixpath.normpath(image)
    if os.path.isabs(path):
        inside = os.path.relpath(path, root)
        if not _climbs(inside):
            return inside
    elif not _climbs(path) and not _climbs(_slashed(path)) and not _DRIVE.match(path):
        return path
    if allow_absolute:
        return os.path.normpath(os.path.join(root, path))
    raise InputError(
        f"image path {image!r} leaves the image folder {root}; correct it, give --image-root, or"
        " allow it with --allow-absolute-paths"
    )


def resolve_image(source: Mapping[str, Any], row_image: str) -> Path:
    """The file that a row's image names.

    Args:
        source: the recipe of the row's source (``Samples.source``).
        row_image: the row's `image`.

    Raises:
        InputError: the path leaves the image root and the source does not allow that.
    """
    root = source["image_root"]
    if root is None:
        raise InputError(f"image {row_image!r} belongs to a source without images")
    allowed = bool(source["options"].get("allow_absolute_paths", False))
    return Path(root, safe_path(row_image, root, allowed))


class Listing:
    """Which files exist below ``root``; each folder is listed once."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._folders: dict[str, frozenset[str]] = {}

    def has(self, path: str) -> bool:
        """Whether ``path`` (relative to the root, or absolute) is there.

        A dangling link or a folder counts: it is reported when its turn to be read comes.
        """
        folder, name = os.path.split(table_of(path)[0])
        names = self._folders.get(folder)
        if names is None:
            names = self._folders[folder] = self._list(folder)
        return name in names

    def _list(self, folder: str) -> frozenset[str]:
        try:
            return frozenset(os.listdir(os.path.join(self.root, folder)))
        except (OSError, ValueError):
            return frozenset()

    def locate(self, path: str, suffixes: Sequence[str] = SUFFIXES) -> str | None:
        """The path of the file that ``path`` means: itself, with `/` for `\\`, or with a suffix."""
        if self.has(path):
            return path
        slashed = path.replace("\\", "/")
        if slashed != path and self.has(slashed):
            return slashed
        if slashed.endswith(tuple(suffixes)):
            return None
        for suffix in suffixes:
            if self.has(slashed + suffix):
                return slashed + suffix
        return None


def choose_root(candidates: Iterable[str], first_images: Sequence[str]) -> Listing:
    """The folder below which most of the first images are found; the first of equals."""
    return max(
        (Listing(folder) for folder in candidates),
        key=lambda listing: sum(listing.locate(image) is not None for image in first_images),
    )


def _slashed(path: str) -> str:
    """What a path written on Windows means here."""
    return posixpath.normpath(path.replace("\\", "/"))


def _climbs(path: str) -> bool:
    return path == ".." or path.startswith(("../", "/"))
