"""Joining labels: ``racist,sexist=hate;nothate=ok``.

Rules stand between `;`, each with the labels to join before the `=` and their new name after it.
Names that hold these characters can be given as JSON instead: ``{"hate": ["racist", "a, b"]}``.
Every name is one of the labels as they were: rules do not follow each other.
"""

import difflib
import json
from collections.abc import Sequence

from mmc.extract.sources.base import listed
from mmc.store.errors import InputError

Rules = tuple[tuple[str, str], ...]
"""(label, its new name) as the user wrote them."""


def parse_merge(text: str) -> Rules:
    """The rules in ``text``; none for the empty one.

    Raises:
        InputError: it cannot be read, or a label is in two rules.
    """
    text = text.strip()
    if not text:
        return ()
    rules = _from_json(text) if text.startswith("{") else _from_words(text)
    names = [name for name, _ in rules]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"merge-labels: {twice[0]!r} is in two places; give each label once")
    return rules


def _from_words(text: str) -> Rules:
    result = []
    for rule in text.split(";"):
        if not rule.strip():
            continue
        before, sign, target = (piece.strip() for piece in rule.rpartition("="))
        names = [name.strip() for name in before.split(",") if name.strip()]
        if not sign or not target or not names:
            raise InputError(
                f"cannot read merge-labels {rule.strip()!r}; write the labels, = and their new"
                " name, with ; between rules, such as racist,sexist=hate;nothate=ok"
            )
        result += [(name, target) for name in names]
    return tuple(result)


def _from_json(text: str) -> Rules:
    try:
        # As pairs: of a new name that is there twice, both rules count.
        pairs = json.loads(text, object_pairs_hook=list)
    except ValueError as error:
        raise InputError(f"merge-labels {text[:60]!r} is not JSON: {error}") from None
    good = all(
        target.strip() and isinstance(names, list) and all(isinstance(n, str) for n in names)
        for target, names in pairs
    )
    if not good:
        raise InputError('merge-labels as JSON must be {"new name": ["label", ...], ...}')
    return tuple((name, target.strip()) for target, names in pairs for name in names)


def merging(rules: Rules, names: Sequence[str], *, need_all: bool = True) -> dict[str, str]:
    """{label: its new name} for the labels that get one.

    Args:
        names: all labels that there are.
        need_all: refuse a rule for a label that is not there.

    Raises:
        InputError: a rule names a label that is not there, or may mean two, or two rules mean one.
    """
    result: dict[str, str] = {}
    for written, target in rules:
        name = _find(written, names, need_all)
        if name is None:
            continue
        if result.setdefault(name, target) != target:
            raise InputError(f"merge-labels: {written!r} is {name!r}, which another rule has")
    return result


def _find(written: str, names: Sequence[str], need_all: bool) -> str | None:
    if written in names:
        return written
    alike = [name for name in names if name.casefold() == written.casefold()]
    if len(alike) == 1:
        return alike[0]
    if alike:
        raise InputError(f"merge-labels: {written!r} may be {' or '.join(alike)}; write it exactly")
    if not need_all:
        return None
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(written.casefold(), folded, 3, 0.6)
    hint = (
        f"did you mean {' or '.join(folded[name] for name in near)}?"
        if near
        else f"the labels are {listed(names)}"
    )
    raise InputError(f"merge-labels: there is no label {written!r}; {hint}")
