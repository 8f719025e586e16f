"""What may be given for a photo: a file, or a picture in memory, and the way to 8-bit RGB.

A picture in memory is read as the file that it could be saved to: there is one definition of how
transparency, orientation, 16 bits and limits are treated, that of `decode`.
"""

import io
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from microclip_deploy.data.decode import DECODE_ERRORS, decode_image, read_image
from microclip_deploy.data.photo import USUAL, PhotoConfig
from microclip_deploy.errors import DataError, printable
from microclip_deploy.paths import StrPath

Picture = StrPath | Image.Image | NDArray[np.uint8]
"""The path of a file, a PIL image of any mode, or RGB as uint8 (H, W, 3), (H, W, 4), (H, W)."""

_ONE_SAVING = threading.Lock()
"""Pillow notes on an image that it is being saved, and the same may be given twice."""


def is_picture(value: object) -> bool:
    """Say whether this stands for one photo, and not for several; it may be a wrong one."""
    if isinstance(value, (str, bytes, os.PathLike, Image.Image)) or hasattr(value, "read"):
        return True
    if hasattr(value, "__array__"):  # of any library; one axis: a series of paths, four: a batch
        return getattr(value, "ndim", 0) not in (1, 4)
    return not hasattr(value, "__iter__")


def read_picture(
    picture: Picture, config: PhotoConfig = USUAL, what: str = "picture"
) -> Image.Image:
    """Return a photo upright as 8-bit RGB, as `read_image` does, whatever it was given as.

    Args:
        picture: stays as it is.
        config: how it is read.
        what: names a picture in memory in errors.

    Raises:
        BadImage: the file or the picture is damaged, or exceeds a limit.
        DataError: no picture.
    """
    if isinstance(picture, (str, os.PathLike)):
        if os.path.isdir(picture):
            remedy = "give its files, such as Path(folder).glob('*.jpg')"
            raise _no_picture(what, f"the folder {printable(os.fspath(picture))}", remedy)
        return read_image(picture, **config.model_dump())
    if hasattr(picture, "__array__") and not isinstance(picture, Image.Image):
        picture = _image_of(picture, what)
    if isinstance(picture, Image.Image):
        return decode_image(_saved(picture, what), Path(what), config)
    remedy = "give one"
    if isinstance(picture, (bytes, bytearray)) or hasattr(picture, "read"):
        remedy = "open it with PIL.Image.open, bytes through io.BytesIO"
    raise _no_picture(what, type(picture).__name__, remedy)


def _saved(image: Image.Image, what: str) -> io.BytesIO:
    """Return an image as a file without compression."""
    stream = io.BytesIO()
    try:
        with _ONE_SAVING:
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = _orientation(image)
            _as_tiff_has_it(image).save(stream, "TIFF", exif=exif, compression="raw")
    except DECODE_ERRORS as error:
        found = f"a PIL image of mode {image.mode} that cannot be used ({error})"
        raise _no_picture(what, found, "give another") from error
    stream.seek(0)
    return stream


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1, upright, where the metadata cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DECODE_ERRORS:
        return 1


def _as_tiff_has_it(image: Image.Image) -> Image.Image:
    """Return an image in a mode that TIFF knows."""
    if image.mode == "HSV":
        return image.convert("RGB")
    if image.mode == "La":
        return image.convert("LA")
    transparent = image.mode in ("PA", "RGBa") or image.has_transparency_data
    return image.convert("RGBA") if transparent and image.mode not in ("LA", "RGBA") else image


def _image_of(picture: Any, what: str) -> Image.Image:
    """Return an array as a PIL image.

    Raises:
        DataError: another dtype or layout.
    """
    try:
        pixels = np.asarray(picture)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor on a GPU, or with a gradient
        found = f"{type(picture).__name__} ({error})"
        raise _no_picture(what, found, "give it as a NumPy array") from error
    found = f"{pixels.dtype} {pixels.shape}"
    if pixels.dtype != np.uint8:
        remedy = "give whole numbers from 0 to 255: (x * 255).round().astype(np.uint8) of 0 to 1"
        raise _no_picture(what, found, remedy)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    colour = pixels.ndim == 3 and pixels.shape[2] in (3, 4)
    if not pixels.size or not (pixels.ndim == 2 or colour):
        first = pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4)
        remedy = "move the channels last with x.transpose(1, 2, 0)" if first else "give one photo"
        raise _no_picture(what, found, remedy)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _no_picture(what: str, found: str, remedy: str) -> DataError:
    return DataError(
        f"{what}: expected a path, a PIL image or a uint8 array (H, W, 3) of RGB, found {found}; "
        f"{remedy}"
    )
