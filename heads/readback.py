"""Reading a predictions file back from disk, in blocks of samples.

Legend: n rows, C labels, S score columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from mmc.heads.formats import Layout, read_header

# Cells looked at together.
BLOCK_CELLS = 1 << 24

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Block:
    """Consecutive samples of a file."""

    ids: pa.Array
    decisions: Bools
    """(n, C)"""
    empty: Bools
    """(n,): the cells that hold the prediction are all empty."""
    scores: npt.NDArray[np.float32] | None
    """(n, S): C columns, or that of the second class (hateful-memes); NaN where empty."""
    listed_scores: npt.NDArray[np.float32] | None
    """long: (k,), one per decided label; NaN where it is empty."""
    strange: list[str]
    """Cells that are not what the layout allows."""


class FileShapeError(ValueError):
    """The file cannot be read in the layout that it should have."""


def read_blocks(path: str | Path, layout: Layout) -> Iterator[Block]:
    """A file's samples in blocks.

    Raises:
        FileShapeError: the header is not that of the layout.
        pyarrow.ArrowInvalid: not a CSV file, or a score that is not a number.
    """
    header = read_header(path)
    if header != list(layout.header):
        raise FileShapeError(_header_difference(header, layout))
    # Names of our own: a label may be called like another column.
    names = [f"c{i}" for i in range(len(header))]
    numbers = _number_columns(layout)
    types = {n: pa.float32() if i in numbers else pa.string() for i, n in enumerate(names)}
    held: pa.Table | None = None
    # Opened here: Arrow would read a name's ~ and its .gz in its own way.
    with open(path, "rb") as file:
        reader = pacsv.open_csv(
            file,
            pacsv.ReadOptions(column_names=names, skip_rows_after_names=1, block_size=8 << 20),
            pacsv.ParseOptions(newlines_in_values=True),
            pacsv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=False),
        )
        for batch in reader:
            table = pa.Table.from_batches([batch])
            if layout.form != "long":
                yield from _split(table, layout)
                continue
            # The last sample's lines may go on in the next batch.
            table = table if held is None else pa.concat_tables([held, table]).combine_chunks()
            starts = _starts(table)
            yield from _split_long(table.slice(0, starts[-1]), layout)
            held = table.slice(starts[-1])
    if held is not None:
        yield from _split_long(held, layout)


def _number_columns(layout: Layout) -> range:
    """Places of the score columns; all others are text."""
    if layout.form == "hateful-memes":
        return range(1, 2)
    first = 1 + (len(layout.label_set) if layout.form == "wide" else 1)
    return range(first, len(layout.header))


def _header_difference(header: list[str], layout: Layout) -> str:
    wanted = list(layout.header)
    if len(header) != len(wanted):
        return f"the header has {len(header)} columns, {layout.form} needs {len(wanted)}"
    place = next(i for i, (a, b) in enumerate(zip(header, wanted, strict=True)) if a != b)
    return f"column {place + 1} is {header[place]!r}, should be {wanted[place]!r}"


def _split(table: pa.Table, layout: Layout) -> Iterator[Block]:
    step = max(1, BLOCK_CELLS // len(layout.label_set))
    for i in range(0, len(table), step):
        columns = [c.combine_chunks() for c in table.slice(i, step).columns]
        yield _block(columns, layout)


def _block(columns: list[pa.Array], layout: Layout) -> Block:
    scores = None
    strange: list[str] = []
    if layout.form == "wide":
        cells = columns[1 : 1 + len(layout.label_set)]
        decisions = np.column_stack([bools(pc.equal(cell, "1")) for cell in cells])
        empties = np.column_stack([bools(pc.equal(cell, "")) for cell in cells])
        allowed = pa.array(["0", "1", ""])
        for cell in cells:
            strange += cell.filter(pc.invert(pc.is_in(cell, allowed))).slice(0, 3).to_pylist()
        empty = np.logical_or.reduce(empties, axis=1)
        tail = columns[1 + len(layout.label_set) :]
    else:
        labels, tail = columns[1], columns[2:]
        if layout.form == "hateful-memes":
            labels, tail = columns[2], columns[1:2]
        decisions, strange = _decided(labels, layout)
        empty = bools(pc.equal(labels, ""))
    if tail:
        scores = np.column_stack([_floats(column) for column in tail])
    return Block(columns[0], decisions, empty, scores, None, strange)


def _decided(labels: pa.Array, layout: Layout) -> tuple[Bools, list[str]]:
    """Cells of joined label names -> bool (n, C) and the names that are not labels."""
    n = len(labels)
    decisions = np.zeros((n, len(layout.label_set)), dtype=bool)
    names = pa.array(layout.label_set, pa.string())
    whole = pc.index_in(labels, names)
    known = bools(pc.is_valid(whole))
    decisions[known.nonzero()[0], whole.drop_null().to_numpy().astype(np.int64)] = True
    rest = (~known & ~bools(pc.equal(labels, ""))).nonzero()[0]
    if not len(rest):
        return decisions, []
    parts = pc.split_pattern(labels.take(pa.array(rest)), layout.separator)
    lengths = pc.list_value_length(parts).to_numpy()
    flat = pc.list_flatten(parts)
    index = pc.index_in(flat, names)
    row = rest.repeat(lengths)
    good = bools(pc.is_valid(index))
    column = index.drop_null().to_numpy().astype(np.int64)
    strange = flat.filter(pa.array(~good)).slice(0, 3).to_pylist()
    pairs = row[good] * len(layout.label_set) + column
    values, times = np.unique(pairs, return_counts=True)
    strange += [
        f"{layout.label_set[v % len(layout.label_set)]} twice" for v in values[times > 1][:3]
    ]
    decisions[row[good], column] = True
    return decisions, strange


def _starts(table: pa.Table) -> npt.NDArray[np.int64]:
    """Where each run of equal ids begins."""
    ids = table.column(0).combine_chunks()
    changed = bools(pc.not_equal(ids[1:], ids[:-1]))
    return np.concatenate([[0], changed.nonzero()[0] + 1])


def _split_long(table: pa.Table, layout: Layout) -> Iterator[Block]:
    if not len(table):
        return
    ids, labels, scores, ranks = (c.combine_chunks() for c in table.columns)
    starts = _starts(table)
    sample = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(table))))
    names = pa.array(layout.label_set, pa.string())
    index = pc.index_in(labels, names)
    good, blank = bools(pc.is_valid(index)), bools(pc.equal(labels, ""))
    strange = labels.filter(pa.array(~good & ~blank)).slice(0, 3).to_pylist()
    column = pc.fill_null(index, 0).to_numpy().astype(np.int64)
    values = _floats(scores)
    expected_rank = np.arange(len(table)) - starts[sample] + 1
    if not np.array_equal(_floats(ranks)[good], expected_rank[good]):
        strange.append("ranks that do not count 1, 2, 3 ...")
    step = max(1, BLOCK_CELLS // len(layout.label_set))
    for first in range(0, len(starts), step):
        inside = (sample >= first) & (sample < first + step)
        rows = sample[inside] - first
        decisions = np.zeros((min(step, len(starts) - first), len(layout.label_set)), dtype=bool)
        kept = good[inside]
        decisions[rows[kept], column[inside][kept]] = True
        no_label = decisions.sum(1) == 0
        yield Block(
            ids.take(pa.array(starts[first : first + step])),
            decisions,
            no_label,
            None,
            values[inside][kept],
            strange,
        )


def bools(values: pa.Array) -> Bools:
    result: Bools = values.to_numpy(zero_copy_only=False).astype(bool)
    return result


def _floats(values: pa.Array) -> npt.NDArray[np.float32]:
    """float32 with NaN for null."""
    result: npt.NDArray[np.float32] = pc.cast(values, pa.float32()).to_numpy(zero_copy_only=False)
    return result
