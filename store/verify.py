"""Checking every byte of a store that counts, mending what can be, and dropping gone rows."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow.compute as pc

from mmc.store.aliases import (
    FEATURES,
    alias_names,
    arrays_json,
    current_failures,
    find_alias,
    read_failures,
    read_layout,
    read_status,
    read_status_chunk,
    status_key,
    write_arrays_json,
    write_status_chunk,
)
from mmc.store.compaction import compact_files, finish
from mmc.store.errors import DamagedStoreError, MmcError
from mmc.store.files import Files
from mmc.store.labeltext import LABEL_TEXT, read_label_text
from mmc.store.layout import status_json
from mmc.store.locks import exclusive
from mmc.store.mapped import open_shard
from mmc.store.reader import EmbeddingStore
from mmc.store.samples import ROOT, SAMPLES, SamplesFile, write_root
from mmc.store.schema import DONE, FAILED, MISSING, AliasRecord, dump, group_json
from mmc.store.showing import format_bytes

_LOOKS = 3
"""Writers may be at work: what does not fit is looked at again before it counts as damage."""

Kind = Literal["samples", "root", "alias", "array", "status", "shard", "failures", "label_text"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing in a store that is not as it was committed."""

    file: str
    """Path or URL of the file."""
    feature: str
    """``alias/field``, ``alias`` or "" for the samples."""
    shard: int | None
    """Which shard, where it is one."""
    what: str
    """One sentence."""
    kind: Kind
    """What sort of file it is; ``samples`` and ``alias`` cannot be repaired."""
    tower: str = ""
    """Tower whose status is concerned."""
    repairable: bool = True
    """Whether `repair` mends it, so that the next extraction makes anew what was lost."""


def verify(store: EmbeddingStore) -> list[Problem]:
    """Read everything that is marked as done and compare every checksum.

    What was never committed, and what a killed writer left behind, is no problem.
    """
    files = store.files
    try:
        samples = SamplesFile(files)
        ids = samples.read().column("id")
    except DamagedStoreError as error:
        return [_problem(files, SAMPLES, "", error, "samples")]
    problems = []
    if pc.count_distinct(ids, mode="all").as_py() != len(ids):
        problems.append(_problem(files, SAMPLES, "", "an id occurs twice", "samples"))
    if files.read(ROOT) != dump(group_json({"mmc": samples.meta.to_json()})):
        what = "its attributes are not those of samples.parquet"
        problems.append(_problem(files, ROOT, "", what, "root"))
    for alias in alias_names(files):
        problems += _settled(files, alias, samples.num_rows, samples.meta.generation)
    return problems


def repair(store: EmbeddingStore) -> list[Problem]:
    """Make damaged shards missing again, so that the next extraction fills them; what was found.

    Problems of kind ``samples`` and ``alias`` are beyond repair and stay.

    Raises:
        StoreLockedError: somebody writes.
    """
    files = store.files
    with exclusive(files):
        problems = verify(store)
        if any(problem.kind == "samples" for problem in problems):
            return problems
        meta = SamplesFile(files).meta
        finish(files, meta.generation)
        for problem in problems:
            _mend(files, problem, meta.generation)
        if any(problem.kind == "array" for problem in problems):
            # Only now can its shards be looked at.
            more = [problem for problem in verify(store) if problem.repairable]
            for problem in more:
                _mend(files, problem, meta.generation)
            problems += more
        write_root(files, meta)
        files.clean("", deep=False)
        files.clean(FEATURES, deep=True)
    return problems


@dataclass(frozen=True, kw_only=True)
class CompactReport:
    """What a compaction did."""

    dropped: int
    """Rows that were gone from their source."""
    rows: int
    """Rows that are left."""
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        """One line for people."""
        freed = format_bytes(max(self.bytes_before - self.bytes_after, 0))
        return f"{self.dropped:,} samples dropped, {self.rows:,} left; {freed} freed"


