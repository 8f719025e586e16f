"""Cut-outs on photos: pictures whose object is known to the pixel.

A cut-out is a picture with transparency; its alpha channel is the true mask. Each one is pasted at
several sizes on square pieces of background photos, at places that depend on nothing but the order
of the files. `docs/benchmarks.md` says where cut-outs and backgrounds come from.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from microclip_deploy.data.decode import BadImage, read_image
from microclip_deploy.data.sources import list_images
from microclip_deploy.errors import DataError, printable

SHARES = (0.08, 0.16, 0.3, 0.45, 0.6)
"""Of the frame that a cut-out is to cover; what does not fit is cut off, so some cover less."""
LEAST_SHARE = 0.03
"""Below it a composite is left out: the object is a few tokens."""
LEAST_SIDE = 140
"""Pixels of a cut-out's longer side; smaller ones would be enlarged to a blur."""
LEAST_COLOURS = 251
"""Different colours of 5 bits a channel; drawings have fewer and photos more."""
PIECE = (0.6, 1.0)
"""Side of the piece of a background / its shorter side, least and most."""
OPAQUE = 127
"""Alpha above it is the object."""


class Composites(NamedTuple):
    """Pictures and what is true of them."""

    pixels: NDArray[np.uint8]
    """(B, S, S, 3), RGB."""
    cover: NDArray[np.float64]
    """(B, N): share of each token's square that the object covers."""
    cutout: NDArray[np.int64]
    """(B,): which cut-out it is, from 0 on."""

    @property
    def truth(self) -> NDArray[np.bool_]:
        """The true mask: tokens that the object covers by more than half."""
        return self.cover > 0.5

    @property
    def share(self) -> NDArray[np.float64]:
        """Share of the frame that the object covers, (B,)."""
        found: NDArray[np.float64] = self.cover.mean(axis=1)
        return found


def read_cutouts(source: Path) -> list[Image.Image]:
    """Return the usable cut-outs of a folder or list, cropped to what is opaque; RGBA.

    Without transparency, too small, and drawn ones are left out, as are those that cannot be read.

    Raises:
        DataError: none is usable.
    """
    paths = list_images(source).paths
    found = [cutout for path in paths if (cutout := _cutout(path)) is not None]
    if not found:
        raise DataError(
            f"{printable(source)}: expected cut-outs, photos with transparency of {LEAST_SIDE} "
            f"pixels or more, found none in {len(paths)} images; Debian's tuxpaint-stamps-default "
            "has some: docs/benchmarks.md"
        )
    return found


def compose(
    cutouts: list[Image.Image], backgrounds: list[Image.Image], side: int, grid: int
) -> Composites:
    """Paste each cut-out at every size of `SHARES`.

    Args:
        cutouts: RGBA, cropped.
        backgrounds: RGB.
        side: S of the network input, pixels.
        grid: tokens a side.
    """
    made = [
        (*picture, number)
        for number, cutout in enumerate(cutouts)
        for picture in _pictures(cutout, number, backgrounds, side, grid)
    ]
    pixels, cover, numbers = zip(*made, strict=True)
    return Composites(np.stack(pixels), np.stack(cover), np.array(numbers))


def _pictures(
    cutout: Image.Image, number: int, backgrounds: list[Image.Image], side: int, grid: int
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float64]]]:
    """Yield pixels and cover of one cut-out's composites."""
    rng = np.random.default_rng(number)
    opaque = (np.asarray(cutout.getchannel("A")) > OPAQUE).mean()
    for share in SHARES:
        background = backgrounds[rng.integers(len(backgrounds))]
        canvas = _piece(background, rng).resize((side, side), Image.Resampling.BICUBIC)
        scale = side * math.sqrt(share / opaque / (cutout.width * cutout.height))
        width, height = (max(8, int(length * scale)) for length in cutout.size)
        left, top = (_place(side - length, rng) for length in (width, height))
        layer = Image.new("RGBA", (side, side))
        layer.paste(cutout.resize((width, height), Image.Resampling.BICUBIC), (left, top))
        alpha = np.asarray(layer.getchannel("A"), np.float64) / 255
        cell = side // grid
        cover = alpha.reshape(grid, cell, grid, cell).mean(axis=(1, 3)).ravel()
        if cover.mean() >= LEAST_SHARE:
            composite = Image.alpha_composite(canvas.convert("RGBA"), layer)
            yield np.asarray(composite.convert("RGB")), cover


def _piece(background: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return a square piece of a photo."""
    side = int(min(background.size) * rng.uniform(*PIECE))
    left, top = (int(rng.integers(length - side + 1)) for length in background.size)
    return background.crop((left, top, left + side, top + side))


def _place(room: int, rng: np.random.Generator) -> int:
    """Return where a length begins: inside the frame, or covering it where it is longer."""
    return int(rng.integers(min(0, room), max(0, room) + 1))


def _cutout(path: Path) -> Image.Image | None:
    try:
        read_image(path)  # refuses what is damaged or of absurd size
    except BadImage:
        return None
    picture = Image.open(path).convert("RGBA")
    opaque = np.asarray(picture.getchannel("A")) > OPAQUE
    if opaque.all() or not opaque.any() or max(picture.size) < LEAST_SIDE:
        return None
    colours = np.unique(np.asarray(picture)[opaque][:, :3] // 8, axis=0)
    if len(colours) < LEAST_COLOURS:
        return None
    return picture.crop(Image.fromarray(opaque).getbbox())
