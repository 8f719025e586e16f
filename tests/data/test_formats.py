"""Formats: what is read where its plugin is there, and what other files are said to be."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from microclip_deploy.data import formats
from microclip_deploy.data.decode import BadImage, decode_image
from microclip_deploy.data.jpeg_xl import read_header

JXL_HEADERS = {
    "ff0a03070013880200b400b5": (24, 16, 1),
    "ff0a6002400c0013880200e4": (33, 77, 1),
    "ff0a7a3e1c00138802008c80": (3000, 2000, 1),
    "0000000c4a584c200d0a870a00000014667479706a786c20000000006a786c20000000cb6a786c63"
    "ff0af8be01001388020024c2": (640, 480, 1),
    "0000000c4a584c200d0a870a00000014667479706a786c20000000006a786c20000000136a786c7000000000"
    "ff0af83e0bc404000001e36a": (640, 480, 6),
    "0000000c4a584c200d0a870a000000016a786c6300000000000000cbff0af8be01001388020024c2": (
        640,
        480,
        1,
    ),
}
"""Starts of files that libjxl wrote: bare, in a box, in numbered boxes; the last one in a box with
a 64-bit size."""


def reason_of(content: bytes, name: str = "photo") -> str:
    with pytest.raises(BadImage) as caught:
        decode_image(io.BytesIO(content), Path(name))
    return caught.value.reason


@pytest.fixture
def without_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let nothing but Pillow's own formats be there."""
    own = tuple(each for each in formats.FORMATS if each.module.startswith("PIL."))
    monkeypatch.setattr(formats, "FORMATS", own)
    for cached in (formats.readable, formats.image_endings):
        cached.cache_clear()
    yield
    for cached in (formats.readable, formats.image_endings):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("start", "told"),
    [
        (b"\0\0\0\x18ftypheic", "HEIF: install microclip-deploy[photos]"),
        (b"\0\0\0\x18ftypmif1", "HEIF: install microclip-deploy[photos]"),
        (b"\xff\x0a\x03\x07", "JXL: install microclip-deploy[photos]"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL: install microclip-deploy[photos]"),
        (b"\0\0\0\x18ftypcrx ", "camera raw: develop to JPEG or TIFF"),
        (b"\0\0\0\x18ftypmp42", "a video"),
        (b"\x1aE\xdf\xa3", "a video"),
        (b"8BPS\0\x01", "a Photoshop file"),
        (b"%PDF-1.7", "a PDF"),
        (b"\0\0\0\x0cjP  \r\n", "JPEG 2000: convert it to PNG or JPEG"),
        (bytes(128) + b"DICM", "DICOM: convert it to PNG"),
        (b"\xef\xbb\xbf\n <SVG xmlns", "an SVG drawing: convert it to PNG"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"PK\x03\x04", "a zip archive: unpack it"),
        (b"hello", "no image of a known format: JPEG, PNG"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "a damaged JPEG file"),
    ],
)
@pytest.mark.usefixtures("without_plugins")
def test_what_is_not_read_is_named_by_its_content(start: bytes, told: str) -> None:
    assert reason_of(start).startswith(told)


@pytest.mark.parametrize("tag", [{254: 1}, {50706: 1}], ids=["smaller copy", "DNG"])
def test_thumbnails_in_raw_files_do_not_pass_for_photos(tag: dict[int, int]) -> None:
    content = io.BytesIO()
    Image.new("L", (8, 8)).save(content, "TIFF", tiffinfo=tag)
    assert reason_of(content.getvalue()) == formats.RAW


@pytest.mark.parametrize("ending", [".cr2", ".NEF", ".dng"])
def test_endings_of_raw_files_are_enough(ending: str) -> None:
    assert formats.kind_of(ending) == formats.RAW


@pytest.mark.parametrize("start", JXL_HEADERS)
def test_size_and_orientation_of_jpeg_xl_are_in_its_header(start: str) -> None:
    assert read_header(io.BytesIO(bytes.fromhex(start))) == JXL_HEADERS[start]


@pytest.mark.parametrize("start", ["", "ff0a", "0000000c4a584c200d0a870a", "00000001", "00"])
def test_what_has_no_header_of_jpeg_xl_is_refused(start: str) -> None:
    with pytest.raises(SyntaxError, match="no JPEG XL codestream"):
        read_header(io.BytesIO(bytes.fromhex(start)))


@pytest.mark.parametrize(("name", "plugin"), [("HEIF", "pillow_heif"), ("JXL", "pillow_jxl")])
@pytest.mark.parametrize("orientation", [1, 6])
def test_plugins_are_used_where_they_are_installed(
    name: str, plugin: str, orientation: int
) -> None:
    pytest.importorskip(plugin)
    assert name in formats.readable()
    exif = Image.Exif()
    exif[0x0112] = orientation
    shades = np.linspace(0, 255, 32 * 48).reshape(32, 48).astype(np.uint8)
    stored, content = Image.fromarray(shades).convert("RGB"), io.BytesIO()
    stored.save(content, name, exif=exif.tobytes())
    image = decode_image(content, Path("photo"))
    upright = stored.rotate({1: 0, 6: -90}[orientation], expand=True)
    assert image.size == upright.size
    assert np.abs(np.asarray(image, int) - np.asarray(upright, int)).mean() < 5
    assert reason_of(content.getvalue()[:60]) != ""