def compact(store: EmbeddingStore) -> CompactReport:
    """Drop the rows that are gone. Open the store again afterwards.

    Raises:
        StoreLockedError: somebody writes.
        DamagedStoreError: rows that have to move are damaged; nothing was changed.
    """
    before = store.files.tree_bytes("")
    dropped = compact_files(store.files)
    return CompactReport(
        dropped=dropped,
        rows=SamplesFile(store.files).num_rows,
        bytes_before=before,
        bytes_after=store.files.tree_bytes(""),
    )


def conclusion(problems: Sequence[Problem], path: str, *, repaired: bool) -> str:
    """What to do after `verify` or `repair` found ``problems`` in the store at ``path``.

    Raises:
        MmcError: something is damaged still.
    """
    if not problems:
        return f"{path}: every checksum is right"
    mendable = sum(problem.repairable for problem in problems)
    rest = len(problems) - mendable
    parts = []
    if mendable and repaired:
        parts.append(f"{mendable} mended: run the same `mmc extract` again to fill what is missing")
    elif mendable:
        parts.append(f"{mendable} damaged in {path}: run `mmc verify {path} --repair`")
    if rest:
        parts.append(f"{rest} cannot be repaired: the lines above say what to do")
    if rest or not repaired:
        raise MmcError("; ".join(parts))
    return parts[0]


def _problem(
    files: Files,
    key: str,
    feature: str,
    what: object,
    kind: Kind,
    shard: int | None = None,
    tower: str = "",
) -> Problem:
    where = files.where(key)
    return Problem(
        file=where,
        feature=feature,
        shard=shard,
        what=str(what).removeprefix(f"{where} "),
        kind=kind,
        tower=tower,
        repairable=kind not in ("samples", "alias"),
    )


def _settled(files: Files, alias: str, rows: int, generation: int) -> list[Problem]:
    """The problems of an alias that nobody overwrites or compacts while it is looked at."""
    for _ in range(_LOOKS):
        before = files.signature(f"{FEATURES}/{alias}/{ROOT}")
        problems = list(_alias(files, alias, rows, generation))
        if not problems or files.signature(f"{FEATURES}/{alias}/{ROOT}") == before:
            break
    return problems


def _alias(files: Files, alias: str, rows: int, generation: int) -> Iterator[Problem]:
    try:
        found = find_alias(files, alias, generation)
    except DamagedStoreError as error:
        yield _problem(files, f"{FEATURES}/{alias}/{ROOT}", alias, error, "alias")
        return
    if found is None:
        return
    prefix, record = found
    for key, _ in arrays_json(record, rows):
        what = _status_fault(files, f"{prefix}/{key}", record) if key.startswith("status_") else ""
        if what:
            yield _problem(files, f"{prefix}/{key}", alias, what, "array")
    for tower in record.towers:
        yield from _tower(files, prefix, alias, record, tower, rows)
    yield from _failures(files, prefix, alias, record, rows)
    try:
        read_label_text(files, prefix)
    except DamagedStoreError as error:
        yield _problem(files, f"{prefix}/{LABEL_TEXT}", alias, error, "label_text")


def _status_fault(files: Files, key: str, record: AliasRecord) -> str:
    """What is wrong with a status's metadata, which only other zarr readers need."""
    raw = files.read(key)
    if raw is None:
        return "it is missing"
    try:
        stored = json.loads(raw)
        rows = int(stored["shape"][0])
    except (ValueError, KeyError, TypeError, IndexError):
        return "it is damaged: not the metadata of an array"
    # Read after it: rows are added to the samples first.
    fits = 0 <= rows <= SamplesFile(files).num_rows
    same = stored == status_json(rows, record.shard_rows)
    return "" if fits and same else "it is not the metadata of this status"


