"""Many files by one name: braces (`shard_{00000..00012}.tar`) and globs (`part-*.parquet`)."""

import glob
import itertools
import os
import re
from collections.abc import Iterator

import natsort

from mmc.store.errors import InputError

_MOST = 100_000
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?|([A-Za-z])\.\.([A-Za-z])")
_GLOB = re.compile(r"[*?]|\[[^\]/]+\]")
_NO_FILES = ("hf-dataset:",)
"""Specs of these are names, and a split in brackets is no set of characters."""
_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def is_pattern(spec: str) -> bool:
    """Whether ``spec`` is meant for many files: it holds a wildcard or braces, and is no file."""
    if os.path.lexists(os.path.expanduser(spec)) or (os.name != "nt" and _DRIVE.match(spec)):
        return False
    if "://" in spec or spec.startswith(_NO_FILES):
        return False
    return bool(_GLOB.search(spec) or len(_alternatives(spec)) != 1)


def expand(pattern: str) -> list[str]:
    """The files and folders that a pattern means, absolute: braces in order, globs natural sorted.

    Raises:
        InputError: nothing matches, or a name that braces spell out is not there.
    """
    found: dict[str, None] = {}
    missing = []
    for name in _names(_absolute(pattern)):
        if _GLOB.search(name) and not os.path.lexists(name):
            matches = natsort.natsorted(glob.glob(name, recursive=True))
        else:
            matches = [name] if os.path.exists(name) else []
            missing += [] if matches else [name]
        found.update(dict.fromkeys(matches))
    if missing and found:
        raise InputError(
            f"{len(missing)} of the {len(missing) + len(found)} files of {pattern} are not there,"
            f" first {missing[0]}; correct the pattern (or use * for what is there)"
        )
    if not found:
        raise InputError(f"no file matches {pattern} (looked below {fixed_folder(pattern)})")
    return list(found)


def matches(pattern: str) -> list[str]:
    """As :func:`expand`, and nothing where it finds fault or ``pattern`` is none."""
    try:
        return expand(pattern) if is_pattern(pattern) else []
    except InputError:
        return []


def fixed_folder(pattern: str) -> str:
    """The deepest folder that all names of a pattern lie in, absolute."""
    folder = os.path.dirname(_absolute(pattern))
    while _GLOB.search(folder) or len(_alternatives(folder)) != 1 or "{" in folder:
        folder = os.path.dirname(folder)
    return folder


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _names(pattern: str) -> list[str]:
    """The pattern with its braces spelled out.

    Raises:
        InputError: they make more names than any data set has.
    """
    names = list(itertools.islice(_spelled(pattern), _MOST + 1))
    if len(names) > _MOST:
        raise InputError(f"{pattern} means more than {_MOST:,} files; correct its braces")
    return names


def _spelled(pattern: str) -> Iterator[str]:
    pieces = _alternatives(pattern)
    if len(pieces) == 1:
        yield pattern
        return
    before, choices, after = pieces
    for choice in choices:
        for some in _spelled(choice):
            yield from (before + some + rest for rest in _spelled(after))


def _alternatives(pattern: str) -> tuple[str] | tuple[str, list[str] | Iterator[str], str]:
    """(before, choices, after) of the first braces with choices in them; else (pattern,)."""
    for start in (at for at, sign in enumerate(pattern) if sign == "{"):
        depth, commas = 0, []
        for at in range(start, len(pattern)):
            sign = pattern[at]
            depth += (sign == "{") - (sign == "}")
            if sign == "," and depth == 1:
                commas.append(at)
            if depth == 0:
                inside = pattern[start + 1 : at]
                counted = _counted(inside)
                if counted is not None:
                    return pattern[:start], counted, pattern[at + 1 :]
                if commas:
                    ends = zip([start, *commas], [*commas, at], strict=True)
                    choices = [pattern[a + 1 : b] for a, b in ends]
                    return pattern[:start], choices, pattern[at + 1 :]
                break
    return (pattern,)


def _counted(inside: str) -> Iterator[str] | None:
    """`00..12` and `a..f` spelled out, lazily; None for anything else."""
    match = _RANGE.fullmatch(inside)
    if match is None:
        return None
    first, last, step, letter, last_letter = match.groups()
    if letter is not None:
        a, b = ord(letter), ord(last_letter)
        return (chr(code) for code in range(a, b + (1 if b >= a else -1), 1 if b >= a else -1))
    by = abs(int(step or 1)) or 1
    a, b = int(first), int(last)
    padded = any(re.match(r"-?0\d", number) for number in (first, last))
    width = max(len(first), len(last)) if padded else 0
    by = by if b >= a else -by
    return (f"{number:0{width}d}" for number in range(a, b + (1 if by > 0 else -1), by))
