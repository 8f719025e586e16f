"""Which image files are read, by what, and what other files are.

A file is known by its content; its ending only decides whether a search of folders looks at it.
Only the formats below are tried: each further decoder is attack surface. AVIF needs a Pillow that
was built with it, HEIC and JPEG XL need a plugin; the extra `photos` brings all three.
"""

import importlib
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import IO, NamedTuple

from PIL import Image, features
from PIL.ImageFile import ImageFile

from microclip_deploy.data.jpeg_xl import read_header

INSTALL = "install microclip-deploy[photos]"
"""What reads the formats that Pillow does not."""


class Format(NamedTuple):
    """A format that can be read once its module is there."""

    name: str
    """Pillow's."""
    module: str
    """Registers the format when it is imported."""
    endings: tuple[str, ...]
    """Of file names, in lower case."""


FORMATS = (
    Format("JPEG", "PIL.JpegImagePlugin", (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")),
    Format("PNG", "PIL.PngImagePlugin", (".png", ".apng")),
    Format("WEBP", "PIL.WebPImagePlugin", (".webp",)),
    Format("BMP", "PIL.BmpImagePlugin", (".bmp", ".dib")),
    Format("TIFF", "PIL.TiffImagePlugin", (".tif", ".tiff")),
    Format("GIF", "PIL.GifImagePlugin", (".gif",)),
    Format("PPM", "PIL.PpmImagePlugin", (".ppm", ".pgm", ".pbm", ".pnm")),
    Format("AVIF", "PIL.AvifImagePlugin", (".avif", ".avifs")),
    Format("HEIF", "pillow_heif.HeifImagePlugin", (".heic", ".heif", ".hif", ".heics", ".heifs")),
    Format("JXL", "pillow_jxl", (".jxl",)),
)
"""In the order in which they are tried."""

RAW = "camera raw: develop to JPEG or TIFF"
"""Many are TIFF files whose first page is a thumbnail, which must not pass for the photo."""

CONVERT = "convert to PNG or JPEG"

PHOTO_KINDS = (INSTALL, RAW, CONVERT)
"""Kinds of files that show something although they are not read."""

SIDE = "beside photos"
"""Files that nobody takes for photos."""

_ENDINGS = {
    RAW: "3fr arw cr2 cr3 crw dcr dng erf iiq kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 "
    "srf srw x3f",
    "video: extract frames": "3gp avi flv m2ts m4v mkv mov mp4 mpeg mpg mts webm wmv",
    "archive: unpack": "7z bz2 gz rar tgz xz zip",
    "archive: give it by itself": "arrow parquet tar",
    CONVERT: "ai cur dcm dds eps exr fit fits hdr icns ico j2k jp2 jpf jpx jxr "
    "kra pcx pdf pfm psb psd qoi sgi svg svgz tga wdp xbm xcf xpm",
    SIDE: "aae bib cfg csv db doc docx htm html ini json jsonl log md npy npz onnx pt py rst "
    "safetensors sh thm toml tsv txt url xls xlsx xml xmp yaml yml",
}
"""Kinds of files that are not read, and the endings of their names."""

_KIND_OF: Mapping[str, str] = {
    **{f".{ending}": kind for kind, endings in _ENDINGS.items() for ending in endings.split()},
    **{ending: INSTALL for kind in FORMATS for ending in kind.endings},
}

_SIGNATURES = (
    (0, b"8BPS", "a Photoshop file"),
    (0, b"%PDF", "a PDF"),
    (0, b"%!PS", "a PostScript file"),
    (0, b"PK\x03\x04", "a zip archive: unpack it"),
    (0, b"Rar!", "a rar archive: unpack it"),
    (0, b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (0, b"\x1f\x8b", "compressed by gzip: unpack it"),
    (0, b"\x1aE\xdf\xa3", "a video"),
    (8, b"AVI ", "a video"),
    (4, b"jP  ", "JPEG 2000: convert it to PNG or JPEG"),
    (0, b"\xffO\xffQ", "JPEG 2000: convert it to PNG or JPEG"),
    (0, b"\xff\n", "JXL"),
    (4, b"JXL ", "JXL"),
    (128, b"DICM", "DICOM: convert it to PNG"),
    (0, b"<svg", "an SVG drawing: convert it to PNG"),
    (0, b"<?xml", "XML text"),
    (0, b"<!doctype html", "a web page"),
    (0, b"<html", "a web page"),
    (0, b"{", "text"),
)
"""Offset, bytes and what they tell, of files that are often taken for photos; or a format."""

_BRANDS = {
    "AVIF": (b"avif", b"avis"),
    "HEIF": b"heic heix heim heis hevc hevx hevm hevs mif1 msf1".split(),
    RAW: (b"crx ",),
}
"""Of ISO media files, which are videos otherwise."""

_DNG_VERSION, _NEW_SUBFILE_TYPE = 50706, 254
"""TIFF tags; bit 0 of the second marks a page as a smaller copy of another."""


class NotRead(Exception):
    """A file is not read although its bytes may be in order; the text says why."""


@cache
def readable() -> tuple[str, ...]:
    """Return Pillow's names of the formats that can be read here, and load what reads them."""
    return tuple(kind.name for kind in FORMATS if _loaded(kind))


@cache
def image_endings() -> frozenset[str]:
    """Return the file name endings under which folders are searched, in lower case."""
    names = readable()
    return frozenset(ending for kind in FORMATS if kind.name in names for ending in kind.endings)


def recognised(start: bytes) -> Iterator[str]:
    """Yield the readable formats that a file of these first 16 bytes may have."""
    for name in readable():
        _, accepts = Image.OPEN[name]
        answer = accepts(start) if accepts is not None else True
        if answer and not isinstance(answer, str):  # a text says why not
            yield name


def opened(stream: IO[bytes], require_size: Callable[[int, int], None]) -> ImageFile:
    """Return an image whose pixels are not decoded yet.

    Unlike `Image.open`, which has a limit of its own that is global to the process.

    Args:
        stream: binary and seekable.
        require_size: called with width and height; what it raises leaves this function.

    Raises:
        NotRead: no image of a format that is read.
    """
    stream.seek(0)
    start, damaged = stream.read(132), ""
    for name in recognised(start[:16]):
        stream.seek(0)
        try:
            if name == "JXL":
                return _opened_jpeg_xl(stream, require_size)
            image = Image.OPEN[name][0](stream, "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            damaged = f"a damaged {name} file"
            continue
        require_size(*image.size)
        if start[8:10] == b"CR" or _is_preview(image):
            raise NotRead(RAW)
        return image
    known = f"no image of a known format: {', '.join(readable())}"
    raise NotRead(described(start) or damaged or known)


def kind_of(ending: str) -> str:
    """Return SIDE, or what makes photos of files of an ending; '' if that is not known."""
    return _KIND_OF.get(ending.lower(), "")


def described(start: bytes) -> str:
    """Say what a file is that no decoder takes, from its first 132 bytes; '' if unknown."""
    if start[4:8] == b"ftyp":
        brand = start[8:12]
        told = next((name for name, brands in _BRANDS.items() if brand in brands), "a video")
    else:
        text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        told = next(
            (
                what
                for offset, mark, what in _SIGNATURES
                if start[offset:].startswith(mark) or (offset == 0 and text.startswith(mark))
            ),
            "",
        )
    if told in ("AVIF", "HEIF", "JXL"):
        return f"a damaged {told} file" if told in readable() else f"{told}: {INSTALL}"
    return told


def _opened_jpeg_xl(stream: IO[bytes], require_size: Callable[[int, int], None]) -> ImageFile:
    """Open a JPEG XL file, which decodes it; its size is checked before."""
    header = read_header(stream)
    require_size(header.width, header.height)
    stream.seek(0)
    image = Image.OPEN["JXL"][0](stream, "")
    if header.orientation > 1 and not getattr(image, "jpeg", None):
        image.info.pop("exif", None)  # the decoder has turned it upright
    return image


def _is_preview(image: ImageFile) -> bool:
    """Say whether the first page of a TIFF is a thumbnail, as in the raw files of cameras."""
    tags = getattr(image, "tag_v2", {})
    return _DNG_VERSION in tags or bool(tags.get(_NEW_SUBFILE_TYPE, 0) & 1)


def _loaded(kind: Format) -> bool:
    """Import what reads a format; say whether it is there and works."""
    try:
        importlib.import_module(kind.module)
    except ImportError:
        return False
    feature = kind.name.lower()
    return kind.name in Image.OPEN and (
        feature not in features.modules or features.check(feature) is True
    )
