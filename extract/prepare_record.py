"""The record of a preparation: what its folder was made of, and whether it is finished."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmc.extract.prepare_options import PrepareConfig, PrepareReport
from mmc.extract.sources import Samples, patterns
from mmc.extract.sources.prepared import RECIPE, schema_text
from mmc.extract.sources.splits import SPLITS
from mmc.extract.sources.state import hash_samples
from mmc.store.errors import InputError
from mmc.store.files import LocalFiles
from mmc.store.samples import UNKNOWN

Say = Callable[[str], None]

FORMAT = 1
INDEX = "index.parquet"
TABLE = "samples.csv"
"""The one table where there are other splits than train, val and test."""
CORE = ("id", "split", "labels", "text", "image", "image_offset", "size", UNKNOWN.name)
"""Columns with a meaning of their own; the others are the user's."""
_TABLES = ("csv", "jsonl", "parquet", "arrow")
"""Formats that do not look into folders."""
_SETTINGS = ("to", "max_side", "quality", "shard_samples", "max_pixels")


def check_apart(folder: Path, source: str, samples: Samples) -> None:
    """Refuse an output inside the source, which would become part of it, and the reverse."""
    named = [piece.partition("=")[2] or piece for piece in samples.source["spec"].split(",")]
    specs = [spec for spec in named if os.path.isabs(spec)]
    for place in (*specs, samples.source["image_root"]):
        if place is not None and Path(place).is_relative_to(folder):
            raise InputError(f"{folder} holds the source {place}; name another folder to write to")
    if samples.source["format"] in _TABLES:
        return
    for spec in specs:
        whole = spec if os.path.isdir(spec) else patterns.fixed_folder(spec)
        if folder.is_relative_to(whole):
            raise InputError(
                f"{folder} lies in the source {source}, and would become part of it; name a folder"
                " elsewhere"
            )


def make_folder(files: LocalFiles) -> None:
    """Make the output's folder.

    Raises:
        InputError: a file is there, or no folder may be made.
    """
    try:
        files.root.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{files.root} is a file; name a folder to write to") from None
    except OSError as error:
        raise InputError(f"cannot make {files.root}: {error.strerror or error}") from None


def make_recipe(samples: Samples, config: PrepareConfig) -> dict[str, Any]:
    """What the output is made of; another recipe makes other shards."""
    settings = {name: getattr(config, name) for name in _SETTINGS}
    digest = hashlib.sha256(json.dumps([FORMAT, settings], sort_keys=True).encode())
    hash_samples(digest, samples)
    core = [name for name in CORE if name in samples.table.column_names]
    return {
        "format": FORMAT,
        "done": False,
        **settings,
        "source": samples.source["spec"],
        "task": samples.task,
        "label_set": list(samples.label_set),
        "columns": schema_text(samples.table.drop_columns(core).schema),
        "label_tree": samples.source.get("label_tree"),
        "recipe": digest.hexdigest(),
    }


def claim(
    files: LocalFiles, recipe: dict[str, Any], config: PrepareConfig, report: Say
) -> PrepareReport | None:
    """Make the folder ours: the report of what is finished there, else None.

    Raises:
        InputError: it holds something else.
    """
    found = read_record(files)
    same = found is not None and found["recipe"] == recipe["recipe"]
    if found is not None and (not same or config.overwrite):
        if not same and not config.overwrite:
            raise InputError(
                f"{files.root} was prepared {_difference(found, recipe)}; give --overwrite to"
                " replace it, or name another folder"
            )
        write_record(files, {**found, "done": False})
        _remove_prepared(files)
    elif found is not None and found["done"]:
        report(f"{files.root} is finished and its source has not changed: nothing to do")
        lists = {name: tuple(found["result"][name]) for name in ("failures", "warnings")}
        return PrepareReport(**{**found["result"], **lists})
    elif found is not None:
        report(f"{files.root}: going on where an earlier run stopped")
    for name in ("", *files.names("")):
        files.clean(name, deep=False)
    write_record(files, recipe)
    return None


def _difference(found: dict[str, Any], recipe: dict[str, Any]) -> str:
    if found["source"] != recipe["source"]:
        return f"from {found['source']}"
    for name in _SETTINGS:
        if found[name] != recipe[name]:
            return f"with --{name.replace('_', '-')} {found[name]}, not {recipe[name]}"
    return "when its source was not as it is now, or was read with other options"


def read_record(files: LocalFiles) -> dict[str, Any] | None:
    """The record of what is in a folder; None where there is nothing.

    Raises:
        InputError: something is there that `mmc prepare` has not made.
    """
    data = files.read(RECIPE)
    if data is None:
        # A run that was killed at once leaves nothing but its lock and its temporary file.
        others = [
            name
            for name in files.names("")
            if not name.startswith((".lock", ".owner")) and not name.endswith(".tmp")
        ]
        if others:
            raise InputError(
                f"{files.root} holds other content ({others[0]}); name a new folder to write to"
            )
        return None
    try:
        found: dict[str, Any] = json.loads(data)
        if not {*_SETTINGS, "recipe", "done", "source"} <= set(found):
            raise ValueError
    except (ValueError, TypeError):
        raise InputError(
            f"{files.where(RECIPE)} is not of `mmc prepare`; name a new folder"
        ) from None
    return found


def write_record(files: LocalFiles, record: dict[str, Any]) -> None:
    files.write(RECIPE, [json.dumps(record, ensure_ascii=False, indent=1).encode()])


def _remove_prepared(files: LocalFiles) -> None:
    """Remove what a run wrote, and nothing else: shards, index and tables."""
    for name in (INDEX, TABLE, *(f"{split}.csv" for split in SPLITS)):
        files.remove(name)
    for folder in files.names(""):
        for name in files.names(folder):
            path = files.path(f"{folder}/{name}")
            if re.fullmatch(r"\d{5}\.tar", name):
                path.unlink()
            elif folder == "images" and re.fullmatch(r"\d{5}", name):
                shutil.rmtree(path)
        if files.path(folder).is_dir() and not files.names(folder):
            files.path(folder).rmdir()
