"""Tables with one column for each label: 1 yes, 0 no, -1 or nothing where it is not known.

A sample of which no label is known is unlabelled; so are the rows of a table that has none of the
columns, such as a test set. A table that lacks some of them does not know those labels.

The labels are called as the columns are, and stand in their order. Where cells are empty or -1 is a
choice of those who made the table: some mean "no" by an empty cell. ``missing_labels`` names the
cells that mean "not known", and an empty one means "no" then.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmc.extract.sources.base import Part, listed, shown
from mmc.extract.sources.columns import Roles
from mmc.extract.sources.labels import MARKERS, Labels, say, unlabelled
from mmc.extract.sources.merge import Rules, merging
from mmc.store.errors import InputError
from mmc.store.samples import labels_column, reconciled

_WORDS = {"true": 1, "yes": 1, "false": 0, "no": 0}
_YES, _NO, _UNKNOWN = 1, 0, -1

Entries = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(row, label) of some entries."""


def read_label_columns(
    parts: Sequence[Part],
    roles: Sequence[Roles],
    *,
    task: str | None = None,
    missing: frozenset[str] | None = None,
    merge: Rules = (),
    need_merged: bool = True,
) -> Labels:
    """The labels of all samples, from the columns that the roles name.

    Args:
        task: given by the user, or None: multilabel.
        missing: cells that mean "not known", given by the user, or None.
        merge: which labels to join.
        need_merged: refuse to join labels that are not there.

    Raises:
        InputError: a cell that is neither yes nor no nor unknown, or labels that do not make
            ``task``.
    """
    names = tuple(dict.fromkeys(name for role in roles for name in role.label_columns))
    tally = _Tally(missing)
    yes: list[Entries] = []
    unknown: list[Entries] = []
    known = np.repeat([bool(role.label_columns) for role in roles], [len(part) for part in parts])
    start = 0
    for part, role in zip(parts, roles, strict=True):
        rows = np.arange(start, start + len(part))
        for label, name in enumerate(names if role.label_columns else ()):
            values = (
                tally.read(part, name)
                if name in role.label_columns
                else np.full(len(part), _UNKNOWN, np.int8)
            )
            for found, value in ((yes, _YES), (unknown, _UNKNOWN)):
                at = rows[values == value]
                found.append((at, np.full(len(at), label)))
        start += len(part)
    merged = merging(merge, names, need_all=need_merged)
    left = tuple(dict.fromkeys(merged.get(name, name) for name in names))
    place = np.array([left.index(merged.get(name, name)) for name in names], np.int64)
    column, open_column = reconciled(
        _lists(yes, place, known, len(left)), _lists(unknown, place, known, len(left)), len(left)
    )
    if column.null_count == start:
        if task is not None:
            raise InputError(f"task {task} was asked for and the source has no labels")
        return unlabelled(start)
    if task not in (None, "multilabel"):
        column, open_column = _one_each(column, left, str(task), parts), None
    labels = Labels(
        names=left,
        task=task or "multilabel",
        separator=None,
        column=column,
        unknown=open_column,
        merged=merged,
        notes=[f"labels: from {len(names)} columns ({listed(names, 5)})", *tally.lines()],
    )
    if merged:
        labels.notes.append(f"labels: {len(merged)} merged, {len(left)} left")
    counts = pc.list_value_length(column)
    if task is None and len(left) > 1 and pc.all(pc.equal(counts, 1)).as_py():
        labels.notes.append(
            "labels: each labelled sample has exactly one; --task multiclass (or binary) chooses"
            " one of them for each"
        )
    say(labels, 0)
    return labels


def columns_of_zeros_and_ones(columns: Mapping[str, pa.ChunkedArray]) -> list[str]:
    """Names of the columns that could each be a label: some 1, else 0, -1 or nothing."""
    tally = _Tally(None)
    return [
        name
        for name, column in columns.items()
        # Most columns are told by their first cells.
        if _may_be_label(tally, column.slice(0, FIRST)) and _may_be_label(tally, column, some=True)
    ]


FIRST = 1000
"""Cells of a column that are looked at before all are."""


