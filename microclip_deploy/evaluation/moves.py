"""What a report tells of the verdict, with photos that adaptation gave another class."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from microclip_deploy.adapt.run_directory import RunInputs
from microclip_deploy.data.decode import BadImage, read_photo
from microclip_deploy.data.photo import PhotoConfig
from microclip_deploy.evaluation.page import data_uri
from microclip_deploy.verdict import Move, Verdict

_SIDE = 104
"""Of a thumbnail, pixels."""


class MoveRow(NamedTuple):
    """Photos that went from one class to another."""

    before: str
    after: str
    photos: int
    pictures: tuple[str, ...]
    """data: URIs of some of them."""


class Believed(NamedTuple):
    """What is believed of an adaptation, for a report."""

    verdict: Verdict
    moves: tuple[MoveRow, ...]
    harmed: tuple[str, ...]
    rolled_back: tuple[str, ...]


def believed(manifest: Mapping[str, Any], inputs: RunInputs | None) -> Believed | None:
    """Return what a manifest says of the adaptation; None where it says nothing, as older ones.

    Args:
        manifest: of the checkpoint.
        inputs: of the run; without them there are no pictures.
    """
    if "verdict" not in manifest:
        return None
    verdict, classes = Verdict.model_validate(manifest["verdict"]), manifest["classes"]
    moves = tuple(
        MoveRow(classes[move.before], classes[move.after], move.photos, _pictures(move, inputs))
        for move in verdict.moves
    )
    harmed = tuple(classes[c] for c in verdict.harmed)
    return Believed(verdict, moves, harmed, tuple(manifest.get("rolled_back", ())))


def _pictures(move: Move, inputs: RunInputs | None) -> tuple[str, ...]:
    if inputs is None:
        return ()
    paths = (Path(inputs.images[row]) for row in move.examples)
    found = (_picture(path, inputs.recipe.photos) for path in paths)
    return tuple(uri for uri in found if uri)


def _picture(path: Path, config: PhotoConfig) -> str | None:
    """Return a thumbnail, or None where the photo can no longer be read."""
    try:
        photo = read_photo(path, config).image
    except BadImage:
        return None
    photo.thumbnail((2 * _SIDE, 2 * _SIDE))
    square = Image.new("RGB", (max(photo.size),) * 2, "white")
    left, top = ((max(photo.size) - side) // 2 for side in photo.size)
    square.paste(photo, (left, top))
    return data_uri(square, _SIDE)
