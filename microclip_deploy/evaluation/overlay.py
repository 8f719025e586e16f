"""Pictures of what the model looked at: the saliency mask and SOAP's attention on the photo.

    mask       tokens outside are dimmed and greyed, the border of the foreground is drawn
    attention  a colour map of even lightness steps; the brighter, the more weight

The attention is shown relative to its largest entry of the same image: it says where the weight
is, not how much there is. What the test view cuts off a photo is dimmed too: no token saw it.
"""

import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from microclip_deploy import artifact
from microclip_deploy.data.decode import BadImage, read_image
from microclip_deploy.data.preprocess import Box, Preprocess
from microclip_deploy.errors import DataError
from microclip_deploy.evaluation.predict import FailedImage, ImagePrediction, Result

DEFAULT_SCALE = 2
"""Sides of the picture / sides of the test view."""

_DIMMED = 0.30
"""Brightness of what lies outside the mask."""

_COLOUR = 0.4
"""Share of its colour that is left there; the rest is grey."""

_GREYED = 0.8
"""Brightness of the grey photo below the attention alone."""

_HEAT_OPACITY = 0.75
"""Share of the colour map where the attention is largest."""

_LINE = (255, 255, 255)
_HALO = (20, 20, 24)

# Nine anchors of matplotlib's "inferno" (CC0), whose lightness rises evenly from black to pale
# yellow; linear interpolation between them is within 2 % of the original.
_INFERNO = (
    (0, 0, 4),
    (31, 12, 72),
    (85, 15, 109),
    (136, 34, 106),
    (186, 54, 85),
    (227, 89, 51),
    (249, 140, 10),
    (249, 201, 50),
    (252, 255, 164),
)


def overlay(
    image: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    attention: NDArray[np.float32] | None = None,
    scale: int = DEFAULT_SCALE,
) -> Image.Image:
    """Draw the mask and, if given, the attention on a test view.

    Args:
        image: uint8 (S, S, 3), as `Preprocess.test_view` makes it.
        mask: bool (N,), row-major square token grid.
        attention: float (N,) or (N+1,), whose last entry is the zero token's and is left out.
        scale: whole factor by which the picture is larger than the image.

    Returns:
        RGB, (S * scale, S * scale).

    Raises:
        DataError: shapes or dtypes that do not go together.
    """
    photo = _enlarged(image, scale)
    return photo_overlay(photo, (0, 0, *photo.size), mask, attention)


def photo_overlay(
    photo: Image.Image,
    seen: Box,
    mask: NDArray[np.bool_],
    attention: NDArray[np.float32] | None = None,
) -> Image.Image:
    """Draw the mask and, if given, the attention on a photo of any size.

    Args:
        photo: mode RGB.
        seen: what the token grid covers, as `Preprocess.seen` tells.
        mask: as for `overlay`.
        attention: as for `overlay`.

    Returns:
        RGB, of the photo's size.

    Raises:
        DataError: shapes or dtypes that do not go together.
    """
    cells = _mask_cells(mask)
    shown = (
        photo if attention is None else _with_heat(photo, seen, _heat(attention, len(cells) - 1))
    )
    own, grey = _DIMMED * _COLOUR, _DIMMED * (1 - _COLOUR) / 3
    dimmed = shown.convert("RGB", _matrix(own, grey))
    columns, rows = (_cell_of_pixel(photo.size, seen, axis, len(cells)) for axis in (0, 1))
    covered = Image.fromarray(cells.astype(np.uint8)[np.ix_(rows, columns)] * np.uint8(255))
    return _with_border(Image.composite(shown, dimmed, covered), seen, cells)


def attention_map(
    image: NDArray[np.uint8], attention: NDArray[np.float32], scale: int = DEFAULT_SCALE
) -> Image.Image:
    """Draw the attention alone over a greyed test view.

    Args:
        image: uint8 (S, S, 3).
        attention: float (N,) or (N+1,), as for `overlay`.
        scale: as for `overlay`.

    Raises:
        DataError: shapes or dtypes that do not go together.
    """
    photo = _enlarged(image, scale)
    heat = _heat(attention, math.isqrt(len(attention)))
    greyed = photo.convert("RGB", _matrix(0.0, _GREYED / 3))
    return _with_heat(greyed, (0, 0, *photo.size), heat)


class OverlayWriter:
    """One PNG a photo, of its own size."""

    def __init__(self, directory: Path) -> None:
        """Make the folder.

        Raises:
            EnvironmentProblem: it cannot be made.
        """
        artifact.make_directory(directory)
        self._directory = directory

    def drawn(self, results: Iterable[Result], preprocess: Preprocess) -> Iterator[Result]:
        """Write INDEX-NAME.png of every prediction, and tell each result with its overlay.

        A photo that has gone since its prediction gets none.

        Args:
            results: what `predict` returns.
            preprocess: of the session that predicted.

        Raises:
            EnvironmentProblem: the disk is full or the folder cannot be written.
        """
        for result in results:
            yield result if isinstance(result, FailedImage) else self._drawn(result, preprocess)

    def _drawn(self, result: ImagePrediction, preprocess: Preprocess) -> ImagePrediction:
        try:
            photo = read_image(result.path)
        except BadImage:
            return result
        seen = preprocess.seen(photo.size)
        picture, buffer = photo_overlay(photo, seen, result.mask, result.attention), io.BytesIO()
        picture.save(buffer, "PNG", compress_level=1)  # the higher ones take seconds a photo
        path = self._directory / overlay_name(result)
        artifact.write_bytes(path, buffer.getvalue())
        return replace(result, overlay=path)


