"""Pictures in memory are read as the files they could be saved to; what is none is explained."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from microclip_deploy.data.decode import read_image
from microclip_deploy.data.picture import is_picture, read_picture
from microclip_deploy.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)
GREY16 = Image.fromarray(PIXELS[..., 0].astype(np.uint16) << 8)


def palette() -> Image.Image:
    """Return an image of which one colour is transparent."""
    image = RGB.quantize(8)
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize("image", [
    RGB, RGB.convert("L"), RGB.convert("1"), RGB.convert("LA"), RGB.convert("RGBA"), palette(),
    GREY16, GREY16.convert("I"),
], ids=lambda image: image.mode)  # fmt: skip
def test_a_picture_is_read_as_its_file(image: Image.Image, tmp_path: Path) -> None:
    if image.mode.endswith("A"):
        image.putalpha(RGB.getchannel("G"))
    saved = tmp_path / ("saved.tif" if image.mode == "I" else "saved.png")
    image.save(saved)
    wanted = np.asarray(read_image(saved))
    for picture in (image, Image.open(saved), saved, str(saved)):
        np.testing.assert_array_equal(np.asarray(read_picture(picture)), wanted)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBa", "PA"])
def test_modes_without_a_common_file_are_read_as_pillow_does(mode: str) -> None:
    image = RGB.convert("RGBA").convert(mode) if mode in ("RGBa", "PA") else RGB.convert(mode)
    np.testing.assert_array_equal(np.asarray(read_picture(image)), np.asarray(image.convert("RGB")))


def test_arrays_of_colours_and_greys_are_taken() -> None:
    read_only = PIXELS.copy()
    read_only.flags.writeable = False
    given: list[Any] = [read_only, np.asfortranarray(PIXELS), torch.from_numpy(PIXELS)]
    for array in given:
        np.testing.assert_array_equal(np.asarray(read_picture(array)), PIXELS)
    grey = PIXELS[..., :1]
    for array in (grey, grey[..., 0]):
        np.testing.assert_array_equal(np.asarray(read_picture(array)), grey.repeat(3, axis=2))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_picture_is_turned_as_its_file_is(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    RGB.save(tmp_path / "turned.png", exif=exif)
    found = np.asarray(read_picture(Image.open(tmp_path / "turned.png")))
    np.testing.assert_array_equal(found, np.asarray(read_image(tmp_path / "turned.png")))


def test_one_picture_may_be_read_by_several_threads() -> None:
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(read_picture, [RGB] * 64):
            assert found.size == RGB.size


def closed() -> Image.Image:
    image = RGB.copy()
    image.close()
    return image


def truncated() -> Image.Image:
    stream = io.BytesIO()
    RGB.resize((200, 200)).save(stream, "PNG")
    return Image.open(io.BytesIO(stream.getvalue()[:4000]))


@pytest.mark.parametrize(("wrong", "told"), [
    (None, "found NoneType"),
    (3, "found int"),
    ([PIXELS], "found list"),
    (b"\xff\xd8", "found bytes; open it with PIL.Image.open, bytes through io.BytesIO"),
    (io.BytesIO(), "found BytesIO; open it with PIL.Image.open"),
    (Path(), r"found the folder \.; give its files"),
    (PIXELS / 255, r"found float64 \(12, 20, 3\); give whole numbers from 0 to 255"),
    (torch.zeros(3, 8, 8, requires_grad=True), "found Tensor .*; give it as a NumPy array"),
    (PIXELS.transpose(2, 0, 1), r"found uint8 \(3, 12, 20\); move the channels last"),
    (PIXELS[None], r"found uint8 \(1, 12, 20, 3\); give one photo"),
    (PIXELS[:0], r"found uint8 \(0, 20, 3\); give one photo"),
    (closed(), "mode RGB that cannot be used"),
    (truncated(), "mode RGB that cannot be used .*truncated"),
    (RGB.convert("F"), "floating-point"),
    (PIXELS[:1], "a side is shorter"),
    (np.zeros((2, 500), np.uint8), "one side exceeds"),
])  # fmt: skip
def test_what_is_no_picture_is_explained(wrong: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_picture(wrong)


def test_one_picture_is_told_from_several() -> None:
    paths = np.array(["a.jpg", "b.jpg"])
    for one in (
        "a.jpg",
        Path("a.jpg"),
        RGB,
        PIXELS,
        PIXELS[..., 0],
        torch.zeros(3, 8, 8),
        b"",
        None,
    ):
        assert is_picture(one)
    for several in ([], ["a.jpg"], (RGB,), paths, PIXELS[None], iter("ab"), Path().glob("*")):
        assert not is_picture(several)
