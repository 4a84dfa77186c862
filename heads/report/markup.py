"""Pieces of HTML. Whatever comes from data goes through `esc`; functions here return markup."""

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any


def esc(value: Any) -> str:
    """Text that is safe between tags and in quoted attributes; control characters become spaces."""
    text = "".join(c if c >= " " or c in "\n\t" else " " for c in str(value))
    return html.escape(text.encode("utf-8", "backslashreplace").decode(), quote=True)


def number(value: Any, digits: int = 3) -> str:
    """A figure for a reader: "0.941", "1,024", "–" where it is not defined."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else f"{value:,}"


def section(key: str, title: str, *parts: str) -> str:
    """A section with a heading that can be jumped to."""
    body = "\n".join(part for part in parts if part)
    return (
        f'<section id="{key}" aria-labelledby="{key}-h"><h2 id="{key}-h">{esc(title)}</h2>\n'
        f"{body}\n</section>"
    )


def paragraph(text: str, css: str = "") -> str:
    """Plain text as a paragraph."""
    kind = f' class="{css}"' if css else ""
    return f"<p{kind}>{esc(text)}</p>"


def folded(summary: str, *parts: str, printed: bool = True) -> str:
    """What is shown when the reader asks for it, and on paper if ``printed``."""
    kind = "" if printed else ' class="screen"'
    return f"<details{kind}><summary>{esc(summary)}</summary>\n{''.join(parts)}</details>"


def cell(value: Any, *, digits: int = 3, bar: bool = False) -> str:
    """A number as a table cell that sorts by its full value; ``bar`` draws it, a share of 1."""
    known = value is not None and not (isinstance(value, float) and math.isnan(value))
    data = f' data-v="{value:.6g}"' if known else ' data-v=""'
    drawn = f' class="num bar" style="--v:{float(value):.3f}"' if bar and known else ' class="num"'
    return f"<td{data}{drawn}>{number(value, digits)}</td>"


def row_head(content: str) -> str:
    """The first cell of a row; ``content`` is markup."""
    return f'<th scope="row">{content}</th>'


def table(
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    sortable: bool = False,
    css: str = "",
) -> str:
    """A table in a box that scrolls sideways where the screen is narrow.

    Args:
        header: titles of the columns, plain text.
        rows: cells as markup (`cell`, `row_head`).
        sortable: titles are buttons; the page's script sorts.
    """
    if sortable:
        titles = "".join(
            f'<th scope="col" aria-sort="none"><button type="button">{esc(name)}'
            '<span class="arrow" aria-hidden="true"></span></button></th>'
            for name in header
        )
    else:
        titles = "".join(f'<th scope="col">{esc(name)}</th>' for name in header)
    body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    kind = " ".join(filter(None, (css, "sortable" if sortable else "")))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(caption)}">'
        f'<table class="{kind}"><caption>{esc(caption)}</caption>'
        f"<thead><tr>{titles}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def text_cell(value: Any) -> str:
    """Text as a table cell."""
    return f"<td>{esc(value)}</td>"
