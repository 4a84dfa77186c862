"""The table of samples: its schema, checks and file. Row i of every array is row i here."""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmc.store.errors import DamagedStoreError, InputError
from mmc.store.files import Files
from mmc.store.schema import FORMAT, canonical_json, check_format, dump, group_json

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

INTERNAL = pa.schema([("_source", pa.int16()), ("_gone", pa.bool_())])
_METADATA_KEY = b"mmc"

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class StoreMeta:
    """What samples.parquet's own metadata says of the whole store."""

    label_set: tuple[str, ...]
    task: str
    sources: tuple[dict[str, Any], ...]
    generation: int = 0
    """Which order of rows; compaction makes a new one."""

    def to_json(self) -> dict[str, Any]:
        """For the key-value metadata and the attributes of the root group."""
        return {
            "format": FORMAT,
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
            check_format(data["format"], where)
            return cls(
                label_set=tuple(data["label_set"]),
                task=data["task"],
                sources=tuple(data["sources"]),
                generation=data["generation"],
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
    a user's column named like an internal one is renamed to ``user.<name>``.

    Raises:
        InputError: no id column, an id that is null, empty or there twice, a column that cannot
            be converted, a label index outside the label set, several labels where the task
            allows one.
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
    for name in samples.column_names:
        if name not in columns:
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
    if meta.task in ("binary", "multiclass") and (counts > 1).any():
        row = int((counts > 1).argmax())
        raise InputError(
            f"sample {ids[row].as_py()!r} has {counts[row]} labels and the task is {meta.task}; "
            "a multilabel task allows several"
        )
    return labels_column(counts, indices[keep], known)


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
    """The reverse of :func:`csr`, from the labels per row."""
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
    return table.select([*core, *(name for name in table.column_names if name not in core)])


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
    """Labels of all rows, as compressed rows; rows that are gone count as unknown."""

    indptr: Rows
    """(N + 1,) int64: row i has ``indices[indptr[i]:indptr[i + 1]]``."""
    indices: npt.NDArray[np.int32]
    """Indices into the label set, ascending in each row."""
    known: npt.NDArray[np.bool_]
    """(N,) whether the labels of a row are known; known and empty means "none of them"."""
    num_labels: int
    """C, the length of the label set."""

    @classmethod
    def of(cls, labels: pa.ChunkedArray, gone: npt.NDArray[np.bool_], num_labels: int) -> Self:
        """From the table's columns."""
        indptr, indices, known = csr(labels)
        if gone.any():
            counts = np.where(gone, 0, np.diff(indptr))
            indices = indices[np.repeat(~gone, np.diff(indptr))]
            indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(indptr, indices, known & ~gone, num_labels)

    def _flat(self, rows: npt.ArrayLike | None) -> tuple[Rows, npt.NDArray[np.int32], Any]:
        """(position in ``rows`` of each label, its index, known per row)."""
        if rows is None:
            counts = np.diff(self.indptr)
            return np.repeat(np.arange(len(counts)), counts), self.indices, self.known
        wanted = np.asarray(rows, np.int64)
        counts = (self.indptr[1:] - self.indptr[:-1])[wanted]
        ends = np.cumsum(counts)
        at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(
            self.indptr[wanted] - (ends - counts), counts
        )
        return np.repeat(np.arange(len(wanted)), counts), self.indices[at], self.known[wanted]

    def multi_hot(self, rows: npt.ArrayLike | None = None) -> npt.NDArray[np.int8]:
        """(n, C) int8 of 0 and 1 for ``rows`` (all when None); -1 in rows that are unknown."""
        positions, indices, known = self._flat(rows)
        hot = np.zeros((len(known), self.num_labels), np.int8)
        hot[positions, indices] = 1
        hot[~known] = -1
        return hot

    def counts(self, rows: npt.ArrayLike | None = None) -> npt.NDArray[np.int64]:
        """(C,) how many of ``rows`` (all when None) have each label."""
        _, indices, _ = self._flat(rows)
        return np.bincount(indices, minlength=self.num_labels).astype(np.int64)

    def known_counts(self, rows: npt.ArrayLike | None = None) -> npt.NDArray[np.int64]:
        """(C,) for how many of ``rows`` (all when None) each label is known."""
        known = self.known if rows is None else self.known[np.asarray(rows, np.int64)]
        return np.full(self.num_labels, known.sum(), np.int64)
