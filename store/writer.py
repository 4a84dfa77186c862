"""Filling an alias: whole shards, committed one at a time.

A commit writes each field's shard (temporary file, sync, rename), then the reasons of rows that
failed, then the status in the same way. Until its status says so no row is there, so a writer may
die at any moment: the rows it was busy with are missing, and everything else is as it was.
"""

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmc.store.aliases import (
    FAILURES,
    FEATURES,
    Status,
    read_failures,
    read_layout,
    read_status,
    remove_alias,
    status_shards,
    write_failures,
    write_status_chunk,
)
from mmc.store.compaction import roll_forward
from mmc.store.errors import InputError, MmcError
from mmc.store.files import Files
from mmc.store.labeltext import write_label_text
from mmc.store.layout import Layout
from mmc.store.locks import SAMPLES_LOCK, WAIT_SECONDS, alias_lock, held
from mmc.store.mapped import Rows, open_shard
from mmc.store.samples import SamplesFile, write_root
from mmc.store.schema import (
    DONE,
    FAILED,
    MISSING,
    AliasRecord,
    Compression,
    FieldSpec,
    Provenance,
    canonical_json,
    check_name,
    dump,
    fill_value,
)
from mmc.store.shards import Array, encode
from mmc.store.target import Target, check_settings


@contextlib.contextmanager
def open_writer(
    files: Files,
    known: SamplesFile,
    alias: str,
    fields: Sequence[FieldSpec],
    identity: Mapping[str, Any],
    context: Mapping[str, Any],
    *,
    shard_rows: int | None = None,
    compress: Compression = None,
    overwrite: bool = False,
) -> Iterator["Writer"]:
    """Lock ``alias`` and make it ready for ``fields``; see ``EmbeddingStore.writer``.

    ``known`` is what the caller takes the contents of the rows from: they must not have changed.
    """
    check_name(alias, "name")
    check_settings(fields, shard_rows, compress)
    provenance = Provenance(
        identity=json.loads(canonical_json(dict(identity), "identity")),
        context=json.loads(canonical_json(dict(context), "context")),
    )
    with contextlib.ExitStack() as stack:
        # Under the samples lock, so that the rows seen here stay as they are until the writer is
        # done: a sync takes the lock of every alias.
        with held(files, SAMPLES_LOCK, wait=WAIT_SECONDS):
            stack.enter_context(held(files, alias_lock(alias)))
            samples = SamplesFile(files)
            if samples.signature != known.signature:
                raise MmcError(
                    f"the samples of {files.url} were changed by another process in the meantime; "
                    "run it again"
                )
            write_root(files, samples.meta)
        roll_forward(files, alias, samples.meta.generation)
        files.clean(f"{FEATURES}/{alias}", deep=True)
        target = Target(files, alias, samples)
        if overwrite:
            remove_alias(files, target.prefix)
        record = target.ready(fields, provenance, shard_rows, compress)
        yield Writer(target, record, provenance.context)


