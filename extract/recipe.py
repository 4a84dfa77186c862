"""Embed new data the way a run's features were made, so that the run can read it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmc.extract.label_text import spec_of
from mmc.extract.options import ExtractConfig
from mmc.extract.pipeline import Progress, Say, extract_each
from mmc.extract.sources import Samples, SourceOptions, read_source
from mmc.extract.sources.read import check_source
from mmc.extract.syncing import open_if_there
from mmc.store import EmbeddingStore
from mmc.store.config import build
from mmc.store.errors import InputError

# What a source of the same kind shares with the one that was trained on. Where its files lie, its
# labels and its splits are its own.
INHERITED = (
    "image_column",
    "text_column",
    "id_column",
    "label_separator",
    "encoding",
    "text_template",
    "merge_labels",
    "missing_labels",
    "label_level",
    "ties",
    "allow_absolute_paths",
)


def source_options(
    recipes: Sequence[Mapping[str, Any]],
    trained_on: Mapping[str, Any],
    source: str,
    given: Mapping[str, Any],
) -> SourceOptions:
    """How to read new data: as the trained source was read, unless the user says otherwise.

    Args:
        recipes: of the run; when none of them reads a picture, none needs to be there.
        trained_on: recipe of the source that the run was trained on.
        source: the new data; in the same folder it shares the image root, too.
        given: what the user says.
    """
    before = trained_on.get("options", {})
    inherited = {name: before[name] for name in INHERITED if name in before}
    where = os.path.dirname(os.path.abspath(source))
    if "image_root" in before and where == os.path.dirname(trained_on.get("spec", "")):
        inherited["image_root"] = before["image_root"]
    if all(field.startswith("text") for recipe in recipes for field in recipe["fields"]):
        inherited["need_images"] = False
    if inherited.get("ties") == "drop":
        del inherited["ties"]  # predictions are for every sample, the tied and the equal ones too
    inherited["need_merged_labels"] = "merge_labels" not in inherited
    return build(SourceOptions, {**inherited, **given, "dedupe": False}, where="the source")


def embed_like(
    recipes: Sequence[Mapping[str, Any]],
    source: str,
    store_path: str,
    options: SourceOptions,
    *,
    device: str,
    report: Say,
    progress: Progress,
) -> tuple[EmbeddingStore, NDArray[np.int64]]:
    """Extract ``source`` into ``store_path`` with each recipe of a run.

    Args:
        recipes: what `Run.recipe` gives: alias, fields, identity and context of each backbone.

    Returns:
        The store, and the rows of the source's samples in the source's order, int64 (n,).

    Raises:
        InputError: the source cannot be read, or a backbone is not where it was.
    """
    check_source(source)
    each = [_config(recipe, options, device) for recipe in recipes]
    read: list[Samples] = []

    def own() -> Samples:
        """The source, when it may be brought into the store."""
        samples = replace(read_source(source, options), advice=[])
        _check_own(store_path, samples.source["spec"], _ids(samples))
        read.append(samples)
        return samples

    # The heads of a run hold the label texts that they read: none are made here.
    extract_each(
        own, store_path, each[0], each, label_texts=False, report=report, progress=progress
    )
    store = EmbeddingStore.open(store_path)
    for recipe in recipes:
        for field in recipe["fields"]:
            if f"{recipe['alias']}/{field}" not in store:
                raise InputError(
                    f"{source}: the run reads {recipe['alias']}/{field}, and no sample has what it "
                    "is made from; name the column, or the folder of images (--image-root)"
                )
    return store, _rows(store, _ids(read[0])).to_numpy().astype(np.int64)


def _ids(samples: Samples) -> pa.Array:
    return samples.table["id"].combine_chunks().cast(pa.string())


def _rows(store: EmbeddingStore, ids: pa.Array) -> pa.Array:
    """Row of each id in the store; null where it has none."""
    return pc.index_in(ids, value_set=store.column("id").combine_chunks().cast(pa.string()))


def _check_own(path: str, spec: str, ids: pa.Array) -> None:
    """Refuse a store where other sources have these samples: they would be relabelled.

    Raises:
        InputError: ids of the source are in the store, and came from elsewhere.
    """
    store = open_if_there(path)
    if store is None or not store.sources:
        return
    rows = _rows(store, ids).drop_null().to_numpy().astype(np.int64)
    owners = store.column("_source").to_numpy()[rows]
    others = [store.sources[owner]["spec"] for owner in np.unique(owners)]
    if any(other != spec for other in others):
        raise InputError(
            f"{path} has some of these samples from {others[0]}, with their own labels and splits; "
            "predict on the store itself, or give another --store"
        )


def _config(recipe: Mapping[str, Any], options: SourceOptions, device: str) -> ExtractConfig:
    """What makes the features of one backbone again."""
    identity = recipe["identity"]
    return ExtractConfig(
        backbones=(spec_of(recipe),),
        names=(recipe["alias"],),
        fields=tuple(recipe["fields"]),
        batch_size=identity["batch_size"]["image"],
        precision=identity["precision"],
        max_text_tokens=identity.get("max_text_tokens"),
        device=device,
        source=options,
    )
