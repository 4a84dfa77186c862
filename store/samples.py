"""The table of samples: its schema, checks and file. Row i of every array is row i here."""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmc.store.errors import DamagedStoreError, InputError
from mmc.store.files import Files
from mmc.store.schema import FORMAT, PARTLY, canonical_json, check_format, dump, group_json

SAMPLES = "samples.parquet"
ROOT = "zarr.json"
TASKS = ("unlabelled", "binary", "multiclass", "multilabel")
"""From the least to the most that a row may carry: merging two sources takes the later one."""

COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("labels", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("image", pa.string()),
        ("image_offset", pa.int64()),
        ("image_key", pa.string()),
        ("text_key", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
    ]
)
"""What a source may give; only ``id`` must be there. See FORMAT.md for the meanings."""

UNKNOWN = pa.field("unknown_labels", pa.list_(pa.int32()))
"""What a source may give besides: labels that are not known of a sample whose others are. The
column is there only where some are, and the format is then `PARTLY`."""

INTERNAL = pa.schema([("_source", pa.int16()), ("_gone", pa.bool_())])
_METADATA_KEY = b"mmc"

Rows = npt.NDArray[np.int64]
CompressedRows = tuple[Rows, npt.NDArray[np.int32]]
"""(indptr, indices): row i has ``indices[indptr[i]:indptr[i + 1]]``."""


@dataclass(frozen=True, kw_only=True)
class StoreMeta:
    """What samples.parquet's own metadata says of the whole store."""

    label_set: tuple[str, ...]
    task: str
    sources: tuple[dict[str, Any], ...]
    generation: int = 0
    """Which order of rows; compaction makes a new one."""
    format: int = FORMAT
    """`PARTLY` where single labels are unknown."""

    def to_json(self) -> dict[str, Any]:
        """For the key-value metadata and the attributes of the root group."""
        return {
            "format": self.format,
            "generation": self.generation,
            "label_set": list(self.label_set),
            "task": self.task,
            "sources": list(self.sources),
        }

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Self:
        """Parse the key-value metadata.

        Raises:
            DamagedStoreError: not what :meth:`to_json` wrote.
            FormatVersionError: a newer format.
        """
        try:
            data = json.loads(raw)
            check_format(data["format"], where, PARTLY)
            return cls(
                label_set=tuple(data["label_set"]),
                task=data["task"],
                sources=tuple(data["sources"]),
                generation=data["generation"],
                format=data["format"],
            )
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise DamagedStoreError(
                f"{where} is damaged: {type(error).__name__}: {error} in its metadata"
            ) from None


def check_meta(label_set: Sequence[str], task: str, source: dict[str, Any]) -> StoreMeta:
    """A checked :class:`StoreMeta` for one source.

    Raises:
        InputError: unknown task, repeated or empty label names, a source without ``spec``.
    """
    if task not in TASKS:
        raise InputError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    labels = tuple(str(label) for label in label_set)
    if len(set(labels)) != len(labels):
        twice = sorted({label for label in labels if labels.count(label) > 1})
        raise InputError(f"label {twice[0]!r} occurs twice in the label set")
    if "" in labels:
        raise InputError("the label set holds an empty name")
    if task == "binary" and len(labels) != 2:
        raise InputError(f"a binary task has 2 labels and the label set has {len(labels)}")
    if not isinstance(source.get("spec"), str):
        raise InputError("the source's recipe has no 'spec'")
    source = json.loads(canonical_json(source, f"the recipe of source {source['spec']}"))
    return StoreMeta(label_set=labels, task=task, sources=(source,))


def canonical(samples: pa.Table, meta: StoreMeta) -> pa.Table:
    """``samples`` with every column of ``COLUMNS`` in its type and order, then the user's own.

    Missing columns become null, splits become "", labels are sorted and unique in each row, and
    a user's column named like an internal one is renamed to ``user.<name>``. ``unknown_labels``
    (list of indices; null or empty: none) stays where any label is unknown; a row with all of them
    is unlabelled, and an unlabelled row has none in that column.

    Raises:
        InputError: no id column, an id that is null, empty or there twice, a column that cannot
            be converted, a label index outside the label set, several labels or unknown ones where
            the task allows one, a label that a row both has and does not know.
    """
    if "id" not in samples.column_names:
        raise InputError(f"the samples have no 'id' column; found {samples.column_names}")
    twice = [name for name in samples.column_names if samples.column_names.count(name) > 1]
    if twice:
        raise InputError(f"the samples have two columns named {twice[0]!r}")
    columns: dict[str, pa.ChunkedArray] = {}
    for field in COLUMNS:
        columns[field.name] = _converted(samples, field)
    columns["split"] = pc.fill_null(columns["split"], "")
    _check_ids(columns["id"])
    columns["labels"] = _checked_labels(columns["labels"], columns["id"], meta)
    if UNKNOWN.name in samples.column_names:
        columns |= _with_unknown(
            columns["labels"], _converted(samples, UNKNOWN), columns["id"], meta
        )
    for name in samples.column_names:
        if name not in columns and name != UNKNOWN.name:
            mine = f"user.{name}" if name in INTERNAL.names else name
            columns[mine] = samples.column(name)
    return pa.table(columns)


