"""The folder of one alias: its record, statuses and failures."""

import json
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmc.store.errors import DamagedStoreError, FormatVersionError
from mmc.store.files import Files
from mmc.store.layout import Layout, status_json
from mmc.store.schema import MISSING, TOWER_CONTENT, AliasRecord, dump, removed_json
from mmc.store.shards import CRC_BYTES, REMEDY, with_crc, without_crc

FEATURES = "features"
STAGING = "compact"
"""Where a compaction builds aliases in their new row order, before it commits."""

Status = npt.NDArray[np.uint8]

FAILURES = pa.schema(
    [("row", pa.int64()), ("id", pa.string()), ("tower", pa.string()), ("reason", pa.string())]
)
"""errors.parquet: one row per (row, tower) that was tried and failed."""


def find_alias(files: Files, alias: str, generation: int) -> tuple[str, AliasRecord] | None:
    """The folder and record of an alias in the row order ``generation``; None when there is none.

    A compaction that was killed after its commit leaves the arrays in the staging folder: they
    are as good there, and the next writer moves them.

    Raises:
        DamagedStoreError: there are arrays, but only of another row order, or without a record.
    """
    for _ in range(_LOOKS):
        stale = None
        for folder in (FEATURES, STAGING):
            prefix = f"{folder}/{alias}"
            record = read_record(files, prefix)
            if record is None:
                continue
            if record.generation == generation:
                return prefix, record
            if folder == FEATURES:
                stale = record
        if stale is not None:
            raise DamagedStoreError(
                f"{files.where(f'{FEATURES}/{alias}')} follows row order {stale.generation} and "
                f"the samples follow {generation}; extract it again with --overwrite"
            )
        if not lost_record(files, alias):
            return None
    raise DamagedStoreError(
        f"{files.where(f'{FEATURES}/{alias}/zarr.json')} is missing, and without it nobody knows "
        "what made the embeddings beside it; put it back, extract again with --overwrite, or "
        "delete the folder"
    )


_LOOKS = 3
"""A compaction moves aliases: one that seems to have lost its record is looked for again."""


def read_record(files: Files, prefix: str) -> AliasRecord | None:
    """The record of an alias's folder; None when it has none or is being removed.

    Raises:
        DamagedStoreError: it is damaged.
    """
    key = f"{prefix}/zarr.json"
    raw = files.read(key)
    return None if raw is None else AliasRecord.from_bytes(raw, files.where(key))


def lost_record(files: Files, alias: str) -> bool:
    """Whether rows were committed to an alias whose record is not there.

    The record is there before the first commit, and a tombstone takes its place before the arrays
    are removed: no kill can leave this.
    """
    prefix = f"{FEATURES}/{alias}"
    towers = _towers_on_disk(files, prefix)
    committed = any(status_shards(files, prefix, tower) for tower in towers)
    return committed and files.size(f"{prefix}/zarr.json") is None


def _towers_on_disk(files: Files, prefix: str) -> list[str]:
    return [name[len("status_") :] for name in files.names(prefix) if name.startswith("status_")]


def remove_alias(files: Files, prefix: str) -> None:
    """Remove an alias; one that is half removed has a tombstone and counts as none."""
    files.remove_tree(prefix, tombstone=dump(removed_json()))


def alias_names(files: Files) -> list[str]:
    """Names of the aliases, sorted; those with a damaged or a lost record too."""
    found = set()
    for folder in (FEATURES, STAGING):
        for name in files.names(folder):
            if not name.startswith(".") and _is_alias(files, folder, name):
                found.add(name)
    return sorted(found)


def _is_alias(files: Files, folder: str, name: str) -> bool:
    try:
        if read_record(files, f"{folder}/{name}") is not None:
            return True
    except (DamagedStoreError, FormatVersionError):
        return True
    return folder == FEATURES and lost_record(files, name)


def read_layout(files: Files, prefix: str, field: str) -> Layout:
    """The layout of a field's array, from its own zarr.json.

    Raises:
        DamagedStoreError: missing, or not that of a format 1 feature.
    """
    key = f"{prefix}/{field}/zarr.json"
    raw = files.read(key)
    if raw is None:
        raise DamagedStoreError(f"{files.where(key)} is missing; {REMEDY}")
    try:
        data = json.loads(raw)
    except ValueError:
        raise DamagedStoreError(f"{files.where(key)} is damaged: not JSON; {REMEDY}") from None
    return Layout.from_json(data, files.where(key))


def status_key(prefix: str, tower: str, shard: int) -> str:
    """The file with the status of one shard."""
    return f"{prefix}/status_{tower}/c.{shard}"


def status_shards(files: Files, prefix: str, tower: str) -> set[int]:
    """Shards that have a status file; the others were never committed to."""
    names = (name.partition("c.") for name in files.names(f"{prefix}/status_{tower}"))
    return {int(digits) for before, _, digits in names if not before and digits.isdecimal()}


def read_status_chunk(
    files: Files, prefix: str, tower: str, shard: int, shard_rows: int
) -> Status | None:
    """(shard_rows,) the status of one shard; None when it was never written.

    Raises:
        DamagedStoreError: wrong checksum or length.
    """
    key = status_key(prefix, tower, shard)
    raw = files.read(key)
    if raw is None:
        return None
    where = files.where(key)
    status = np.frombuffer(without_crc(raw, where), np.uint8)
    if len(status) != shard_rows:
        raise DamagedStoreError(f"{where} has {len(status)} rows, not {shard_rows}; {REMEDY}")
    return status


