"""`mmc extract`: from a source to a filled store.

The order matters: everything that the user may have got wrong is found before the store is
touched, and the table of samples is in place before the first embedding is.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch

from mmc.extract import reporting
from mmc.extract.backbones import load_backbone
from mmc.extract.filling import Filling, Loaded, open_writer
from mmc.extract.keys import add_keys
from mmc.extract.label_text import update_label_text
from mmc.extract.lanes import NO_IMAGE
from mmc.extract.options import ExtractConfig, ExtractReport, read_label_names
from mmc.extract.settings import (
    choose_fields,
    choose_settings,
    pick_device,
    recorded,
    usable_cores,
)
from mmc.extract.sources import Samples, read_source
from mmc.store import EmbeddingStore, SyncReport
from mmc.store.errors import InputError, MmcError, NotAStoreError
from mmc.store.files import open_files

__all__ = ["ExtractConfig", "ExtractReport", "extract"]

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


def extract(
    source: str,
    store_path: str,
    config: ExtractConfig,
    *,
    report: Say = print,
    progress: Progress = silent,
) -> ExtractReport:
    """Embed a source's samples into a store: only what is missing or has changed.

    Args:
        source: where the samples come from.
        store_path: the store; made when there is none.
        config: what to run and how.
        report: called with each line for the user.
        progress: called with (stage, done, total) several times a second, in this thread.

    Raises:
        InputError: the source, a name, a field or a setting is wrong, or the store holds features
            of that name that were made differently. The store is as it was then.
        MmcError: the disk is full, the store is locked or damaged, or ``config.strict`` and some
            sample could not be embedded.
        KeyboardInterrupt: Ctrl-C; what was finished by then is in the store.
    """
    started = time.perf_counter()
    aliases = config.aliases()
    device = pick_device(config.device)
    store = open_if_there(store_path)
    samples = read_source(source, config.source)
    for line in (*samples.notes, *(f"warning: {line}" for line in samples.warnings)):
        report(line)
    names = read_label_names(config.label_names, samples.label_set)
    contents = _contents(samples, store)
    loading = time.perf_counter()
    loaded = [
        _load(spec, alias, store, config, device, contents, report)
        for spec, alias in zip(config.backbones, aliases, strict=True)
    ]
    load_seconds = time.perf_counter() - loading
    store = _update_samples(store_path, store, loaded, samples, config, report, progress)
    filling = Filling(store, loaded, config, device, report)
    with ExitStack() as stack:
        lanes = filling.open(stack)
        embed_seconds = filling.run(lanes, progress)
        for writer, item in zip(filling.writers, loaded, strict=True):
            if update_label_text(store, writer, item.backbone, names, config.label_prompt):
                report(f"{item.alias}: embedded {len(store.label_set):,} label names")
    seconds = time.perf_counter() - started
    outcome = filling.outcome(lanes, seconds, load_seconds, embed_seconds)
    reporting.say_outcome(outcome, report)
    if config.strict:
        _refuse_failures(store, aliases)
    return outcome


def open_if_there(path: str) -> EmbeddingStore | None:
    """The store at ``path``; None when a new one can be made there.

    Raises:
        NotAStoreError: something else is there.
    """
    try:
        return EmbeddingStore.open(path)
    except NotAStoreError:
        files = open_files(path)
        names = {name for name in files.names("") if not name.startswith(".")}
        # A store whose making was killed has these and no zarr.json yet.
        if files.exists() and not (names <= {"features", "samples.parquet"}):
            raise
        return None


def _contents(samples: Samples, store: EmbeddingStore | None) -> set[str]:
    """Which of image and text any sample has, in the source or in the store."""
    found = set()
    for name in ("image", "text"):
        columns = [samples.table[name]] + ([] if store is None else [store.column(name)])
        if any(column.null_count < len(column) for column in columns):
            found.add(name)
    return found


def _load(
    spec: str,
    alias: str,
    store: EmbeddingStore | None,
    config: ExtractConfig,
    device: torch.device,
    contents: set[str],
    report: Say,
) -> Loaded:
    """Load one backbone with the settings that its features in the store were made with.

    Raises:
        InputError: it has no such field, or reads nothing that the source has.
    """
    provenance = recorded(store, alias, config)
    settings = choose_settings(config, provenance, device)
    backbone = load_backbone(
        spec,
        device=str(device),
        precision=settings.precision,
        max_text_tokens=settings.max_text_tokens,
    )
    fields = choose_fields(backbone, alias, store, config)
    # Kept for the next run: what waits for an image or a text is not in the store yet.
    backbone.context["fields"] = list(fields)
    usable = tuple(name for name in fields if backbone.fields[name].tower in contents)
    if not usable:
        raise InputError(
            f"{backbone.context['spec']} gives {', '.join(fields)}, and no sample has "
            f"{' or '.join(sorted({backbone.fields[name].tower for name in fields}))}"
        )
    for tower in dict.fromkeys(backbone.fields[name].tower for name in fields):
        if tower not in contents:
            report(f"{alias}: no sample has {_A[tower]}, so its {tower} tower is left out")
    return Loaded(alias=alias, backbone=backbone, settings=settings, fields=usable)


_A = {"image": "an image", "text": "a text"}


def _update_samples(
    path: str,
    store: EmbeddingStore | None,
    loaded: Sequence[Loaded],
    samples: Samples,
    config: ExtractConfig,
    report: Say,
    progress: Progress,
) -> EmbeddingStore:
    """Bring the store's table to the source, making the store when there is none."""
    workers = config.workers or usable_cores()
    hashed = partial(progress, "files")
    if store is None:
        table = add_keys(samples, None, workers=workers, progress=hashed)
        store = EmbeddingStore.create(
            path,
            table,
            label_set=samples.label_set,
            task=samples.task,
            source=samples.source,
        )
        report(f"new store {path}: {len(store):,} samples")
        return store
    _check_goes_together(store, samples, config, report)
    for item in loaded:
        if recorded(store, item.alias, config):
            _check_continues(store, item, config)
    table = add_keys(samples, store.samples, workers=workers, progress=hashed)
    sync: SyncReport = store.sync(
        table, label_set=samples.label_set, task=samples.task, source=samples.source
    )
    reporting.say_sync(sync, report)
    _warn_of_moved(store, samples, report)
    return store


