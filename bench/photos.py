"""Encoded photos in memory; made up for whoever gives none of their own."""

import io
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from PIL import Image
from rich.console import Console

from microclip_deploy.console import tell_left_out, tell_skipped, tell_warnings
from microclip_deploy.data.decode import decode_image, opened_photo
from microclip_deploy.data.photo import USUAL, PhotoConfig
from microclip_deploy.data.sources import check_images, list_images
from microclip_deploy.export.proof.probes import made_up_photos

SIDE = 400
"""Pixels; sides are 1.05 to 1.8 times as long, a short one about 500: what photos of a training set
are best shrunk to. Those of a camera cost many times as much to decode."""
_QUALITY = 90
_NAME = Path("photo in memory")
"""For messages."""


def encoded_photos(
    images: Path | None,
    network_side: int,
    made: int,
    most: int,
    reading: PhotoConfig,
    notes: Console,
) -> tuple[list[bytes], str]:
    """Return encoded photos and whose they are: the user's files as they are, or made-up JPEGs.

    Args:
        images: folder or list; None for made-up ones.
        network_side: S of the network input, pixels.
        made: so many are made up.
        most: so many of the user's are taken.
        reading: how the user's are checked.
        notes: where it is told what is left out.

    Raises:
        DataError: none of them can be used.
    """
    if images is None:
        return made_up_jpegs(made, network_side), "made up"
    listed = list_images(images)
    left_out = listed.left_out.summary()
    tell_left_out(left_out, notes)
    checked = check_images(listed.paths[:most], reading, max_bad="100%")
    tell_skipped(checked.bad, notes)
    tell_warnings(checked.remarks, notes)
    source = f"the user's (left out: {left_out})" if left_out else "the user's"
    return [encoded(path, reading) for path in checked.good], source


def encoded(path: Path, reading: PhotoConfig) -> bytes:
    """Return the bytes of a photo that `check_images` found good."""
    with opened_photo(path, reading) as stream:
        return stream.read()


def described(encoded: Sequence[bytes], sides: Sequence[int], source: str) -> str:
    """Say how many photos there are, whose, and how large, which decides what decoding costs.

    Args:
        encoded: files.
        sides: the short one of each, pixels.
        source: as `encoded_photos` returns it.
    """
    kib = median(len(photo) for photo in encoded) / 1024
    typical = f"median short side {median(sides):.0f} px, median {kib:.0f} KiB"
    return f"{len(encoded)} {source}, {typical}"


def made_up_jpegs(count: int, network_side: int) -> list[bytes]:
    """Return JPEG files.

    Args:
        count: of photos.
        network_side: S of the network input, pixels; no photo is smaller.
    """
    photos = made_up_photos(max(network_side, SIDE), count).read()
    return [jpeg(photo) for photo in photos]


def jpeg(photo: Image.Image) -> bytes:
    """Return a photo as a JPEG file."""
    encoded = io.BytesIO()
    photo.convert("RGB").save(encoded, "JPEG", quality=_QUALITY)
    return encoded.getvalue()


def decoded(encoded: Sequence[bytes], config: PhotoConfig = USUAL) -> list[Image.Image]:
    """Return RGB images, one after the other, by the product's own reader."""
    return [decode_image(io.BytesIO(photo), _NAME, config) for photo in encoded]
