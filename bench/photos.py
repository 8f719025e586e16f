"""Encoded photos in memory; made up for whoever gives none of their own."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from microclip_deploy.data.decode import decode_image
from microclip_deploy.data.photo import USUAL, PhotoConfig
from microclip_deploy.export.proof.probes import made_up_photos

SIDE = 400
"""Pixels; sides are 1.05 to 1.8 times as long, a short one about 500: what photos of a training set
are best shrunk to. Those of a camera cost many times as much to decode."""
_QUALITY = 90
_NAME = Path("photo in memory")
"""For messages."""


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
