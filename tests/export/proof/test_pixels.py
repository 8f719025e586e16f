"""The stage before the graphs: test views as Pillow and torchvision make them."""

import importlib.util
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.export.proof.parity import compare_pixels
from microclip_deploy.export.proof.probes import made_up_photos

if TYPE_CHECKING:
    from tests.export.conftest import Subject

PHOTOS = made_up_photos(32)
Wrong = Callable[[Image.Image], Image.Image]


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_the_right_pixels_are_equal(resize_mode: str, tiny: "Subject") -> None:
    preprocess = tiny.preprocess.model_copy(update={"resize_mode": resize_mode})
    views = PHOTOS.views(preprocess)
    stage = compare_pixels(PHOTOS.read(), views, preprocess)
    assert (stage.difference, stage.departs) == (0, False)


def squeezed(photo: Image.Image) -> Image.Image:
    return photo.resize((32, 32), Image.Resampling.BICUBIC)


def resized(side: int, how: Image.Resampling) -> Wrong:
    def resize(photo: Image.Image) -> Image.Image:
        short = min(photo.size)
        return photo.resize((side * photo.width // short, side * photo.height // short), how)

    return resize


def shifted(photo: Image.Image) -> Image.Image:
    right = Preprocess(size=32, mean=(0, 0, 0), std=(1, 1, 1)).resized(photo)
    return right.transform(right.size, Image.Transform.AFFINE, (1, 0, 1, 0, 1, 1))


BILINEAR = resized(32, Image.Resampling.BILINEAR)
ENLARGED = resized(36, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("wrong", [squeezed, shifted, BILINEAR, ENLARGED])
@pytest.mark.parametrize("installed", [True, False])
def test_wrong_preprocessing_departs(
    tiny: "Subject",
    wrong: Wrong,
    installed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not installed:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
        monkeypatch.setitem(sys.modules, "torchvision", None)

    def view(photo: Image.Image) -> NDArray[np.uint8]:
        made = wrong(photo)
        left, top = ((side - 32) // 2 for side in made.size)
        return np.array(made.crop((left, top, left + 32, top + 32)))

    views = np.stack([view(photo) for photo in PHOTOS.read()])
    assert compare_pixels(PHOTOS.read(), views, tiny.preprocess).departs


def test_a_mistake_in_our_own_preprocessing_departs_from_torchvision(tiny: "Subject") -> None:
    class Mistaken(Preprocess):
        def resized(self, image: Image.Image) -> Image.Image:
            return BILINEAR(image)

    mistaken = Mistaken(**tiny.preprocess.model_dump())
    assert compare_pixels(PHOTOS.read(), PHOTOS.views(mistaken), mistaken).departs
