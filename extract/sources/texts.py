"""The text of each sample: a column, or a template over several."""

import string
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmc.extract.sources import columns
from mmc.extract.sources.base import Part, SourceOptions
from mmc.extract.sources.columns import Roles
from mmc.store.errors import InputError


def blank_to_null(cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """``cells`` with null for those of white space alone."""
    blank = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(cells)), 0)
    return pc.if_else(blank, pa.scalar(None, pa.string()), cells)


def text_of(part: Part, roles: Roles, options: SourceOptions) -> pa.ChunkedArray:
    """(N,) string; null = no text.

    Raises:
        InputError: a template that cannot be read or names a column that is not there.
    """
    if options.text_template is None:
        return blank_to_null(part.column(roles.text))
    pieces: list[Any] = []
    cells = []
    for literal, name in _template(options.text_template):
        pieces.append(pa.scalar(literal))
        if name is not None:
            # To the letter: in a table with `caption` beside `text`, `{Caption}` is a mistake.
            if name not in part.records.columns.column_names:
                raise columns.missing_column(
                    part.records.where, name, part.records.columns.column_names, "text_template"
                )
            cells.append(part.column(name))
            pieces.append(cells[-1])
    joined = pc.binary_join_element_wise(
        *pieces, pa.scalar(""), null_handling="replace", null_replacement=""
    )
    # A text made of the template's own words alone is none.
    something = [pc.is_valid(blank_to_null(cell)) for cell in cells]
    filled = something[0]
    for more in something[1:]:
        filled = pc.or_(filled, more)
    return pc.if_else(filled, joined, pa.scalar(None, pa.string()))


def _template(template: str) -> list[tuple[str, str | None]]:
    """(literal text, column name after it or None) pieces of a text template."""
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"cannot read the text template {template!r}: {error}") from None
    fields = [name for _, name, _, _ in pieces if name is not None]
    if not all(fields) or any(spec or conversion for _, _, spec, conversion in pieces):
        raise InputError(
            f"text template {template!r}: write columns as {{name}}, without `:` or `!`"
        )
    if not fields:
        raise InputError(f"text template {template!r} names no column; write them as {{name}}")
    return [(literal, name) for literal, name, _, _ in pieces]
