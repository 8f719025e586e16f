"""Whether descriptions name more images right than texts that say nothing, image by image."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_NORMAL = 1.96
"""Standard errors on each side of a mean that hold 95 %."""
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""The same where the error is estimated from 2, 3, ... 10 values: Student's t."""

Controls = Mapping[str, Sequence[NDArray[np.float32]]]
"""Name -> class matrices (C, E) with unit rows, one for each draw."""


def rows_of(controls: Controls) -> dict[str, NDArray[np.float32]]:
    """Return the class matrices of all draws by the name of their row."""
    return {
        name: matrix
        for control, draws in controls.items()
        for name, matrix in zip(row_names(control, len(draws)), draws, strict=True)
    }


def row_names(control: str, draws: int) -> list[str]:
    """Return the names that the draws of a control have as rows."""
    return [f"{control} {draw + 1}" for draw in range(draws)] if draws > 1 else [control]


class Comparison(NamedTuple):
    """Zero-shot accuracy of the descriptions minus that of a control, on the same images."""

    control: str
    difference: float
    low: float
    """Lower end of the 95 % interval of the difference."""
    high: float
    images: int
    draws: int
    """How often the control was drawn; the difference is to their mean."""

    @property
    def beaten(self) -> bool:
        """Whether the descriptions are better, beyond chance."""
        return self.low > 0

    def sentence(self) -> str:
        """Say what follows."""
        measured = (
            f"{100 * self.difference:+.1f} points, 95 % interval {100 * self.low:+.1f} to "
            f"{100 * self.high:+.1f}, {self.images} images"
        ) + (f", {self.draws} draws" if self.draws > 1 else "")
        if self.beaten:
            return f"zero-shot, the descriptions beat {self.control}: {measured}"
        verdict = (
            f"are worse than {self.control}"
            if self.high < 0
            else f"do not beat {self.control} beyond chance"
        )
        return (
            f"zero-shot, the descriptions {verdict} ({measured}): what they say is of no proven "
            "use to this model; try `describe check`, or adapt with templates"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**self._asdict(), "sentence": self.sentence()}


def compared(control: str, right: NDArray[np.bool_], drawn: NDArray[np.bool_]) -> Comparison:
    """Compare descriptions with the draws of a control.

    Args:
        control: its name.
        right: bool (M,), which images the descriptions name right.
        drawn: bool (K, M), the same for each draw of the control.

    Returns:
        The mean difference with an interval for both of what chance decides: the images, and the
        words that are drawn. With M images and K draws its half-width is the root of
        1.96^2 (variance over images) / M + t^2 (variance over draws) / K, t Student's for K - 1.
    """
    by_image = right - drawn.mean(axis=0)
    by_draw = drawn.mean(axis=1)
    draws, images = drawn.shape
    square = _NORMAL**2 * by_image.var(ddof=1) / images if images > 1 else 1.0
    if draws > 1:
        square += _STUDENT[min(draws, 10) - 2] ** 2 * by_draw.var(ddof=1) / draws
    difference, reach = float(by_image.mean()), float(np.sqrt(square))
    return Comparison(control, difference, difference - reach, difference + reach, images, draws)
