"""Render the images that pretraining and its evaluation read, in two worker processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.demo.glyphs import PrintStyle
from microclip_deploy.demo.render import IMAGE_SIDE, Domain, image_generator, render_glyph

__all__ = ["ImagePool", "render_pool"]

_WORKERS = 2
_CHUNK = 500


class ImagePool(NamedTuple):
    """Rendered images in index order.

    Attributes:
        images: uint8 (B, 64, 64, 3).
        labels: int64 (B,), index into the characters the pool was made of.
        styles: print style of each image.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    styles: tuple[PrintStyle, ...]


def render_pool(
    characters: Sequence[str], domain: Domain, count: int, *, seed: int, split: int
) -> ImagePool:
    """Render `count` images; image i shows character i modulo their number.

    Args:
        characters: classes in label order.
        domain: image domain.
        count: number of images.
        seed: seed of the pool.
        split: number that keeps this pool's random numbers apart from every other one.
    """
    starts = range(0, count, _CHUNK)
    chunk = partial(_render_chunk, "".join(characters), domain, count, (seed, split))
    # spawn, not fork: the parent may already run torch threads.
    with multiprocessing.get_context("spawn").Pool(_WORKERS) as workers:
        pieces = workers.map(chunk, starts)
    labels = np.arange(count, dtype=np.int64) % len(characters)
    styles = tuple(style for _, piece in pieces for style in piece)
    images = np.concatenate([images for images, _ in pieces])
    return ImagePool(images, labels, styles)


def _render_chunk(
    characters: str, domain: Domain, count: int, stream: tuple[int, int], start: int
) -> tuple[NDArray[np.uint8], list[PrintStyle]]:
    size = min(_CHUNK, count - start)
    images = np.empty((size, IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8)
    styles = []
    for row in range(size):
        index = start + row
        rng = image_generator(*stream, index)
        glyph = render_glyph(characters[index % len(characters)], domain, rng)
        images[row] = glyph.image
        styles.append(glyph.style)
    return images, styles
