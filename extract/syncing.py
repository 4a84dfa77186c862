"""Bringing a store's table of samples to a source, and saying aloud what that changes."""

import json
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmc.extract import reporting
from mmc.extract.keys import add_keys
from mmc.extract.options import ExtractConfig
from mmc.extract.settings import usable_cores
from mmc.extract.sources import Samples
from mmc.extract.sources.duplicates import settle
from mmc.extract.sources.read import is_there
from mmc.store import EmbeddingStore
from mmc.store.errors import InputError, MmcError, NotAStoreError
from mmc.store.files import open_files
from mmc.store.locks import SAMPLES_LOCK, WAIT_SECONDS, held

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]

SUCCESSOR = 0.5
"""A source that has this share of the ids of one that is not there any more is taken for it."""


def open_if_there(path: str) -> EmbeddingStore | None:
    """The store at ``path``; None when a new one can be made there.

    Raises:
        NotAStoreError: something else is there.
        InputError: it would lie inside another store.
    """
    try:
        return EmbeddingStore.open(path)
    except NotAStoreError:
        files = open_files(path)
        names = {name for name in files.names("") if not name.startswith(".")}
        # A store whose making was killed has these and no zarr.json yet.
        if files.exists() and not (names <= {"features", "samples.parquet"}):
            raise
        _check_outside(path)
        return None


def _check_outside(path: str) -> None:
    """Raises InputError when a folder above ``path`` is a store."""
    for above in _folders_above(path):
        try:
            raw = open_files(above).read("zarr.json")
            inside = raw is not None and "mmc" in json.loads(raw)["attributes"]
        except (ValueError, KeyError, TypeError, MmcError):
            continue  # some other group of zarr, or a folder that is not ours to look into
        if inside:
            raise InputError(f"{path} lies inside the store {above}; choose a path outside of it")


def _folders_above(path: str) -> Iterator[str]:
    """The folders that a path or URL lies in, from the nearest."""
    scheme, separator, rest = path.rpartition("://")
    rest = rest if separator else os.path.abspath(os.path.expanduser(path))
    while (rest := posixpath.dirname(rest)) not in ("", "/"):
        yield f"{scheme}{separator}{rest}"


def update_samples(
    path: str,
    store: EmbeddingStore | None,
    samples: Samples,
    config: ExtractConfig,
    report: Say,
    progress: Progress,
) -> EmbeddingStore:
    """Bring the store's table to the source, making the store when there is none.

    Raises:
        InputError: the source does not go together with the store.
        StoreLockedError: another process writes to the store.
    """
    workers = config.workers or usable_cores()
    hashed = partial(progress, "files")
    if store is None:
        table = add_keys(samples, None, workers=workers, progress=hashed)
        table = settle(samples, table, config.source.dedupe, report)
        store = _created(path, samples, table)
        if store is not None:
            report(f"new store {path}: {len(store):,} samples")
            return store
        # Another process was faster: what it has made is brought to the source like any store.
        store = EmbeddingStore.open(path)
    check_goes_together(store, samples, config, report)
    table = add_keys(samples, store.samples, workers=workers, progress=hashed)
    table = settle(samples, table, config.source.dedupe, report)
    _warn_of_lost_contents(store, table, report)
    moved = _moved_from(store, samples, table)
    sync = store.sync(
        table,
        label_set=samples.label_set,
        task=samples.task,
        source=samples.source,
        replaces=moved,
    )
    if moved:
        report(
            f"{moved} is not there any more, and this source has its samples: taken for the same "
            "source in another place"
        )
    reporting.say_sync(sync, report)
    _warn_of_orphans(store, samples.source["spec"], report)
    return store


def _created(path: str, samples: Samples, table: pa.Table) -> EmbeddingStore | None:
    """A new store; None when another process has just made one there."""
    with held(open_files(path), SAMPLES_LOCK, wait=WAIT_SECONDS):
        if open_if_there(path) is not None:
            return None
        return EmbeddingStore.create(
            path, table, label_set=samples.label_set, task=samples.task, source=samples.source
        )


def check_goes_together(
    store: EmbeddingStore, samples: Samples, config: ExtractConfig, report: Say
) -> None:
    """Say what a source changes in the meaning of the store.

    Raises:
        InputError: it is another source than those of the store, and of another task.
    """
    specs = [source["spec"] for source in store.sources]
    if not store.label_set or not samples.label_set or store.task == samples.task:
        if (
            samples.source["spec"] not in specs
            and _moved_from(store, samples, samples.table) is None
        ):
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


def _positions(store: EmbeddingStore, table: pa.Table) -> np.ndarray:
    """For each row of the store its row in ``table``; -1 where it has none."""
    found = pc.index_in(
        store.column("id").cast(pa.string()), value_set=table["id"].cast(pa.string())
    )
    positions: np.ndarray = pc.fill_null(found, -1).to_numpy()
    return positions


def _warn_of_lost_contents(store: EmbeddingStore, table: pa.Table, report: Say) -> None:
    """Say how many texts and images the source had and has no more, for samples that it has."""
    positions = _positions(store, table)
    here = np.flatnonzero((positions >= 0) & store.live)
    for content, options in (("text", "--text-column"), ("image", "--image-column")):
        had = store.column(content).is_valid().to_numpy()[here]
        has = table[content].is_valid().to_numpy()[positions[here]]
        lost = int(np.count_nonzero(had & ~has))
        if lost:
            report(
                f"warning: {content}s of the store that the source does not have any more: "
                f"{lost:,}; what was made from them is missing now. If that is not meant, extract "
                f"again with the source read as before ({options})"
            )


def _is_lost(spec: str) -> bool:
    """Whether a source was made of local files that are not there any more."""
    is_local = os.path.isabs(spec) or "=/" in spec
    return is_local and not is_there(spec)


def _moved_from(store: EmbeddingStore, samples: Samples, table: pa.Table) -> str | None:
    """The source of the store that this one is, in another place; None where it is none of them."""
    if samples.source["spec"] in [source["spec"] for source in store.sources]:
        return None
    positions = _positions(store, table)
    owners = store.column("_source").to_numpy()
    for index, source in enumerate(store.sources):
        mine = (owners == index) & store.live
        shared = np.count_nonzero(mine & (positions >= 0))
        if mine.any() and shared >= SUCCESSOR * mine.sum() and _is_lost(source["spec"]):
            return str(source["spec"])
    return None


def _warn_of_orphans(store: EmbeddingStore, spec: str, report: Say) -> None:
    """Say when other sources that are not there any more still hold samples of the store."""
    owners = store.column("_source").to_numpy()[store.live]
    for index, count in zip(*np.unique(owners, return_counts=True), strict=True):
        source: Mapping[str, str] = store.sources[index]
        if source["spec"] != spec and _is_lost(source["spec"]):
            report(
                f"warning: {count:,} samples of the store came from {source['spec']}, which is not "
                "there any more, and are still used"
            )
