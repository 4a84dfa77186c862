"""Labels: what they are called, which rows have none, which task they make.

**Names** are kept as written, without outer spaces: NA, None and 007 are names. Repeats count once,
empty parts are dropped. Where all names are integers, 1.0 is 1, and 01 is 1 if 1 occurs too.
The label set is in natural order: 2 before 10.

**Empty cells.** A missing value (JSON null, no such key or column) is unlabelled. So is an empty
cell where its whole split is empty. Another empty cell means "none of the labels" in a multi-label
task and unlabelled in a single-label one.

**Task.** multilabel: some cell holds several labels, a separator or a list, a separator is given,
or there is only one label. Else binary with exactly two labels, multiclass with more.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import natsort
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmc.extract.sources.base import listed
from mmc.extract.sources.label_cells import INTEGER, Cells
from mmc.store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels of all samples."""

    names: tuple[str, ...]
    """The label set, in natural order."""
    task: str
    separator: str | None
    """What stood between labels; null = nothing seen, or lists."""
    column: pa.ChunkedArray
    """(N,) list<int32> into ``names``, ascending; null = unlabelled."""
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def unlabelled(rows: int) -> Labels:
    """No labels at all."""
    column = pa.chunked_array([pa.nulls(rows, pa.list_(pa.int32()))])
    return Labels(names=(), task="unlabelled", separator=None, column=column)


def read_labels(
    cells: pa.ChunkedArray,
    groups: NDArray[np.integer[Any]],
    *,
    separator: str | None,
    task: str | None,
    where: Callable[[int], str],
    kaggle: bool = False,
) -> Labels:
    """Parse the label cells of all samples.

    Args:
        cells: (N,) string; null = unlabelled.
        groups: (N,) the split or file of each row, as a number.
        separator: given by the user, or None.
        task: given by the user, or None.
        where: `file:line` of a row, for messages.
        kaggle: the table is of the Kaggle form, in which spaces separate labels.

    Raises:
        InputError: a cell that is no label, or labels that do not make ``task``.
    """
    encoded = cells.combine_chunks().dictionary_encode()
    codes = pc.fill_null(encoded.indices, -1).to_numpy().astype(np.int64)
    texts = encoded.dictionary.to_pylist()
    empty = np.array([not text.strip() for text in texts] + [False])  # [-1] is null
    codes[_in_empty_group(codes, empty, groups)] = -1
    if not (codes >= 0).any():
        if task is not None:
            raise InputError(f"task {task} was asked for and the source has no labels")
        return unlabelled(len(codes))

    def place(code: int) -> str:
        return where(int(np.flatnonzero(codes == code)[0]))

    used = np.bincount(codes[codes >= 0], minlength=len(texts)) > 0
    cut = Cells(
        [text if use else "" for text, use in zip(texts, used, strict=True)], place, kaggle=kaggle
    )
    parts = cut.parts(separator)
    spellings, notes = _one_spelling(parts)
    names = natural_order(set(spellings.values()))
    lengths = np.array([len({spellings[part] for part in cell}) for cell in parts])
    found = _task(names, lengths, cut.several)
    if task is not None:
        _check_task(task, names, lengths, place)
        found = task
    known = codes >= 0
    nothing = np.append(lengths == 0, False)[codes] & known
    if found != "multilabel":
        known &= ~nothing
    result = Labels(
        names=names,
        task=found,
        separator=cut.separator,
        column=_column(parts, spellings, names, np.where(known, codes, -1)),
        notes=[*cut.notes, *notes],
    )
    _say(result, int(nothing.sum()), known)
    return result


