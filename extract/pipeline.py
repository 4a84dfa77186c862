"""`mmc extract`: from a source to a filled store.

The order matters: backbones are found wrong before a source is read, which may take minutes;
everything that the user may have got wrong is found before the store is touched; and the table of
samples is in place before the first embedding is.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mmc.extract import reporting
from mmc.extract.backbones import load_backbone
from mmc.extract.filling import Filling, Loaded, open_writer
from mmc.extract.label_text import update_label_text
from mmc.extract.lanes import ABSENT
from mmc.extract.options import ExtractConfig, ExtractReport, read_label_names
from mmc.extract.settings import (
    choose_batch_size,
    choose_fields,
    choose_settings,
    pick_device,
    recorded,
)
from mmc.extract.sources import Samples, read_source
from mmc.extract.sources.read import check_source
from mmc.extract.syncing import open_if_there, update_samples
from mmc.store import EmbeddingStore
from mmc.store.errors import InputError, MmcError
from mmc.store.schema import TOWER_CONTENT

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
    own: Mapping[str, Mapping[str, Any]] | None = None,
    report: Say = print,
    progress: Progress = silent,
) -> ExtractReport:
    """Embed a source's samples into a store: only what is missing or has changed.

    Args:
        source: where the samples come from.
        store_path: the store; made when there is none.
        config: what to run and how.
        own: name of a backbone -> what of `OWN` it has for itself, in place of ``config``'s.
        report: called with each line for the user.
        progress: called with (stage, done, total) several times a second, in this thread.

    Raises:
        InputError: the source, a name, a field or a setting is wrong, or the store holds features
            of that name that were made differently. The store is as it was then.
        MmcError: the disk is full, the store is locked or damaged, or ``config.strict`` and some
            sample could not be embedded.
        KeyboardInterrupt: Ctrl-C; what was finished by then is in the store.
    """
    check_source(source)
    own = own or {}
    aliases = config.aliases()
    each = [
        replace(config, backbones=(spec,), names=(alias,), **own.get(alias, {}))
        for spec, alias in zip(config.backbones, aliases, strict=True)
    ]
    read = partial(read_source, source, config.source)
    shared = [alias for alias in aliases if "fields" not in own.get(alias, {})]
    some_fields = shared if len(each) > 1 else ()
    return extract_each(
        read, store_path, config, each, some_fields=some_fields, report=report, progress=progress
    )


def extract_each(
    read: Callable[[], Samples],
    store_path: str,
    config: ExtractConfig,
    each: Sequence[ExtractConfig],
    *,
    some_fields: Collection[str] = (),
    label_texts: bool = True,
    report: Say,
    progress: Progress,
) -> ExtractReport:
    """As `extract`, with settings for each backbone.

    Args:
        read: gives the samples; called when all that is cheap to check has been.
        store_path: the store; made when there is none.
        config: of the run; its backbones do not count.
        each: one backbone each, with its name, fields, batch size, precision and text length.
        some_fields: names of backbones that may lack some of their fields, which others give.
        label_texts: whether the label names are embedded, too.
        report: called with each line for the user.
        progress: called with (stage, done, total).
    """
    started = time.perf_counter()
    device = pick_device(config.device)
    if config.label_names is not None:
        read_label_names(config.label_names, ())
    store = open_if_there(store_path)
    loaded = [_load(one, store, device, some_fields) for one in each]
    _check_all_given(config.fields or (), loaded)
    load_seconds = time.perf_counter() - started
    if store is not None:
        for item in loaded:
            _check_continues(store, item, config)
    samples = read()
    warnings = (f"warning: {line}" for line in samples.warnings)
    for line in (*samples.notes, *warnings, *samples.advice):
        report(line)
    names = read_label_names(config.label_names, samples.label_set)
    contents = _contents(samples, store)
    loaded = [_usable(item, contents, report) for item in loaded]
    store = update_samples(store_path, store, samples, config, report, progress)
    filling = Filling(store, loaded, config, device, report)
    with ExitStack() as stack:
        lanes = filling.open(stack)
        embed_seconds = filling.run(lanes, progress)
        if label_texts:
            templates = config.label_template
            for writer, item in zip(filling.writers, loaded, strict=True):
                if update_label_text(store, writer, item.backbone, names, templates):
                    report(f"{item.alias}: embedded {len(store.label_set):,} label names")
    seconds = time.perf_counter() - started
    outcome = filling.outcome(lanes, seconds, load_seconds, embed_seconds)
    reporting.say_outcome(outcome, report)
    if config.strict:
        _refuse_failures(store, outcome.aliases)
    return outcome


def _contents(samples: Samples, store: EmbeddingStore | None) -> set[str]:
    """Which of image and text any sample has, in the source or in the store."""
    found = set()
    for name in ("image", "text"):
        columns = [samples.table[name]] + ([] if store is None else [store.column(name)])
        if any(column.null_count < len(column) for column in columns):
            found.add(name)
    return found


def _load(
    config: ExtractConfig,
    store: EmbeddingStore | None,
    device: torch.device,
    some_fields: Collection[str],
) -> Loaded:
    """Load the one backbone of ``config`` as it made the features that the store has.

    Raises:
        InputError: it cannot be loaded, or has no such field.
    """
    (spec,), (alias,) = config.backbones, config.aliases()
    provenance = recorded(store, alias, config)
    settings = choose_settings(config, provenance, device)
    backbone = load_backbone(
        spec,
        device=str(device),
        precision=settings.precision,
        max_text_tokens=settings.max_text_tokens,
    )
    if alias in some_fields and config.fields:
        here = tuple(name for name in config.fields if name in backbone.fields)
        config = replace(config, fields=here or config.fields)
    fields = choose_fields(backbone, alias, store, config)
    # Kept for the next run: what waits for an image or a text is not in the store yet.
    backbone.context["fields"] = list(fields)
    batch_size = choose_batch_size(config, provenance, backbone, device)
    return Loaded(alias=alias, backbone=backbone, batch_size=batch_size, fields=fields)


def _check_all_given(fields: Sequence[str], loaded: Sequence[Loaded]) -> None:
    """Raises InputError where none of several backbones gives one of the fields."""
    for name in fields:
        if not any(name in item.fields for item in loaded):
            known = sorted({known for item in loaded for known in item.backbone.fields})
            raise InputError(
                f"none of the backbones has a field {name!r}; choose from {', '.join(known)}"
            )


def _usable(item: Loaded, contents: set[str], report: Say) -> Loaded:
    """The backbone with those of its fields that can be made from what the samples have.

    Raises:
        InputError: there are none.
    """
    towers = dict.fromkeys(spec.tower for spec in item.specs)
    lacking = {
        tower: [content for content in TOWER_CONTENT[tower] if content not in contents]
        for tower in towers
    }
    usable = tuple(spec.name for spec in item.specs if not lacking[spec.tower])
    if not usable:
        what = sorted({content for missing in lacking.values() for content in missing})
        raise InputError(
            f"{item.backbone.context['spec']} gives {', '.join(item.fields)}, and no sample has "
            f"{' or '.join(what)}"
        )
    for tower in towers:
        if lacking[tower]:
            what = [_A[content] for content in lacking[tower]]
            report(
                f"{item.alias}: no sample has {' and '.join(what)}, so its {tower} tower is left "
                "out"
            )
    return replace(item, fields=usable)


_A = {"image": "an image", "text": "a text"}


def _check_continues(store: EmbeddingStore, item: Loaded, config: ExtractConfig) -> None:
    """Raises InputError when what is asked does not continue what the store has."""
    if recorded(store, item.alias, config) is None:
        return
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
            if error["reason"] not in ABSENT:
                rows.add(error["row"])
    if rows:
        raise MmcError(
            f"{len(rows):,} of {len(store):,} samples could not be embedded (--strict is on); "
            f"the rest is in {store.path}"
        )
