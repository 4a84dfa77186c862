"""`mmc caption`: a source's table with a column of captions that a model writes of its pictures.

Each distinct picture is captioned once, whatever samples have it. Batches are cut from the distinct
pictures in the source's order, at fixed positions, and a batch is computed whole or not at all: a
run that was killed and run again writes the very table of one that was not. Results are kept batch
by batch in a journal beside the table; the table appears whole, at the end, and the journal goes.

A picture that cannot be used has an empty caption and is counted.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mmc.extract.backbones.base import default_precision
from mmc.extract.captions_journal import SUFFIX, Journal, open_journal
from mmc.extract.captions_options import CaptionConfig, CaptionReport
from mmc.extract.captions_table import SUFFIXES, check_out, write_table
from mmc.extract.content import Content
from mmc.extract.images import ImageError, decode
from mmc.extract.keys import add_keys, drop_duplicates
from mmc.extract.plan import Rows, first_rows
from mmc.extract.settings import pick_device, usable_cores
from mmc.extract.sources import Samples, read_source
from mmc.store.errors import InputError

if TYPE_CHECKING:
    from mmc.extract.backbones.hf_captioner import Captioner

__all__ = ["CaptionConfig", "CaptionReport", "caption"]

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]

_BATCH_SIZES = {"cpu": 8, "cuda": 64}
_BATCHES_AHEAD = 2
"""Batches that are decoded while another is captioned."""
_SAID = 5


def silent(stage: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


def caption(
    source: str,
    out: str,
    config: CaptionConfig,
    *,
    report: Say = print,
    progress: Progress = silent,
) -> CaptionReport:
    """Write the samples of a source, with captions, to a table that is a source again.

    Args:
        source: where the samples come from.
        out: a .csv or .parquet file; its journal lies beside it until it is complete.
        config: the model and how it writes.
        report: called with each line for the user.
        progress: called with (stage, done, total), in this thread.

    Raises:
        InputError: the source, the model or a setting is wrong, or OUT exists.
        MmcError: another process writes the same table.
        KeyboardInterrupt: Ctrl-C; what was captioned by then is in the journal.
    """
    started = time.perf_counter()
    path = _out(out, config)
    samples = read_source(source, config.source)
    for line in (*samples.notes, *(f"warning: {line}" for line in samples.warnings)):
        report(line)
    if samples.table["image"].null_count == len(samples.table):
        raise InputError(f"{source} has no pictures to caption; name them with --image-column")
    check_out(path, samples, config.column)
    if config.source.dedupe:
        drop_duplicates(samples, workers=config.workers or usable_cores(), report=report)
    captioner, batch_size, made_by = _load(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    journal_path = path.with_name(path.name + SUFFIX)
    with open_journal(journal_path, made_by, overwrite=config.overwrite) as journal:
        work = _Work(samples, captioner, journal, config, batch_size, progress)
        if work.reused:
            report(f"{journal_path}: {work.reused:,} pictures were captioned before")
        try:
            work.run()
        except KeyboardInterrupt:
            report(
                f"interrupted; what was captioned so far is in {journal_path}, and the same "
                "command goes on from there"
            )
            raise
        captions = work.captions()
        write_table(path, samples, captions, config.column, report)
        journal.remove()
    result = work.outcome(str(path), captions, time.perf_counter() - started)
    _say(result, report)
    return result


def _out(out: str, config: CaptionConfig) -> Path:
    path = Path(os.path.abspath(os.path.expanduser(out)))
    if path.suffix not in SUFFIXES:
        raise InputError(f"OUT {out}: name a file that ends in {' or '.join(SUFFIXES)}")
    if path.is_dir() or (path.exists() and not config.overwrite):
        raise InputError(f"{path} exists; name another OUT, or replace it with --overwrite")
    return path


def _load(config: CaptionConfig) -> "tuple[Captioner, int, dict[str, Any]]":
    """The model, pictures in a batch, and what the captions depend on."""
    from mmc.extract.backbones.hf_captioner import Decoding, load_captioner

    device = pick_device(config.device)
    decoding = Decoding(
        prompt=" ".join(config.prompt.split()),
        beams=config.beams,
        max_tokens=config.max_tokens,
        min_tokens=config.min_tokens,
    )
    captioner = load_captioner(
        config.backbone,
        decoding,
        device=str(device),
        precision=config.precision or default_precision(str(device)),
    )
    batch_size = config.batch_size or _BATCH_SIZES.get(device.type, 16)
    made_by = {**captioner.identity, "batch_size": batch_size, "max_pixels": config.max_pixels}
    return captioner, batch_size, made_by


class _Work:
    """One captioning."""

    def __init__(
        self,
        samples: Samples,
        captioner: "Captioner",
        journal: Journal,
        config: CaptionConfig,
        batch_size: int,
        progress: Progress,
    ) -> None:
        self._captioner, self._journal, self._progress = captioner, journal, progress
        self._max_pixels = config.max_pixels
        self._workers = config.workers or usable_cores()
        hashed = partial(progress, "files")
        table = add_keys(samples, None, workers=self._workers, progress=hashed)
        source = pa.array(np.zeros(len(table), np.int16))
        self._table = table.append_column("_source", source)
        self._content = Content(self._table, [samples.source])
        self._keys: list[str | None] = table["image_key"].to_pylist()
        self._named = table["image"].is_valid().to_numpy()
        distinct = self._distinct()
        self._batches = [
            distinct[start : start + batch_size] for start in range(0, len(distinct), batch_size)
        ]
        self._total = len(distinct)
        self.reused = sum(key in journal for key in map(self._key, distinct.tolist()))
        self._seconds = 0.0

    def _distinct(self) -> Rows:
        """The lowest row of each picture that can be read, ascending."""
        firsts = first_rows(self._table["image_key"], np.ones(len(self._keys), np.bool_))
        read = np.array([key is not None for key in self._keys], np.bool_)
        rows: Rows = np.flatnonzero((firsts == np.arange(len(firsts))) & read)
        return rows

    def _key(self, row: int) -> str:
        key = self._keys[row]
        assert key is not None
        return key

    def run(self) -> None:
        """Caption what the journal lacks."""
        started = time.perf_counter()
        done = self.reused
        self._progress("captions", done, self._total)
        with ThreadPoolExecutor(self._workers, "mmc-decode") as pool:
            for rows, pictures in self._decoded(pool):
                done += self._caption(rows, pictures)
                self._progress("captions", done, self._total)
        self._seconds = time.perf_counter() - started

    def _decoded(
        self, pool: ThreadPoolExecutor
    ) -> "Iterator[tuple[Rows, list[Tensor | ImageError]]]":
        """The batches that lack something, decoded a little ahead; whole, as they always are."""
        lacking = (
            rows
            for rows in self._batches
            if not all(self._key(row) in self._journal for row in rows.tolist())
        )
        waiting: deque[tuple[Rows, list[Future[Tensor | ImageError]]]] = deque()
        try:
            while True:
                while len(waiting) <= _BATCHES_AHEAD and (rows := next(lacking, None)) is not None:
                    waiting.append((rows, [pool.submit(self._decode, row) for row in rows]))
                if not waiting:
                    return
                rows, pictures = waiting.popleft()
                yield rows, [picture.result() for picture in pictures]
        finally:
            for _, pictures in waiting:
                for picture in pictures:
                    picture.cancel()

    def _decode(self, row: np.int64) -> "Tensor | ImageError":
        try:
            data = self._content.image_bytes(int(row))
            return decode(data, self._captioner.image_transform, max_pixels=self._max_pixels)
        except ImageError as error:
            return error

    def _caption(self, rows: Rows, pictures: "Sequence[Tensor | ImageError]") -> int:
        """Caption one batch; the number of pictures that are new by it."""
        keys = [self._key(row) for row in rows.tolist()]
        failed = {
            key: str(picture)
            for key, picture in zip(keys, pictures, strict=True)
            if isinstance(picture, ImageError)
        }
        captions: dict[str, str] = {}
        if len(failed) < len(keys):
            # A picture that cannot be used leaves its place empty, so that others keep theirs.
            shape = (len(keys), *self._captioner.image_transform.shape)
            pixels = torch.zeros(shape, dtype=torch.uint8)
            for place, picture in enumerate(pictures):
                if isinstance(picture, Tensor):
                    pixels[place] = picture
            written = self._captioner(pixels)
            captions = {
                key: text for key, text in zip(keys, written, strict=True) if key not in failed
            }
        new = [key for key in keys if key not in self._journal]
        self._journal.add(
            {key: captions[key] for key in new if key in captions},
            {key: failed[key] for key in new if key in failed},
        )
        return len(new)

    def captions(self) -> list[str]:
        """The caption of each row; "" where it has none."""
        return ["" if key is None else self._journal.captions.get(key, "") for key in self._keys]

    def _failures(self) -> Iterator[tuple[int, str]]:
        """(row, why) of each row whose picture cannot be used."""
        for row in np.flatnonzero(self._named).tolist():
            key = self._keys[row]
            if key is None:
                found = self._decode(np.int64(row))
                yield row, str(found) if isinstance(found, ImageError) else "it has changed"
            elif key in self._journal.failed:
                yield row, self._journal.failed[key]

    def outcome(self, out: str, captions: Sequence[str], seconds: float) -> CaptionReport:
        """The numbers of this run."""
        ids = self._table["id"]
        failures = [f"{ids[row].as_py()}: {why}" for row, why in self._failures()]
        written = self._total - self.reused
        return CaptionReport(
            out=out,
            samples=len(captions),
            captioned=sum(bool(text) for text in captions),
            written=written,
            reused=self.reused,
            failed=len(failures),
            without_image=int(np.count_nonzero(~self._named)),
            failures=tuple(failures[:_SAID]),
            seconds=seconds,
            rate=written / self._seconds if self._seconds and written else 0.0,
        )


def _say(result: CaptionReport, report: Say) -> None:
    report(
        f"{result.out}: {result.samples:,} samples, {result.captioned:,} with a caption; "
        f"{result.written:,} pictures captioned now, {result.rate:,.1f} a second"
    )
    if result.without_image:
        report(f"{result.without_image:,} samples have no picture and no caption")
    if result.failed:
        report(f"warning: {result.failed:,} samples have a picture that cannot be used:")
        for line in result.failures:
            report(f"  {line}")
