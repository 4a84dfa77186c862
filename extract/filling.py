"""Filling what a store misses: lanes, threads, and the numbers of the run."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mmc.extract import ceiling, reporting
from mmc.extract.backbones.base import Backbone
from mmc.extract.content import Content, content_keys, holds
from mmc.extract.engines import Engine
from mmc.extract.forward import Tally
from mmc.extract.jobs import Buffers, Clock, JobSettings
from mmc.extract.lanes import NO_IMAGE, NO_TEXT, Lane
from mmc.extract.options import ExtractConfig, ExtractReport
from mmc.extract.plan import Rows, first_rows
from mmc.extract.settings import TEXTS_PER_IMAGE, usable_cores
from mmc.extract.tasks import Presence, picture_groups, tasks
from mmc.store import EmbeddingStore, FieldSpec, Writer
from mmc.store.layout import default_shard_rows

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]

STAGES = {"image": "images", "fused": "images with texts", "text": "texts"}
"""What progress calls the towers."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One backbone, ready to run under a name of the store."""

    alias: str
    backbone: Backbone
    batch_size: int
    """Images in a batch."""
    fields: tuple[str, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the numbers; batches too, since sums are split by their shape."""
        return {**self.backbone.identity, "batch_size": self.batch_sizes}

    @property
    def batch_sizes(self) -> dict[str, int]:
        """Samples in a batch: of pictures (with their texts or without), and of texts."""
        return {"image": self.batch_size, "text": TEXTS_PER_IMAGE * self.batch_size}

    @property
    def specs(self) -> list[FieldSpec]:
        return [self.backbone.fields[name] for name in self.fields]


def open_writer(
    store: EmbeddingStore,
    item: Loaded,
    config: ExtractConfig,
    *,
    specs: Sequence[FieldSpec] | None = None,
    shard_rows: int | None = None,
) -> AbstractContextManager[Writer]:
    """The writer of one backbone, for all its fields or only ``specs``."""
    return store.writer(
        item.alias,
        specs or item.specs,
        item.identity,
        item.backbone.context,
        shard_rows=config.shard_rows or shard_rows,
        compress=config.compress,
        overwrite=config.overwrite,
    )


class Filling:
    """Fills what is missing of all backbones."""

    def __init__(
        self,
        store: EmbeddingStore,
        loaded: Sequence[Loaded],
        config: ExtractConfig,
        device: torch.device,
        report: Say,
    ) -> None:
        self._store, self._loaded, self._config = store, loaded, config
        self._device, self._report = device, report
        self._workers = config.workers or usable_cores()
        self._clock = Clock()
        self._engine = Engine(device, self._workers, self._clock)
        self._samples: pa.Table = store.samples
        self._live = store.live
        self._presence = Presence(
            live=self._live,
            image=holds(self._samples["image"]),
            text=holds(self._samples["text"]),
        )
        self._firsts: dict[str, Rows] = {}
        """Per tower: the row that computes each row's content."""
        self._tally = Tally()
        self.writers: list[Writer] = []

    def open(self, stack: ExitStack) -> list[Lane]:
        """Open a writer for each backbone and find what is missing."""
        shard_rows = self._common_shard_rows()
        for item in self._loaded:
            new = self._config.overwrite or item.alias not in self._store.aliases
            self.writers.append(
                stack.enter_context(
                    open_writer(
                        self._store, item, self._config, shard_rows=shard_rows if new else None
                    )
                )
            )
        lanes = [
            self._lane(item, writer, tower)
            for item, writer in zip(self._loaded, self.writers, strict=True)
            for tower in dict.fromkeys(spec.tower for spec in item.specs)
        ]
        if len(picture_groups(lanes)) > 1:
            self._report(
                "the backbones' shards or batches have no small common multiple, so pictures are "
                "decoded more than once"
            )
        return lanes

    def _common_shard_rows(self) -> int:
        """Shards of new features: the same for all, so that their pictures are decoded together."""
        there = [
            self._store.record(item.alias).shard_rows
            for item in self._loaded
            if item.alias in self._store.aliases and not self._config.overwrite
        ]
        wanted = [
            default_shard_rows(len(self._store), max(spec.row_bytes for spec in item.specs))
            for item in self._loaded
        ]
        return min([*there, *wanted])

    def _lane(self, item: Loaded, writer: Writer, tower: str) -> Lane:
        errors = self._store.errors(item.alias)
        pending = writer.pending(tower, retry_failed=self._config.retry_failed)
        again = set(pending.tolist())
        failed = {
            row: reason
            for row, at, reason in zip(
                errors["row"].to_pylist(),
                errors["tower"].to_pylist(),
                errors["reason"].to_pylist(),
                strict=True,
            )
            if at == tower and row not in again
        }
        return Lane(
            alias=item.alias,
            tower=tower,
            backbone=item.backbone,
            writer=writer,
            reader=self._reader(item.alias),
            fields=tuple(spec for spec in item.specs if spec.tower == tower),
            batch_size=item.batch_sizes["text" if tower == "text" else "image"],
            pending=pending,
            firsts=self._first_rows(tower),
            pictures=self._first_rows("image"),
            failed=failed,
        )

    def _first_rows(self, tower: str) -> Rows:
        """For each row the one that computes its content; the same for all backbones."""
        if tower not in self._firsts:
            self._firsts[tower] = first_rows(content_keys(self._samples, tower), self._live)
        return self._firsts[tower]

    def _reader(self, alias: str) -> Callable[[str, NDArray[np.int64]], NDArray[Any]]:
        return lambda field, rows: self._store[f"{alias}/{field}"].take(rows)

    def run(self, lanes: Sequence[Lane], progress: Progress) -> float:
        """Embed what is missing; returns the seconds that took."""
        start = time.perf_counter()
        if not any(len(lane.pending) for lane in lanes):
            return 0.0
        settings = JobSettings(
            content=Content(self._samples, self._store.sources),
            buffers=Buffers(pinned=self._device.type == "cuda"),
            clock=self._clock,
            tally=self._tally,
            max_pixels=self._config.max_pixels,
        )

        def tick() -> None:
            for tower, stage in STAGES.items():
                mine = [lane for lane in lanes if lane.tower == tower and len(lane.pending)]
                if mine:
                    done = sum(lane.done for lane in mine)
                    progress(stage, done, sum(len(lane.pending) for lane in mine))

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self._engine.run(tasks(lanes, self._presence, settings), tick)
        except KeyboardInterrupt:
            self._report(
                "interrupted; what was embedded so far is in the store, and the same command goes "
                "on from there"
            )
            raise
        finally:
            torch.set_num_threads(threads)
        return time.perf_counter() - start

    def outcome(
        self, lanes: Sequence[Lane], seconds: float, load_seconds: float, embed_seconds: float
    ) -> ExtractReport:
        """The numbers of this run, the bare forward rate among them."""
        failures = reporting.failures(self._store, lanes)
        pending = [lane.pending for lane in lanes]
        touched = np.unique(np.concatenate(pending)) if pending else np.empty(0, np.int64)
        embedded = reporting.count_embedded(lanes)
        forward = ceiling.forward_seconds(
            self._tally.all(), self._device, self._engine.encoders, embed_seconds
        )
        threads = {
            "read": self._workers,
            "decode": self._workers,
            "encode": self._engine.encoders,
            "write": 1,
        }
        stages = dict(self._clock.seconds)
        samples = int(np.count_nonzero(self._live))
        return ExtractReport(
            store=self._store.path,
            aliases=tuple(item.alias for item in self._loaded),
            samples=samples,
            embedded=embedded,
            skipped=samples - len(touched),
            failed=len({failure.row for failure in failures}),
            without_image=reporting.count_absent(lanes, NO_IMAGE),
            without_text=reporting.count_absent(lanes, NO_TEXT),
            failures=tuple(failures[: reporting.FAILURES_SHOWN]),
            seconds=seconds,
            load_seconds=load_seconds,
            embed_seconds=embed_seconds,
            rate=len(touched) / embed_seconds if embed_seconds else 0.0,
            ceiling=len(touched) / forward if forward else None,
            efficiency=forward / embed_seconds if forward else None,
            stages=stages,
            bottleneck=reporting.bottleneck(stages, threads),
        )
