"""A chart with two logarithmic axes as a self-contained SVG file."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 190, 34, 44
_COLOURS = ("#1b6ca8", "#c4501b", "#2e8b57", "#7b3fa0", "#8a6d1d", "#555555")
_DASHES = ("", "6 4", "2 3", "9 3 2 3")

Line = Sequence[tuple[float, float]]
"""Points (x, y), both above 0."""


def log_chart(
    panels: Mapping[str, Mapping[str, Line]], *, title: str, x_label: str, y_label: str
) -> str:
    """Draw lines over logarithmic axes.

    Args:
        panels: group -> name -> line. Lines of a group share a colour, those of a name a dash.
        title: above the chart.
        x_label: below the x axis.
        y_label: above the y axis.

    Returns:
        An SVG document, or '' if there is no point at all.
    """
    points = [p for group in panels.values() for line in group.values() for p in line]
    if not points:
        return ""
    x_ticks = sorted({x for x, _ in points})
    low, high = (math.log10(edge([y for _, y in points])) for edge in (min, max))
    decades = range(math.floor(low), max(math.ceil(high), math.floor(low) + 1) + 1)
    x_range = (math.log10(x_ticks[0]), math.log10(x_ticks[-1]))
    parts = [_text(_LEFT, 16, title, "start", bold=True)]
    parts += [_text(_LEFT, 29, y_label, "start"), _text(_LEFT, HEIGHT - 8, x_label, "start")]
    for decade in decades:
        y = _place(decade, (decades[0], decades[-1]), HEIGHT - _BOTTOM, _TOP)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{10.0**decade:g}", "end"))
    for tick in x_ticks:
        x = _place(math.log10(tick), x_range, _LEFT, WIDTH - _RIGHT)
        parts.append(_text(x, HEIGHT - _BOTTOM + 16, f"{tick:g}", "middle"))
    names = list(dict.fromkeys(name for group in panels.values() for name in group))
    number = 0
    for colour, (group, lines) in zip(_cycle(len(panels)), panels.items(), strict=True):
        for name, line in lines.items():
            style = f'stroke="{colour}" stroke-dasharray="{_DASHES[names.index(name) % 4]}"'
            parts.append(_line(line, x_range, (decades[0], decades[-1]), style))
            y = _TOP + 8 + 15 * number
            left = WIDTH - _RIGHT + 12
            parts.append(f'<path d="M{left} {y}h24" fill="none" stroke-width="2" {style}/>')
            parts.append(_text(left + 30, y + 4, f"{group}, {name}", "start"))
            number += 1
    return _document(parts, title)


def _line(
    line: Line, x_range: tuple[float, float], y_range: tuple[float, float], style: str
) -> str:
    places = [
        (
            _place(math.log10(x), x_range, _LEFT, WIDTH - _RIGHT),
            _place(math.log10(y), y_range, HEIGHT - _BOTTOM, _TOP),
        )
        for x, y in sorted(line)
    ]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places)
    return f'<g fill="none" stroke-width="2" {style}><path d="{path}"/>{dots}</g>'


def _place(value: float, span: tuple[float, float], start: float, end: float) -> float:
    """Return where a value of a span lies between two pixels; a span of one value has a middle."""
    if span[0] == span[1]:
        return (start + end) / 2
    return start + (value - span[0]) / (span[1] - span[0]) * (end - start)


def _cycle(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _text(x: float, y: float, text: str, anchor: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _document(parts: Sequence[str], label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label)}" font-family="sans-serif" font-size="12">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>{"".join(parts)}</svg>\n'
    )
