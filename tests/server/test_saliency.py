"""Outlines of masks."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from microclip_deploy.server.saliency import outlines
from microclip_deploy.serving.overlay import photo_mask

SCALE = 8
"""Pixels of a cell."""


@pytest.mark.parametrize("seed", range(20))
def test_outlines_enclose_the_mask(seed: int) -> None:
    """Even-odd filling of all polygons gives the mask back: holes, islands, touching corners."""
    rng = np.random.default_rng(seed)
    grid = int(rng.integers(1, 9))
    mask = rng.random(grid * grid) < rng.uniform(0.2, 0.9)
    side = grid * SCALE
    polygons = outlines(mask, (0, 0, side, side), (side, side))
    filled = np.zeros((side, side), bool)
    for polygon in polygons:
        picture = Image.new("1", (side, side))
        inner = [(x * 16 + 8, y * 16 + 8) for x, y in polygon]
        large = Image.new("1", (side * 16 + 16, side * 16 + 16))
        ImageDraw.Draw(large).polygon(inner, fill=1)
        picture = large.crop((8, 8, side * 16 + 8, side * 16 + 8))
        filled ^= np.asarray(picture)[8::16, 8::16]
    expected = photo_mask((side, side), (0, 0, side, side), mask)
    np.testing.assert_array_equal(filled, expected)


def test_outlines_stay_on_the_photo() -> None:
    """What the token grid covers beyond a photo is cut off."""
    polygons = outlines(np.ones(4, bool), (-10, 0, 50, 60), (40, 60))
    assert polygons == [[[0, 0], [40, 0], [40, 60], [0, 60]]]
