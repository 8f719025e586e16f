"""Safe decoding of image files that nobody has looked at.

A folder of photos holds truncated downloads, renamed text files, header bombs and odd pixel
formats. `read_image` turns every usable one into plain 8-bit RGB and every other one into a
`BadImage` with a short reason; nothing else escapes. Its rules:

* Only the formats in ACCEPTED_FORMATS are tried: each further decoder is attack surface.
* Limits (pixels, file size, aspect ratio) are checked before pixels are allocated.
* The EXIF orientation is applied; an unreadable EXIF block is ignored.
* Of an animation the first frame is taken.
* Alpha is dropped, not composited: `convert("RGB")` is what CLIP models were trained with.
* 16-bit grey keeps its high byte, as Pillow does for 16-bit colour. Clipping, Pillow's default,
  would turn most such images white.
"""

import io
import re
import stat
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from microclip_deploy.errors import DataError, printable
from microclip_deploy.paths import StrPath, as_path

ACCEPTED_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""Pillow's names of the formats that are decoded."""

IMAGE_SUFFIXES = frozenset(
    {
        ".bmp",
        ".dib",
        ".gif",
        ".jfif",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".mpo",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    }
)
"""Lower-case file name endings under which a folder is searched for images."""

MAX_PIXELS = 50_000_000
"""Default largest width x height; covers the cameras of phones (48 million)."""

MAX_FILE_BYTES = 100_000_000
"""Largest file that is opened: metadata is read into memory before any pixel."""

MAX_ASPECT_RATIO = 100
"""Largest long side / short side; resizing the short side multiplies the area by up to this."""

MIN_SIDE = 2
"""Smallest side, pixels: one pixel carries nothing to learn from."""

# What Pillow's decoders raise on damaged input (found by mutating valid files); a decoder may also
# raise Pillow's DecompressionBombError, which derives from Exception alone.
DECODE_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    Image.DecompressionBombError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(DataError):
    """One file cannot be used as an image; `path` and `reason` say which and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{printable(path)}: expected a readable image, found a file that cannot be used "
            f"({reason}); repair or remove it"
        )
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type["BadImage"], tuple[Path, str]]:
        """Rebuild from both arguments, so that the error survives a process boundary."""
        return BadImage, (self.path, self.reason)


def read_image(path: StrPath, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the first frame of an image file, upright, as 8-bit RGB without metadata.

    Args:
        path: the file.
        max_pixels: largest accepted width x height, checked in the header.

    Raises:
        BadImage: the file cannot be opened, is no accepted image, is damaged or exceeds a limit.
        UsageError: not a path.
    """
    path = as_path(path, "image")
    try:
        status = path.stat()
        # A named pipe would block and a device would never end, so the kind is checked first.
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise BadImage(path, f"it is {kind}")
        if status.st_size == 0:
            raise BadImage(path, "the file is empty")
        if status.st_size > MAX_FILE_BYTES:
            raise BadImage(path, f"{status.st_size} bytes exceed the limit of {MAX_FILE_BYTES}")
        with path.open("rb") as stream:
            return decode_image(stream, path, max_pixels=max_pixels)
    except (OSError, ValueError) as error:
        raise BadImage(path, _reason(error)) from error


def decode_image(stream: IO[bytes], path: Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the first frame of an open, seekable image as `read_image` does.

    Args:
        stream: binary and seekable, such as a file or io.BytesIO of an uploaded body, whose size
            the caller has bounded.
        path: the name used in errors.
        max_pixels: largest accepted width x height, checked in the header.

    Raises:
        BadImage: no accepted image, damaged, or larger than a limit.
    """
    try:
        with _PILLOW_WARNINGS_HIDDEN:
            try:
                return _decode(stream, path, max_pixels)
            except ValueError as error:
                # Pillow refuses compressed PNG metadata that grows beyond 1 MiB, such as a large
                # colour profile. None of it is needed, so such a file is read without it.
                if "MAX_TEXT" not in str(error):
                    raise
                return _decode(_without_png_metadata(stream), path, max_pixels)
    except DECODE_ERRORS as error:
        raise BadImage(path, _reason(error)) from error


def _decode(stream: IO[bytes], path: Path, max_pixels: int) -> Image.Image:
    """Decode for `decode_image`; raises BadImage on a limit and any decode error on damage."""
    image = Image.open(stream, formats=ACCEPTED_FORMATS)
    refusal = _refusal(*image.size, max_pixels)
    if refusal:
        raise BadImage(path, refusal)
    # Before the orientation is read: Pillow applies a TIFF's own while loading.
    image.load()
    transpose = _TRANSPOSE.get(_orientation(image))
    rgb = _to_rgb(image)
    if transpose is not None:
        rgb = rgb.transpose(transpose)
    rgb.info = {}
    return rgb


def _without_png_metadata(stream: IO[bytes]) -> io.BytesIO:
    """Return a PNG file without its text and colour profile chunks."""
    stream.seek(0)
    kept = io.BytesIO()
    kept.write(stream.read(8))
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"iCCP", b"iTXt", b"tEXt", b"zTXt"):
            stream.seek(length + 4, io.SEEK_CUR)
        else:
            kept.write(head + stream.read(length + 4))
    kept.seek(0)
    return kept


def _refusal(width: int, height: int, max_pixels: int) -> str:
    """Return why an image of this size is not used, or '' if it is."""
    short, long = sorted((width, height))
    if width * height > max_pixels:
        return f"{width}x{height} pixels exceed the limit of {max_pixels} pixels"
    if short < MIN_SIDE:
        return f"{width}x{height} pixels, a side is shorter than {MIN_SIDE}"
    if long > MAX_ASPECT_RATIO * short:
        return f"{width}x{height} pixels, one side exceeds {MAX_ASPECT_RATIO} times the other"
    return ""


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation 1..8; 1, upright, when there is none that can be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS:
        # The pixels are good, so damaged metadata is no reason to lose the image.
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return a new RGB image of the loaded pixels.

    Raises:
        ValueError: the pixel type has no defined white level.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white level")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise ValueError("pixels of more than 16 bits have no defined white level")
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    """Return one short line for what opening or decoding raised."""
    if isinstance(error, UnidentifiedImageError):
        return f"no image of a known format: {', '.join(ACCEPTED_FORMATS)}"
    if isinstance(error, Image.DecompressionBombError):
        return "the header declares more pixels than the limit"
    if isinstance(error, MemoryError):
        return "decoding needs more memory than there is"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, OSError) and "truncated" in str(error).lower():
        return "the file is truncated"
    return printable(f"it cannot be decoded: {error}")[:160]


class _PillowWarningsHidden:
    """Context manager that hides Pillow's own warnings while any thread is inside.

    Pillow warns about large images and damaged metadata. Both are handled here, and a caller that
    turns warnings into errors must not see them. `warnings.catch_warnings` is unsafe in threads:
    its exit restores a copy that may be another thread's. One filter is added and removed instead.
    """

    _FILTER = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._FILTER not in warnings.filters:
                self._filters().insert(0, self._FILTER)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._FILTER in warnings.filters:
                self._filters().remove(self._FILTER)

    @staticmethod
    def _filters() -> list[object]:
        """Return the list behind `warnings.filters`, which the type stubs call a sequence."""
        return cast("list[object]", warnings.filters)


_PILLOW_WARNINGS_HIDDEN = _PillowWarningsHidden()
