"""From a SOURCE, as the user writes it, to samples: which files, which format, which splits."""

import difflib
import os
import re
from collections import defaultdict
from collections.abc import Sequence

import natsort
import pyarrow as pa
import pyarrow.compute as pc

from mmc.extract import sources
from mmc.extract.sources import patterns, prepared
from mmc.extract.sources.base import Format, Part, Samples, SourceOptions, listed
from mmc.extract.sources.build import build
from mmc.extract.sources.splits import normalise, numbered, split_of_file, without_number
from mmc.store.errors import InputError
from mmc.store.registry import Entry, entries, load
from mmc.store.schema import canonical_json

GROUP = "mmc.sources"

_NAMED = re.compile(r"\w+=")
_NEXT_NAMED = re.compile(r",(?=\w+=)")
_NEAR = 0.7
"""How alike two names are, from 0 to 1, for one to be offered in place of the other."""


def read_source(spec: str, options: SourceOptions | None = None) -> Samples:
    """Read a SOURCE: a file; a folder; a glob or brace pattern; `train=a.csv,val=b.csv`.

    Raises:
        InputError: nothing there, no format that knows it, or a fault in it (with file and line).
    """
    options = options or SourceOptions()
    notes: list[str] = []
    parts = []
    for split, path in _files(spec, notes):
        entry, reader = _format(path)
        records = reader.read(path, options)
        prepared.understand(records, options)
        parts.append(Part(split, entry.name, records))
    _ids_from_one_folder(parts)
    samples = build(_canonical(spec), parts, options)
    canonical_json(samples.source, "the source")
    samples.notes = list(dict.fromkeys([*notes, *samples.notes]))
    return samples


def check_source(spec: str) -> None:
    """Look whether there is something that a format knows, before anything that takes long.

    Raises:
        InputError: there is not.
    """
    for _, path in _files(spec, []):
        _format(path)


def is_there(spec: str) -> bool:
    """Whether the files of a source (as `Samples.source` spells it) are still where they were."""
    paths = [path for _, path in _named(spec)] if _is_named(spec) else [spec]
    return all(
        bool(patterns.matches(path)) if patterns.is_pattern(path) else os.path.exists(path)
        for path in paths
    )


def _ids_from_one_folder(parts: Sequence[Part]) -> None:
    """Let ids that are places in each part's folder be places in the folder of all."""
    folders = [part.records.folder for part in parts if part.records.ids_in_folder]
    if len(set(folders)) < 2:
        return
    root = os.path.commonpath(folders)
    for part in parts:
        below = os.path.relpath(part.records.folder, root).replace(os.sep, "/")
        if part.records.ids_in_folder and below != ".":
            table = part.records.columns
            ids = pc.binary_join_element_wise(pa.scalar(below), table["id"], "/")
            part.records.columns = table.set_column(table.column_names.index("id"), "id", ids)


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


def _recognised(path: str) -> bool:
    return any(reader.recognises(path) for _, reader in _formats())


def _is_named(spec: str) -> bool:
    return bool(_NAMED.match(spec)) and not os.path.exists(spec)


def _named(spec: str) -> list[tuple[str, str]]:
    """(split, path) of `train=a.csv,val=b.csv`."""
    pieces = (piece.partition("=") for piece in _NEXT_NAMED.split(spec))
    return [(normalise(name), path.strip()) for name, _, path in pieces]


def _canonical(spec: str) -> str:
    """``spec`` with absolute paths: one source has one spec, wherever the command is run."""
    if _is_named(spec):
        return ",".join(f"{name}={_absolute(path)}" for name, path in _named(spec))
    is_path = os.path.exists(os.path.expanduser(spec)) or patterns.matches(spec)
    return _absolute(spec) if is_path else spec


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _files(spec: str, notes: list[str]) -> list[tuple[str | None, str]]:
    """(split or None, what one format reads) of everything that ``spec`` means."""
    if _is_named(spec):
        names = [name for name, _ in _named(spec)]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise InputError(f"source {spec!r} gives split {twice[0]!r} twice")
        return [
            (split, path) for split, given in _named(spec) for path in _of_one_split(given, notes)
        ]
    if not os.path.exists(os.path.expanduser(spec)):
        if _recognised(spec):
            return [(None, _absolute(spec) if patterns.is_pattern(spec) else spec)]
        if patterns.is_pattern(spec):
            return [(split_of_file(path), path) for path in _tables(spec, notes)]
    path = _existing(spec)
    if not os.path.isdir(path) or _recognised(path):
        return [(None, path)]
    return _files_in(path, notes)


def _of_one_split(given: str, notes: list[str]) -> list[str]:
    """The files behind `train=`: a file, a folder, a pattern."""
    if patterns.is_pattern(given):
        return [_absolute(given)] if _recognised(given) else _tables(given, notes)
    path = _existing(given)
    if not os.path.isdir(path) or _recognised(path):
        return [path]
    names = [name for _, name in _tables_in(path)]
    return [os.path.join(path, name) for name in _one_table(names, path)]