def _converted(samples: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    if field.name not in samples.column_names:
        return pa.chunked_array([pa.nulls(len(samples), field.type)])
    column = samples.column(field.name)
    try:
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"column {field.name!r} cannot be read as {field.type}: {reason}"
        ) from None


def _check_ids(ids: pa.ChunkedArray) -> None:
    empty = pc.fill_null(pc.equal(ids, ""), True).to_numpy()
    if empty.any():
        raise InputError(f"row {int(empty.argmax())} has no id; each sample needs one")
    first = pc.index_in(ids, value_set=ids).to_numpy()
    again = np.flatnonzero(first != np.arange(len(first)))
    if len(again):
        row = int(again[0])
        raise InputError(
            f"id {ids[row].as_py()!r} occurs twice, in rows {int(first[row])} and {row}"
        )


def _checked_labels(
    labels: pa.ChunkedArray, ids: pa.ChunkedArray, meta: StoreMeta
) -> pa.ChunkedArray:
    counts, indices, known = _sorted_labels(labels, ids, meta)
    if meta.task in ("binary", "multiclass") and (counts > 1).any():
        row = int((counts > 1).argmax())
        raise InputError(
            f"sample {ids[row].as_py()!r} has {counts[row]} labels and the task is {meta.task}; "
            "a multilabel task allows several"
        )
    return labels_column(counts, indices, known)


def _with_unknown(
    labels: pa.ChunkedArray, unknown: pa.ChunkedArray, ids: pa.ChunkedArray, meta: StoreMeta
) -> dict[str, pa.ChunkedArray]:
    """The columns of checked labels and of those that are unknown, without the latter if empty."""
    counts, lacking, _ = _sorted_labels(unknown, ids, meta)
    checked = labels_column(counts, lacking, counts > 0)
    row, label = first_in_both(labels, checked, len(meta.label_set))
    if row >= 0:
        raise InputError(
            f"sample {ids[row].as_py()!r} has label {meta.label_set[label]!r}, which is among its "
            "unknown ones as well"
        )
    labels, left = reconciled(labels, checked, len(meta.label_set))
    if left is None:
        return {"labels": labels}
    if meta.task != "multilabel":
        row = int(pc.is_valid(left).to_numpy().argmax())
        raise InputError(
            f"sample {ids[row].as_py()!r} has unknown labels and the task is {meta.task}; "
            "only a multilabel task knows some labels of a sample and others not"
        )
    return {"labels": labels, UNKNOWN.name: left}


