"""`mmc prepare`: a source as resized pictures with captions and metadata, in shards or in tables.

What is written is a source again, recognised without options: the same ids, splits, labels, label
set, texts and further columns, in the same order (csv: within each split).

**Pictures** are decoded as extraction does it (`images.decode_rgb`: upright, RGB), made smaller
where they are larger, and saved as JPEG; an upright JPEG that is small enough is copied. A picture
that cannot be used is counted and its sample kept with its text alone; a sample without text is
then left out, so that its shard is smaller by one. A sample that never had either is left out
before shards are planned.

**Commit**: `prepare.json` says from what and how, and that it is not finished; each shard appears
whole; index or tables come next; `prepare.json` is written again last. A run that was interrupted
goes on behind the shards that are there, if neither source nor settings have changed since;
otherwise it is an error, unless ``overwrite`` is given.
"""

import codecs
import csv
import io
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmc.extract.content import Content, holds
from mmc.extract.images import ImageError, shrink
from mmc.extract.keys import drop_duplicates
from mmc.extract.prepare_check import compare
from mmc.extract.prepare_options import PrepareConfig, PrepareReport
from mmc.extract.prepare_record import (
    CORE,
    INDEX,
    TABLE,
    check_apart,
    claim,
    make_folder,
    make_recipe,
    read_record,
    write_record,
)
from mmc.extract.prepare_shards import ImageFolders, Ready, TarShards, key_of
from mmc.extract.settings import usable_cores
from mmc.extract.sources import Samples, read_source
from mmc.extract.sources.splits import SPLITS
from mmc.store.errors import InputError
from mmc.store.files import LocalFiles
from mmc.store.locks import held
from mmc.store.samples import UNKNOWN

__all__ = ["PrepareConfig", "PrepareReport", "prepare"]

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]

_SAID = 5


