"""Image folder: `class/name.jpg`, as scikit-learn and torchvision read it, also in split folders.

The first folder is the class (the second, below train, val or test); folders below it belong to it.
Ids are paths from the source's folder. Pictures that do not lie in two classes or more are read as
unlabelled. Files whose names do not end like a picture's are left out, and so is what is hidden.
"""

import itertools
import os
from collections.abc import Iterator

import natsort
import numpy as np
import pyarrow as pa

from mmc.extract.sources.base import Records, SourceOptions, listed
from mmc.extract.sources.shards import IMAGES
from mmc.extract.sources.splits import split_named
from mmc.store.errors import InputError

_SUFFIXES = tuple(f".{kind}" for kind in sorted(IMAGES))
_TABLES = (
    *(".csv", ".tsv", ".tab", ".psv", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather"),
    "captions.txt",  # Flickr8k's name for its table
)
_LOOK = 1_000
"""So many names of a folder, and so many folders, tell whether there are pictures."""

_Found = tuple[str, ...]
"""A file's path from the source's folder, in parts."""


class ImageFolder:
    """Format `imagefolder`."""

    def recognises(self, spec: str) -> bool:
        """A folder with pictures in it or below, and with no table or tar in it or in a folder."""
        if not os.path.isdir(spec) or not any(True for _ in _walk(spec, _LOOK)):
            return False
        with os.scandir(spec) as found:
            folders = [entry.path for entry in found if entry.is_dir()]
        return not any(map(_has_tables, [spec, *folders[:_LOOK]]))

    def read(self, spec: str, options: SourceOptions) -> Records:
        """All pictures, by split, class and name.

        Raises:
            InputError: there is no picture, or the folder cannot be read.
        """
        root = os.path.abspath(os.path.expanduser(spec))
        found = list(_walk(root))
        files = [file for file in found if _is_text("".join(file))]
        if not files:
            raise InputError(f"{spec} holds no picture ({', '.join(_SUFFIXES)})")
        splits = [split_named(file[0]) if len(file) > 1 else None for file in files]
        # Where there are split folders, what lies beside them is no class.
        inner = [file[1:] if split else file for file, split in zip(files, splits, strict=True)]
        classes = [file[0] if len(file) > 1 else None for file in inner]
        if any(splits):
            classes = [name if split else None for name, split in zip(classes, splits, strict=True)]
        names = natsort.natsorted({name for name in classes if name is not None})
        labelled = len(names) > 1
        order = sorted(
            range(len(files)), key=lambda at: (_ORDER[splits[at]], *map(_natural, inner[at]))
        )
        paths = pa.array(["/".join(files[at]) for at in order], pa.string())
        columns = {"id": paths, "image": paths}
        roles = {"id": "id", "image": "image"}
        if labelled:
            roles["labels"] = "class"
            columns["class"] = pa.array([classes[at] for at in order], pa.string())
        elif names:
            columns["folder"] = pa.array([classes[at] for at in order], pa.string())
        if any(splits):
            roles["split"] = "split"
            columns["split"] = pa.array([splits[at] for at in order], pa.string())
        return Records(
            where=os.path.basename(root),
            folder=root,
            columns=pa.table(columns),
            lines=np.arange(1, len(files) + 1),
            description="image folder",
            place=lambda row: paths[row].as_py(),
            roles=roles,
            ids_in_folder=True,
            label_set=tuple(names) if labelled and options.label_column is None else None,
            notes=[_note(names, labelled)],
            warnings=_warnings(files, classes, labelled, len(found) - len(files)),
        )


def _has_tables(folder: str) -> bool:
    try:
        with os.scandir(folder) as found:
            names = [entry.name.lower() for entry in itertools.islice(found, _LOOK)]
    except OSError:
        return False
    return any(name.removesuffix(".gz").endswith((*_TABLES, ".tar")) for name in names)


def _is_text(name: str) -> bool:
    """Whether a file's name is UTF-8: a table of samples can hold no other."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


_ORDER = {"train": 0, "val": 1, "test": 2, None: 3}
_natural = natsort.natsort_keygen()


def _note(names: list[str], labelled: bool) -> str:
    if labelled:
        return f"labels: the folders of the pictures, {len(names)} classes ({listed(names, 5)})"
    return "labels: none, for the pictures do not lie in two class folders or more"


def _warnings(
    files: list[_Found], classes: list[str | None], labelled: bool, unreadable: int
) -> list[str]:
    warnings = []
    outside = [file for file, name in zip(files, classes, strict=True) if name is None]
    if labelled and outside:
        warnings.append(
            f"{len(outside)} pictures lie in no class folder, first {'/'.join(outside[0])!r}: read"
            " as unlabelled"
        )
    if unreadable:
        warnings.append(f"{unreadable} pictures left out, for their names are not UTF-8")
    return warnings


def _walk(root: str, most: int | None = None) -> Iterator[_Found]:
    """The pictures below a folder; links are followed, into no folder twice on one way down.

    With ``most``, only so many names of each folder and so many folders are looked at.
    """
    waiting: list[tuple[_Found, frozenset[tuple[int, int]]]] = [((), frozenset())]
    looked = 0
    while waiting and looked != most:
        inner, above = waiting.pop()
        looked += 1
        folder = os.path.join(root, *inner)
        try:
            status = os.stat(folder)
            here = (status.st_dev, status.st_ino)
            with os.scandir(folder) as found:
                for at, entry in enumerate(found):
                    if at == most:
                        break
                    if entry.name.startswith(".") or entry.name == "__MACOSX":
                        continue
                    if entry.name.lower().endswith(_SUFFIXES):
                        yield (*inner, entry.name)
                    elif entry.is_dir() and here not in above:
                        waiting.append(((*inner, entry.name), above | {here}))
        except OSError as error:
            if most is None:
                raise InputError(f"cannot read {folder}: {error.strerror or error}") from None