def first_in_both(
    labels: pa.ChunkedArray, unknown: pa.ChunkedArray, num_labels: int
) -> tuple[int, int]:
    """The first (row, label) that stands in both columns; (-1, -1): none."""
    places, both = _in_both(labels, unknown, num_labels)
    if not both.any():
        return -1, -1
    at = int(both.argmax())
    return int(places[at] // num_labels), int(places[at] % num_labels)


def reconciled(
    labels: pa.ChunkedArray, unknown: pa.ChunkedArray, num_labels: int
) -> tuple[pa.ChunkedArray, pa.ChunkedArray | None]:
    """Both columns (list<int32>, ascending) as a store keeps them.

    What a row has is not unknown, an unlabelled row has nothing in either, and a row of which no
    label is known is unlabelled. None: nothing is unknown but whole rows.
    """
    indptr, indices, known = csr(labels)
    row_of = np.repeat(np.arange(len(known)), np.diff(csr(unknown)[0]))
    kept = ~_in_both(labels, unknown, num_labels)[1] & known[row_of]
    counts = np.bincount(row_of[kept], minlength=len(known))
    none_known = (counts == num_labels) & (num_labels > 0)
    kept &= ~none_known[row_of]
    counts[none_known] = 0
    if none_known.any():
        labels = labels_column(np.diff(indptr), indices, known & ~none_known)
    if not counts.any():
        return labels, None
    return labels, labels_column(counts, csr(unknown)[1][kept], counts > 0)


def _in_both(
    labels: pa.ChunkedArray, unknown: pa.ChunkedArray, num_labels: int
) -> tuple[Rows, npt.NDArray[np.bool_]]:
    """Row x C + label of each entry of ``unknown``, and whether ``labels`` has it, too."""
    given, places = (
        np.repeat(np.arange(len(known)), np.diff(indptr)) * num_labels + indices
        for indptr, indices, known in (csr(labels), csr(unknown))
    )
    both: npt.NDArray[np.bool_] = np.isin(places, given)
    return places, both


def _sorted_labels(
    labels: pa.ChunkedArray, ids: pa.ChunkedArray, meta: StoreMeta
) -> tuple[Rows, npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Labels per row, the indices ascending and unique in each row, and which rows are not null."""
    indptr, indices, known = csr(labels)
    row_of = np.repeat(np.arange(len(known)), np.diff(indptr))
    outside = (indices < 0) | (indices >= len(meta.label_set))
    if outside.any():
        at = int(outside.argmax())
        raise InputError(
            f"sample {ids[int(row_of[at])].as_py()!r} has label index {indices[at]} and the label "
            f"set has {len(meta.label_set)} labels"
        )
    order = np.lexsort((indices, row_of))
    indices, row_of = indices[order], row_of[order]
    keep = np.ones(len(indices), bool)
    keep[1:] = (indices[1:] != indices[:-1]) | (row_of[1:] != row_of[:-1])
    counts = np.bincount(row_of[keep], minlength=len(known))
    return counts, indices[keep], known


def csr(labels: pa.ChunkedArray) -> tuple[Rows, npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """A list<int32> column as (indptr (N + 1,), indices, known (N,)); null rows are empty."""
    counts = pc.fill_null(pc.list_value_length(labels), 0).to_numpy()
    indptr = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=indptr[1:])
    values = pc.list_flatten(labels)
    return indptr, values.to_numpy().astype(np.int32, copy=False), pc.is_valid(labels).to_numpy()


def labels_column(
    counts: npt.NDArray[Any], indices: npt.NDArray[Any], known: npt.NDArray[np.bool_]
) -> pa.ChunkedArray:
    """The reverse of :func:`csr`, from the labels per row.

    Raises:
        InputError: more than a column of lists can hold.
    """
    if len(indices) > np.iinfo(np.int32).max:
        raise InputError(
            f"the samples have {len(indices):,} labels (or unknown ones) together, and a store "
            f"holds {np.iinfo(np.int32).max:,} at most; leave labels out"
        )
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    array = pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(indices, pa.int32()), mask=pa.array(~known)
    )
    return pa.chunked_array([array])


_TAKE_BYTES = 1 << 29


def take_rows(table: pa.Table, rows: npt.NDArray[np.int64]) -> pa.Table:
    """``table.take(rows)`` for tables of any size.

    Arrow's own joins the chunks of a column first, which fails beyond 2 GiB of text.
    """
    columns = [_take(column, rows) for column in table.columns]
    return pa.table(columns, schema=table.schema)


def _take(column: pa.ChunkedArray, rows: npt.NDArray[np.int64]) -> pa.ChunkedArray:
    if column.type != pa.string() or column.nbytes < _TAKE_BYTES:
        return column.take(pa.array(rows))
    wide = column.cast(pa.large_string())
    # Blocks of half a gigabyte on average: room for a block four times as long.
    step = max(1, _TAKE_BYTES * len(column) // column.nbytes)
    blocks = (rows[start : start + step] for start in range(0, len(rows), step))
    parts = [wide.take(pa.array(block)).cast(pa.string()) for block in blocks]
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string())


def with_internal(
    table: pa.Table, source: npt.NDArray[np.int16], gone: npt.NDArray[np.bool_]
) -> pa.Table:
    """``table`` with the internal columns, in the order of the file."""
    for field, values in zip(INTERNAL, (source, gone), strict=True):
        column = pa.chunked_array([pa.array(values, field.type)])
        if field.name in table.column_names:
            table = table.set_column(table.column_names.index(field.name), field, column)
        else:
            table = table.append_column(field, column)
    core = [*COLUMNS.names, *INTERNAL.names]
    core += [UNKNOWN.name] if UNKNOWN.name in table.column_names else []
    return table.select([*core, *(name for name in table.column_names if name not in core)])


def settled(table: pa.Table, meta: StoreMeta) -> tuple[pa.Table, StoreMeta]:
    """``table`` without a column of unknown labels that has none, and the format that says so."""
    if UNKNOWN.name not in table.column_names:
        return table, replace(meta, format=FORMAT)
    if len(pc.list_flatten(table.column(UNKNOWN.name))):
        return table, replace(meta, format=PARTLY)
    return table.drop_columns([UNKNOWN.name]), replace(meta, format=FORMAT)


def write_samples(files: Files, table: pa.Table, meta: StoreMeta) -> None:
    """Replace samples.parquet at once or not at all."""
    text = canonical_json(meta.to_json(), "the store's description")
    table = table.replace_schema_metadata({_METADATA_KEY: text.encode()})

    def fill(file: Any) -> None:
        pq.write_table(
            table, file, compression="zstd", use_dictionary=["split"], write_page_checksum=True
        )

    files.write_stream(SAMPLES, fill)


def write_root(files: Files, meta: StoreMeta) -> None:
    """Bring the copy in the root group's attributes up to date: plain zarr readers see it."""
    new = dump(group_json({"mmc": meta.to_json()}))
    if files.read(ROOT) != new:
        files.write(ROOT, [new])


class SamplesFile:
    """samples.parquet as it was when it was opened, read column by column.

    Raises:
        DamagedStoreError: missing, or not a table of format 1.
    """

    def __init__(self, files: Files) -> None:
        self.where = files.where(SAMPLES)
        self._lock = threading.Lock()
        self.signature = files.signature(SAMPLES)
        """Changes when the file is replaced."""
        try:
            self._file = pq.ParquetFile(files.open(SAMPLES), page_checksum_verification=True)
        except FileNotFoundError:
            raise DamagedStoreError(
                f"{self.where} is missing, and with it the samples of this store"
            ) from None
        except (pa.ArrowInvalid, OSError) as error:
            raise self._damaged(error) from None
        schema = self._file.schema_arrow
        raw = (schema.metadata or {}).get(_METADATA_KEY)
        if raw is None or any(name not in schema.names for name in (*COLUMNS.names, "_gone")):
            raise DamagedStoreError(f"{self.where} is not the samples table of a store")
        self.meta = StoreMeta.from_bytes(raw, self.where)
        self.num_rows: int = self._file.metadata.num_rows
        self.names: list[str] = schema.names
        self.partly = self.meta.format >= PARTLY
        """Whether single labels are unknown."""
        if self.partly and UNKNOWN.name not in self.names:
            raise DamagedStoreError(f"{self.where} has format {PARTLY} and no {UNKNOWN.name!r}")

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Some columns, or all.

        Raises:
            InputError: no such column.
            DamagedStoreError: the bytes are not what was written.
        """
        for name in columns or ():
            if name not in self.names:
                raise InputError(
                    f"the samples have no column {name!r}; there are {', '.join(self.names)}"
                )
        try:
            with self._lock:
                table = self._file.read(columns)
        except (pa.ArrowInvalid, OSError) as error:
            raise self._damaged(error) from None
        return table.replace_schema_metadata(None)

    def _damaged(self, error: Exception) -> DamagedStoreError:
        reason = str(error).splitlines()[0]
        return DamagedStoreError(f"{self.where} is damaged ({reason}); extract into a new store")


@dataclass(frozen=True)
class Labels:
    """Labels of all rows, as compressed rows; rows that are gone count as unknown.

    A row may be unknown as a whole, or single labels of it.
    """

    indptr: Rows
    """(N + 1,) int64: row i has ``indices[indptr[i]:indptr[i + 1]]``."""
    indices: npt.NDArray[np.int32]
    """Indices into the label set, ascending in each row."""
    known: npt.NDArray[np.bool_]
    """(N,) whether labels of a row are known; known and empty means "none of them"."""
    num_labels: int
    """C, the length of the label set."""
    unknown_indptr: Rows | None = None
    """(N + 1,) int64; None where each row is known as a whole or not at all."""
    unknown_indices: npt.NDArray[np.int32] | None = None
    """The unknown labels of known rows, in the same form; a row that is unknown has none here."""

    @classmethod
    def of(
        cls,
        labels: pa.ChunkedArray,
        gone: npt.NDArray[np.bool_],
        num_labels: int,
        unknown: pa.ChunkedArray | None = None,
    ) -> Self:
        """From the table's columns."""
        indptr, indices, known = csr(labels)
        indptr, indices = _emptied(indptr, indices, gone)
        known = known & ~gone
        if unknown is None:
            return cls(indptr, indices, known, num_labels)
        lacking = _emptied(*csr(unknown)[:2], ~known)
        return cls(indptr, indices, known, num_labels, *lacking)

    @classmethod
    def of_hot(cls, hot: npt.NDArray[np.int8]) -> Self:
        """From (N, C): 1 yes, 0 no, -1 unknown."""
        known: npt.NDArray[np.bool_] = np.any(hot >= 0, axis=1)
        given = _compressed(hot == 1)
        lacking = _compressed((hot < 0) & known[:, None])
        if not len(lacking[1]):
            return cls(*given, known, hot.shape[1])
        return cls(*given, known, hot.shape[1], *lacking)

    @property
    def partly(self) -> bool:
        """Whether single labels may be unknown."""
        return self.unknown_indptr is not None

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        arrays = (self.indptr, self.indices, self.known, self.unknown_indptr, self.unknown_indices)
        return sum(array.nbytes for array in arrays if array is not None)

    def given(self, rows: npt.ArrayLike | None = None) -> CompressedRows:
        """(indptr, indices) of the labels that ``rows`` (all when None) have."""
        return _chosen(self.indptr, self.indices, rows)

    def unknown(self, rows: npt.ArrayLike | None = None) -> CompressedRows:
        """(indptr, indices) of the single labels that are unknown in ``rows`` (all when None)."""
        if self.unknown_indptr is None or self.unknown_indices is None:
            count = len(self.known) if rows is None else len(np.asarray(rows))
            return np.zeros(count + 1, np.int64), np.zeros(0, np.int32)
        return _chosen(self.unknown_indptr, self.unknown_indices, rows)

    def multi_hot(self, rows: npt.ArrayLike | None = None) -> npt.NDArray[np.int8]:
        """(n, C) int8 for ``rows`` (all when None): 1 yes, 0 no, -1 unknown."""
        known = self.known if rows is None else self.known[np.asarray(rows, np.int64)]
        hot = np.zeros((len(known), self.num_labels), np.int8)
        for value, (indptr, indices) in ((1, self.given(rows)), (-1, self.unknown(rows))):
            hot[np.repeat(np.arange(len(known)), np.diff(indptr)), indices] = value
        hot[~known] = -1
        return hot

    def counts(self, rows: npt.ArrayLike | None = None) -> npt.NDArray[np.int64]:
        """(C,) how many of ``rows`` (all when None) have each label."""
        return np.bincount(self.given(rows)[1], minlength=self.num_labels).astype(np.int64)

    def known_counts(self, rows: npt.ArrayLike | None = None) -> npt.NDArray[np.int64]:
        """(C,) for how many of ``rows`` (all when None) each label is known."""
        known = self.known if rows is None else self.known[np.asarray(rows, np.int64)]
        lacking = np.bincount(self.unknown(rows)[1], minlength=self.num_labels)
        counts: npt.NDArray[np.int64] = known.sum() - lacking
        return counts


def _chosen(
    indptr: Rows, indices: npt.NDArray[np.int32], rows: npt.ArrayLike | None
) -> CompressedRows:
    """Some rows of compressed rows, in the order asked for."""
    if rows is None:
        return indptr, indices
    wanted = np.asarray(rows, np.int64)
    counts = indptr[wanted + 1] - indptr[wanted]
    found = np.zeros(len(wanted) + 1, np.int64)
    np.cumsum(counts, out=found[1:])
    # Place of every label: the start of its row plus 0, 1, 2 ...
    places = np.arange(found[-1]) + np.repeat(indptr[wanted] - found[:-1], counts)
    return found, indices[places]


def _emptied(
    indptr: Rows, indices: npt.NDArray[np.int32], rows: npt.NDArray[np.bool_]
) -> CompressedRows:
    """Compressed rows without what is in ``rows``."""
    if not rows.any():
        return indptr, indices
    counts = np.diff(indptr)
    kept = indices[np.repeat(~rows, counts)]
    return np.concatenate([[0], np.cumsum(np.where(rows, 0, counts))]).astype(np.int64), kept


def _compressed(flags: npt.NDArray[np.bool_]) -> CompressedRows:
    rows, indices = np.nonzero(flags)
    indptr = np.searchsorted(rows, np.arange(len(flags) + 1)).astype(np.int64)
    return indptr, indices.astype(np.int32)
