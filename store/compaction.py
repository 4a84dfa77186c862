"""Dropping the rows that are gone. Rows move, so arrays and samples must change as one.

Each alias is built anew in a staging folder that carries the next generation number; then
samples.parquet is replaced, with that number: this is the commit. Readers take the folder whose
number is that of the samples, so the store is whole at every moment; moving the staged folders
into place only tidies up, and the next writer does it where a kill prevented it.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from mmc.store.aliases import (
    FEATURES,
    STAGING,
    alias_names,
    current_failures,
    find_alias,
    read_failures,
    read_record,
    read_status,
    remove_alias,
    write_arrays_json,
    write_failures,
    write_status_chunk,
)
from mmc.store.feature import Feature
from mmc.store.files import Files
from mmc.store.labeltext import read_label_text, write_label_text
from mmc.store.layout import Layout
from mmc.store.locks import exclusive
from mmc.store.mapped import Rows
from mmc.store.samples import SamplesFile, settled, take_rows, write_root, write_samples
from mmc.store.schema import FAILED, AliasRecord, dump
from mmc.store.shards import encode

INDEX = "index"
"""Folder of the neighbour indexes, which name rows."""


def compact_files(files: Files) -> int:
    """Drop the rows that are gone; how many there were.

    Raises:
        StoreLockedError: somebody writes.
        DamagedStoreError: rows that have to move are damaged; nothing was changed.
    """
    with exclusive(files):
        samples = SamplesFile(files)
        generation = samples.meta.generation
        for alias in alias_names(files):
            roll_forward(files, alias, generation)
        files.remove_tree(STAGING)
        gone = samples.read(["_gone"]).column(0).to_numpy()
        if not gone.any():
            return 0
        keep = np.flatnonzero(~gone)
        for alias in alias_names(files):
            _stage(files, alias, generation, len(gone), keep)
        table, meta = settled(
            take_rows(samples.read(), keep), replace(samples.meta, generation=generation + 1)
        )
        write_samples(files, table, meta)
        finish(files, meta.generation)
        files.remove_tree(INDEX)
        write_root(files, meta)
        return len(gone) - len(keep)


def finish(files: Files, generation: int) -> None:
    """Move what a committed compaction staged into place."""
    for alias in alias_names(files):
        roll_forward(files, alias, generation)
    files.remove_tree(STAGING)


def roll_forward(files: Files, alias: str, generation: int) -> None:
    """Move one staged alias into place, if it belongs to the committed row order."""
    staged, target = f"{STAGING}/{alias}", f"{FEATURES}/{alias}"
    new = read_record(files, staged)
    if new is None or new.generation != generation:
        return
    old = read_record(files, target)
    if old is not None and old.generation == generation:
        # It was copied before and only its source is left.
        files.remove_tree(staged)
        return
    remove_alias(files, target)
    files.move_tree(staged, target)


def _stage(files: Files, alias: str, generation: int, rows: int, keep: Rows) -> None:
    """Build an alias with the rows ``keep`` only; its record is written last."""
    found = find_alias(files, alias, generation)
    if found is None:
        return
    prefix, record = found
    staged = f"{STAGING}/{alias}"
    new = replace(record, generation=generation + 1)
    write_arrays_json(files, staged, new, len(keep))
    failed = {}
    for tower in record.towers:
        status = read_status(files, prefix, tower, rows, record.shard_rows)
        failed[tower] = status == FAILED
        for name in record.of_tower(tower):
            feature = Feature(files, prefix, alias, record, name, status)
            _stage_field(files, f"{staged}/{name}", feature, new, name, keep)
        for shard, start in enumerate(range(0, len(keep), record.shard_rows)):
            part = status[keep[start : start + record.shard_rows]]
            if part.any():
                write_status_chunk(files, staged, tower, shard, record.shard_rows, part)
    failures = current_failures(read_failures(files, prefix), failed)
    _stage_failures(files, staged, failures, keep)
    texts = read_label_text(files, prefix)
    if texts is not None:
        write_label_text(files, staged, *texts)
    files.write(f"{staged}/zarr.json", [dump(new.to_json())])


def _stage_field(
    files: Files, folder: str, feature: Feature, record: AliasRecord, name: str, keep: Rows
) -> None:
    layout = Layout.of(record.fields[name], len(keep), record.shard_rows, record.compress)
    for shard in range(layout.num_shards):
        start, stop = layout.bounds(shard)
        rows = keep[start:stop]
        if feature.done[rows].any():
            # Checksums always: a damaged row must not get a fitting checksum by being moved.
            block = feature.take(rows, missing="fill", check=True)
            files.write(f"{folder}/{layout.key(shard)}", encode(layout, block))


def _stage_failures(files: Files, staged: str, failures: pa.Table, keep: Rows) -> None:
    old = failures.column("row").to_numpy()
    place = np.searchsorted(keep, old)
    stays = np.isin(old, keep)
    if stays.any():
        kept = failures.filter(pa.array(stays)).set_column(0, "row", pa.array(place[stays]))
        write_failures(files, staged, kept)
