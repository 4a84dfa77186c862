"""Reading delimited text whose writer did not double the quotes inside quoted fields.

Such a file still says where records begin: on a line whose leading columns look like those of the
other records. Everything from there to the next such line is one record. One column, the *loose*
one, holds the text with the quotes; the columns before it and after it are well-formed, so the
loose field is what lies between them, without its outer quotes.

A record that is well-formed by itself is read as such. Nothing is merged, cut or dropped on a
guess: a line that may begin a record or continue a text is an error.
"""

import csv
import io
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

_SUFFIX = re.compile(r"\.[A-Za-z]\w{1,4}$")
_SUPPORT = 0.02
"""A shape of leading columns counts when so many records begin with it (and at least 3 do)."""


Shape = tuple[str, frozenset[str]]
"""Of a cell: its file suffix, and the kinds of characters of the rest."""


class MalformedError(Exception):
    """A row cannot be read; ``line`` is where it starts, from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def recover(text: str, delimiter: str, width: int) -> tuple[list[list[str]], list[int], list[int]]:
    """Read ``text``, header line included.

    Args:
        width: number of columns.

    Returns:
        rows as written (line breaks in texts kept), the line that each starts on, and the lines of
        those that were repaired: not well-formed, or with a line break in the text.

    Raises:
        MalformedError: a row that cannot be recovered.
    """
    newline = "\n" if "\n" in text else "\r"
    lines = text.split(newline)
    header = next(at for at, line in enumerate(lines) if line.strip())
    problem = None
    for loose in _loose_columns(lines[header + 1 :], delimiter, width):
        try:
            return _read(
                lines, header + 1, newline, _Grammar(lines[header + 1 :], loose, delimiter, width)
            )
        except MalformedError as error:
            problem = max(problem or error, error, key=lambda one: one.line)
    assert problem is not None
    raise problem


def _read(
    lines: list[str], first: int, newline: str, grammar: "_Grammar"
) -> tuple[list[list[str]], list[int], list[int]]:
    """What :func:`recover` returns, once it is known which column is loose."""
    records = _records(lines, first, grammar)
    parsed = [_parse(record, newline, grammar) for record in records]
    # A writer that left one inner quote alone doubles none: then `","` in a text is no new field.
    undoubled = any(one.broken for one in parsed)
    rows, repaired = [], []
    for record, one in zip(records, parsed, strict=True):
        row = one.row
        if row is None:
            row = one.loose_row if undoubled or one.broken else None
            if row is None:
                raise MalformedError(record.line, one.problem)
        if one.row is None or record.closed_at > 1:
            repaired.append(record.line)
        rows.append(row)
    return rows, [record.line for record in records], repaired


def width_problem(fields: int, width: int) -> str:
    """What to say of a row with the wrong number of fields."""
    more = "put quotes around a text with delimiters in it" if fields > width else "fill it up"
    return f"has {fields} fields and the header has {width}; {more}"


def shape(cell: str) -> Shape:
    """What a cell looks like."""
    suffix = _SUFFIX.search(cell)
    stem = cell[: suffix.start()] if suffix else cell
    return (suffix.group().lower() if suffix else ""), frozenset(map(_kind, set(stem)))


@lru_cache(maxsize=1024)
def _kind(char: str) -> str:
    return "9" if char.isdigit() else "a" if char.isalpha() else " " if char.isspace() else char


@dataclass
class _Record:
    line: int
    pieces: list[str]
    quoted: bool
    """Its loose field begins with a quote."""
    closed_at: int = 0
    """Number of pieces up to the last that may end the record; 0 = none so far."""
    closed: bool = False
    """Whether the record may end here; blank lines after its end do not matter."""

    def add(self, line: str, ends: bool) -> None:
        """Take a line in; ``ends``: the record may end with it."""
        self.pieces.append(line)
        if ends:
            self.closed_at = len(self.pieces)
        self.closed = ends or (self.closed and not line.strip())


@dataclass(frozen=True)
class _Parsed:
    row: list[str] | None
    """The fields of a well-formed record."""
    broken: bool = False
    """Not well-formed for its quotes, not just for its number of fields."""
    loose_row: list[str] | None = None
    """The fields with everything between the outer columns as the loose one."""
    problem: str = ""


@dataclass
class _Known:
    """The shapes that one leading column takes where records begin."""

    suffixes: set[str] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)

    def add(self, shape: Shape) -> None:
        self.suffixes.add(shape[0])
        self.kinds |= shape[1]

    def fits(self, shape: Shape) -> bool:
        return shape[0] in self.suffixes and shape[1] <= self.kinds


def _cell(delimiter: str) -> str:
    """Pattern of a well-formed cell on one line."""
    return rf'(?:"[^"]*(?:""[^"]*)*"|[^"{re.escape(delimiter)}\r\n]*)'


def _loose_columns(lines: list[str], delimiter: str, width: int) -> list[int]:
    """Columns that may be the loose one: where most quotes go wrong first; at last the last."""
    cells = re.compile(rf"(?:{_cell(delimiter)}{re.escape(delimiter)})*")
    votes: Counter[int] = Counter()
    for line in lines:
        match = cells.match(line)
        assert match is not None
        if line[match.end() : match.end() + 1] == '"' and _strict(line, delimiter) is None:
            cells_before = next(csv.reader([match.group()], delimiter=delimiter)) or [""]
            votes[min(len(cells_before), width) - 1] += 1
    ranked = sorted(votes, key=lambda at: (votes[at], at), reverse=True)
    return list(dict.fromkeys([*ranked, width - 1]))


def _strict(text: str, delimiter: str) -> list[str] | None:
    """The cells of one record that is well-formed in its quotes; else None."""
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None


class _Grammar:
    """How records of this file begin and end."""

    def __init__(self, lines: list[str], loose: int, delimiter: str, width: int) -> None:
        self.delimiter = delimiter
        self.width = width
        self.loose = loose
        cell, d = _cell(delimiter), re.escape(delimiter)
        blank = " " if delimiter == "\t" else r"[ \t]"
        after = rf"((?:{d}{cell}){{{width - 1 - loose}}}){blank}*\r?\Z"
        self.before = re.compile(rf"(?:{cell}{d}){{{loose}}}")
        self.end = re.compile(rf'"{after}')
        self.quoted = re.compile(rf'"(.*)"{after}', re.DOTALL)
        self._known = [_Known() for _ in range(loose)]
        self._learn(lines)

    def _learn(self, lines: list[str]) -> None:
        """Take the shapes of leading columns on lines that follow the end of a record.

        The first column must have a shape that is usual here; the others then take what they have
        beside it.
        """
        begins: list[tuple[Shape, ...]] = []
        ended = True
        for line in lines:
            if not line.strip():
                continue
            start = self.start(line)
            if start is not None and ended:
                begins.append(tuple(map(shape, start[0])))
            ended = self.ends(line, start)
        counts = Counter(shapes[0] for shapes in begins)
        enough = max(3, _SUPPORT * len(begins))
        for shapes in begins:
            if counts[shapes[0]] >= enough or shapes[0] == begins[0][0]:
                for known, seen in zip(self._known, shapes, strict=True):
                    known.add(seen)

    def strict(self, text: str) -> list[str] | None:
        """The cells of one record that is well-formed in its quotes; else None."""
        return _strict(text, self.delimiter)

    def start(self, line: str) -> tuple[list[str], str] | None:
        """(leading cells, the rest) of a line that is built like the beginning of a record."""
        match = self.before.match(line)
        if match is None:
            return None
        rest = line[match.end() :].rstrip("\r")
        cells = next(csv.reader([match.group()], delimiter=self.delimiter), [""])[:-1]
        if not cells or not cells[0].strip():
            return None
        if not rest.startswith('"'):
            fields = self.strict(rest) if rest else [""]
            if fields is None or len(fields) != self.width - self.loose:
                return None
        return cells, rest

    def fits(self, cells: list[str]) -> bool:
        """Whether leading cells look like those of the other records."""
        return all(known.fits(shape(cell)) for known, cell in zip(self._known, cells, strict=True))

    def ends(self, line: str, start: tuple[list[str], str] | None) -> bool:
        """Whether a record may end with this line, which begins one when ``start`` is given."""
        if start is None:
            return self.end.search(line) is not None
        rest = start[1]
        return not rest.startswith('"') or self.end.search(rest, 1) is not None


def _records(lines: list[str], first: int, grammar: _Grammar) -> list[_Record]:
    """Group the lines into records."""
    if grammar.loose == 0:
        raise MalformedError(
            first + 1,
            "or a later line has quotes inside a quoted text of the first column, so nothing tells"
            " where records begin; double the inner quotes",
        )
    records: list[_Record] = []
    for number, line in enumerate(lines[first:], first + 1):
        current = records[-1] if records else None
        start = grammar.start(line)
        if start is not None and _begins(current, start[0], number, grammar):
            current = _Record(number, [], quoted=start[1].startswith('"'))
            records.append(current)
        elif current is None or (current.closed and not current.quoted):
            if not line.strip():
                continue
            raise MalformedError(number, _width_problem(line, grammar))
        else:
            start = None
        current.add(line, grammar.ends(line, start))
    if records:
        _require_closed(records[-1])
    return records


def _begins(current: _Record | None, cells: list[str], number: int, grammar: _Grammar) -> bool:
    """Whether a line built like a beginning is one."""
    if current is None or (current.closed and not current.quoted):
        return True  # nothing is open that this line could continue
    if grammar.fits(cells):
        _require_closed(current)
        return True
    if current.closed:
        raise MalformedError(
            number,
            f"may begin a record or continue the text of line {current.line}: its first columns do"
            " not look like the other records'; double the quotes inside the text",
        )
    return False


def _require_closed(record: _Record) -> None:
    if not record.closed:
        raise MalformedError(
            record.line, "opens a quote that is not closed before the next record begins; close it"
        )


def _width_problem(text: str, grammar: _Grammar) -> str:
    fields = grammar.strict(text)
    if fields is None:
        return "cannot be read; a quote is out of place: double the quotes inside a text"
    return width_problem(len(fields), grammar.width)


def _parse(record: _Record, newline: str, grammar: _Grammar) -> _Parsed:
    text = newline.join(record.pieces[: record.closed_at]).rstrip("\r")
    fields = grammar.strict(text)
    if fields is not None and len(fields) == grammar.width:
        return _Parsed(fields)
    before = grammar.before.match(text)
    assert before is not None
    match = grammar.quoted.fullmatch(text, before.end())
    loose_row = None
    if match is not None:
        leading = next(csv.reader([before.group()], delimiter=grammar.delimiter))[:-1]
        trailing = next(csv.reader([match.group(2)], delimiter=grammar.delimiter), [""])[1:]
        loose_row = [*leading, match.group(1), *trailing]
    return _Parsed(None, fields is None, loose_row, _width_problem(text, grammar))
