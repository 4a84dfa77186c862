"""Label cells: what separates labels in them.

When no separator is given: JSON or Python lists are taken as lists. Cells of integers only may be
divided by space, comma, semicolon or pipe (the Kaggle form). Otherwise `|` or `;` anywhere is the
separator. A comma may be part of a name, so it needs evidence: half of the cells with commas must
share a part with another cell in which that part stands at another place (alone, first or later),
as in "Action, Comedy" and "Comedy, Drama" but not in "Portland, Oregon" and "Portland, Maine".
Names are divided at spaces only when told, or in the Kaggle form when few words make many cells.
"""

import ast
import json
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from mmc.extract.sources.base import shown
from mmc.store.errors import InputError

INTEGER = re.compile(r"-?\d+(\.0+)?")
"""A whole number as a label: pandas writes 1.0 where other cells are missing."""

_INTEGERS = re.compile(r"[\s,;|]*-?\d+(\.0+)?([\s,;|]+-?\d+(\.0+)?)*[\s,;|]*")
_ANY = re.compile(r"[\s,;|]+")
_HINT_SHARE = 3


class Cells:
    """The distinct label cells of a source and how they are divided."""

    def __init__(
        self, texts: Sequence[str], place: Callable[[int], str], *, kaggle: bool = False
    ) -> None:
        self.texts = [text.strip() for text in texts]
        self.separator: str | None = None
        self.several = False
        """A separator or a list was seen: more than one label is meant to be possible."""
        self.notes: list[str] = []
        self._place, self._kaggle = place, kaggle

    def parts(self, separator: str | None) -> list[list[str]]:
        """The labels in each cell, as written."""
        with warnings.catch_warnings():
            # A backslash in a cell is no reason to warn about Python's string escapes.
            warnings.simplefilter("ignore", SyntaxWarning)
            lists = [self._listed(code, text) for code, text in enumerate(self.texts)]
        self._check_named(lists)
        plain = [text for text, listed in zip(self.texts, lists, strict=True) if listed is None]
        divide = self._divider([text for text in plain if text], separator)
        result = []
        for text, listed in zip(self.texts, lists, strict=True):
            self.several |= listed is not None
            result.append(divide(text) if listed is None else listed)
        return result

    def _check_named(self, lists: Sequence[list[str] | None]) -> None:
        """Raises InputError for 0, 1 or -1 in the place of each label: these would be names."""
        sizes = {len(one) for one in lists if one}
        items = {item for one in lists if one for item in one}
        numbers = {"0", "1", "-1", "0.0", "1.0", "-1.0"}
        if len(sizes) == 1 and max(sizes) > 2 and items <= numbers:
            code = next(code for code, one in enumerate(lists) if one)
            raise InputError(
                f"{self._place(code)}: the labels are lists of {max(sizes)} zeros and ones, such as"
                f" {shown(self.texts[code])}; write the names of the labels that a sample has, or a"
                " column for each label (--label-column a,b,c)"
            )

    def exact(self, label_set: Sequence[str]) -> list[list[str]]:
        """The labels in each cell of a format that knows them: a name, or a JSON list of names."""
        known = set(label_set)
        result = []
        for code, text in enumerate(self.texts):
            listed = None if text in known else self._listed(code, text)
            names = ([text] if text else []) if listed is None else listed
            self.several |= listed is not None
            unknown = [name for name in names if name not in known]
            if unknown:
                raise InputError(
                    f"{self._place(code)}: {shown(unknown[0])} is none of the source's labels"
                )
            result.append(names)
        return result

    def _listed(self, code: int, text: str) -> list[str] | None:
        """The items of a JSON or Python list; None when the cell is not one."""
        if (text[:1], text[-1:]) not in (("[", "]"), ("{", "}")):
            return None
        value = _literal(text)
        if isinstance(value, dict):
            raise InputError(
                f"{self._place(code)}: the label is an object, {shown(text)}; give a text, a number"
                " or a list of them"
            )
        if not isinstance(value, list):
            return None
        return [item for item in (self._item(code, item) for item in value) if item]

    def _item(self, code: int, value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if not isinstance(value, str | int | float):
            raise InputError(
                f"{self._place(code)}: {value!r} in the list of labels is no label; use texts or"
                " numbers"
            )
        return str(value).strip()

    def _divider(self, texts: list[str], separator: str | None) -> Callable[[str], list[str]]:
        if separator is not None:
            self.separator = separator
            self.several = True
        elif texts and all(_INTEGERS.fullmatch(text) for text in texts):
            seen = Counter(
                found.strip()[:1] or " " for text in texts for found in _ANY.findall(text)
            )
            if seen:
                self.several = True
                self.separator = seen.most_common(1)[0][0]
            return lambda text: [part for part in _ANY.split(text) if part]
        else:
            self.separator = self._recognise(texts)
        if self.separator is None:
            return lambda text: [text] if text else []
        self.several |= any(self.separator in text for text in texts)
        return self._split

    def _split(self, text: str) -> list[str]:
        assert self.separator is not None
        # A space stands for any run of white space.
        pieces = text.split(self.separator.strip() or None)
        return [piece.strip() for piece in pieces if piece.strip()]

    def _recognise(self, texts: list[str]) -> str | None:
        for separator in ("|", ";"):
            if any(separator in text for text in texts):
                return separator
        with_comma = sum("," in text for text in texts)
        if with_comma:
            if _shared(texts, ",") * 2 >= with_comma:
                return ","
            self.notes.append(
                f"labels: commas taken as part of the names ({with_comma} names have one); if they"
                " separate labels, give --label-separator ,"
            )
            return None
        words = {word for text in texts for word in text.split()}
        if words and len(texts) >= _HINT_SHARE * len(words):
            if self._kaggle:
                return " "
            self.notes.append(
                f"labels: {len(texts)} names made of only {len(words)} words; if spaces separate"
                ' labels, give --label-separator " "'
            )
        return None


def _shared(texts: list[str], separator: str) -> int:
    """How many of the divided texts share a part with another text where it stands elsewhere."""
    divided = {text: [part.strip() for part in text.split(separator)] for text in texts}
    places = defaultdict(set)
    for parts in divided.values():
        for at, part in enumerate(parts):
            places[part].add(_position(at, parts))
    several = [parts for parts in divided.values() if len(parts) > 1]
    return sum(any(len(places[part]) > 1 for part in parts if part) for parts in several)


def _position(at: int, parts: Sequence[str]) -> str:
    if len(parts) == 1:
        return "alone"
    return "later" if at else "first"


def _literal(text: str) -> Any:
    """A JSON value, else a Python literal; None when it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
