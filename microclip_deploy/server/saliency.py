"""Where the model looked, in the forms that a client can ask for."""

import base64
import io
import math
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from microclip_deploy.data.preprocess import Box, Preprocess
from microclip_deploy.server.intake import View
from microclip_deploy.serving.overlay import photo_mask, photo_overlay

Form = Literal["none", "mask", "overlay", "polygon", "tokens"]
FORMS: tuple[str, ...] = get_args(Form)


def saliency(
    form: str,
    view: View,
    preprocess: Preprocess,
    mask: NDArray[np.bool_],
    attention: NDArray[np.float32],
    complete: bool,
) -> dict[str, Any]:
    """Return the saliency of one photo as JSON values.

    Args:
        form: "mask": a black and white PNG of the photo's size; "overlay": a picture, the photo
            with mask and attention; "polygon": outlines; "tokens": the grid itself.
        view: the photo.
        preprocess: of the model.
        mask: (N,), row-major square token grid.
        attention: (N+1,), the last entry is the zero token's.
        complete: the graph joins every pair of tokens.
    """
    box = preprocess.seen(view.size)
    told: dict[str, Any] = {"complete": complete, "seen": [round(edge, 3) for edge in box]}
    if form == "tokens":
        told["tokens"] = {
            "grid": math.isqrt(len(mask)),
            "mask": mask.astype(int).tolist(),
            "attention": attention[:-1].tolist(),
            "zero": float(attention[-1]),
        }
    elif form == "polygon":
        told["polygons"] = outlines(mask, box, view.size)
    elif form == "mask":
        told["png"] = _png(Image.fromarray(photo_mask(view.size, box, mask)))
    elif view.shown is not None:
        scale = view.shown.width / view.size[0]
        left, top, right, bottom = (edge * scale for edge in box)
        told["png"] = _png(photo_overlay(view.shown, (left, top, right, bottom), mask, attention))
    return told


def outlines(mask: NDArray[np.bool_], box: Box, size: tuple[int, int]) -> list[list[list[float]]]:
    """Return the borders of a mask as closed polygons in pixels of the photo.

    Outer borders run clockwise on the screen, holes the other way; where two cells touch at a
    corner only, the polygons keep them apart.

    Args:
        mask: (N,), row-major square token grid.
        box: what the grid covers.
        size: width and height of the photo, beyond which nothing reaches.
    """
    grid = math.isqrt(len(mask))
    cells = np.pad(mask.reshape(grid, grid), 1)
    edges = _edges(cells)
    left, top, right, bottom = box

    def place(corner: tuple[int, int]) -> list[float]:
        x = left + (right - left) * corner[0] / grid
        y = top + (bottom - top) * corner[1] / grid
        return [round(min(max(x, 0), size[0]), 2), round(min(max(y, 0), size[1]), 2)]

    polygons = []
    while edges:
        begin = min(edges)
        polygons.append([place(corner) for corner in _corners(_walk(begin, edges))])
    return polygons


_Corner = tuple[int, int]


def _edges(cells: NDArray[np.bool_]) -> dict[_Corner, list[_Corner]]:
    """Return the sides between inside and outside, corner to corner, the inside on the right."""
    edges: dict[_Corner, list[_Corner]] = {}
    for row, column in np.argwhere(cells).tolist():
        x, y = column - 1, row - 1  # without the padding
        sides = (
            (cells[row - 1, column], (x, y), (x + 1, y)),
            (cells[row, column + 1], (x + 1, y), (x + 1, y + 1)),
            (cells[row + 1, column], (x + 1, y + 1), (x, y + 1)),
            (cells[row, column - 1], (x, y + 1), (x, y)),
        )
        for inside, begin, end in sides:
            if not inside:
                edges.setdefault(begin, []).append(end)
    return edges


def _walk(begin: _Corner, edges: dict[_Corner, list[_Corner]]) -> list[_Corner]:
    """Take one closed border out of the edges."""
    path, here, came = [begin], begin, (0, 0)
    while True:
        choices = edges[here]

        def turn(end: _Corner, here: _Corner = here, came: _Corner = came) -> int:
            """Prefer the right turn, which stays with the same cell."""
            return came[1] * (end[0] - here[0]) - came[0] * (end[1] - here[1])

        end = min(choices, key=turn)
        choices.remove(end)
        if not choices:
            del edges[here]
        if end == begin:
            return path
        came, here = (end[0] - here[0], end[1] - here[1]), end
        path.append(here)


def _corners(path: list[_Corner]) -> list[_Corner]:
    """Leave out the points in the middle of straight lines."""
    around = zip(path[-1:] + path[:-1], path, path[1:] + path[:1], strict=True)
    return [
        here
        for before, here, after in around
        if (here[0] - before[0], here[1] - before[1]) != (after[0] - here[0], after[1] - here[1])
    ]


def _png(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=3)
    return base64.b64encode(stream.getvalue()).decode("ascii")
