"""Charts of a latency report as SVG text; their colours come from the page's style sheet."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from microclip_deploy.errors import printable

WIDTH, HEIGHT = 720, 340
COLOURS = 6
"""Classes s1 to s6; lines after the sixth repeat them, dashed."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 28, 44
_MOST_TICKS = 9
_BAR_LEFT, _BAR_WIDTH, _BAR_STEP = 100, 380, 24


class Point(NamedTuple):
    """A measurement; both coordinates are above 0."""

    x: float
    y: float
    label: str


class Bar(NamedTuple):
    """One bar; `floor` is marked on it, in the unit of `value`."""

    name: str
    value: float
    floor: float | None
    label: str


def curve_chart(
    lines: Mapping[str, Sequence[Point]],
    *,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float] = (),
) -> str:
    """Draw lines over two logarithmic axes; points are joined in the given order.

    Args:
        lines: name -> line; the i-th has the class `s{i+1}`, see `legend`.
        x_label: below the x axis.
        y_label: above the y axis.
        x_ticks: round values are used where there are none.

    Returns:
        An <svg> element, or '' if there is no point at all.
    """
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    x_marks = tuple(x_ticks) or log_ticks([point.x for point in points])
    y_marks = log_ticks([point.y for point in points])
    parts = [_text(_LEFT, 14, y_label, "start"), _text(_LEFT, HEIGHT - 8, x_label, "start")]
    for mark in y_marks:
        y = _y(mark, y_marks)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{mark:g}", "end"))
    parts += [
        _text(_x(mark, x_marks), HEIGHT - _BOTTOM + 18, f"{mark:g}", "middle") for mark in x_marks
    ]
    for number, (name, line) in enumerate(lines.items()):
        places = [(_x(point.x, x_marks), _y(point.y, y_marks), point.label) for point in line]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in places)
        dots = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{_safe(label)}</title></circle>'
            for x, y, label in places
        )
        drawn = f'<path d="{path}"/>{dots}' if places else ""
        parts.append(f'<g class="{_style(number)}"><title>{_safe(name)}</title>{drawn}</g>')
    return _svg(parts, f"{y_label} over {x_label}: {', '.join(lines)}", HEIGHT)


def bar_chart(bars: Sequence[Bar], name: str) -> str:
    """Draw horizontal bars on one linear scale, with a line where a bar's floor is.

    Returns:
        An <svg> element, or '' if there is no bar.
    """
    if not bars:
        return ""
    most = max(max(bar.value, bar.floor or 0.0) for bar in bars) or 1.0
    parts = []
    for number, bar in enumerate(bars):
        y = 4 + _BAR_STEP * number
        end = _BAR_LEFT + _BAR_WIDTH * bar.value / most
        parts.append(_text(_BAR_LEFT - 8, y + 13, bar.name, "end"))
        parts.append(
            f'<rect class="column" x="{_BAR_LEFT}" y="{y}" width="{end - _BAR_LEFT:.1f}" '
            f'height="{_BAR_STEP - 6}"><title>{_safe(bar.label)}</title></rect>'
        )
        if bar.floor is not None:
            x = _BAR_LEFT + _BAR_WIDTH * bar.floor / most
            parts.append(f'<path class="mark" d="M{x:.1f} {y - 2}v{_BAR_STEP - 2}"/>')
            end = max(end, x)
        parts.append(_text(end + 8, y + 13, bar.label, "start"))
    return _svg(parts, name, 4 + _BAR_STEP * len(bars))


def legend(names: Sequence[str]) -> str:
    """Return the names of lines as an HTML list, in the colours of `curve_chart`."""
    items = [f'<li class="{_style(i)}">{_safe(name)}</li>' for i, name in enumerate(names)]
    return f'<ul class="legend">{"".join(items)}</ul>'


def log_ticks(values: Sequence[float]) -> tuple[float, ...]:
    """Return two or more round numbers that enclose the values: 1, 2 and 5, or powers of ten.

    Args:
        values: all above 0.
    """
    low, high = min(values), max(values)
    for steps in ((1, 2, 5), (1,)):
        decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        marks = [step * 10.0**decade for decade in decades for step in steps]
        first = max(i for i, mark in enumerate(marks) if mark <= low)
        last = max(next(i for i, mark in enumerate(marks) if mark >= high), first + 1)
        ticks = tuple(marks[first : last + 1])
        if len(ticks) <= _MOST_TICKS:
            break
    return ticks


def _x(value: float, ticks: Sequence[float]) -> float:
    return _place(value, ticks, _LEFT + 12, WIDTH - _RIGHT - 12)


def _y(value: float, ticks: Sequence[float]) -> float:
    return _place(value, ticks, HEIGHT - _BOTTOM, _TOP)


def _place(value: float, ticks: Sequence[float], start: float, end: float) -> float:
    """Return the pixel of a value; a single tick stands in the middle."""
    low, high = math.log10(ticks[0]), math.log10(ticks[-1])
    share = 0.5 if low == high else (math.log10(value) - low) / (high - low)
    return start + share * (end - start)


def _style(number: int) -> str:
    return f"s{number % COLOURS + 1}" + (" dashed" if number >= COLOURS else "")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_safe(text)}</text>'


def _safe(text: str) -> str:
    return escape(printable(text))


def _svg(parts: Sequence[str], label: str, height: int) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{_safe(label)}">'
        f"{''.join(parts)}</svg>"
    )
