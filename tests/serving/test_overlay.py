from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import DataError
from microclip_deploy.serving.overlay import attention_map, overlay, photo_overlay


def grey_image(side: int = 64) -> NDArray[np.uint8]:
    return np.full((side, side, 3), 128, np.uint8)


def centre_mask(grid: int = 4) -> NDArray[np.bool_]:
    mask = np.zeros((grid, grid), np.bool_)
    mask[1:3, 1:3] = True
    return mask.ravel()


def test_the_outside_is_dimmed_and_the_inside_kept() -> None:
    picture = np.asarray(overlay(grey_image(), centre_mask(), scale=2))
    assert picture.shape == (128, 128, 3)
    assert (picture[64, 64] == 128).all()
    assert (picture[8, 8] < 60).all()


def test_the_border_of_the_mask_is_drawn_light() -> None:
    picture = np.asarray(overlay(grey_image(), centre_mask(), scale=2))
    assert (picture[32, 40:80] == 255).all()
    assert (picture[40:80, 32] == 255).all()


def test_a_whole_mask_leaves_the_image_alone() -> None:
    picture = overlay(grey_image(), np.ones(16, np.bool_), scale=1)
    assert (np.asarray(picture) == 128).all()


def test_attention_colours_its_peak() -> None:
    attention = np.zeros(17, np.float32)
    attention[5], attention[16] = 0.6, 0.4
    picture = np.asarray(overlay(grey_image(), np.ones(16, np.bool_), attention, 1)).astype(int)
    peak, far = picture[24, 24], picture[60, 60]
    assert peak[0] - peak[2] > 50
    assert far.max() - far.min() < 8


def test_attention_without_any_weight_draws_nothing_odd() -> None:
    picture = np.asarray(attention_map(grey_image(), np.full(17, np.nan, np.float32), 1))
    assert picture.std() == 0


def test_a_grid_that_does_not_divide_the_image_covers_it() -> None:
    picture = overlay(grey_image(50), np.ones(49, np.bool_), np.ones(50, np.float32), 3)
    assert picture.size == (150, 150)


@pytest.mark.parametrize(
    ("image", "mask", "attention"),
    [
        (np.zeros((8, 9, 3), np.uint8), np.ones(4, np.bool_), None),
        (np.zeros((8, 8, 3), np.float32), np.ones(4, np.bool_), None),
        (np.zeros((8, 8, 3), np.uint8), np.ones(5, np.bool_), None),
        (np.zeros((8, 8, 3), np.uint8), np.ones(4, np.uint8), None),
        (np.zeros((8, 8, 3), np.uint8), np.ones(4, np.bool_), np.ones(7, np.float32)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    image: NDArray[np.uint8], mask: NDArray[np.bool_], attention: NDArray[np.float32] | None
) -> None:
    with pytest.raises(DataError, match="expected"):
        overlay(image, mask, attention)


def preprocess(resize_mode: Literal["shortest", "longest", "squash"] = "shortest") -> Preprocess:
    return Preprocess(size=32, mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode=resize_mode)


def seen_share(resize_mode: Literal["shortest", "longest", "squash"]) -> float:
    """Return the share of a bright wide photo that stays bright under a mask of everything."""
    photo = Image.new("RGB", (400, 200), (200, 200, 200))
    box = preprocess(resize_mode).seen(photo.size)
    picture = np.asarray(photo_overlay(photo, box, np.ones(16, np.bool_)))
    assert picture.shape == (200, 400, 3)
    return float((picture[100] == 200).all(axis=1).mean())


def test_a_photo_is_dimmed_where_the_view_cut_it_off() -> None:
    assert seen_share("shortest") == pytest.approx(0.5, abs=0.02)
    assert seen_share("longest") == seen_share("squash") == 1


def test_a_photo_is_drawn_on_as_its_view_is() -> None:
    view, attention = grey_image(), np.arange(17, dtype=np.float32)
    photo = Image.fromarray(view).resize((128, 128))
    drawn = photo_overlay(photo, (0, 0, 128, 128), centre_mask(), attention)
    assert drawn.tobytes() == overlay(view, centre_mask(), attention, 2).tobytes()
