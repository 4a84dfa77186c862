"""Data sets of Hugging Face: saved ones (`save_to_disk`), and those of the Hub by name.

A saved one is read without the `datasets` library: Arrow streams, with JSON files that say which
they are and what their columns mean. ``hf-dataset:NAME[SPLIT]`` has the library load (and download)
NAME into its cache and reads the Arrow files there, so pictures stay where they are:

    hf-dataset:owner/name                 all splits
    hf-dataset:owner/name[train]          one split; [train,test] several
    hf-dataset:owner/name/config[train]   one of its configurations
    hf-dataset:./folder[train]            a folder that the library can load
"""

import importlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from mmc.extract.sources.arrow import ArrowFile
from mmc.extract.sources.base import Records, SourceOptions, listed
from mmc.extract.sources.splits import normalise
from mmc.extract.sources.typed import Features, features_of, read_records
from mmc.store.errors import InputError

SCHEME = "hf-dataset:"
_DICT, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"
_SPEC = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<splits>[^\[\]]*)\])?")


class SavedDataset:
    """Format `hf-saved`."""

    def recognises(self, spec: str) -> bool:
        """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` made."""
        return os.path.isfile(os.path.join(spec, _DICT)) or _is_saved(spec)

    def read(self, spec: str, options: SourceOptions) -> Records:
        """All rows of all splits.

        Raises:
            InputError: a file is missing or not what the library writes.
        """
        return read_saved(os.path.abspath(spec), None, options)


class HubDataset:
    """Format `hf-dataset`."""

    def recognises(self, spec: str) -> bool:
        """By its scheme."""
        return spec.startswith(SCHEME)

    def read(self, spec: str, options: SourceOptions) -> Records:
        """All rows of the splits that are named, or of all.

        Raises:
            InputError: `datasets` is not installed, or does not find or load the data set.
        """
        name, config, splits = parse(spec)
        if os.path.isfile(os.path.join(name, _DICT)) or _is_saved(name):
            return read_saved(os.path.abspath(name), splits, options)
        return _read_loaded(_load(name, config, spec), splits, spec, options)


def parse(spec: str) -> tuple[str, str | None, list[str] | None]:
    """(name, configuration or None, splits or None = all) of an `hf-dataset:` spec.

    Raises:
        InputError: another form.
    """
    match = _SPEC.fullmatch(spec.removeprefix(SCHEME).strip())
    if match is None:
        raise InputError(
            f"cannot read {spec!r}; write {SCHEME}owner/name[split] or"
            f" {SCHEME}owner/name/config[split]"
        )
    name, config = os.path.expanduser(match["name"]), None
    if not os.path.isdir(name) and not name.startswith((".", "/")) and name.count("/") == 2:
        name, _, config = name.rpartition("/")
    splits = None
    if match["splits"] is not None:
        splits = [split.strip() for split in match["splits"].split(",") if split.strip()]
        if not splits:
            raise InputError(
                f"{spec!r} names no split between the brackets; leave them out for all"
            )
    return name, config, splits


def read_saved(folder: str, splits: Sequence[str] | None, options: SourceOptions) -> Records:
    """The rows of some splits, or of all, of a saved data set."""
    if not os.path.isfile(os.path.join(folder, _DICT)):
        if splits is not None:
            raise InputError(f"{folder} is one data set without splits; leave {splits} out")
        parts: dict[str | None, str] = {None: folder}
    else:
        there = _json(os.path.join(folder, _DICT)).get("splits")
        if not isinstance(there, list) or not there:
            raise InputError(f"{os.path.join(folder, _DICT)} names no splits; save it again")
        parts = {split: os.path.join(folder, split) for split in _chosen(there, splits, folder)}
    files = []
    features: list[Features] = []  # of each file: splits may number the same classes otherwise
    for split, part in parts.items():
        if not _is_saved(part):
            raise InputError(f"{part} is not there or not complete; save the data set again")
        state = _json(os.path.join(part, _STATE))
        if state.get("_indices_data_files"):
            raise InputError(
                f"{part} was saved as a selection of rows; call flatten_indices() and save it again"
            )
        its = _json(os.path.join(part, _INFO)).get("features") or None
        for file in state.get("_data_files", []):
            path = os.path.join(part, os.path.basename(str(file.get("filename"))))
            files.append((None if split is None else normalise(split), ArrowFile(path)))
            features.append(features_of(files[-1][1].schema) if its is None else its)
    if not files:
        raise InputError(f"{folder} names no data files; save the data set again")
    return read_records(
        files,
        options,
        folder=folder,
        description="saved Hugging Face data set",
        features=features,
    )


def _is_saved(folder: str) -> bool:
    return all(os.path.isfile(os.path.join(folder, name)) for name in (_STATE, _INFO))


def _json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; save the data set again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is no JSON object; save the data set again")
    return value


def _chosen(there: Sequence[str], wanted: Sequence[str] | None, where: str) -> list[str]:
    """The splits that are wanted, under the names that the data set has for them."""
    if wanted is None:
        return list(there)
    result = []
    for split in wanted:
        alike = [name for name in there if name == split]
        alike = alike or [name for name in there if normalise(name) == normalise(split)]
        if not alike:
            raise InputError(f"{where} has no split {split!r}; it has {listed(there)}")
        result.append(alike[0])
    return list(dict.fromkeys(result))


def _load(name: str, config: str | None, spec: str) -> dict[str, Any]:
    """{split: data set} as the library loads it."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise InputError(
            f"{spec} needs the datasets library, which is not installed; install it:"
            " pip install datasets"
        ) from None
    try:
        loaded = datasets.load_dataset(name, config)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"cannot load {spec}: {reason} (the form is {SCHEME}owner/name/config[split])"
        ) from None
    return dict(loaded)


def _read_loaded(
    loaded: dict[str, Any], splits: Sequence[str] | None, spec: str, options: SourceOptions
) -> Records:
    files = []
    features: list[Features] = []
    for split in _chosen(list(loaded), splits, spec):
        paths = [file["filename"] for file in loaded[split].cache_files]
        if not paths and len(loaded[split]):
            raise InputError(
                f"{spec} is held in memory and not in files; set HF_DATASETS_IN_MEMORY_MAX_SIZE=0"
            )
        files += [(normalise(split), ArrowFile(os.path.abspath(path))) for path in paths]
        features += [loaded[split].features.to_dict()] * len(paths)
    if not files:
        raise InputError(f"{spec} has no rows")
    return read_records(
        files,
        options,
        folder=os.path.commonpath([os.path.dirname(file.path) for _, file in files]),
        description=f"Hugging Face data set {spec.removeprefix(SCHEME)}",
        features=features,
    )