def _failures(
    files: Files, prefix: str, alias: str, record: AliasRecord, rows: int
) -> Iterator[Problem]:
    """Every row that failed has its reason."""
    key = f"{prefix}/errors.parquet"
    for _ in range(_LOOKS):
        failed = {}
        for tower in record.towers:
            with contextlib.suppress(DamagedStoreError):  # which _tower() tells
                failed[tower] = read_status(files, prefix, tower, rows, record.shard_rows) == FAILED
        try:
            failures = read_failures(files, prefix)
        except DamagedStoreError as error:
            yield _problem(files, key, alias, error, "failures")
            return
        count = sum(int(mask.sum()) for mask in failed.values())
        lacking = count - len(current_failures(failures, failed))
        if lacking <= 0:
            return
    what = f"it lacks the reasons of {lacking} of the {count} rows that failed"
    yield _problem(files, key, alias, what, "failures")


def _tower(
    files: Files, prefix: str, alias: str, record: AliasRecord, tower: str, rows: int
) -> Iterator[Problem]:
    size = record.shard_rows
    layouts = {}
    for name in record.of_tower(tower):
        try:
            layouts[name] = read_layout(files, prefix, name)
        except DamagedStoreError as error:
            key = f"{prefix}/{name}/{ROOT}"
            yield _problem(files, key, f"{alias}/{name}", error, "array", tower=tower)
    present = {name: set(files.names(f"{prefix}/{name}")) for name in layouts}
    for shard in range(-(-rows // size)):
        try:
            status = read_status_chunk(files, prefix, tower, shard, size)
        except DamagedStoreError as error:
            key = status_key(prefix, tower, shard)
            yield _problem(files, key, alias, error, "status", shard, tower)
            continue
        if status is None:
            if any(layout.key(shard) in present[name] for name, layout in layouts.items()):
                key = status_key(prefix, tower, shard)
                what = "it is missing, and with it which rows of its shard are done"
                yield _problem(files, key, alias, what, "status", shard, tower)
            continue
        done = np.flatnonzero(status == DONE)
        for name, layout in layouts.items() if len(done) else ():
            if shard * size + done[-1] >= layout.rows:
                key = f"{prefix}/{name}/{ROOT}"
                what = f"its shape ends at row {layout.rows} and later rows are done"
                yield _problem(files, key, f"{alias}/{name}", what, "array", tower=tower)
            key = f"{prefix}/{name}/{layout.key(shard)}"
            try:
                opened = open_shard(files, key, layout)
                for chunk in np.unique(done // layout.chunk_rows).tolist():
                    opened.check(chunk)
            except DamagedStoreError as error:
                yield _problem(files, key, f"{alias}/{name}", error, "shard", shard, tower)


def _mend(files: Files, problem: Problem, generation: int) -> None:
    if problem.kind in ("samples", "root", "alias"):
        return
    alias = problem.feature.partition("/")[0]
    found = find_alias(files, alias, generation)
    if found is None:
        return
    prefix, record = found
    if problem.kind == "array":
        write_arrays_json(files, prefix, record, SamplesFile(files).num_rows)
    elif problem.kind == "label_text":
        files.remove_tree(f"{prefix}/{LABEL_TEXT}")
    elif problem.kind == "status" and problem.shard is not None:
        size = record.shard_rows
        nothing = np.zeros(0, np.uint8)
        write_status_chunk(files, prefix, problem.tower, problem.shard, size, nothing)
    elif problem.kind == "shard" and problem.shard is not None:
        _reset(files, prefix, record, problem.tower, problem.shard, DONE)
    elif problem.kind == "failures":
        # Without its reason a failure says nothing: let it be tried again.
        for tower in record.towers:
            for shard in range(-(-SamplesFile(files).num_rows // record.shard_rows)):
                _reset(files, prefix, record, tower, shard, FAILED)
        files.remove(f"{prefix}/errors.parquet")


def _reset(
    files: Files, prefix: str, record: AliasRecord, tower: str, shard: int, value: int
) -> None:
    """Make the rows of a shard whose status is ``value`` missing."""
    status = read_status_chunk(files, prefix, tower, shard, record.shard_rows)
    if status is not None and (status == value).any():
        mended = np.where(status == value, MISSING, status).astype(np.uint8)
        write_status_chunk(files, prefix, tower, shard, record.shard_rows, mended)
