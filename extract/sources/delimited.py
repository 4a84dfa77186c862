"""Delimited text: CSV, TSV and the like, well-formed or broken.

A file is read strictly first. Python's `csv` and pandas accept text after a closing quote and cut
fields there without a word, so strict means: an error at the first such quote, at an open quote at
the end, and at any row whose number of fields is not the header's. What fails goes to
`recovery.recover`, which repairs each record or names the line. Files like that break texts at the
end of a line and double spaces besides, so there every run of white space in a cell becomes one
space; a well-formed file keeps its texts exactly.

Two other ways of writing are taken as what they are, and said aloud: a backslash before each quote
in a text (Spark, MySQL), where every row is well-formed then; and a space after each delimiter,
where the header has one after each of its own.

Values are kept as written: no cell becomes a number or a missing value. Rows without any content
are skipped, columns without a name dropped.
"""

import csv
import gzip
import io
import os
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mmc.extract.sources.base import Records, SourceOptions
from mmc.extract.sources.encoding import TextFile
from mmc.extract.sources.recovery import MalformedError, recover, shape, width_problem
from mmc.store.errors import InputError

_SUFFIXES = (".csv", ".tsv", ".tab", ".psv", ".txt")
_DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}
_CHUNK = 1 << 16
_HEAD = 1 << 16
_limit = threading.Lock()


class Delimited:
    """Format `csv`."""

    def recognises(self, spec: str) -> bool:
        """By suffix; a .txt file must have a delimiter in its first line."""
        name = spec.lower().removesuffix(".gz")
        if not name.endswith(_SUFFIXES) or not os.path.isfile(spec):
            return False
        return not name.endswith(".txt") or _has_delimiter(spec)

    def read(self, spec: str, options: SourceOptions) -> Records:
        """All records, as text.

        Raises:
            InputError: unreadable, empty, no header, a column named twice, a row that no repair
                makes sense of.
        """
        file = TextFile(spec, options.encoding)
        first = _first_line(file)
        delimiter = _delimiter(first, spec)
        notes: list[str] = []
        warnings = [file.warning] if file.warning else []
        with _long_fields():
            spaced = _is_spaced(first, delimiter)
            names, keep = _header(first, delimiter, spaced, file.name, notes)
            form = _Form(file.name, delimiter, spaced, len(names))
            try:
                chunks, lines = _strict(file.stream(), form, warnings)
            except MalformedError as error:
                chunks, lines = _otherwise(file, form, warnings, error)
        if not lines:
            raise InputError(f"{file.name} has a header and no rows")
        arrays = [pa.chunked_array([chunk[at] for chunk in chunks], pa.string()) for at in keep]
        return Records(
            where=file.name,
            folder=os.path.dirname(os.path.abspath(spec)),
            columns=pa.table(arrays, names=[names[at] for at in keep]),
            lines=np.array(lines, np.int64),
            description="CSV" if delimiter == "," else f"{_DELIMITERS[delimiter]} separated",
            notes=notes,
            warnings=warnings,
        )


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let fields be longer than the 128 KiB of the csv module's process-wide default."""
    with _limit:
        before = csv.field_size_limit(sys.maxsize)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _has_delimiter(path: str) -> bool:
    """Whether the first line holds a delimiter, in any encoding that keeps ASCII apart."""
    try:
        with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
            line = file.read(_HEAD).lstrip().partition(b"\n")[0]
    except (OSError, EOFError, zlib.error):
        return False
    return any(delimiter.encode() in line for delimiter in _DELIMITERS)


def _first_line(file: TextFile) -> str:
    for line in file.stream():
        if line.strip():
            return line.rstrip("\r\n")
    raise InputError(f"{file.name} is empty")


def _delimiter(header: str, path: str) -> str:
    """The delimiter that the header holds most of; a .tsv's is the tab when it holds one."""
    if path.lower().removesuffix(".gz").endswith((".tsv", ".tab")) and "\t" in header:
        return "\t"
    return max(_DELIMITERS, key=header.count)


@dataclass(frozen=True)
class _Form:
    """How a file is written."""

    where: str
    delimiter: str
    spaced: bool
    """A space follows each delimiter."""
    width: int

    def reader(self, stream: Iterable[str]) -> Any:
        """A strict reader of its rows."""
        return csv.reader(
            stream, delimiter=self.delimiter, skipinitialspace=self.spaced, strict=True
        )


