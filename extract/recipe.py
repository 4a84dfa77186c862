"""Embed new data the way a run's features were made, so that the run can read it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmc.extract.options import ExtractConfig
from mmc.extract.pipeline import Progress, Say, extract
from mmc.extract.sources import SourceOptions, read_source
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
    "allow_absolute_paths",
)


def source_options(trained_on: Mapping[str, Any], given: Mapping[str, Any]) -> SourceOptions:
    """How to read new data: as the trained source was read, unless the user says otherwise."""
    before = trained_on.get("options", {})
    inherited = {name: before[name] for name in INHERITED if name in before}
    return build(SourceOptions, {**inherited, **given}, where="the source")


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
    for recipe in recipes:
        extract(
            source, store_path, _config(recipe, options, device), report=report, progress=progress
        )
    store = EmbeddingStore.open(store_path)
    ids = read_source(source, options).table["id"].combine_chunks()
    known = store.column("id").combine_chunks()
    rows = pc.index_in(ids.cast(pa.string()), value_set=known.cast(pa.string()))
    return store, rows.to_numpy().astype(np.int64)


def _config(recipe: Mapping[str, Any], options: SourceOptions, device: str) -> ExtractConfig:
    identity, context = recipe["identity"], recipe["context"]
    if "spec" not in context:
        raise InputError(
            f"the run does not say which backbone made {recipe['alias']!r}; "
            "extract the data yourself and give the store"
        )
    return ExtractConfig(
        backbones=(context.get("resolved_spec", context["spec"]),),
        names=(recipe["alias"],),
        fields=tuple(recipe["fields"]),
        batch_size=identity["batch_size"]["image"],
        precision=identity["precision"],
        max_text_tokens=identity.get("max_text_tokens"),
        device=device,
        source=options,
    )