def _may_be_label(tally: "_Tally", column: pa.ChunkedArray, *, some: bool = False) -> bool:
    """Whether all cells can be read, and with ``some`` there is a yes and something else."""
    kind = column.type
    if not (
        pa.types.is_boolean(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
    ):
        return False
    cells = pc.unique(column).to_pylist()
    values = {tally.value("" if cell is None else str(cell)) for cell in cells}
    return values <= {_YES, _NO, _UNKNOWN} and (not some or (_YES in values and len(values) > 1))


class _Tally:
    """Reads cells, and counts those that are no plain yes or no."""

    def __init__(self, missing: frozenset[str] | None) -> None:
        self._missing = missing
        self._numbers = {_number(text) for text in missing or ()} - {None}
        self._empty = self._marked = 0

    def read(self, part: Part, name: str) -> NDArray[np.int8]:
        """(n,) 1, 0 or -1 of each cell of a column.

        Raises:
            InputError: a cell that is something else.
        """
        encoded = part.column(name).combine_chunks().dictionary_encode()
        codes = pc.fill_null(encoded.indices, len(encoded.dictionary)).to_numpy()
        texts = [*encoded.dictionary.to_pylist(), ""]
        values = np.array([self.value(text) for text in texts], np.int8)
        counts = np.bincount(codes, minlength=len(texts))
        for code, text in enumerate(texts):
            if not counts[code]:
                continue
            if values[code] not in (_YES, _NO, _UNKNOWN):
                row = int(np.flatnonzero(codes == code)[0])
                raise InputError(
                    f"{part.where(row)}: column {shown(name)} holds {shown(text)!r}; a column of"
                    " one label has 1, 0, or -1 or nothing where it is not known"
                )
            if _is_empty(text):
                self._empty += int(counts[code])
            elif values[code] == _UNKNOWN:
                self._marked += int(counts[code])
        return values[codes]

    def lines(self) -> list[str]:
        """What to say of them."""
        if not self._empty:
            return []
        if self._missing is not None:
            return [f"labels: {self._empty:,} empty cells read as no"]
        kept = "-1" if self._marked else "-"
        return [
            f"labels: {self._empty:,} empty cells read as unknown; if they mean no, give"
            f" --missing-labels {kept}"
        ]

    def value(self, text: str) -> int:
        """1, 0, -1, or 2 of what is none of them."""
        text = text.strip()
        number = _number(text)
        if self._missing is None:
            if _is_empty(text) or number == _UNKNOWN:
                return _UNKNOWN
        elif text in self._missing or (number is not None and number in self._numbers):
            return _UNKNOWN
        elif _is_empty(text):
            return _NO
        if number in (_YES, _NO):
            return int(number)
        return _WORDS.get(text.lower(), 2)


def _is_empty(text: str) -> bool:
    return not text.strip() or text.strip() in MARKERS


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value == value else None


def _lists(
    entries: Sequence[Entries], place: NDArray[np.int64], known: NDArray[np.bool_], size: int
) -> pa.ChunkedArray:
    """(N,) list<int32> of the labels of each row, under their places after merging."""
    keys = [rows * size + place[labels] for rows, labels in entries]
    flat = np.unique(np.concatenate([np.zeros(0, np.int64), *keys]))
    width = max(size, 1)
    counts = np.bincount(flat // width, minlength=len(known))
    return labels_column(counts, flat % width, known)


def _one_each(
    column: pa.ChunkedArray, names: Sequence[str], task: str, parts: Sequence[Part]
) -> pa.ChunkedArray:
    """The column for a task with one label per sample: a row without any is unlabelled.

    Raises:
        InputError: a row with several, or too few or too many labels for the task.
    """
    if len(names) < 2 or (task == "binary" and len(names) != 2):
        wanted = "exactly 2" if task == "binary" else "2 or more"
        raise InputError(f"task {task} needs {wanted} label columns and there are {len(names)}")
    counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    if (counts > 1).any():
        row = int((counts > 1).argmax())
        raise InputError(
            f"{_place(parts)(row)} has {counts[row]} labels and the task is {task}; use --task"
            " multilabel"
        )
    flat = pc.list_flatten(column).to_numpy()
    return labels_column(counts, flat, counts == 1)


def _place(parts: Sequence[Part]) -> Callable[[int], str]:
    def where(row: int) -> str:
        for part in parts:
            if row < len(part):
                return part.where(row)
            row -= len(part)
        raise IndexError(row)

    return where
