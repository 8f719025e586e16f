"""Charts of the reports, drawn by matplotlib as SVG that reads well on light and dark pages."""

import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from microclip_deploy.errors import printable, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#3f7fd6", "#d0752b", "#3a9f75", "#9a62c4", "#a58a35", "#c9527a", "#2a9fb5", "#8f6248",
)  # fmt: skip
_DASHES = ("-", "--", ":", "-.")
_GREY = "#7d8794"
_LINE_HEIGHT = 0.2  # of a legend, inches
_LONGEST = 48  # characters of a name beside a matrix
_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text, in the reader's own font
    "svg.hashsalt": "chart",  # the same chart is the same bytes
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _GREY,
    "text.parse_math": False,  # names may hold a dollar sign
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.3,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "legend.frameon": False,
    "savefig.transparent": True,
}

HALF, FULL, NARROW = 5.1, 10.7, 3.4
"""Widths in inches: half a page, all of it, and a phone's, on which it fills its card in its own
size, so that the text is as large as the page's."""

Line = Sequence[tuple[float, float]]
"""Points (x, y)."""


class Drawing(NamedTuple):
    """One chart as SVG documents for wide and narrow screens; '' where there is nothing to draw."""

    wide: str
    narrow: str


def drawing(draw: Callable[..., str], width: float = FULL) -> Drawing:
    """Draw a chart for all screens.

    Args:
        draw: one of the functions below, with all its arguments but `width`.
        width: on a wide screen, inches.
    """
    return Drawing(draw(width=width), draw(width=NARROW))


