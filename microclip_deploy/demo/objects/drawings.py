"""Drawings of things by several artists, and the sheets of tiles that hold them.

A sheet is one artist's drawings in one PNG: square tiles from left to right and top to bottom,
colours multiplied by alpha. `drawings/` holds the sheets that the benchmark needs, in the order of
`names.CLASSES` and `names.CLUTTER`; drawings/ATTRIBUTION.md names the artists and their licences.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from microclip_deploy.demo.objects.names import CLASSES, CLUTTER

TILE = 56
"""Side of a drawing, pixels."""

PER_ROW = 22
"""Tiles beside one another in a sheet."""

TARGET_ARTISTS = ("twemoji", "fluent-emoji-flat")
"""Whose drawings of the 42 classes the tiny model has never seen; it has of other things, some of
them like the classes ("grinning cat", "two hump camel")."""

Sheet = Mapping[str, NDArray[np.uint8]]
"""Name of a thing -> its drawing, (TILE, TILE, 4), colours multiplied by alpha."""


class Drawings:
    """Drawings of some things, each by one or more artists."""

    def __init__(
        self,
        sheets: Mapping[str, Sheet],
        things: Sequence[str],
        chosen: Callable[[str, str], bool] = lambda thing, artist: True,
        device: torch.device | str = "cpu",
    ) -> None:
        """Take what the sheets have of the things; `chosen(thing, artist)` may leave some out.

        `device` is where the drawings lie, and where `draw` gets its arguments and leaves them.
        """
        found = {
            thing: [
                sheet[thing]
                for artist, sheet in sheets.items()
                if thing in sheet and chosen(thing, artist)
            ]
            for thing in things
        }
        found = {thing: tiles for thing, tiles in found.items() if tiles}
        self.things = tuple(found)
        """Those that somebody has drawn, in the order asked for."""
        tiles = np.stack([tile for drawn in found.values() for tile in drawn])
        self._tiles = torch.from_numpy(tiles).permute(0, 3, 1, 2).to(device)
        self._rows = _rows([len(drawn) for drawn in found.values()]).to(device)

    def draw(self, which: Tensor, generator: torch.Generator) -> Tensor:
        """Return a drawing of each thing, by one of its artists.

        Args:
            which: int64 (B,), indices into `things`.
            generator: chooses the artist; both on the device of the drawings.

        Returns:
            float32 (B, 4, TILE, TILE) in [0, 1], colours multiplied by alpha.
        """
        column = torch.randint(
            self._rows.shape[1], which.shape, generator=generator, device=generator.device
        )
        return self._tiles[self._rows[which, column]].float() / 255


def _rows(counts: Sequence[int]) -> Tensor:
    """Return each thing's tiles, repeated to one length that gives every artist the same share."""
    length, rows, start = math.lcm(*set(counts)), [], 0
    for count in counts:
        rows.append([start + i % count for i in range(length)])
        start += count
    return torch.tensor(rows)


def read_sheet(path: Path, names: Sequence[str]) -> Sheet:
    """Read the drawings of the named things from an artist's sheet."""
    tiles = np.asarray(Image.open(path))
    tiles = tiles.reshape(-1, TILE, PER_ROW, TILE, 4).swapaxes(1, 2).reshape(-1, TILE, TILE, 4)
    return dict(zip(names, tiles, strict=False))


def sheet_image(tiles: Sequence[NDArray[np.uint8]]) -> Image.Image:
    """Return drawings as the picture that `read_sheet` reads."""
    rows = math.ceil(len(tiles) / PER_ROW)
    sheet = np.zeros((rows * PER_ROW, TILE, TILE, 4), np.uint8)
    sheet[: len(tiles)] = np.stack(tiles)
    sheet = sheet.reshape(rows, PER_ROW, TILE, TILE, 4).swapaxes(1, 2)
    return Image.fromarray(sheet.reshape(rows * TILE, PER_ROW * TILE, 4))


@cache
def target_sheets() -> dict[str, Sheet]:
    """Return the shipped drawings, by artist."""
    folder = Path(__file__).parent / "drawings"
    names = CLASSES + CLUTTER
    return {artist: read_sheet(folder / f"{artist}.png", names) for artist in TARGET_ARTISTS}
