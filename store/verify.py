"""Checking every byte of a store that counts, mending what can be, and dropping gone rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow.compute as pc

from mmc.store.aliases import (
    FEATURES,
    alias_names,
    arrays_json,
    find_alias,
    read_failures,
    read_layout,
    read_status_chunk,
    status_key,
    write_arrays_json,
    write_status_chunk,
)
from mmc.store.compaction import compact_files, finish
from mmc.store.errors import DamagedStoreError
from mmc.store.files import Files
from mmc.store.labeltext import LABEL_TEXT, read_label_text
from mmc.store.locks import exclusive
from mmc.store.mapped import open_shard
from mmc.store.reader import EmbeddingStore
from mmc.store.samples import ROOT, SAMPLES, SamplesFile, write_root
from mmc.store.schema import DONE, FAILED, MISSING, AliasRecord, dump, group_json

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
        problems.extend(_alias(files, alias, samples.num_rows, samples.meta.generation))
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
        write_root(files, meta)
        files.clean("", deep=False)
        files.clean(FEATURES, deep=True)
    return problems


def compact(store: EmbeddingStore) -> int:
    """Drop the rows that are gone; how many there were. Open the store again afterwards.

    Raises:
        StoreLockedError: somebody writes.
        DamagedStoreError: rows that have to move are damaged; nothing was changed.
    """
    return compact_files(store.files)


def _problem(
    files: Files,
    key: str,
    feature: str,
    what: object,
    kind: Kind,
    shard: int | None = None,
    tower: str = "",
) -> Problem:
    return Problem(
        file=files.where(key), feature=feature, shard=shard, what=str(what), kind=kind, tower=tower
    )


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
        if key.startswith("status_") and files.read(f"{prefix}/{key}") is None:
            yield _problem(files, f"{prefix}/{key}", alias, "it is missing", "array")
    for tower in record.towers:
        yield from _tower(files, prefix, alias, record, tower, rows)
    try:
        read_failures(files, prefix)
    except DamagedStoreError as error:
        yield _problem(files, f"{prefix}/errors.parquet", alias, error, "failures")
    try:
        read_label_text(files, prefix)
    except DamagedStoreError as error:
        yield _problem(files, f"{prefix}/{LABEL_TEXT}", alias, error, "label_text")


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
    for shard in range(-(-rows // size)):
        try:
            status = read_status_chunk(files, prefix, tower, shard, size)
        except DamagedStoreError as error:
            key = status_key(prefix, tower, shard)
            yield _problem(files, key, alias, error, "status", shard, tower)
            continue
        if status is None:
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
        files.remove(status_key(prefix, problem.tower, problem.shard))
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