def _is_spaced(header: str, delimiter: str) -> bool:
    """Whether a space follows each delimiter of the header: then it is no part of the values."""
    cells = next(csv.reader([header], delimiter=delimiter))
    return len(cells) > 1 and all(cell.startswith(" ") for cell in cells[1:])


def _header(
    line: str, delimiter: str, spaced: bool, where: str, notes: list[str]
) -> tuple[list[str], list[int]]:
    """All header names and the places of the columns to keep."""
    try:
        reader = csv.reader([line], delimiter=delimiter, skipinitialspace=spaced, strict=True)
        names = [name.strip() for name in next(reader)]
    except csv.Error as error:
        raise InputError(f"{where}:1: cannot read the header line: {error}") from None
    named = [name for name in names if name]
    if not named:
        raise InputError(f"{where}:1: the header line has no names")
    twice = [name for name in named if named.count(name) > 1]
    if twice:
        raise InputError(f"{where}:1: two columns are named {twice[0]!r}; rename one")
    if delimiter != ",":
        notes.append(f"{where}: columns are separated by {_DELIMITERS[delimiter]}")
    if spaced:
        notes.append(f"{where}: the space after each delimiter is no part of the values")
    if len(named) < len(names):
        notes.append(f"{where}: columns without a name left out: {len(names) - len(named)}")
    return names, [at for at, name in enumerate(names) if name]


def _strict(
    stream: Iterable[str], form: _Form, warnings: list[str]
) -> tuple[list[list[pa.Array]], list[int]]:
    """The columns in chunks and the line of each row.

    Raises:
        MalformedError: a quote out of place, a row of another width.
    """
    reader = form.reader(stream)
    chunks: list[list[pa.Array]] = []
    rows: list[list[str]] = []
    lines: list[int] = []
    next(row for row in reader if len(row) > 1 or "".join(row).strip())  # the header
    start = reader.line_num + 1
    try:
        for row in reader:
            if len(row) != form.width:
                if any(cell.strip() for cell in row):
                    raise MalformedError(start, width_problem(len(row), form.width))
            elif any(row):
                rows.append(row)
                lines.append(start)
                if reader.line_num > start and _holds_record(row, form.delimiter):
                    warnings.append(
                        f"{form.where}:{start} holds, inside quotes, a line that looks like a"
                        " record; is a quote missing?"
                    )
                if len(rows) == _CHUNK:
                    chunks.append(_columns(rows))
                    rows = []
            start = reader.line_num + 1
    except csv.Error as error:
        raise MalformedError(start, f"cannot be read: {error}; correct this line") from None
    if rows:
        chunks.append(_columns(rows))
    return chunks, lines


def _holds_record(row: list[str], delimiter: str) -> bool:
    """Whether a cell goes on in lines built like this very row: a sign of a forgotten quote."""
    first = shape(row[0])
    return any(
        line.count(delimiter) == len(row) - 1 and shape(line.partition(delimiter)[0]) == first
        for cell in row
        for line in cell.splitlines()[1:]
    )


def _columns(rows: list[list[str]]) -> list[pa.Array]:
    return [pa.array(cells, pa.string()) for cells in zip(*rows, strict=True)]


def _otherwise(
    file: TextFile, form: _Form, warnings: list[str], error: MalformedError
) -> tuple[list[list[pa.Array]], list[int]]:
    """The same as :func:`_strict` for a file that is not well-formed.

    Raises:
        InputError: no other way of reading it makes sense of all rows.
    """
    text = file.text()
    if '\\"' in text:
        said: list[str] = []
        try:
            found = _strict(io.StringIO(text.replace('\\"', '""'), newline=""), form, said)
        except MalformedError:
            pass
        else:
            warnings += [
                *said,
                f'{file.name}: quotes inside texts are written \\", first in the record of line'
                f" {error.line}: read as quotes",
            ]
            return found
    try:
        if '"' not in text:
            raise error
        rows, lines, repaired = recover(text, form.delimiter, form.width)
        if not repaired:  # a fault that is none of quotes, such as a lone CR
            raise error
    except MalformedError as problem:
        raise InputError(f"{file.name}:{problem.line} {problem}") from None
    rows = [[" ".join(cell.split()) for cell in row] for row in rows]
    warnings.append(
        f"{file.name}: {len(repaired)} of {len(rows)} records were malformed (quotes inside a text"
        f" not doubled, texts broken over lines) and repaired, first at line {repaired[0]}; runs of"
        " white space became one space"
    )
    return [_columns(rows[at : at + _CHUNK]) for at in range(0, len(rows), _CHUNK)], lines