def overlay_name(result: Result) -> str:
    """Return a file name that is unique in its run and plain on every system."""
    kept = "".join(c if c.isalnum() and c.isascii() else "-" for c in result.path.stem)
    return f"{result.index:06d}-{kept[:60].strip('-') or 'image'}.png"


def _enlarged(image: NDArray[np.uint8], scale: int) -> Image.Image:
    square = image.ndim == 3 and image.shape[0] == image.shape[1] and image.shape[2] == 3
    if not square or image.dtype != np.uint8:
        raise DataError(
            f"saliency image: expected uint8 (S, S, 3), found {image.dtype} {image.shape}; "
            "make it with Preprocess.test_view"
        )
    if scale < 1:
        raise DataError(f"saliency scale: expected at least 1, found {scale}; give another")
    side = len(image) * scale
    return Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)


def _mask_cells(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return (G+1, G+1): the token grid, and a last row and column for what no token saw."""
    grid = math.isqrt(mask.size)
    if mask.ndim != 1 or mask.dtype != np.bool_ or grid == 0 or grid * grid != mask.size:
        raise DataError(
            f"saliency mask: expected bool (N,) of a square grid, found {mask.dtype} {mask.shape}; "
            "take one image's row of Prediction.mask"
        )
    return np.pad(mask.reshape(grid, grid), (0, 1))


def _heat(attention: NDArray[np.float32], grid: int) -> NDArray[np.uint8]:
    """Return (G, G) weights, 255 where they are largest."""
    count = grid * grid
    if attention.ndim != 1 or attention.size not in (count, count + 1) or count == 0:
        raise DataError(
            f"saliency attention: expected ({count},) or ({count + 1},), found "
            f"{attention.shape}; take one image's row of Prediction.attention"
        )
    cells = attention[:count].reshape(grid, grid).astype(np.float32)
    weights = np.nan_to_num(cells, nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    relative: NDArray[np.uint8] = np.rint(255 * weights / max(float(weights.max()), 1e-12)).astype(
        np.uint8
    )
    return relative


def _with_heat(photo: Image.Image, seen: Box, heat: NDArray[np.uint8]) -> Image.Image:
    """Blend the colour map of (G, G) weights over what the grid covers of a photo."""
    left, top, right, bottom = (round(edge) for edge in seen)
    size = (max(1, right - left), max(1, bottom - top))
    smooth = Image.new("L", photo.size)
    smooth.paste(Image.fromarray(heat).resize(size, Image.Resampling.BICUBIC), (left, top))
    levels = np.arange(256) / 255
    # The square root lifts middling weights: attention is dominated by a few tokens.
    opacity = smooth.point(np.rint(255 * _HEAT_OPACITY * np.sqrt(levels)).astype(int).tolist())
    smooth.putpalette(_inferno(levels).tobytes())
    return Image.composite(smooth.convert("RGB"), photo, opacity)


def _inferno(levels: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Map (L,) levels from 0 to 1 to (L, 3) colours."""
    anchors = np.asarray(_INFERNO)
    places = np.linspace(0, 1, len(anchors))
    channels = [np.interp(levels, places, anchors[:, c]) for c in range(3)]
    colours: NDArray[np.uint8] = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    return colours


def _matrix(own: float, each: float) -> tuple[float, ...]:
    """Return Pillow's colour matrix: `own` of the same channel, and `each` of all three."""
    rows = (np.eye(3) * own + each, np.zeros((3, 1)))
    return tuple(np.hstack(rows).ravel().tolist())


def _cell_of_pixel(size: tuple[int, int], seen: Box, axis: int, cells: int) -> NDArray[np.int64]:
    """Return the row or column of cells that each pixel lies in; the last is that of no token."""
    grid, begin, end = cells - 1, seen[axis], seen[axis + 2]
    found = np.floor((np.arange(size[axis]) - begin) * grid / (end - begin)).astype(np.int64)
    return np.where((found < 0) | (found >= grid), grid, found)


def _with_border(picture: Image.Image, seen: Box, cells: NDArray[np.bool_]) -> Image.Image:
    """Draw a light line with a dark halo along the edges between foreground and the rest."""
    pixels = np.array(picture)
    grid, width = len(cells) - 1, max(1, min(picture.size) // 220)
    xs, ys = (
        [math.ceil(seen[axis] + k * (seen[axis + 2] - seen[axis]) / grid) for k in range(grid + 1)]
        for axis in (0, 1)
    )
    # Row and column -1 are those of no token.
    upright = np.argwhere(cells[:grid] != np.roll(cells, 1, axis=1)[:grid])
    level = np.argwhere(cells[:, :grid] != np.roll(cells, 1, axis=0)[:, :grid])
    edges = [(xs[k], ys[row], xs[k], ys[row + 1]) for row, k in upright.tolist()]
    edges += [(xs[column], ys[k], xs[column + 1], ys[k]) for k, column in level.tolist()]
    # The halo first: the light line then lies on top of it everywhere.
    for margin, colour in ((2 * width, _HALO), (width, _LINE)):
        for left, top, right, bottom in edges:
            rim = left == right in (0, picture.width) or top == bottom in (0, picture.height)
            if not rim:
                rows = slice(max(0, top - margin), max(0, bottom + margin))
                pixels[rows, max(0, left - margin) : max(0, right + margin)] = colour
    return Image.fromarray(pixels)