def read_status(files: Files, prefix: str, tower: str, rows: int, shard_rows: int) -> Status:
    """(rows,) the status of every row; rows that were never committed are 0.

    Raises:
        DamagedStoreError: a status file is damaged.
    """
    shards = -(-rows // shard_rows)
    status = np.full(shards * shard_rows, MISSING, np.uint8)
    present = status_shards(files, prefix, tower)
    for shard in range(shards):
        if shard in present:
            chunk = read_status_chunk(files, prefix, tower, shard, shard_rows)
            if chunk is not None:
                status[shard * shard_rows : (shard + 1) * shard_rows] = chunk
    return status[:rows]


def write_status_chunk(
    files: Files, prefix: str, tower: str, shard: int, shard_rows: int, status: Status
) -> None:
    """Replace the status of one shard; rows beyond ``status`` are 0."""
    padded = np.full(shard_rows, MISSING, np.uint8)
    padded[: len(status)] = status
    files.write(status_key(prefix, tower, shard), [with_crc(padded.tobytes())])


def reset_status(
    files: Files, prefix: str, tower: str, shard_rows: int, rows: npt.NDArray[np.int64]
) -> None:
    """Make ``rows`` missing again; only the shards that hold one of them are written."""
    for shard in np.unique(rows // shard_rows).tolist():
        chunk = read_status_chunk(files, prefix, tower, shard, shard_rows)
        if chunk is None:
            continue
        local = rows[rows // shard_rows == shard] - shard * shard_rows
        if (chunk[local] != MISSING).any():
            status = chunk.copy()
            status[local] = MISSING
            write_status_chunk(files, prefix, tower, shard, shard_rows, status)


def reset_changed(
    files: Files, changed: Mapping[str, npt.NDArray[np.int64]], generation: int
) -> None:
    """Make rows missing again in every tower that reads what changed of them.

    Args:
        changed: content ("image", "text") to the rows where it differs.
        generation: row order of the samples.
    """
    for alias in alias_names(files):
        prefix, shard_rows = _status_arrays(files, alias, generation)
        for tower, size in shard_rows.items():
            for content, rows in changed.items():
                if content in TOWER_CONTENT.get(tower, ()) and len(rows):
                    reset_status(files, prefix, tower, size, rows)


def _status_arrays(files: Files, alias: str, generation: int) -> tuple[str, dict[str, int]]:
    """An alias's folder, and tower -> rows of a shard of each status that it has."""
    try:
        found = find_alias(files, alias, generation)
    except DamagedStoreError:
        # Its record may be put back: what the statuses say has to be true then as well.
        prefix, sizes = f"{FEATURES}/{alias}", {}
        for tower in _towers_on_disk(files, prefix):
            for shard in sorted(status_shards(files, prefix, tower))[:1]:
                sizes[tower] = (files.size(status_key(prefix, tower, shard)) or 0) - CRC_BYTES
        return prefix, {tower: size for tower, size in sizes.items() if size > 0}
    if found is None:
        return "", {}
    prefix, record = found
    return prefix, dict.fromkeys(record.towers, record.shard_rows)


def write_arrays_json(files: Files, prefix: str, record: AliasRecord, rows: int) -> None:
    """Bring the zarr.json of every array of an alias to ``rows`` rows, where it differs."""
    for key, data in arrays_json(record, rows):
        new = dump(data)
        if files.read(f"{prefix}/{key}") != new:
            files.write(f"{prefix}/{key}", [new])


def arrays_json(record: AliasRecord, rows: int) -> Iterator[tuple[str, dict[str, object]]]:
    """(key below the alias, metadata) of every array of an alias."""
    for name, field in record.fields.items():
        layout = Layout.of(field, rows, record.shard_rows, record.compress)
        yield f"{name}/zarr.json", layout.to_json()
    for tower in record.towers:
        yield f"status_{tower}/zarr.json", status_json(rows, record.shard_rows)


def read_failures(files: Files, prefix: str) -> pa.Table:
    """All of errors.parquet; rows that succeeded since may still be in it.

    Raises:
        DamagedStoreError: not a table with the columns of ``FAILURES``.
    """
    key = f"{prefix}/errors.parquet"
    raw = files.read(key)
    if raw is None:
        return FAILURES.empty_table()
    try:
        table = pq.read_table(pa.BufferReader(raw), page_checksum_verification=True)
        return table.select(FAILURES.names).cast(FAILURES)
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise DamagedStoreError(f"{files.where(key)} is damaged ({reason}); {REMEDY}") from None


def write_failures(files: Files, prefix: str, failures: pa.Table) -> None:
    """Replace errors.parquet."""
    files.write_stream(
        f"{prefix}/errors.parquet",
        lambda file: pq.write_table(failures, file, write_page_checksum=True),
    )


def current_failures(failures: pa.Table, failed: Mapping[str, npt.NDArray[np.bool_]]) -> pa.Table:
    """Those failures whose row still has status 2.

    Args:
        failures: of :func:`read_failures`.
        failed: tower to (N,) whether the status is 2.
    """
    rows = failures.column("row").to_numpy()
    towers = failures.column("tower")
    keep = np.zeros(len(failures), bool)
    for tower, mask in failed.items():
        mine = pc.equal(towers, tower).to_numpy() & (rows < len(mask))
        keep[mine] = mask[rows[mine]]
    return failures.filter(pa.array(keep)).sort_by([("row", "ascending"), ("tower", "ascending")])
