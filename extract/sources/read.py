"""From a SOURCE, as the user writes it, to samples: which files, which format, which splits."""

import difflib
import os
import re
from collections import defaultdict
from collections.abc import Sequence

from mmc.extract import sources
from mmc.extract.sources.base import Format, Part, Samples, SourceOptions, listed
from mmc.extract.sources.build import build
from mmc.extract.sources.splits import normalise, split_named
from mmc.store.errors import InputError
from mmc.store.registry import Entry, entries, load

GROUP = "mmc.sources"

_NAMED = re.compile(r"\w+=")
_NEXT_NAMED = re.compile(r",(?=\w+=)")


def read_source(spec: str, options: SourceOptions | None = None) -> Samples:
    """Read a SOURCE: a file; a folder with train, val and test files; `train=a.csv,val=b.csv`.

    Raises:
        InputError: nothing there, no format that knows it, or a fault in it (with file and line).
    """
    options = options or SourceOptions()
    notes: list[str] = []
    parts = []
    for split, path in _files(spec, notes):
        entry, reader = _format(path)
        parts.append(Part(split, entry.name, reader.read(path, options)))
    samples = build(_canonical(spec), parts, options)
    samples.notes[:0] = notes
    return samples


def _formats() -> list[tuple[Entry, Format]]:
    return [(entry, load(entry)()) for entry in entries(sources.SOURCES, GROUP)]


def _format(spec: str) -> tuple[Entry, Format]:
    for entry, reader in _formats():
        if reader.recognises(spec):
            return entry, reader
    known = "; ".join(
        f"{entry.name}: {entry.needs or entry.description}" for entry, _ in _formats()
    )
    raise InputError(f"no format reads {spec} ({known})")


def _is_named(spec: str) -> bool:
    return bool(_NAMED.match(spec)) and not os.path.exists(spec)


def _canonical(spec: str) -> str:
    """``spec`` with absolute paths: one source has one spec, wherever the command is run."""
    if _is_named(spec):
        named = (piece.partition("=") for piece in _NEXT_NAMED.split(spec))
        return ",".join(f"{normalise(name)}={_absolute(path.strip())}" for name, _, path in named)
    return _absolute(spec) if os.path.exists(os.path.expanduser(spec)) else spec


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _files(spec: str, notes: list[str]) -> list[tuple[str | None, str]]:
    """(split or None, path) of every file that ``spec`` means."""
    if _is_named(spec):
        named = [piece.partition("=") for piece in _NEXT_NAMED.split(spec)]
        names = [normalise(name) for name, _, _ in named]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise InputError(f"source {spec!r} gives split {twice[0]!r} twice")
        return [
            (name, _existing(path.strip())) for name, (_, _, path) in zip(names, named, strict=True)
        ]
    if any(reader.recognises(spec) for _, reader in _formats()) and not _exists(spec):
        return [(None, spec)]
    path = _existing(spec)
    if not os.path.isdir(path) or any(reader.recognises(path) for _, reader in _formats()):
        return [(None, path)]
    return _files_in(path, notes)


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def _existing(path: str) -> str:
    full = _absolute(path)
    if os.path.exists(full):
        return full
    folder, name = os.path.split(full)
    near = difflib.get_close_matches(name, os.listdir(folder), 3) if os.path.isdir(folder) else []
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise InputError(f"there is no file or folder {path}{hint}")


def _files_in(folder: str, notes: list[str]) -> list[tuple[str | None, str]]:
    """The train, val and test files of a folder; else its only table."""
    formats = _formats()
    tables = [
        (entry.name, name)
        for name in sorted(os.listdir(folder))
        # A text beside the tables (README.txt) is a table only when named like one.
        if not name.startswith(".") and (_split_of(name) or not name.lower().endswith(".txt"))
        for entry, reader in formats
        if reader.recognises(os.path.join(folder, name))
    ]
    by_format: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for format_name, name in tables:
        split = _split_of(name)
        if split:
            by_format[format_name][split].append(name)
    if not by_format:
        return [(None, os.path.join(folder, _only([name for _, name in tables], folder)))]
    if len(by_format) > 1:
        raise InputError(
            f"{folder} holds split files of several formats ({', '.join(by_format)}); name the"
            " files: train=...,val=...,test=..."
        )
    (found,) = by_format.values()
    for split, names in found.items():
        if len(names) > 1:
            raise InputError(
                f"{folder} holds {' and '.join(names)}, all for {split}; name the files:"
                " train=...,val=...,test=..."
            )
    used = {split: found[split][0] for split in ("train", "val", "test") if split in found}
    notes.append("files: " + ", ".join(f"{name} is {split}" for split, name in used.items()))
    left = [name for _, name in tables if name not in used.values()]
    if left:
        notes.append(f"files left out: {', '.join(left)} (only train, val and test files are read)")
    return [(split, os.path.join(folder, name)) for split, name in used.items()]


def _split_of(name: str) -> str | None:
    return split_named(name.partition(".")[0])


def _only(names: Sequence[str], folder: str) -> str:
    if len(names) == 1:
        return names[0]
    if not names:
        raise InputError(
            f"{folder} holds no table that mmc reads; give a file, or a folder with train, val and"
            " test files"
        )
    raise InputError(
        f"{folder} holds several tables ({listed(names, 5)}) and none is named train, val or test;"
        " name the files: train=...,val=...,test=..."
    )
