"""Safe decoding of image files that nobody has looked at.

A folder of photos holds truncated downloads, renamed text files, header bombs and odd pixel
formats. `read_image` turns every usable one into plain 8-bit RGB and every other one into a
`BadImage` with a short reason; nothing else escapes. Its rules:

* Limits (pixels, file size, aspect ratio) are checked before pixels are allocated.
* Above FULL_PIXELS a photo is decoded at half its size, or a quarter, and one at a time, so that
  memory stays bounded.
* The EXIF orientation is applied; an unreadable EXIF block is ignored.
* Of an animation the first frame is taken, of a file of several pages the first page.
* A JPEG whose end is missing is read if nearly all of its pixels are there.

`formats` says what is read, `pixels` how numbers of any kind become 8-bit RGB.
"""

import io
import logging
import re
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import IO, cast

from PIL import ExifTags, Image, ImageChops
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from microclip_deploy.data import archive, formats
from microclip_deploy.data.photo import MAX_PIXELS, USUAL, Kind, Photo, PhotoConfig, Remark
from microclip_deploy.data.pixels import (
    Samples,
    eight_bits,
    has_transparency,
    is_deep,
    on_background,
)
from microclip_deploy.errors import DataError, printable
from microclip_deploy.paths import StrPath, as_path

_log = logging.getLogger(__name__)

FULL_PIXELS = 50_000_000
"""Up to this width x height a photo is decoded in full: the pixels are those of open_clip."""

MIN_FILE_LIMIT = 100_000_000
"""Bytes that a file may always have: metadata is read into memory before any pixel."""

BYTES_A_PIXEL = 8
"""What a file may have for each pixel of the limit: four channels of 16 bits."""

MAX_ASPECT_RATIO = 100
"""Largest long side / short side; resizing the short side multiplies the area by up to this."""

MIN_SIDE = 2
"""Smallest side, pixels: one pixel carries nothing to learn from."""

MOST_MISSING = 0.01
"""Share of the pixels that a JPEG may lack at its end."""

_JPEG_END = b"\xff\xd9"
_JPEG_NOISE = bytes(97 * i % 255 for i in range(255))  # no 255, which begins a marker

_ONE_LARGE_PHOTO = threading.Lock()
"""Held while a photo above FULL_PIXELS is decoded, which may take 1 to 3 GB."""
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


def read_image(
    path: StrPath,
    *,
    max_pixels: int = MAX_PIXELS,
    bit_depth: int | None = None,
    background: str = "white",
) -> Image.Image:
    """Return the first frame of an image file, upright, as 8-bit RGB without metadata.

    Args:
        path: the file.
        max_pixels: largest accepted width x height, checked in the header.
        bit_depth: as in `PhotoConfig`.
        background: as in `PhotoConfig`.

    Raises:
        BadImage: the file cannot be opened, is no accepted image, is damaged or exceeds a limit.
        UsageError: not a path, or a setting out of range.
    """
    path = as_path(path, "image")
    config = PhotoConfig.of(max_pixels=max_pixels, bit_depth=bit_depth, background=background)
    photo = read_photo(path, config)
    for remark in photo.remarks:
        level = logging.WARNING if remark.kind is Kind.SHALLOW else logging.INFO
        _log.log(level, "warning: %s", remark.line(path))
    return photo.image


def read_photo(path: Path, config: PhotoConfig) -> Photo:
    """Return what `read_image` does, with what is remarkable; raises BadImage as it does.

    Raises:
        EnvironmentProblem: the path leads into an object store, which cannot be reached.
    """
    with opened_photo(path, config) as stream:
        return decode_photo(stream, path, config)


@contextmanager
def opened_photo(path: Path, config: PhotoConfig) -> Iterator[IO[bytes]]:
    """Give a photo's bytes, wherever its path leads; raises as `read_photo`."""
    try:
        member = archive.find(path)
        require_bytes(_size(path) if member is None else member.size, path, config)
        if formats.kind_of(path.suffix) == formats.RAW:
            raise BadImage(path, formats.RAW)
        with path.open("rb") if member is None else member.open() as stream:
            yield stream
    except (OSError, ValueError) as error:
        raise BadImage(path, _reason(error)) from error


def require_bytes(size: int, path: Path, config: PhotoConfig) -> None:
    """Refuse an encoded image for its size in bytes, before any of it is looked at.

    Raises:
        BadImage: empty, or above the limit.
    """
    if size == 0:
        raise BadImage(path, "the file is empty")
    limit = max(MIN_FILE_LIMIT, BYTES_A_PIXEL * config.max_pixels)
    if size > limit:
        raise BadImage(path, f"{size} bytes exceed the limit of {limit}")


def _size(path: Path) -> int:
    status = path.stat()
    # A named pipe would block and a device would never end, so the kind is checked first.
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise BadImage(path, f"it is {kind}")
    return status.st_size


def decode_image(stream: IO[bytes], path: Path, config: PhotoConfig = USUAL) -> Image.Image:
    """Return the picture of `decode_photo`, and raise as it does."""
    return decode_photo(stream, path, config).image