class Writer:
    """Commits shards of one alias; made by ``EmbeddingStore.writer``.

    Commits of different shards or towers may come from several threads.
    """

    def __init__(self, target: Target, record: AliasRecord, context: dict[str, Any]) -> None:
        self.alias = target.alias
        self.fields = record.fields
        self.shard_rows = record.shard_rows
        self._files = target.files
        self._prefix = target.prefix
        self._samples = target.samples
        self._record = record
        self._context = context
        self._rows = target.samples.num_rows
        self._gone = self._samples.read(["_gone"]).column(0).to_numpy()
        self._lock = threading.Lock()
        self._ids: pa.ChunkedArray | None = None
        self._layouts = {name: read_layout(self._files, self._prefix, name) for name in self.fields}
        self._status: dict[str, Status] = {
            tower: read_status(self._files, self._prefix, tower, self._rows, self.shard_rows).copy()
            for tower in record.towers
        }
        self._started = {
            tower: status_shards(self._files, self._prefix, tower) for tower in record.towers
        }

    @property
    def num_shards(self) -> int:
        """Shards that hold at least one row."""
        return -(-self._rows // self.shard_rows)

    def bounds(self, shard: int) -> tuple[int, int]:
        """First row of ``shard`` and the row after its last.

        Raises:
            InputError: no such shard.
        """
        if not 0 <= shard < self.num_shards:
            raise InputError(f"shard {shard} is outside the store's {self.num_shards}")
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self._rows)

    def pending(self, tower: str, *, retry_failed: bool = False) -> Rows:
        """Rows that are not gone and that ``tower`` has not been committed for, ascending.

        Args:
            tower: one of the alias's towers.
            retry_failed: take rows that failed too.
        """
        status = self._tower(tower)
        wanted = status == MISSING
        if retry_failed:
            wanted |= status == FAILED
        return np.flatnonzero(wanted & ~self._gone)

    def commit(
        self,
        shard: int,
        tower: str,
        rows: npt.ArrayLike,
        arrays: Mapping[str, Array],
        failed: Mapping[int, str] | None = None,
    ) -> None:
        """Write rows of one shard for good; rows of the shard not named here stay as they are.

        Args:
            shard: which one.
            tower: whose fields these are.
            rows: (n,) rows of the store that ``arrays`` hold, all in this shard.
            arrays: each field of the tower, (n, *shape); float32 is rounded to a float16 field.
            failed: row to reason, for rows that have no embedding.

        Raises:
            InputError: rows outside the shard or named twice, a field missing, of another shape
                or with values too large for its dtype.
            MmcError: the disk is full or not ours to write; these rows are as before or missing.
            DamagedStoreError: the rest of the shard, which has to be kept, is damaged.
        """
        failed = dict(failed or {})
        start, stop = self.bounds(shard)
        wanted = np.asarray(rows, np.int64).reshape(-1)
        _check_rows(wanted, list(failed), start, stop)
        fields = self._record.of_tower(tower)
        status = self._tower(tower)[start:stop]
        blocks = self._checked(tower, arrays, len(wanted))
        touched = np.concatenate([wanted, np.fromiter(failed, np.int64, len(failed))]) - start

        self._note_context()
        before = status.copy()
        before[touched] = MISSING
        if (before != status).any() or (len(wanted) and shard not in self._started[tower]):
            # Between the shards of two fields a kill must not leave these rows marked as done; and
            # a shard without a status file tells that the file was lost.
            self._write_status(tower, shard, before)
        if len(wanted):
            kept = np.flatnonzero(before == DONE)
            for name in fields:
                self._write_field(name, shard, wanted - start, blocks[name], kept)
        if failed or (status[touched] == FAILED).any():
            self._write_failures(tower, touched + start, failed)
        after = before.copy()
        after[wanted - start] = DONE
        after[np.fromiter(failed, np.int64, len(failed)) - start] = FAILED
        self._write_status(tower, shard, after)

    def write_label_text(self, labels: Sequence[str], array: npt.ArrayLike, prompt: str) -> None:
        """Keep the embeddings of the label names' prompts beside the features.

        Args:
            labels: C names.
            array: (C, D), stored as float32.
            prompt: the template that was filled with each name.

        Raises:
            InputError: another number of rows than labels.
        """
        write_label_text(self._files, self._prefix, labels, array, prompt)

    def _tower(self, tower: str) -> Status:
        if tower not in self._status:
            raise InputError(
                f"{self.alias} has no {tower!r} tower; it has {', '.join(self._status)}"
            )
        return self._status[tower]

    def _checked(self, tower: str, arrays: Mapping[str, Array], count: int) -> dict[str, Array]:
        """The arrays in their stored dtype."""
        fields = self._record.of_tower(tower)
        if set(arrays) != set(fields):
            raise InputError(
                f"the {tower} tower of {self.alias} has the fields {', '.join(fields)}; "
                f"got {', '.join(arrays) or 'none'}"
            )
        return {
            name: _as_stored(name, np.asarray(arrays[name]), self._layouts[name], count)
            for name in fields
        }

    def _write_field(self, name: str, shard: int, local: Rows, values: Array, kept: Rows) -> None:
        layout = self._layouts[name]
        start, stop = layout.bounds(shard)
        key = f"{self._prefix}/{name}/{layout.key(shard)}"
        if len(local) == stop - start and (np.diff(local) == 1).all():
            block = np.ascontiguousarray(values)
        else:
            block = np.full(
                (stop - start, *layout.row_shape), fill_value(layout.dtype), layout.dtype
            )
            if len(kept):
                items = block.reshape(-1).view(np.dtype(f"V{layout.row_bytes}"))
                open_shard(self._files, key, layout).take(kept, items, kept, check=True)
            block[local] = values
        self._files.write(key, encode(layout, block))

    def _write_status(self, tower: str, shard: int, status: Status) -> None:
        write_status_chunk(self._files, self._prefix, tower, shard, self.shard_rows, status)
        start, stop = self.bounds(shard)
        self._status[tower][start:stop] = status
        self._started[tower].add(shard)

    def _write_failures(self, tower: str, rows: Rows, failed: Mapping[int, str]) -> None:
        with self._lock:
            if self._ids is None:
                self._ids = self._samples.read(["id"]).column(0)
            old = read_failures(self._files, self._prefix)
            mine = pc.and_(
                pc.equal(old.column("tower"), tower),
                pc.is_in(old.column("row"), value_set=pa.array(rows)),
            )
            new = pa.table(
                {
                    "row": pa.array(list(failed), pa.int64()),
                    "id": self._ids.take(pa.array(list(failed), pa.int64())),
                    "tower": pa.array([tower] * len(failed), pa.string()),
                    "reason": pa.array([str(reason) for reason in failed.values()], pa.string()),
                },
                schema=FAILURES,
            )
            merged = pa.concat_tables([old.filter(pc.invert(mine)), new])
            write_failures(self._files, self._prefix, merged)

    def _note_context(self) -> None:
        """Keep the context of whoever wrote last: written with the first commit."""
        with self._lock:
            if self._record.provenance.context == self._context:
                return
            provenance = replace(self._record.provenance, context=self._context)
            self._record = replace(self._record, provenance=provenance)
            self._files.write(f"{self._prefix}/zarr.json", [dump(self._record.to_json())])


def _check_rows(rows: Rows, failed: list[int], start: int, stop: int) -> None:
    both = np.concatenate([rows, np.array(failed, np.int64)])
    outside = both[(both < start) | (both >= stop)]
    if len(outside):
        raise InputError(f"row {outside[0]} is not in the shard of rows {start} to {stop - 1}")
    values, counts = np.unique(both, return_counts=True)
    if (counts > 1).any():
        raise InputError(f"row {values[counts > 1][0]} is committed twice at once")


def _as_stored(name: str, values: Array, layout: Layout, count: int) -> Array:
    if values.shape != (count, *layout.row_shape):
        raise InputError(
            f"field {name!r} needs shape {(count, *layout.row_shape)}, got {values.shape}"
        )
    # Floats may be rounded; integers never wrap around.
    if not np.can_cast(
        values.dtype, layout.dtype, "same_kind" if layout.dtype.kind == "f" else "safe"
    ):
        raise InputError(f"field {name!r} is {layout.dtype}, got {values.dtype}")
    try:
        with np.errstate(over="raise"):
            return values.astype(layout.dtype, copy=False)
    except FloatingPointError:
        raise InputError(
            f"field {name!r} has values beyond {layout.dtype}'s range; store it as float32"
        ) from None