def _check_goes_together(
    store: EmbeddingStore, samples: Samples, config: ExtractConfig, report: Say
) -> None:
    """Say what a source changes in the meaning of the store.

    Raises:
        InputError: it is another source than those of the store, and of another task.
    """
    specs = [source["spec"] for source in store.sources]
    if not store.label_set or not samples.label_set or store.task == samples.task:
        if samples.source["spec"] not in specs:
            report(f"{store.path} has samples of {specs[-1]}; these are added to them")
        return
    if samples.source["spec"] in specs:
        report(
            f"warning: the task was {store.task} with {len(store.label_set)} labels and is now "
            f"{samples.task} with {len(samples.label_set)}; if that is not meant, read the source "
            "as before (--label-separator, --task, --label-column)"
        )
    elif config.source.task is None:
        raise InputError(
            f"{store.path} holds {store.task} samples of {specs[-1]}, and this source is "
            f"{samples.task}; name another store, or join them on purpose: --task {store.task}"
        )


def _warn_of_moved(store: EmbeddingStore, samples: Samples, report: Say) -> None:
    """Say when other sources that are not there any more still hold samples of the store."""
    owners = store.column("_source").to_numpy()[store.live]
    for index, count in zip(*np.unique(owners, return_counts=True), strict=True):
        spec = store.sources[index]["spec"]
        if spec != samples.source["spec"] and os.path.isabs(spec) and not os.path.exists(spec):
            report(
                f"warning: {count:,} samples of the store came from {spec}, which is not there any "
                "more, and are still used; if it was moved here, they are what it has lost since"
            )


def _check_continues(store: EmbeddingStore, item: Loaded, config: ExtractConfig) -> None:
    """Raises InputError when what is asked does not continue what the store has."""
    towers = store.record(item.alias).towers
    there = [spec for spec in item.specs if spec.tower in towers]
    there = there or list(store.record(item.alias).fields.values())
    # Opening a writer makes the check. Towers that are new to the store wait for the real one.
    with open_writer(store, item, config, specs=there):
        pass


def _refuse_failures(store: EmbeddingStore, aliases: Sequence[str]) -> None:
    """Raises MmcError when any sample of these backbones could not be embedded, now or before."""
    rows = set()
    for alias in aliases:
        for error in store.errors(alias).to_pylist():
            if error["reason"] != NO_IMAGE:
                rows.add(error["row"])
    if rows:
        raise MmcError(
            f"{len(rows):,} of {len(store):,} samples could not be embedded (--strict is on); "
            f"the rest is in {store.path}"
        )
