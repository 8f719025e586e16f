"""Pictures of what the model looked at: the saliency mask and SOAP's attention on the test view.

    mask       tokens outside are dimmed and greyed, the border of the foreground is drawn
    attention  a colour map of even lightness steps; the brighter, the more weight

The attention is shown relative to its largest entry of the same image: it says where the weight
is, not how much there is.
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from microclip_deploy.errors import DataError

DEFAULT_SCALE = 2
"""Sides of the picture / sides of the test view."""

_DIMMED = 0.30
"""Brightness of what lies outside the mask."""

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
    """Draw the mask and, if given, the attention on an image.

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
    grid = _checked_grid(image, mask, attention, scale)
    side = image.shape[0] * scale
    photo = _enlarged(image, side)
    if attention is not None:
        photo = _with_heat(photo, attention[: grid * grid].reshape(grid, grid))
    covered = _cells_to_pixels(mask.reshape(grid, grid), side)
    dimmed = photo.mean(axis=2, keepdims=True) * 0.6 + photo * 0.4
    picture = np.where(covered[..., None], photo, dimmed * _DIMMED)
    drawn = _draw_border(picture, covered)
    return Image.fromarray(np.clip(drawn + 0.5, 0, 255).astype(np.uint8))


def attention_map(
    image: NDArray[np.uint8], attention: NDArray[np.float32], scale: int = DEFAULT_SCALE
) -> Image.Image:
    """Draw the attention alone over a greyed image.

    Args:
        image: uint8 (S, S, 3).
        attention: float (N,) or (N+1,), as for `overlay`.
        scale: as for `overlay`.

    Raises:
        DataError: shapes or dtypes that do not go together.
    """
    tokens = math.isqrt(len(attention)) ** 2
    grid = _checked_grid(image, np.ones(tokens, np.bool_), attention, scale)
    photo = _enlarged(image, image.shape[0] * scale)
    grey = np.repeat(photo.mean(axis=2, keepdims=True) * np.float32(0.8), 3, axis=2)
    drawn = _with_heat(grey, attention[:tokens].reshape(grid, grid))
    return Image.fromarray(np.clip(drawn + 0.5, 0, 255).astype(np.uint8))


def _checked_grid(
    image: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    attention: NDArray[np.float32] | None,
    scale: int,
) -> int:
    """Return the side G of the token grid."""
    square = image.ndim == 3 and image.shape[0] == image.shape[1] and image.shape[2] == 3
    if not square or image.dtype != np.uint8:
        raise DataError(
            f"saliency image: expected uint8 (S, S, 3), found {image.dtype} {image.shape}; "
            "make it with Preprocess.test_view"
        )
    grid = math.isqrt(mask.size)
    if mask.ndim != 1 or mask.dtype != np.bool_ or grid == 0 or grid * grid != mask.size:
        raise DataError(
            f"saliency mask: expected bool (N,) of a square grid, found {mask.dtype} {mask.shape}; "
            "take one image's row of Prediction.mask"
        )
    sizes = (mask.size, mask.size + 1)
    if attention is not None and (attention.ndim != 1 or attention.size not in sizes):
        raise DataError(
            f"saliency attention: expected ({sizes[0]},) or ({sizes[1]},), found "
            f"{attention.shape}; take one image's row of Prediction.attention"
        )
    if scale < 1:
        raise DataError(f"saliency scale: expected at least 1, found {scale}; give another")
    return grid


def _enlarged(image: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    large = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(large, np.float32)


def _cells_to_pixels(cells: NDArray[np.bool_], side: int) -> NDArray[np.bool_]:
    """Return (side, side): the cell each pixel lies in; cells may be no whole number of pixels."""
    index = np.arange(side) * len(cells) // side
    pixels: NDArray[np.bool_] = cells[np.ix_(index, index)]
    return pixels


def _with_heat(photo: NDArray[np.float32], attention: NDArray[np.float32]) -> NDArray[np.float32]:
    """Blend the colour map of (G, G) weights over the (P, P, 3) photo."""
    weights = np.nan_to_num(attention.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    relative = weights / max(float(weights.max()), 1e-12)
    smooth = Image.fromarray(relative.clip(0, 1)).resize(
        (photo.shape[1], photo.shape[0]), Image.Resampling.BICUBIC
    )
    heat = np.asarray(smooth, np.float32).clip(0, 1)
    # The square root lifts middling weights: attention is dominated by a few tokens.
    opacity = _HEAT_OPACITY * np.sqrt(heat)[..., None]
    blended: NDArray[np.float32] = photo * (1 - opacity) + _inferno(heat) * opacity
    return blended


def _inferno(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Map (P, P) values from 0 to 1 to (P, P, 3) colours from 0 to 255."""
    anchors = np.asarray(_INFERNO, np.float32)
    places = np.linspace(0, 1, len(anchors))
    channels = [np.interp(values, places, anchors[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)


def _draw_border(picture: NDArray[np.float32], covered: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Draw a light line with a dark halo along the edges between foreground and the rest."""
    foreground = Image.fromarray(covered.astype(np.uint8))
    width = max(1, len(picture) // 220)
    drawn = picture.copy()
    # The halo first: the light line then lies on top of it everywhere.
    for margin, colour in ((2 * width, _HALO), (width, _LINE)):
        grown, shrunk = (
            np.asarray(foreground.filter(kind(2 * margin + 1)))
            for kind in (ImageFilter.MaxFilter, ImageFilter.MinFilter)
        )
        drawn[grown != shrunk] = colour
    return drawn
