"""What a step tells of itself, and the states of paths and stores by which changes are seen."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmc.store.hashing import hash_table

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]
State = Callable[[], str]
"""What an input is now: another text when it has changed."""

ABSENT = "absent"
"""State of what is not there."""

_SAMPLES = ("id", "split", "labels", "image_key", "text_key", "_gone", "unknown_labels")
"""Columns that embeddings, trainings and predictions depend on."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a step is told when it runs."""

    replace: bool
    """Make it anew: what is there was made by this step, of other inputs or settings, or is to be
    made again. Otherwise what is there, if anything, is this very work, unfinished."""
    forced: bool
    """The user asked for it though nothing has changed."""
    report: Say
    """Takes lines of news."""
    progress: Progress
    """Takes (stage, done, total)."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a step gives to whoever ran the recipe."""

    text: str = ""
    """For people, on stdout."""
    data: Any = None
    """For machines, JSON-able."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a recipe."""

    name: str
    """As it is shown and forced; no other step has it."""
    kind: str
    """prepare, caption, tune, extract, train, compare, evaluate or predict."""
    settings: Mapping[str, Any]
    """What the recipe says of it, JSON-able: another value, and the step runs again."""
    inputs: Mapping[str, State]
    """What it reads: another state, and the step runs again. Asked for when its turn has come."""
    run: Callable[[Start], Result]
    """Does the work."""
    made: Callable[[], str | None]
    """State of what it made; None where that is not there, or not whole."""
    after: tuple[str, ...] = ()
    """Names of the steps whose results it reads."""
    owns: str | None = None
    """The file or folder that is its alone: never touched where this recipe has not made it."""


def path_state(path: str | os.PathLike[str]) -> str:
    """Size and modification time of a file; of a folder, of all files below it."""
    try:
        status = os.stat(path)
    except OSError:
        return ABSENT
    if not Path(path).is_dir():
        return f"{status.st_size} {status.st_mtime_ns}"
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = os.path.join(folder, name)
            digest.update(f"{os.path.relpath(file, path)} {path_state(file)}\n".encode())
    return digest.hexdigest()


def store_state(path: str, aliases: Sequence[str] | None) -> str:
    """Digest of a store's samples, labels and splits, and of what made the embeddings of aliases.

    Args:
        path: of the store.
        aliases: those that count; None: all that there are.
    """
    from mmc.store import EmbeddingStore
    from mmc.store.errors import NotAStoreError

    try:
        store = EmbeddingStore.open(path)
    except NotAStoreError:
        return ABSENT
    digest = hashlib.sha256(_samples_state(store).encode())
    for alias in sorted(store.aliases if aliases is None else aliases):
        if alias not in store.aliases:
            digest.update(f"no {alias}".encode())
            continue
        record = store.record(alias)
        digest.update(f"{alias} {record.provenance.fingerprint} {sorted(record.fields)}".encode())
        for tower in record.towers:
            digest.update(store.status(alias, tower).tobytes())
        texts = store.label_text(alias)
        if texts is not None:
            digest.update(json.dumps(texts[0]).encode())
            digest.update(texts[1].tobytes())
    return digest.hexdigest()


def _samples_state(store: "EmbeddingStore") -> str:
    return _samples_digest(store.path, str(store.files.signature("samples.parquet")))


@functools.lru_cache(maxsize=8)
def _samples_digest(path: str, signature: str) -> str:
    """Of the samples that a store has while its table has this signature."""
    from mmc.store import EmbeddingStore

    store = EmbeddingStore.open(path)
    digest = hashlib.sha256(
        json.dumps([store.label_set, store.task, store.label_tree], sort_keys=True).encode()
    )
    samples = store.samples
    hash_table(
        digest, samples.select([n for n in _SAMPLES if n in samples.column_names]).combine_chunks()
    )
    return digest.hexdigest()
