"""What the parts of a source hand to each other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmc.extract.sources.cells import as_text
from mmc.extract.sources.splits import parse_split_by
from mmc.store.errors import InputError

Task = Literal["binary", "multiclass", "multilabel"]
LabelLevel = Literal["top", "leaf", "all"]
LEVELS = get_args(LabelLevel)

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
    """Column with the labels; `-` = read as unlabelled. Or a column for each label, with commas
    between their names, or `*` for any text (`tag_*`): 1 yes, 0 no, -1 or nothing where it is not
    known."""
    unknown_column: str | None = None
    """Column with the labels that are not known of a sample whose others are, written as the labels
    are; `-` = there is none. Recognised by its name, unknown_labels, when not given."""
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
    merge_labels: str | None = None
    """Labels to join, such as "racist,sexist=hate;nothate=ok": names without regard to case where
    that is unambiguous. Votes of annotators are merged before they are counted."""
    missing_labels: str | None = None
    """Label cells that mean "not labelled", comma separated; `-` = none, all are names. When not
    given: NA, None, null, nan and the like, where there are other labels beside them. In columns of
    one label each, cells that mean "not known"; when given, empty cells mean no there."""
    label_level: LabelLevel = "all"
    """Which labels of a tag tree: top (those that have no parent; a label counts for all above
    it), leaf (those that have none below them) or all, as they are given."""
    ties: str = "unlabelled"
    """What a sample gets for which no label has the most votes: unlabelled (it stays in the store),
    first (of the tied labels, the one that was given first), drop (it is left out), or a label's
    name."""
    dedupe: bool = False
    """Drop samples that have the same image and the same text as another: the test copy stays
    before the val copy, that before the train copy, else the first one."""
    text_template: str | None = None
    """Join columns into the text, such as "{title} [SEP] {text}"."""
    allow_absolute_paths: bool = False
    """Let image paths leave the image root: absolute ones and those with `..`."""

    need_images: bool = True
    """Whether pictures must be there; predictions of a run that reads none go without."""
    need_merged_labels: bool = True
    """Whether each label that ``merge_labels`` names must be there; data to predict may lack it."""

    def __post_init__(self) -> None:
        if self.task not in (None, "binary", "multiclass", "multilabel"):
            raise InputError(
                f"unknown task {self.task!r}; choose from binary, multiclass, multilabel"
            )
        if self.label_level not in LEVELS:
            raise InputError(
                f"unknown label level {self.label_level!r}; choose from {', '.join(LEVELS)}"
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
    """Columns by header name; null = the record lacks it. Any type: columns with a role are read as
    text (lists and objects as JSON), the others are carried as they are.
    Columns `image_offset` and `size` (int64) may say where in the file `image` a picture lies."""
    lines: NDArray[np.int64]
    """(N,) the line that each record starts on, from 1."""
    description: str
    """The file's kind in words, such as "tab separated"."""
    place: Callable[[int], str] | None = None
    """Of a row, for messages, where one file and a line do not say it; None = `where:line`."""
    roles: Mapping[str, str] | None = None
    """{id, image, text, labels, split, unknown -> column} of a format that knows its columns: what
    is not in it is not there. None = recognised by the columns' names."""
    label_set: tuple[str, ...] | None = None
    """The labels that there are, in the format's own order, though no sample may have some of them.
    Then a label cell is one name as it stands, or a JSON list of names: nothing is divided, and no
    name means "missing". None = what the cells hold."""
    label_tree: dict[str, list[str]] | None = None
    """Parent -> children, where the format has a tree of labels."""
    ids_in_folder: bool = False
    """Ids are places below ``folder``: with several tables, the folders' names go before them."""
    labels_merged: bool = False
    """The format counts votes: it has applied ``options.ties`` and ``options.merge_labels``."""
    has_places: bool = True
    """int64 columns `image_offset` and `size` are places of pictures, not the user's own."""
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
        """The cells under a header as text; all null where there is none.

        Raises:
            InputError: the column holds bytes.
        """
        if name is None:
            return pa.chunked_array([pa.nulls(len(self), pa.string())])
        return as_text(self.records.columns[name], f"{self.records.where}: column {shown(name)}")

    def where(self, row: int) -> str:
        """`file:line` of a row."""
        if self.records.place is not None:
            return self.records.place(row)
        return f"{self.records.where}:{self.records.lines[row]}"


@dataclass(kw_only=True)
class Samples:
    """A source, read: what `EmbeddingStore.sync` takes, and what to say aloud."""

    table: pa.Table
    """id, split, labels (list<int32> into ``label_set``; null = unlabelled, [] = none of them),
    text and image (null = none), image_offset, unknown_labels (list<int32>; only where single
    labels of labelled samples are unknown), then the user's other columns."""
    label_set: tuple[str, ...]
    task: str
    source: dict[str, Any]
    """The recipe: spec, format, form, options, image_root, columns, label_separator, label_tree,
    counts."""
    notes: list[str]
    warnings: list[str]
    advice: list[str] = field(default_factory=list)
    """What to know before training on it; predictions do not say it."""
    unsplit: bool = False
    """Nothing says which split its rows are of: they train if they have labels, else are test."""
