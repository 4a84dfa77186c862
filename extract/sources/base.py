"""What the parts of a source hand to each other."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmc.extract.sources.splits import parse_split_by
from mmc.store.errors import InputError

Task = Literal["binary", "multiclass", "multilabel"]

NO_COLUMN = "-"
"""As a column option: the source has no such column, whatever its header says."""


def shown(name: str) -> str:
    """A name from a file as it stands in a message: short, on one line."""
    short = name if len(name) <= 60 else name[:57] + "..."
    return short if short.isprintable() else repr(short)


def listed(names: Sequence[str], limit: int = 20) -> str:
    """The first names, for a message."""
    return ", ".join(map(shown, names[:limit])) + (", ..." if len(names) > limit else "")


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How a source is read. Known formats need none of these."""

    image_column: str | None = None
    """Column with the image's path; `-` = there is none. Recognised by its name when not given."""
    text_column: str | None = None
    """Column with the text; `-` = there is none."""
    label_column: str | None = None
    """Column with the labels; `-` = read as unlabelled."""
    id_column: str | None = None
    """Column with the sample's id; `-` = there is none: the image's path, else the row's number."""
    split_column: str | None = None
    """Column that says train, val or test; `-` = there is none."""
    image_root: str | None = None
    """Folder that image paths start from. When not given: the table's folder, or data/, images/ or
    img/ in it, wherever the first images are found."""
    label_separator: str | None = None
    """What stands between labels in a cell, such as "|". Recognised from the data if not given."""
    split_by: str | None = None
    """Divide the train rows: hash:0.8,0.1,0.1 (train, val, test by a hash of the id: a sample keeps
    its split when others are added) or stratified:0.8,0.1,0.1 (labels balanced)."""
    encoding: str | None = None
    """Character encoding of text files. When not given: UTF-8 (or UTF-16 with its mark), and
    cp1252 with a warning where that fails."""
    task: Task | None = None
    """binary, multiclass or multilabel. Recognised from the labels when not given."""
    text_template: str | None = None
    """Join columns into the text, such as "{title} [SEP] {text}"."""
    allow_absolute_paths: bool = False
    """Let image paths leave the image root: absolute ones and those with `..`."""

    need_images: bool = True
    """Whether pictures must be there; predictions of a run that reads none go without."""

    def __post_init__(self) -> None:
        if self.task not in (None, "binary", "multiclass", "multilabel"):
            raise InputError(
                f"unknown task {self.task!r}; choose from binary, multiclass, multilabel"
            )
        if self.label_separator == "":
            raise InputError("the label separator is empty; leave it out to have it recognised")
        if self.split_by is not None:
            parse_split_by(self.split_by)
        if self.encoding is not None:
            try:
                "".encode(self.encoding)
            except LookupError:
                raise InputError(
                    f"unknown encoding {self.encoding!r}; utf-8, cp1252 and latin-1 are usual"
                ) from None


@dataclass(kw_only=True)
class Records:
    """What a format reads from one file (or folder, or pattern), before any meaning is given."""

    where: str
    """Name for messages, usually the file's name."""
    folder: str
    """Where relative image paths may start."""
    columns: pa.Table
    """Text columns by header name; null = the record lacks it. Lists and objects are JSON text.
    Columns `image_offset` and `size` (int64) may say where in the file `image` a picture lies."""
    lines: NDArray[np.int64]
    """(N,) the line that each record starts on, from 1."""
    description: str
    """The file's kind in words, such as "tab separated"."""
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Format(Protocol):
    """One kind of source."""

    def recognises(self, spec: str) -> bool:
        """Whether this format reads what ``spec`` names, judged without reading all of it."""

    def read(self, spec: str, options: SourceOptions) -> Records:
        """All records.

        Raises:
            InputError: unreadable, empty or malformed; the message gives the file and line.
        """


@dataclass(frozen=True)
class Part:
    """One table of a source."""

    split: str | None
    """From the file's name or the spec; None = it says nothing."""
    format: str
    records: Records

    def __len__(self) -> int:
        return int(self.records.columns.num_rows)

    def column(self, name: str | None) -> pa.ChunkedArray:
        """The cells under a header; all null where there is none."""
        if name is None:
            return pa.chunked_array([pa.nulls(len(self), pa.string())])
        return self.records.columns[name]

    def where(self, row: int) -> str:
        """`file:line` of a row."""
        return f"{self.records.where}:{self.records.lines[row]}"


@dataclass(kw_only=True)
class Samples:
    """A source, read: what `EmbeddingStore.sync` takes, and what to say aloud."""

    table: pa.Table
    """id, split, labels (list<int32> into ``label_set``; null = unlabelled, [] = none of them),
    text and image (null = none), image_offset, then the user's other columns."""
    label_set: tuple[str, ...]
    task: str
    source: dict[str, Any]
    """The recipe: spec, format, form, options, image_root, columns, label_separator, counts."""
    notes: list[str]
    warnings: list[str]
