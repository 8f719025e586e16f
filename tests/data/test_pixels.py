"""Files of 16 bits a channel: how many of them hold data, and what becomes of them."""

import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from microclip_deploy.data.decode import BadImage, read_image, read_photo
from microclip_deploy.data.photo import USUAL, Kind, Remark, Remarks
from microclip_deploy.errors import UsageError

COLOUR_TYPES = {"L": 0, "RGB": 2, "LA": 4, "RGBA": 6}


def png16(values: NDArray[np.integer], mode: str) -> bytes:
    """Return a PNG file of 16 bits a channel; Pillow writes grey ones only."""
    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, COLOUR_TYPES[mode], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def ramp(bits: int, mode: str, alpha: int) -> NDArray[np.integer]:
    """Return values from 0 to the largest of `bits`, opaque."""
    grey = np.arange(64).reshape(4, 16) * (2**bits - 1) // 63
    channels = [grey] * len(mode.removesuffix("A")) + [np.full_like(grey, alpha)] * ("A" in mode)
    return np.stack(channels, -1).squeeze()


@pytest.mark.parametrize("alpha", ["full", "shallow"])
@pytest.mark.parametrize("mode", COLOUR_TYPES)
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_shallow_data_is_noticed_and_read_by_the_bit_depth(
    tmp_path: Path, bits: int, mode: str, alpha: str
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png16(ramp(bits, mode, 2**bits - 1 if alpha == "shallow" else 65535), mode))
    remarks = read_photo(path, USUAL).remarks
    assert remarks == ((Remark(Kind.SHALLOW, bits),) if bits < 16 else ())
    shades = np.asarray(read_image(path, bit_depth=bits))
    expected = ramp(bits, "L", 0) >> (bits - 8)
    np.testing.assert_array_equal(shades, np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_values_beyond_the_bit_depth_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png16(ramp(16, mode, 0), mode))
    with pytest.raises(BadImage, match="do not fit into --bit-depth 12"):
        read_image(path, bit_depth=12)


def test_files_that_tell_their_white_need_no_bit_depth(tmp_path: Path) -> None:
    values = ramp(12, "L", 0)
    (tmp_path / "a.pgm").write_bytes(b"P5 16 4 4095\n" + values.astype(">u2").tobytes())
    photo = read_photo(tmp_path / "a.pgm", USUAL)
    assert photo.remarks == ()
    assert np.asarray(photo.image).max() == 255


@pytest.mark.parametrize(("planes", "shade"), [(1, (85, 0, 255)), (2, None)])
def test_colours_of_sixteen_bits_in_tiff_files(
    tmp_path: Path, planes: int, shade: tuple[int, ...] | None
) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.update({256: 2, 257: 2, 258: (16,) * 3, 259: 1, 262: 2, 277: 3, 278: 2, 284: planes})
    tags.update({273: 0, 279: 24})  # Pillow adds where the tags end
    numbers = np.array([0x5511, 0, 0xFF22] * 4, "<u2").tobytes()
    (tmp_path / "a.tif").write_bytes(b"II*\0\x08\0\0\0" + tags.tobytes(8) + numbers)
    if shade:
        assert read_image(tmp_path / "a.tif").getpixel((1, 1)) == shade
    else:  # Pillow would take the bytes of one number for two
        with pytest.raises(BadImage, match="interleave them"):
            read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_eight_bits_and_black_photos_are_no_reason_to_warn(tmp_path: Path, kind: str) -> None:
    for name, image in (
        ("eight", Image.new("RGB", (4, 4), (3, 3, 3))),
        ("black", Image.fromarray(np.zeros((4, 4), np.uint16))),
    ):
        image.save(tmp_path / name, kind)
        assert read_photo(tmp_path / name, USUAL).remarks == ()
        assert read_image(tmp_path / name, bit_depth=10).getpixel((0, 0)) in ((3, 3, 3), (0, 0, 0))


def test_remarks_are_one_line_a_kind_and_logged_for_one_photo(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remarks = Remarks()
    for name in ("b.png", "a.png"):
        Image.fromarray(ramp(10, "L", 0).astype(np.uint16)).save(tmp_path / name)
        remarks.add(tmp_path / name, read_photo(tmp_path / name, USUAL).remarks)
    (line,) = remarks.lines()
    assert line.startswith("16-bit photos with no value above 1023, read as nearly black: 2, such")
    assert line.endswith("b.png; if white is 1023 in them, give --bit-depth 10")
    with caplog.at_level(logging.WARNING):
        read_image(tmp_path / "a.png")
    assert "give --bit-depth 10" in caplog.text


@pytest.mark.parametrize("setting", [{"bit_depth": 7}, {"bit_depth": 17}, {"max_pixels": 0}])
def test_settings_out_of_range_are_usage_errors(tmp_path: Path, setting: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(setting))}: expected another value"):
        read_image(tmp_path / "any.png", **setting)  # type: ignore[arg-type]
