"""Charts as inline SVG: lines on two axes. Colours and strokes are the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmc.heads.report.markup import esc

Point = tuple[float, float]
WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 44


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart; lines differ in colour and in dashes."""

    name: str
    points: Sequence[Point]
    dots: bool = False


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_title: str,
    y_title: str,
    x_range: Point | None = None,
    y_range: Point | None = None,
    diagonal: bool = False,
    dividers: Sequence[float] = (),
) -> str:
    """A figure with a legend.

    Args:
        x_range, y_range: ends of the axes; None: those of the points.
        diagonal: draw y = x, thin.
        dividers: places on the x axis of thin vertical lines.
    """
    points = [point for line in lines for point in line.points]
    x_low, x_high = x_range or _span([x for x, _ in points])
    y_low, y_high = y_range or _span([y for _, y in points])

    def place(point: Point) -> str:
        x = LEFT + (point[0] - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (point[1] - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for value in _ticks(y_low, y_high):
        left, right = place((x_low, value)), place((x_high, value))
        x, y = left.split(",")
        parts.append(f'<path class="grid" d="M{left}L{right}"/>')
        parts.append(
            f'<text class="end" x="{float(x) - 6:.1f}" y="{float(y) + 4:.1f}">{value:g}</text>'
        )
    for value in _ticks(x_low, x_high):
        x, y = place((value, y_low)).split(",")
        parts.append(f'<text class="mid" x="{x}" y="{float(y) + 16:.1f}">{value:g}</text>')
    for value in dividers:
        parts.append(f'<path class="thin" d="M{place((value, y_low))}L{place((value, y_high))}"/>')
    if diagonal:
        parts.append(f'<path class="thin" d="M{place((x_low, y_low))}L{place((x_high, y_high))}"/>')
    for number, line in enumerate(lines):
        kind = f"s{number % 6}"
        drawn = " ".join(place(point) for point in line.points)
        if len(line.points) > 1:
            parts.append(f'<polyline class="line {kind}" points="{drawn}"/>')
        if line.dots or len(line.points) == 1:
            for at in drawn.split():
                x, y = at.split(",")
                parts.append(f'<circle class="dot {kind}" cx="{x}" cy="{y}" r="3"/>')
    parts.append(
        f'<text class="mid" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}">{esc(x_title)}</text>'
        f'<text class="mid" transform="translate(13 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">'
        f"{esc(y_title)}</text>"
    )
    named = "".join(
        f'<li><svg class="key" viewBox="0 0 28 8" aria-hidden="true">'
        f'<path class="line s{number % 6}" d="M0 4H28"/></svg>{esc(line.name)}</li>'
        for number, line in enumerate(lines)
    )
    return (
        f'<figure class="chart"><figcaption>{esc(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(title)}">'
        f'{"".join(parts)}</svg><ul class="legend">{named}</ul></figure>'
    )


def unit_chart(title: str, points: Sequence[Point], *, base: float, mark: Point | None) -> str:
    """A small square chart on [0, 1] x [0, 1], without numbers.

    Args:
        base: height of a thin horizontal line.
        mark: a point to show.
    """

    def place(point: Point) -> str:
        return f"{4 + 112 * point[0]:.1f},{116 - 112 * point[1]:.1f}"

    curve = " ".join(place(point) for point in points)
    dot = ""
    if mark is not None:
        x, y = place(mark).split(",")
        dot = f'<circle class="dot s1" cx="{x}" cy="{y}" r="4"/>'
    return (
        f'<svg viewBox="0 0 120 120" role="img" aria-label="{esc(title)}">'
        '<path class="frame" d="M4 4H116V116H4Z"/>'
        f'<path class="thin" d="M{place((0, base))}L{place((1, base))}"/>'
        f'<polyline class="line s0" points="{curve}"/>{dot}</svg>'
    )


def _span(values: Sequence[float]) -> Point:
    """Ends of an axis that shows the values, never of length 0."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = (high - low) * 0.05 or 0.5
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Up to six round values in [low, high]."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 10) for k in range(first, last + 1)]
