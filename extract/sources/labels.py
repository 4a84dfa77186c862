"""Labels: what they are called, which rows have none, which task they make.

**Names** are kept as written, without outer spaces: 007 is a name. Repeats count once, empty parts
are dropped. Where all names are integers, 1.0 is 1, and 01 is 1 if 1 occurs too. The label set is
in natural order, 2 before 10, unless the format has an order of its own.

**Missing labels.** A missing value (JSON null, no such key or column) is unlabelled. So is a cell
that holds nothing but a usual marker of that (``MARKERS``: NA, None, nan and so on), where other
cells have labels; it is said aloud, and ``missing_labels`` changes it. So is an empty cell where
its whole split is empty. Another empty cell means "none of the labels" in a multi-label task and
unlabelled in a single-label one.

**Single unknown labels** stand in a column of their own, written as the labels are: of a sample
they are neither yes nor no. So the task is multilabel, and a sample of which no label is known is
unlabelled.

**Merging** comes before the task is recognised. The merged label stands where the first of its
labels stood when the format has an order.

**Task.** multilabel: some cell holds several labels, a separator or a list, a separator is given,
or there is only one label. Else binary with exactly two labels, multiclass with more. After a
merge that leaves each sample exactly one label, separators and lists no longer count. A merged
label is unknown where none of its labels is there and one of them is unknown.
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

from mmc.extract.sources.base import NO_COLUMN, listed, shown
from mmc.extract.sources.label_cells import INTEGER, Cells
from mmc.extract.sources.merge import Rules, merging
from mmc.store.errors import InputError
from mmc.store.samples import first_in_both, reconciled

MARKERS = frozenset(
    (
        *("NA", "N/A", "n/a", "<NA>", "#N/A", "#N/A N/A", "#NA", "NULL", "null", "None"),
        *("NaN", "nan", "-NaN", "-nan", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"),
    )
)
"""What tables write for a missing value: the words that pandas reads as one."""


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
    unknown: pa.ChunkedArray | None = None
    """(N,) list<int32>, null = none: labels that are not known of a labelled sample; None = no such
    label."""
    merged: dict[str, str] = field(default_factory=dict)
    """{label: new name} of those that were merged."""
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def unlabelled(rows: int) -> Labels:
    """No labels at all."""
    column = pa.chunked_array([pa.nulls(rows, pa.list_(pa.int32()))])
    return Labels(names=(), task="unlabelled", separator=None, column=column)


def missing_markers(text: str | None) -> frozenset[str] | None:
    """``SourceOptions.missing_labels`` as a set; None = not given."""
    if text is None:
        return None
    if text == NO_COLUMN:
        return frozenset()
    return frozenset(part.strip() for part in text.split(",") if part.strip())


def read_labels(
    cells: pa.ChunkedArray,
    groups: NDArray[np.integer[Any]],
    *,
    where: Callable[[int], str],
    unknown: pa.ChunkedArray | None = None,
    separator: str | None = None,
    task: str | None = None,
    missing: frozenset[str] | None = None,
    kaggle: bool = False,
    label_set: tuple[str, ...] | None = None,
    merge: Rules = (),
    need_merged: bool = True,
) -> Labels:
    """Parse the label cells of all samples.

    Args:
        cells: (N,) string; null = unlabelled.
        groups: (N,) the split or file of each row, as a number.
        where: `file:line` of a row, for messages.
        unknown: (N,) string, written as ``cells``: labels that are not known; null = none.
        separator: given by the user, or None.
        task: given by the user, or None.
        missing: cells that mean "unlabelled", given by the user, or None.
        kaggle: the table is of the Kaggle form, in which spaces separate labels.
        label_set: see ``Records.label_set``.
        merge: which labels to join.
        need_merged: refuse to join labels that are not there.

    Raises:
        InputError: a cell that is no label, or labels that do not make ``task``.
    """
    encoded = cells.combine_chunks().dictionary_encode()
    codes = pc.fill_null(encoded.indices, -1).to_numpy().astype(np.int64)
    texts = encoded.dictionary.to_pylist()
    notes: list[str] = []
    if label_set is None:
        _leave_out_missing(codes, texts, missing, notes)
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
    parts = cut.parts(separator) if label_set is None else cut.exact(label_set)
    open_parts, open_codes = _open_cells(unknown, codes, cut, label_set, where)
    if separator is not None and not any(separator in text for text in texts):
        notes.append(
            f"warning: no label cell contains {separator!r}, so each cell is one label; leave "
            "--label-separator out to have it recognised"
        )
    sets, names, merged = _named([*parts, *open_parts], label_set, merge, need_merged, cut.notes)
    sets, open_sets = sets[: len(parts)], sets[len(parts) :]
    lengths = np.array([len(cell) for cell in sets])
    one_each = bool(merged) and bool((lengths[used] == 1).all())
    partly = any(open_sets)
    found = _task(names, lengths, partly or (cut.several and not one_each))
    if task is not None:
        _check_task(task, names, lengths, place)
        if partly and task != "multilabel":
            raise InputError(
                f"task {task} was asked for, and single labels are unknown; leave --task out, or"
                " the column of unknown labels"
            )
        found = task
    known = codes >= 0
    nothing = np.append(lengths == 0, False)[codes] & known
    if found != "multilabel":
        known &= ~nothing
    column, left = _column(sets, names, np.where(known, codes, -1)), None
    if partly:
        column, left = _reconciled(
            column, _column(open_sets, names, open_codes), names, bool(merged), where
        )
    result = Labels(
        names=names,
        task=found,
        separator=cut.separator,
        column=column,
        unknown=left,
        merged=merged,
        notes=[*notes, *cut.notes],
    )
    say(result, int(nothing.sum()))
    return result


def _open_cells(
    unknown: pa.ChunkedArray | None,
    codes: NDArray[np.int64],
    cut: Cells,
    label_set: tuple[str, ...] | None,
    where: Callable[[int], str],
) -> tuple[list[list[str]], NDArray[np.int64]]:
    """The names in each distinct cell of unknown labels, and the cell of each row (-1 = none).

    Cells of unlabelled rows (``codes`` -1) say nothing.
    """
    if unknown is None:
        return [], np.full(len(codes), -1)
    encoded = unknown.combine_chunks().dictionary_encode()
    found = pc.fill_null(encoded.indices, -1).to_numpy().astype(np.int64)
    found[codes < 0] = -1
    texts = encoded.dictionary.to_pylist()
    used = np.bincount(found[found >= 0], minlength=len(texts)) > 0
    nothing = MARKERS if label_set is None else frozenset()
    texts = [
        text if use and text.strip() not in nothing else ""
        for text, use in zip(texts, used, strict=True)
    ]
    cells = Cells(texts, lambda code: where(int(np.flatnonzero(found == code)[0])))
    parts = cells.parts(cut.separator) if label_set is None else cells.exact(label_set)
    return parts, found


def _reconciled(
    column: pa.ChunkedArray,
    unknown: pa.ChunkedArray,
    names: Sequence[str],
    merged: bool,
    where: Callable[[int], str],
) -> tuple[pa.ChunkedArray, pa.ChunkedArray | None]:
    """Both columns as a store keeps them.

    Raises:
        InputError: a row has a label that it says is unknown.
    """
    row, label = first_in_both(column, unknown, len(names))
    if row >= 0 and not merged:
        raise InputError(
            f"{where(row)} has label {shown(names[label])}, which is among its unknown ones as well"
        )
    return reconciled(column, unknown, len(names))


def _named(
    parts: Sequence[Sequence[str]],
    label_set: tuple[str, ...] | None,
    merge: Rules,
    need_merged: bool,
    notes: list[str],
) -> tuple[list[set[str]], tuple[str, ...], dict[str, str]]:
    """The labels of each cell under their final names, all names in order, and what was merged."""
    if label_set is None:
        name_of, said = _one_spelling(parts)
        names = natural_order(set(name_of.values()))
        notes += said
    else:
        name_of, names = {name: name for name in label_set}, label_set
    merged = merging(merge, names, need_all=need_merged)
    if merged:
        name_of = {part: merged.get(name, name) for part, name in name_of.items()}
        left = dict.fromkeys(merged.get(name, name) for name in names)
        names = natural_order(set(left)) if label_set is None else tuple(left)
        notes.append(f"labels: {len(merged)} merged, {len(names)} left")
    return [{name_of[part] for part in cell} for cell in parts], names, merged


def _leave_out_missing(
    codes: NDArray[np.int64],
    texts: Sequence[str],
    missing: frozenset[str] | None,
    notes: list[str],
) -> None:
    """Set the codes of cells that mean "unlabelled" to -1, and say so."""
    markers = MARKERS if missing is None else missing
    written = {text.strip() for text in texts} - {""}
    found = sorted(written & markers)
    if not found:
        return
    if missing is None and written <= markers:
        notes.append(
            f"labels: the only ones are {listed(found)}, so these are names;"
            f" if they mean unlabelled, give --missing-labels {','.join(found)}"
        )
        return
    gone = np.array([text.strip() in markers for text in texts] + [False])[codes]
    codes[gone] = -1
    notes.append(
        f"labels: {int(gone.sum())} cells that hold {listed(found)} read as unlabelled; if that is"
        " a label's name, give --missing-labels -"
    )


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
    sets: Sequence[set[str]], names: Sequence[str], codes: NDArray[np.int64]
) -> pa.ChunkedArray:
    """The labels of each row as list<int32>, from those of each distinct cell; code -1 is null."""
    index = {name: at for at, name in enumerate(names)}
    cells = [sorted(index[name] for name in cell) for cell in sets]
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


def say(labels: Labels, empty_cells: int) -> None:
    """Add to the notes and warnings what the user should hear."""
    names, notes = labels.names, labels.notes
    how = f", separated by {labels.separator!r}" if labels.separator else ""
    notes.append(f"task: {labels.task}, {len(names)} labels ({listed(names, 5)}){how}")
    if empty_cells:
        meaning = "none of the labels" if labels.task == "multilabel" else "unlabelled"
        notes.append(f"labels: {empty_cells} empty cells read as {meaning}")
    counts = _counts(labels.column, len(names))
    known = np.full(len(names), len(labels.column) - labels.column.null_count)
    if labels.unknown is not None:
        unknown = _counts(labels.unknown, len(names))
        known -= unknown
        rows = len(labels.unknown) - labels.unknown.null_count
        notes.append(
            f"labels: {int(unknown.sum()):,} single labels of {rows:,} samples are unknown: neither"
            " yes nor no, they are left out of losses and metrics"
        )
    always = np.flatnonzero((counts == known) & (known > 0))
    if len(always):
        first = int(always[0])
        whose = "labelled samples" if labels.unknown is None else "samples of which it is known"
        labels.warnings.append(
            f"label {names[first]!r} is on all {int(known[first])} {whose}: there is nothing"
            " to learn, and its average precision and AUC say nothing"
        )


def _counts(column: pa.ChunkedArray, size: int) -> NDArray[np.int64]:
    flat = pc.list_flatten(column).to_numpy().astype(np.int64)
    return np.bincount(flat, minlength=size).astype(np.int64)
