"""JSON lines: one object a line, the form of hateful memes.

Values become text: numbers as Python writes them (so "0001", 1 and 1.0 are three ids), true and
false in small letters, lists and objects as JSON, null and absent keys as missing. NaN, Infinity
and a key given twice are errors. Half surrogates, which no file can hold, become U+FFFD.
"""

import json
import os
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from mmc.extract.sources.base import Records, SourceOptions
from mmc.extract.sources.encoding import TextFile
from mmc.store.errors import InputError

_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
_CHUNK = 1 << 16


class JsonLines:
    """Format `jsonl`."""

    def recognises(self, spec: str) -> bool:
        """By suffix."""
        return spec.lower().removesuffix(".gz").endswith(_SUFFIXES) and os.path.isfile(spec)

    def read(self, spec: str, options: SourceOptions) -> Records:
        """All objects, as text.

        Raises:
            InputError: unreadable, empty, a line that is no object or no valid JSON.
        """
        file = TextFile(spec, options.encoding)
        parser = _Parser(file.name)
        tables, lines = [], []
        chunk: list[dict[str, Any]] = []
        for number, line in enumerate(file.stream(), 1):
            if line.strip():
                chunk.append(parser.object(line, number))
                lines.append(number)
            if len(chunk) == _CHUNK:
                tables.append(parser.table(chunk))
                chunk = []
        if chunk:
            tables.append(parser.table(chunk))
        if not tables:
            raise InputError(f"{file.name} is empty")
        notes = []
        if parser.surrogates:
            notes.append(
                f"{file.name}: {parser.surrogates} values held half a surrogate pair, replaced by"
                " U+FFFD"
            )
        return Records(
            where=file.name,
            folder=os.path.dirname(os.path.abspath(spec)),
            columns=pa.concat_tables(tables, promote_options="default"),
            lines=np.array(lines, np.int64),
            description="JSON lines",
            notes=notes,
            warnings=[file.warning] if file.warning else [],
        )


class _Parser:
    """Lines to objects, objects to columns of text."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.surrogates = 0
        self._decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)

    def object(self, line: str, number: int) -> dict[str, Any]:
        """The object on a line."""
        try:
            value = self._decoder.decode(line.strip())
        except (ValueError, RecursionError) as error:
            if number == 1 and line.lstrip().startswith("["):
                raise self._array(number) from None
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise InputError(
                f"{self.where}:{number} is not valid JSON: {reason}; correct this line"
            ) from None
        if isinstance(value, dict):
            if not value:
                raise InputError(f"{self.where}:{number} is an empty object; remove the line")
            return value
        if isinstance(value, list):
            raise self._array(number)
        raise InputError(
            f"{self.where}:{number} is {line.strip()[:40]}, not an object like"
            ' {"id": ..., "img": ..., "text": ...}'
        )

    def _array(self, number: int) -> InputError:
        return InputError(
            f"{self.where}:{number} begins a JSON array; write one object a line, without [ and ,"
        )

    def table(self, objects: list[dict[str, Any]]) -> pa.Table:
        """Columns of text in the order in which keys first appear."""
        names = dict.fromkeys(name for one in objects for name in one)
        return pa.table(
            {
                self._clean(name): pa.array(
                    [self._cell(one.get(name)) for one in objects], pa.string()
                )
                for name in names
            }
        )

    def _cell(self, value: Any) -> str | None:
        if isinstance(value, str):
            return self._clean(value)
        if value is None:
            return None
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, list | dict):
            return self._clean(json.dumps(value, ensure_ascii=False))
        return str(value)

    def _clean(self, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            self.surrogates += 1
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} is there twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
