"""Small line and column charts as SVG text; colours come from the page's style sheet.

Only numbers and names from this package's code enter the markup, and names are escaped.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 460, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 30


class Axis(NamedTuple):
    """Range and tick values of an axis."""

    low: float
    high: float
    ticks: tuple[float, ...]


def line_chart(
    series: Mapping[str, Sequence[float | None]], first_x: int = 1, *, percent: bool = False
) -> str:
    """Draw values over whole numbers, one line a series; None leaves a gap.

    Args:
        series: values by name; all have the same length. The i-th line has the class `s{i+1}`.
        first_x: x of the first value.
        percent: values are fractions from 0 to 1 and are labelled in percent.

    Returns:
        An <svg> element, or '' if there is no value at all.
    """
    values = [v for line in series.values() for v in line if v is not None and math.isfinite(v)]
    if not values:
        return ""
    axis = nice_axis(min(values), max(values), share=percent)
    count = max(len(line) for line in series.values())
    parts = [*_y_grid(axis, percent), *_x_labels(first_x, count)]
    for number, (name, line) in enumerate(series.items(), start=1):
        points = [
            (_x(i, count), _y(v, axis)) if v is not None and math.isfinite(v) else None
            for i, v in enumerate(line)
        ]
        parts.append(f'<g class="s{number}"><title>{escape(name)}</title>{_path(points)}</g>')
    return _svg(parts, ", ".join(series))


def column_chart(values: Sequence[float], mark: float, name: str) -> str:
    """Draw one thin column a value, in the given order, with a dashed line at `mark`."""
    axis = nice_axis(0, max([*values, mark]))
    parts = _y_grid(axis, percent=False)
    step = (WIDTH - _LEFT - _RIGHT) / len(values)
    floor = _y(axis.low, axis)
    for i, value in enumerate(values):
        top = _y(value, axis)
        x, width = _LEFT + i * step, max(step * 0.85, 0.4)
        parts.append(
            f'<rect class="column" x="{x:.2f}" y="{top:.2f}" width="{width:.2f}" '
            f'height="{max(floor - top, 0):.2f}"/>'
        )
    y = _y(mark, axis)
    parts.append(
        f'<line class="mark" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    )
    return _svg(parts, name)


def nice_axis(low: float, high: float, *, share: bool = False) -> Axis:
    """Return an axis with four to seven round ticks that covers low..high.

    Args:
        low: smallest value.
        high: largest value.
        share: values are fractions: the axis stays within 0 to 1.
    """
    if high - low < 1e-9 * max(abs(high), 1.0):
        margin = 0.05 if share else max(abs(high) * 0.1, 0.5)
        low, high = low - margin, high + margin
    if 0 < low < high / 2:
        low = 0.0  # a small quantity is read against nothing, not against its own minimum
    if share:
        low, high = max(low, 0.0), min(high, 1.0)
    raw = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(i * step for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def _x(index: int, count: int) -> float:
    inner = WIDTH - _LEFT - _RIGHT - 16
    return _LEFT + 8 + (inner / 2 if count == 1 else inner * index / (count - 1))


def _y(value: float, axis: Axis) -> float:
    share = (value - axis.low) / (axis.high - axis.low)
    return _TOP + (HEIGHT - _TOP - _BOTTOM) * (1 - share)


def _y_grid(axis: Axis, percent: bool) -> list[str]:
    parts = []
    for tick in axis.ticks:
        y = _y(tick, axis)
        text = f"{100 * tick:.4g} %" if percent else f"{tick:.6g}"
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>'
        )
    return parts


def _x_labels(first: int, count: int) -> list[str]:
    step = max(1, math.ceil(count / 10))
    return [
        f'<text class="tick" x="{_x(i, count):.1f}" y="{HEIGHT - 10}" text-anchor="middle">'
        f"{first + i}</text>"
        for i in range(0, count, step)
    ]


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """Return connected runs of points as one path, and dots where there is room for them."""
    commands, down = [], False
    for point in points:
        if point is not None:
            commands.append(f"{'L' if down else 'M'}{point[0]:.1f} {point[1]:.1f}")
        down = point is not None
    present = [point for point in points if point is not None]
    dots = present if len(points) <= 30 else []
    circles = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in dots)
    return f'<path d="{" ".join(commands)}"/>{circles}'


def _svg(parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
