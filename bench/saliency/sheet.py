"""A picture sheet: photo, the method's mask, and that of the rule for objects, side by side."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from microclip_deploy.bench.saliency.rules import METHOD, OBJECT, RULES, Cuts
from microclip_deploy.serving.overlay import overlay

SHOWN, COLUMNS, THUMBNAIL, GAP = 24, 4, 96, 8
"""Images, images a row, and pixels."""
MASKS = (("dot", METHOD), ("cosine", METHOD), ("cosine", OBJECT))


def sheet(pixels: NDArray[np.uint8], seen: dict[str, Cuts]) -> Image.Image:
    """Draw images spread evenly over all.

    Args:
        pixels: uint8 (B, S, S, 3).
        seen: affinity -> cuts of these images.
    """
    shown = np.unique(np.linspace(0, len(pixels) - 1, SHOWN).astype(int))
    width = (1 + len(MASKS)) * THUMBNAIL + GAP
    rows = -(-len(shown) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * width, 2 * GAP + rows * (THUMBNAIL + GAP)), "white")
    titles = ["photo", *(f"{affinity}: {rule}" for affinity, rule in MASKS)]
    for number, title in enumerate(titles):
        ImageDraw.Draw(page).text((number * THUMBNAIL, 0), title, fill="black", font_size=9)
    for place, index in enumerate(shown):
        left, top = place % COLUMNS * width, 2 * GAP + place // COLUMNS * (THUMBNAIL + GAP)
        masks = [seen[affinity].mask[index, RULES.index(rule)] for affinity, rule in MASKS]
        drawn = [overlay(pixels[index], mask, scale=1) for mask in masks]
        for number, picture in enumerate([Image.fromarray(pixels[index]), *drawn]):
            page.paste(picture.resize((THUMBNAIL,) * 2), (left + number * THUMBNAIL, top))
    return page
