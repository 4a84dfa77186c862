"""One plain table per kind of component: choose by name, import when used."""

import difflib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from mmc.store.errors import InputError


@dataclass(frozen=True)
class Entry:
    """One component that can be chosen by name."""

    name: str
    """What the user types."""
    target: str
    """Where it lives, as ``package.module:attribute``; imported only when chosen."""
    description: str
    """One line for ``mmc list``."""
    needs: str = ""
    """What it reads or requires, one short phrase."""


def entries(table: Sequence[Entry], group: str) -> tuple[Entry, ...]:
    """The built-in table followed by what other packages register under entry point ``group``.

    A built-in name wins over an entry point of the same name.
    """
    names = {entry.name for entry in table}
    plugins = tuple(
        Entry(point.name, point.value, f"from {point.dist.name if point.dist else 'a plugin'}")
        for point in entry_points(group=group)
        if point.name not in names
    )
    return (*table, *plugins)


def lookup(table: Sequence[Entry], name: str, *, kind: str, group: str) -> Entry:
    """The entry called ``name``.

    Raises:
        InputError: no such name; the message gives the nearest names, or all of them.
    """
    found = _named(table, name)
    if found is None:
        # Finding entry points reads a file of every installed package.
        known = entries(table, group)
        found = _named(known, name)
    if found is not None:
        return found
    names = [entry.name for entry in known]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from: {', '.join(names)}"
    raise InputError(
        f"unknown {kind} {name!r}; {hint} (see `mmc list {group.removeprefix('mmc.')}`)"
    )


def _named(known: Sequence[Entry], name: str) -> Entry | None:
    return next((entry for entry in known if entry.name == name), None)


def load(entry: Entry) -> Any:
    """Import and return what ``entry.target`` names."""
    module, _, attribute = entry.target.partition(":")
    return getattr(importlib.import_module(module), attribute)