def epoch_chart(
    series: Mapping[str, Sequence[float | None]], *, percent: bool = False, width: float = HALF
) -> str:
    """Draw values by epoch, one line a series; None leaves a gap.

    Args:
        series: values by name, the first of epoch 1.
        percent: values are fractions from 0 to 1 and are labelled in percent.
        width: inches.

    Returns:
        An SVG document, or '' if there is no value at all.
    """
    if not any(value is not None for line in series.values() for value in line):
        return ""
    with _drawing(width, 2.2 + _LINE_HEIGHT * len(series)) as (figure, axes):
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        for colour, (name, line) in zip(COLOURS, series.items(), strict=False):
            values = [math.nan if value is None else value for value in line]
            epochs = range(1, len(line) + 1)
            axes.plot(epochs, values, color=colour, marker=".", label=printable(name))
        axes.set_xlim(0.5, max(map(len, series.values())) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        figure.legend(loc="outside lower left")
        return _svg(figure)


def column_chart(values: Sequence[float], mark: float, *, width: float = FULL) -> str:
    """Draw one column a value, in the given order, with a dashed line at `mark`; SVG."""
    with _drawing(width, 2) as (figure, axes):
        axes.bar(range(len(values)), values, color=COLOURS[0], width=0.9)
        axes.axhline(mark, color=COLOURS[1], linestyle="--")
        axes.set_xticks([])
        axes.margins(x=0.01)
        return _svg(figure)


def log_chart(
    groups: Mapping[str, Mapping[str, Line]], *, x_label: str, y_label: str, width: float = FULL
) -> str:
    """Draw lines over two logarithmic axes; points are joined in the given order.

    Args:
        groups: group -> name -> line. Lines of a group share a colour, those of a name a dash.
        x_label: below the x axis.
        y_label: above the y axis.
        width: inches.

    Returns:
        An SVG document, or '' if there is no point at all.
    """
    names = list(dict.fromkeys(name for lines in groups.values() for name in lines))
    xs = sorted({x for lines in groups.values() for line in lines.values() for x, _ in line})
    if not xs:
        return ""
    columns = max(1, int(width // NARROW))
    entries = math.ceil(sum(map(len, groups.values())) / columns)
    with _drawing(width, min(0.8 * width, 3.8) + _LINE_HEIGHT * entries) as (figure, axes):
        from matplotlib.ticker import LogLocator

        for number, (group, lines) in enumerate(groups.items()):
            for name, line in lines.items():
                colour = COLOURS[number % len(COLOURS)]
                dash = _DASHES[names.index(name) % len(_DASHES)]
                label = printable(f"{group}, {name}" if name else group)
                axes.plot(*zip(*line, strict=True), dash, color=colour, marker=".", label=label)
        axes.set(xscale="log", yscale="log", xlabel=x_label)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}")
        axes.set_title(y_label, loc="left", fontsize="medium")
        if len(xs) <= 10 and all(b > 1.2 * a for a, b in pairwise(xs)):  # labels have room
            axes.set_xticks(xs, [f"{x:.3g}" for x in xs])
        axes.minorticks_off()
        figure.legend(loc="outside lower left", ncols=columns)
        return _svg(figure)


def bar_chart(bars: Mapping[str, tuple[float, float | None, str]], *, width: float = FULL) -> str:
    """Draw horizontal bars on one linear scale, each below its name.

    Args:
        bars: name -> (length, where a line marks its floor or None, what is written beside it).
        width: inches.

    Returns:
        An SVG document, or '' if there is no bar.
    """
    if not bars:
        return ""
    with _drawing(width, 0.3 + 0.4 * len(bars)) as (figure, axes):
        lengths = [length for length, _, _ in bars.values()]
        axes.barh(range(len(bars)), lengths, height=0.4, color=COLOURS[0])
        for row, (name, (_, floor, told)) in enumerate(bars.items()):
            axes.text(0, row - 0.28, printable(f"{name}: {told}"))
            if floor is not None:
                axes.vlines(floor, row - 0.25, row + 0.25, color=COLOURS[1], linewidth=2)
        axes.set(ylim=(len(bars) - 0.6, -0.8), yticks=[], xticks=[])
        axes.margins(x=0)
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)
        return _svg(figure)


def matrix_chart(names: Sequence[str], shares: Sequence[Sequence[float]]) -> str:
    """Draw a square matrix of fractions from 0 to 1, its first row at the top.

    Args:
        names: of the rows, which are numbered; the columns have their numbers. Long ones are cut.
        shares: rows.

    Returns:
        An SVG document.
    """
    labels = [printable(name) for name in names]
    labels = [f"{label[:_LONGEST]}…" if len(label) > _LONGEST else label for label in labels]
    middles = [index + 0.5 for index in range(len(names))]
    side, beside = 1.2 + 0.22 * len(names), 1.2 + 0.09 * max(map(len, labels))
    with _drawing(side + beside, side + 0.4) as (figure, axes):
        from matplotlib.ticker import PercentFormatter

        drawn = axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1, edgecolors=_GREY, lw=0.3)
        axes.set_xticks(middles, [str(number) for number in range(1, len(names) + 1)])
        axes.set_yticks(middles, [f"{label}  {i}" for i, label in enumerate(labels, start=1)])
        axes.set(xlabel="taken for", aspect="equal")
        axes.xaxis.set(label_position="top", ticks_position="top")
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.tick_params(length=0)
        figure.colorbar(drawn, format=PercentFormatter(1), shrink=0.6)
        return _svg(figure)


def reliability_chart(bins: Sequence[tuple[int, float, float]], *, width: float = HALF) -> str:
    """Draw accuracy by probability beside the diagonal, on which both are equal; SVG.

    Args:
        bins: (images, mean probability, accuracy) of each interval; a point's area is its images.
        width: inches.
    """
    with _drawing(width, 3.2) as (figure, axes):
        from matplotlib.ticker import PercentFormatter

        images, probabilities, accuracies = zip(*bins, strict=True)
        areas = [12 + 240 * count / sum(images) for count in images]
        axes.plot((0, 1), (0, 1), color=_GREY, linestyle="--")
        axes.plot(probabilities, accuracies, color=COLOURS[0], linewidth=1)
        axes.scatter(probabilities, accuracies, areas, color=COLOURS[0])
        axes.set(xlabel="probability", xlim=(0, 1.03), ylim=(0, 1.03))
        axes.set_title("right", loc="left", fontsize="medium")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
        return _svg(figure)


@contextmanager
def _drawing(width: float, height: float) -> Iterator[tuple["Figure", "Axes"]]:
    """Give an empty chart of a size in inches, drawn with this module's settings."""
    require("matplotlib", "adapt")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def _svg(figure: "Figure") -> str:
    text = io.StringIO()
    with warnings.catch_warnings():
        # The reader's own fonts draw the text; matplotlib's only measure it.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