def natural_order(names: set[str]) -> tuple[str, ...]:
    """Numbers by value, words by letter: 2 before 10, `a2` before `a10`."""
    if all(INTEGER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    return tuple(natsort.natsorted(sorted(names)))


def _in_empty_group(
    codes: NDArray[np.int64], empty: NDArray[np.bool_], groups: NDArray[np.integer[Any]]
) -> NDArray[np.bool_]:
    """(N,) rows with an empty cell in a group where no cell is filled."""
    filled = (codes >= 0) & ~empty[codes]
    has_labels = np.bincount(groups[filled], minlength=int(groups.max(initial=0)) + 1) > 0
    result: NDArray[np.bool_] = empty[codes] & ~has_labels[groups]
    return result


def _one_spelling(parts: Sequence[Sequence[str]]) -> tuple[dict[str, str], list[str]]:
    """The name of each spelling: integers may be written 1.0, and 01 beside 1."""
    written = {part for cell in parts for part in cell}
    same = {name: name for name in written}
    if not all(INTEGER.fullmatch(name) for name in written):
        return same, []
    whole = {name: name.partition(".")[0] for name in written}
    present = set(whole.values())
    for name, integer in whole.items():
        short = re.sub(r"^(-?)0+(?=\d)", r"\1", integer)
        same[name] = short if short in present else integer
    changed = sorted(name for name in written if same[name] != name)
    if not changed:
        return same, []
    return same, [f"labels: {listed([f'{name} read as {same[name]}' for name in changed], 5)}"]


def _task(names: Sequence[str], lengths: NDArray[np.int64], several: bool) -> str:
    if several or (lengths > 1).any() or len(names) < 2:
        return "multilabel"
    return "binary" if len(names) == 2 else "multiclass"


def _check_task(
    task: str, names: Sequence[str], lengths: NDArray[np.int64], place: Callable[[int], str]
) -> None:
    if task == "multilabel":
        return
    if (lengths > 1).any():
        code = int((lengths > 1).argmax())
        raise InputError(
            f"{place(code)} has {lengths[code]} labels and the task is {task}; use --task"
            " multilabel"
        )
    if task == "binary" and len(names) != 2:
        raise InputError(
            f"task binary needs exactly 2 labels and the source has {len(names)}:"
            f" {listed(names, 8)}; leave --task out to have it recognised"
        )
    if len(names) < 2:
        raise InputError(
            f"task multiclass needs 2 labels or more and the source has only {listed(names)}"
        )


def _column(
    parts: Sequence[Sequence[str]],
    spellings: dict[str, str],
    names: Sequence[str],
    codes: NDArray[np.int64],
) -> pa.ChunkedArray:
    """The labels of each row as list<int32>, from those of each distinct cell; code -1 is null."""
    index = {name: at for at, name in enumerate(names)}
    cells = [sorted({index[spellings[part]] for part in cell}) for cell in parts]
    lengths = np.array([len(cell) for cell in cells] + [0], np.int64)
    starts = np.cumsum(lengths) - lengths
    flat = np.array([label for cell in cells for label in cell], np.int32)
    counts = lengths[codes]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
    values = flat[np.repeat(starts[codes], counts) + within]
    array = pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(values, pa.int32()), mask=pa.array(codes < 0)
    )
    return pa.chunked_array([array])


def _say(labels: Labels, empty_cells: int, known: NDArray[np.bool_]) -> None:
    """Add to the notes and warnings what the user should hear."""
    names, notes = labels.names, labels.notes
    how = f", separated by {labels.separator!r}" if labels.separator else ""
    notes.append(f"task: {labels.task}, {len(names)} labels ({listed(names, 5)}){how}")
    if empty_cells:
        meaning = "none of the labels" if labels.task == "multilabel" else "unlabelled"
        notes.append(f"labels: {empty_cells} empty cells read as {meaning}")
    counts = np.bincount(
        pc.list_flatten(labels.column).to_numpy().astype(np.int64), minlength=len(names)
    )
    always = [names[at] for at in np.flatnonzero(counts == known.sum())]
    if always:
        labels.warnings.append(
            f"label {always[0]!r} is on all {int(known.sum())} labelled samples: there is nothing"
            " to learn, and its average precision and AUC say nothing"
        )