def decode_photo(
    stream: IO[bytes], path: Path, config: PhotoConfig, enough: int | None = None
) -> Photo:
    """Return an open, seekable image as `read_photo` does.

    Args:
        stream: binary and seekable, such as a file or io.BytesIO of an uploaded body, whose size
            the caller has bounded.
        path: the name used in errors.
        config: how it is read.
        enough: a short side, pixels, that a JPEG need not exceed: it is decoded at the half, a
            quarter or an eighth of its size where this leaves as much. None: in full.

    Raises:
        BadImage: no accepted image, damaged, or larger than a limit.
    """
    try:
        with _PILLOW_WARNINGS_HIDDEN:
            try:
                return _decode(stream, config, enough)
            except ValueError as error:
                # Pillow refuses compressed PNG metadata that grows beyond 1 MiB, such as a large
                # colour profile. None of it is needed, so such a file is read without it.
                if "MAX_TEXT" not in str(error):
                    raise
                return _decode(_without_png_metadata(stream), config, enough)
            except OSError as error:
                if "truncated" not in str(error):
                    raise
                return _decode_unended(stream, config, error)
    except (formats.NotRead, *DECODE_ERRORS) as error:
        raise BadImage(path, _reason(error)) from error


def _decode(stream: IO[bytes], config: PhotoConfig, enough: int | None = None) -> Photo:
    """Decode for `decode_photo`; raises NotRead on a limit and any decode error on damage."""
    require_size = partial(_require_size, config.max_pixels)
    image = formats.opened(stream, require_size)
    samples, factor = Samples.of(image), _reduction(*image.size)
    with _ONE_LARGE_PHOTO if factor > 1 else nullcontext():
        # Before the orientation is read: Pillow applies a TIFF's own while loading.
        scale = _load(image, factor, enough)
        pixels, bits = eight_bits(
            image,
            samples,
            config.bit_depth,
            lambda rawmode: _loaded_as(rawmode, formats.opened(stream, require_size)),
        )
        pixels = _reduced(pixels, max(1, factor // scale))
    depends = is_deep(image, samples) or has_transparency(pixels)
    rgb = on_background(pixels, config.background)
    transpose = _TRANSPOSE.get(_orientation(image))
    if transpose is not None:
        rgb = rgb.transpose(transpose)
    rgb.info = {}
    found = {
        Remark(Kind.SHALLOW, bits): bits > 0,
        Remark(Kind.FIRST_FRAME): _has_more_frames(image),
        Remark(Kind.REDUCED): factor > 1,
    }
    return Photo(rgb, tuple(remark for remark, true in found.items() if true), depends)


def _reduction(width: int, height: int) -> int:
    """Return the power of two by which both sides are divided so that FULL_PIXELS suffice."""
    factor = 1
    while width * height > FULL_PIXELS * factor**2:
        factor *= 2
    return factor


def _reduced(image: Image.Image, factor: int) -> Image.Image:
    """Return the means of squares of `factor` x `factor` pixels."""
    if factor == 1:
        return image
    by_index = image.mode in ("1", "P", "PA") or "transparency" in image.info
    return (image.convert("RGBA") if by_index else image).reduce(factor)


def _load(image: ImageFile, factor: int, enough: int | None) -> int:
    """Decode the pixels; return by how much both sides are divided already.

    JPEG holds its pixels by frequency, and so gives a half, a quarter or an eighth for less.
    """
    scale = min(factor, 8) if isinstance(image, JpegImageFile) else 1
    while enough and isinstance(image, JpegImageFile) and scale < 8:
        if min(image.size) < 2 * scale * enough:
            break
        scale *= 2
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    image.load()
    return scale


def _loaded_as(rawmode: str, image: ImageFile) -> ImageFile:
    """Decode the pixels, taking the file's numbers for those of another of Pillow's raw modes."""
    image.tile = [
        tile._replace(args=(rawmode, *tile.args[1:]) if isinstance(tile.args, tuple) else rawmode)
        for tile in image.tile
    ]
    image.load()
    return image


def _has_more_frames(image: ImageFile) -> bool:
    """Say whether there is more than was read; of the phones' MPO files only the first counts."""
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except DECODE_ERRORS:
        return True


def _decode_unended(stream: IO[bytes], config: PhotoConfig, error: OSError) -> Photo:
    """Decode a JPEG without its end, if nearly all of it is there; otherwise raise the error.

    Decoders go on with grey where the bytes end, and do not say where that begins. So the file is
    decoded twice, completed in two ways: the pixels that differ are made up.
    """
    stream.seek(0)
    content = stream.read()
    if not content.startswith(b"\xff\xd8"):
        raise error
    noise = _JPEG_NOISE * (len(content) // len(_JPEG_NOISE) + 1)
    photo, other = (_decode(io.BytesIO(content + end + _JPEG_END), config) for end in (b"", noise))
    left, top, right, bottom = ImageChops.difference(photo.image, other.image).getbbox() or [0] * 4
    if (right - left) * (bottom - top) > MOST_MISSING * photo.image.width * photo.image.height:
        raise error
    return photo._replace(remarks=(Remark(Kind.UNENDED), *photo.remarks))


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


def _require_size(max_pixels: int, width: int, height: int) -> None:
    """Refuse an image of a size that is not used.

    Raises:
        NotRead: too many pixels, or too long or too small a side.
    """
    short, long = sorted((width, height))
    size = f"{width}x{height} pixels"
    if width * height > max_pixels:
        raise formats.NotRead(f"{size} exceed the limit of {max_pixels} pixels (--max-pixels)")
    if short < MIN_SIDE:
        raise formats.NotRead(f"{size}, a side is shorter than {MIN_SIDE}")
    if long > MAX_ASPECT_RATIO * short:
        raise formats.NotRead(f"{size}, one side exceeds {MAX_ASPECT_RATIO} times the other")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation 1..8; 1, upright, when there is none that can be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS:
        # The pixels are good, so damaged metadata is no reason to lose the image.
        return 1
    return value if isinstance(value, int) else 1


def _reason(error: BaseException) -> str:
    """Return one short line for what opening or decoding raised."""
    if isinstance(error, formats.NotRead):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return "the header declares more pixels than Pillow decodes"
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