def silent(stage: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


@dataclass(frozen=True)
class _Shard:
    """A shard as planned."""

    name: str
    rows: NDArray[np.int64]
    """Of the source's table."""


def prepare(
    source: str,
    out: str,
    config: PrepareConfig,
    *,
    report: Say = print,
    progress: Progress = silent,
) -> PrepareReport:
    """Write a source's samples, with pictures of moderate size, in a form that is read fast.

    Args:
        source: where the samples come from.
        out: a folder; made when there is none, continued when a run was interrupted there.
        config: what to write and how.
        report: called with each line for the user.
        progress: called with (stage, done, total) several times a second, in this thread.

    Raises:
        InputError: the source or a setting is wrong, or the folder holds something else.
        MmcError: the disk is full; what was finished by then is used by the next run.
        KeyboardInterrupt: Ctrl-C; the same holds.
    """
    started = time.perf_counter()
    samples = read_source(source, config.source)
    for line in (*samples.notes, *(f"warning: {line}" for line in samples.warnings)):
        report(line)
    folder = Path(os.path.abspath(os.path.expanduser(out)))
    check_apart(folder, source, samples)
    if config.source.dedupe:
        drop_duplicates(samples, workers=config.workers or usable_cores(), report=report)
    recipe = make_recipe(samples, config)
    files = LocalFiles(folder)
    work = _Work(files, samples, config, progress)
    make_folder(files)
    read_record(files)  # before a lock is left in a folder that is not ours
    with held(files, ".lock"):
        done = claim(files, recipe, config, report)
        if done is None:
            done = work.run()
            write_record(files, {**recipe, "done": True, "result": asdict(done)})
            done = replace(done, warnings=work.differences())
            write_record(files, {**recipe, "done": True, "result": asdict(done)})
    result = replace(done, out=str(folder), seconds=time.perf_counter() - started)
    _say_result(result, report)
    return result


class _Work:
    """One preparation."""

    def __init__(
        self, files: LocalFiles, samples: Samples, config: PrepareConfig, progress: Progress
    ) -> None:
        self._files, self._samples, self._config = files, samples, config
        self._progress = progress
        kind = TarShards if config.to == "webdataset" else ImageFolders
        self._writer = kind(files.root)
        self._table = samples.table
        self._usual = set(self._table["split"].unique().to_pylist()) <= set(SPLITS)
        self._content = Content(_with_source(self._table), [samples.source])
        self._has_image = holds(self._table["image"])
        self._partly = UNKNOWN.name in self._table.column_names
        self._others = [name for name in self._table.column_names if name not in CORE]
        self._plan = self._planned()
        self._total = sum(len(shard.rows) for shard in self._plan)
        self._done = 0
        self._failures: dict[int, str] = {}
        self._rows = pa.chunked_array([], pa.int64())

    def run(self) -> PrepareReport:
        """Write what is missing, then index or tables."""
        reused = 0
        workers = self._config.workers or usable_cores()
        with ThreadPoolExecutor(max_workers=workers) as pool:
            for shard in self._plan:
                if self._files.path(shard.name).exists():
                    reused += 1
                    self._count(len(shard.rows))
                    continue
                with closing(self._ready(shard, pool, 4 * workers)) as ready:
                    self._writer.write(shard.name, ready)
        written = self._written()
        if not len(written):
            raise InputError(
                f"none of the pictures can be used, first {self._first_failures()[0]}; there is no"
                " sample to prepare"
                if self._failures
                else "no sample is left to prepare"
            )
        if self._config.to == "webdataset" or not self._usual:
            written = written.sort_by("row")  # the order in which all is read back
        self._rows = written["row"]
        if self._config.to == "webdataset":
            self._write_index(written)
        else:
            self._write_tables(written)
        return self._outcome(written, reused)

    def _planned(self) -> list[_Shard]:
        """Shards of about equal size for each split: train, val, test, then others as they come."""
        content = pc.or_(pc.is_valid(self._table["image"]), pc.is_valid(self._table["text"]))
        kept = content.to_numpy()
        splits = np.array(self._table["split"].to_pylist(), object)
        folders = _folders(splits)
        plan: list[_Shard] = []
        for split, folder in folders.items():
            rows = np.flatnonzero((splits == split) & kept)
            if not len(rows):
                continue
            count = -(-len(rows) // self._config.shard_samples)
            for number, part in enumerate(np.array_split(rows, count)):
                index = number if self._config.to == "webdataset" else len(plan)
                plan.append(_Shard(self._writer.name(folder, index), part))
        if not plan:
            raise InputError("no sample has a picture or a text: there is nothing to prepare")
        return plan

    def _count(self, more: int) -> None:
        self._done += more
        self._progress("pictures", self._done, self._total)

    def _ready(
        self, shard: _Shard, pool: ThreadPoolExecutor, ahead: int
    ) -> Generator[Ready, None, None]:
        """The samples of a shard, pictures decoded by the pool a little ahead of writing."""
        rows = self._table.take(pa.array(shard.rows))
        jobs = iter(shard.rows.tolist())
        waiting: deque[Future[bytes | None]] = deque()
        texts, metadata = rows["text"].to_pylist(), self._metadata(rows)
        try:
            for at in range(len(rows)):
                while len(waiting) < ahead and (job := next(jobs, None)) is not None:
                    waiting.append(pool.submit(self._picture, job))
                image = waiting.popleft().result()
                self._count(1)
                if image is not None or texts[at] is not None:
                    yield Ready(
                        key=key_of(int(shard.rows[at])),
                        image=image,
                        text=texts[at],
                        metadata=metadata[at],
                    )
        finally:
            for future in waiting:
                future.cancel()

    def _picture(self, row: int) -> bytes | None:
        """A picture's new bytes; None where there is none that can be used."""
        if not self._has_image[row]:
            return None
        config = self._config
        try:
            return shrink(
                self._content.image_bytes(row),
                max_side=config.max_side,
                quality=config.quality,
                max_pixels=config.max_pixels,
            )
        except ImageError as error:
            self._failures[row] = str(error)
            return None

    def _metadata(self, rows: pa.Table) -> list[dict[str, Any]]:
        """What goes into the JSON of each sample: id, split, labels, those that are not known
        (where there are any), and the user's columns."""
        names = self._label_names(rows)
        others = rows.select(self._others).to_pylist() if self._others else [{}] * len(rows)
        if self._partly:
            label_set = self._samples.label_set
            unknown = rows[UNKNOWN.name].to_pylist()
            others = [
                {UNKNOWN.name: [label_set[at] for at in cell], **other} if cell else other
                for cell, other in zip(unknown, others, strict=True)
            ]
        core = zip(rows["id"].to_pylist(), rows["split"].to_pylist(), names, others, strict=True)
        return [
            {"id": name, "split": split, "labels": labels, **_plain(other)}
            for name, split, labels, other in core
        ]

    def _label_names(self, rows: pa.Table) -> list[Any]:
        """A list of names, or one name where a sample has but one; None = unlabelled."""
        label_set = self._samples.label_set
        cells = rows["labels"].to_pylist()
        if self._samples.task == "multilabel":
            return [cell and [label_set[at] for at in cell] for cell in cells]
        return [label_set[cell[0]] if cell else None for cell in cells]

    def _written(self) -> pa.Table:
        """Row, shard, key, offset and size of all samples that are there."""
        columns: dict[str, list[Any]] = {
            name: [] for name in ("row", "shard", "key", "offset", "size")
        }
        has_text = pc.is_valid(self._table["text"]).to_numpy()
        for shard in self._plan:
            contents = self._writer.contents(shard.name)
            for row in shard.rows.tolist():
                key = key_of(row)
                if key in contents or has_text[row]:
                    offset, size = contents.get(key, (None, None))
                    values = (row, shard.name, key, offset, size)
                    for name, value in zip(columns, values, strict=True):
                        columns[name].append(value)
        text, number = pa.string(), pa.int64()
        kinds = {"row": number, "shard": text, "key": text, "offset": number, "size": number}
        return pa.table({name: pa.array(columns[name], kind) for name, kind in kinds.items()})

    def _write_index(self, written: pa.Table) -> None:
        rows = self._table.take(written["row"])
        index = written.drop_columns("row")
        index = index.add_column(0, "split", rows["split"]).add_column(0, "id", rows["id"])
        sink = io.BytesIO()
        pq.write_table(index, sink)
        self._files.write(INDEX, [sink.getvalue()])

    def _write_tables(self, written: pa.Table) -> None:
        """`train.csv` and so on; one table where there are other splits."""
        rows = self._table.take(written["row"])
        splits = rows["split"].to_pylist()
        images = [
            None if size is None else f"{shard}/{key}.jpg"
            for shard, key, size in zip(
                *(written[name].to_pylist() for name in ("shard", "key", "size")), strict=True
            )
        ]
        more = [*([UNKNOWN.name] if self._partly else []), *self._others]
        header = ["id", "image", "text", "labels", "split", *more]
        lines = [
            [one["id"], image, text, _cell(one["labels"]), one["split"]]
            + [_cell(one.get(name)) for name in more]
            for one, image, text in zip(
                self._metadata(rows), images, rows["text"].to_pylist(), strict=True
            )
        ]
        tables = [f"{split}.csv" if self._usual else TABLE for split in splits]
        for name in dict.fromkeys(tables):

            def fill(file: BinaryIO, name: str = name) -> None:
                writer = csv.writer(codecs.getwriter("utf-8")(file))
                writer.writerow(header)
                for table, line in zip(tables, lines, strict=True):
                    if table == name:
                        writer.writerow(line)

            self._files.write_stream(name, fill)

    def _outcome(self, written: pa.Table, reused: int) -> PrepareReport:
        rows = self._table.take(written["row"])
        images = len(written) - written["size"].null_count
        had = self._table["image"]
        splits = pc.value_counts(rows["split"].combine_chunks()).to_pylist()
        return PrepareReport(
            out=str(self._files.root),
            to=self._config.to,
            samples=len(written),
            images=images,
            failed=len(had) - had.null_count - images,
            dropped=len(self._table) - len(written),
            shards=len(self._plan),
            reused=reused,
            splits={one["values"]: one["counts"] for one in splits},
            bytes=sum(map(self._bytes, self._plan)),
            seconds=0.0,
            failures=self._first_failures(),
            warnings=(),
        )

    def _first_failures(self) -> tuple[str, ...]:
        ids = self._table["id"]
        rows = sorted(self._failures)[:_SAID]
        return tuple(f"{ids[row].as_py()}: {self._failures[row]}" for row in rows)

    def differences(self) -> tuple[str, ...]:
        """Read all back as `mmc extract` would, and say in what it is not what the source gave."""
        return compare(self._samples, self._rows, str(self._files.root), self._config.to)

    def _bytes(self, shard: _Shard) -> int:
        path = self._files.path(shard.name)
        return self._files.tree_bytes(shard.name) if path.is_dir() else path.stat().st_size


def _with_source(table: pa.Table) -> pa.Table:
    """The table as `Content` reads it from a store."""
    table = table.append_column("_source", pa.array(np.zeros(len(table), np.int16)))
    if "size" not in table.column_names:
        table = table.append_column("size", pa.nulls(len(table), pa.int64()))
    return table


def _folders(splits: NDArray[np.object_]) -> dict[str, str]:
    """A folder's name for each split, in the order of writing."""
    found = dict.fromkeys(splits.tolist())
    names = [*(name for name in SPLITS if name in found), *(n for n in found if n not in SPLITS)]
    result: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:40] or "none"
        # Some file systems take Fold and fold for one name.
        taken = {*map(str.lower, result.values()), *(SPLITS if name not in SPLITS else ())}
        while plain.lower() in taken:
            plain += "_"
        result[name] = plain
    return result


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Values that JSON can hold; others as text."""
    result: dict[str, Any] = json.loads(json.dumps(row, default=str))
    return result


def _cell(value: Any) -> Any:
    """A value as a table's cell: lists and objects as JSON, nothing as the empty cell."""
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return "true" if value else "false"
    return value


def _say_result(result: PrepareReport, report: Say) -> None:
    for line in result.warnings:
        report(f"warning: {line}")
    parts = ", ".join(f"{name or 'no split'} {count:,}" for name, count in result.splits.items())
    report(
        f"{result.out}: {result.samples:,} samples ({parts}), {result.images:,} with a picture, in"
        f" {result.shards:,} shards of {result.bytes / 1e6:,.1f} MB together"
    )
    if result.failed:
        report(f"warning: {result.failed:,} pictures could not be used:")
        for line in result.failures:
            report(f"  {line}")
    if result.dropped:
        report(
            f"warning: {result.dropped:,} samples left out: neither a picture that can be used nor"
            " a text"
        )