def _tables(pattern: str, notes: list[str]) -> list[str]:
    """The files of a pattern that some format reads.

    Raises:
        InputError: there is none, or only files that no format reads.
    """
    paths = patterns.expand(pattern)
    found = [path for path in paths if os.path.isfile(path) and _recognised(path)]
    if not found:
        _format(paths[0])
    notes.append(f"files: {len(found)} match {pattern}")
    if len(found) < len(paths):
        left = [os.path.basename(path) for path in paths if path not in set(found)]
        notes.append(f"files left out: {listed(left, 5)} (no format reads them)")
    return found


def _existing(path: str) -> str:
    full = _absolute(path)
    if os.path.exists(full):
        return full
    folder, name = os.path.split(full)
    while not os.path.isdir(folder) and os.path.dirname(folder) != folder:
        folder, name = os.path.split(folder)
    near = _near(name, os.listdir(folder)) if os.path.isdir(folder) else []
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    where = "" if os.path.join(folder, name) == full else f" ({folder} has no {name})"
    raise InputError(f"there is no file or folder {path}{where}{hint}")


def _near(name: str, names: Sequence[str]) -> list[str]:
    """The names that ``name`` may be a slip of the hand for; a shared suffix says little."""
    stem, suffix = os.path.splitext(name.lower())

    def likeness(other: str) -> float:
        other_stem, other_suffix = os.path.splitext(other.lower())
        if suffix and other_suffix and suffix != other_suffix and stem != other_stem:
            return 0.0
        return difflib.SequenceMatcher(None, stem, other_stem).ratio()

    ranked = sorted(
        (name for name in names if not name.startswith(".") and likeness(name) >= _NEAR),
        key=lambda name: (-likeness(name), name),
    )
    return ranked[:3]


def _tables_in(folder: str) -> list[tuple[str, str]]:
    """(format, name) of the tables in a folder."""
    formats = _formats()
    return [
        (entry.name, name)
        for name in natsort.natsorted(os.listdir(folder))
        # A text beside the tables (README.txt) is a table only when named like one.
        if not name.startswith(".")
        if split_of_file(name) or name == "captions.txt" or not name.lower().endswith(".txt")
        if os.path.isfile(os.path.join(folder, name))
        for entry, reader in formats
        if reader.recognises(os.path.join(folder, name))
    ]


def _files_in(folder: str, notes: list[str]) -> list[tuple[str | None, str]]:
    """The train, val and test files of a folder; else its only table."""
    tables = _tables_in(folder)
    inner = os.path.join(folder, "data")
    if not tables and os.path.isdir(inner):
        notes.append(f"files: from {inner}")
        return [(None, inner)] if _recognised(inner) else _files_in(inner, notes)
    by_format: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for format_name, name in tables:
        split = split_of_file(name)
        if split:
            by_format[format_name][split].append(name)
    if not by_format:
        names = _one_table([name for _, name in tables], folder)
        return [(None, os.path.join(folder, name)) for name in names]
    if len(by_format) > 1:
        raise InputError(
            f"{folder} holds split files of several formats ({', '.join(by_format)}); name the"
            " files: train=...,val=...,test=..."
        )
    (found,) = by_format.values()
    for split, names in found.items():
        if len(names) > 1 and not _numbered_alike(names):
            raise InputError(
                f"{folder} holds {' and '.join(names)}, all for {split}; name the files:"
                " train=...,val=...,test=..."
            )
    used = {split: found[split] for split in ("train", "val", "test") if split in found}
    said = (f"{_first_and_more(names)} is {split}" for split, names in used.items())
    notes.append("files: " + ", ".join(said))
    files = [(split, name) for split, names in used.items() for name in names]
    left = [name for _, name in tables if name not in {name for _, name in files}]
    if left:
        notes.append(f"files left out: {', '.join(left)} (only train, val and test files are read)")
    return [(split, os.path.join(folder, name)) for split, name in files]


def _first_and_more(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _numbered_alike(names: Sequence[str]) -> bool:
    """Whether files are the numbered pieces of one table."""
    return all(map(numbered, names)) and len({without_number(name) for name in names}) == 1


def _one_table(names: Sequence[str], folder: str) -> Sequence[str]:
    """The only table of a folder, or its pieces."""
    if len(names) == 1 or (names and _numbered_alike(names)):
        return names
    if not names:
        raise InputError(
            f"{folder} holds no table that mmc reads; give a file, or a folder with train, val and"
            " test files"
        )
    raise InputError(
        f"{folder} holds several tables ({listed(names, 5)}) and none is named train, val or test;"
        " name the files: train=...,val=...,test=..."
    )
