"""Embed new data the way a run's features were made, so that the run can read it."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmc.extract.options import ExtractConfig
from mmc.extract.pipeline import Progress, Say, extract, open_if_there
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
    samples = read_source(source, options)
    ids = samples.table["id"].combine_chunks().cast(pa.string())
    _check_own(store_path, samples.source["spec"], ids)
    said: set[str] = set()

    def once(line: str) -> None:
        """Several extractions read the same source: its news are told once."""
        if line not in said:
            said.add(line)
            report(line)

    for config in _configs(recipes, options, device):
        extract(source, store_path, config, report=once, progress=progress)
    store = EmbeddingStore.open(store_path)
    for recipe in recipes:
        for field in recipe["fields"]:
            if f"{recipe['alias']}/{field}" not in store:
                raise InputError(
                    f"{source}: the run reads {recipe['alias']}/{field}, and no sample has what it "
                    "is made from; name the column, or the folder of images (--image-root)"
                )
    return store, _rows(store, ids).to_numpy().astype(np.int64)


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


def _configs(
    recipes: Sequence[Mapping[str, Any]], options: SourceOptions, device: str
) -> list[ExtractConfig]:
    """As few extractions as the recipes allow: each picture is decoded once in each."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for recipe in recipes:
        identity = recipe["identity"]
        if "spec" not in recipe["context"]:
            raise InputError(
                f"the run does not say which backbone made {recipe['alias']!r}; "
                "extract the data yourself and give the store"
            )
        key = (
            tuple(recipe["fields"]),
            identity["batch_size"]["image"],
            identity["precision"],
            identity.get("max_text_tokens"),
        )
        groups.setdefault(key, []).append(recipe)
    return [
        ExtractConfig(
            backbones=tuple(
                recipe["context"].get("resolved_spec", recipe["context"]["spec"])
                for recipe in group
            ),
            names=tuple(recipe["alias"] for recipe in group),
            fields=fields,
            batch_size=batch_size,
            precision=precision,
            max_text_tokens=max_text_tokens,
            device=device,
            source=options,
        )
        for (fields, batch_size, precision, max_text_tokens), group in groups.items()
    ]
