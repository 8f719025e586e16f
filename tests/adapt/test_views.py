"""Views follow the paper's transforms and depend on nothing but seed, epoch and image."""

import math
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from timm.data.auto_augment import AugmentOp, rand_augment_transform

from microclip_deploy.adapt import views
from microclip_deploy.adapt.views import (
    Operation,
    ViewConfig,
    augmented,
    draw_cuts,
    make_views,
    randaugment_names,
    view_generator,
)
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import UsageError

Drawn = tuple[Operation, ...]
SIZE = 32
CLIP = Preprocess(size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
PAPER = ViewConfig()
PLAIN = ViewConfig(randaugment="", flip=0.0)
SHAPES = [(2, 2), (2, 3), (200, 2), (2, 200), (32, 32), (33, 32), (90, 61)]


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def windows(image: Image.Image) -> set[bytes]:
    """Every S x S window of an image, as bytes."""
    pixels = np.asarray(image)
    every = np.lib.stride_tricks.sliding_window_view(pixels, (SIZE, SIZE, 3))
    return {window.tobytes() for window in every.reshape(-1, SIZE, SIZE, 3)}


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_views_have_their_shapes_for_tiny_wide_and_tall_images(width: int, height: int) -> None:
    for index in range(5):
        made = make_views(noise(width, height), view_generator(0, 0, index), CLIP, PAPER)
        assert made.weak.shape == made.strong.shape == (SIZE, SIZE, 3)
        assert made.crops.shape == (8, SIZE, SIZE, 3)
        assert made.weak.dtype == made.strong.dtype == made.crops.dtype == np.uint8


@pytest.mark.parametrize(("width", "height"), [(33, 32), (50, 70), (90, 61), (32, 32)])
def test_weak_view_is_some_window_of_the_resized_image(width: int, height: int) -> None:
    image = noise(width, height)
    possible = windows(CLIP.resized(image))
    seen = {
        make_views(image, view_generator(0, 0, i), CLIP, PLAIN).weak.tobytes() for i in range(40)
    }
    assert seen <= possible
    assert len(seen) >= min(len(possible), 4)


def test_weak_view_reaches_both_ends() -> None:
    image = noise(34, 32)
    pixels = np.asarray(image)
    seen = {
        make_views(image, view_generator(0, 0, i), CLIP, PLAIN).weak.tobytes() for i in range(40)
    }
    assert seen == {np.ascontiguousarray(pixels[:, i : i + SIZE]).tobytes() for i in range(3)}


@pytest.mark.parametrize("resize_mode", ["longest", "squash"])
def test_models_that_see_the_whole_image_get_it_as_weak_view(resize_mode: str) -> None:
    preprocess = CLIP.model_copy(update={"resize_mode": resize_mode, "fill_color": 9})
    image = noise(90, 40)
    made = make_views(image, view_generator(0, 0, 0), preprocess, PLAIN)
    np.testing.assert_array_equal(made.weak, preprocess.test_view(image))
    assert {crop.shape for crop in made.crops} == {(SIZE, SIZE, 3)}


def test_crops_are_squares_of_the_original_within_the_bounds_of_the_side() -> None:
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(200), np.arange(120))
    image = Image.fromarray(np.stack([x, y, x], -1).astype(np.uint8))
    sides, lefts = [], []
    for _ in range(500):
        crop = image.crop(views._random_square(image.size, rng, (0.5, 0.9)))
        assert crop.width == crop.height
        left, top, _ = np.asarray(crop)[0, 0]
        assert np.asarray(crop)[-1, -1].tolist()[:2] == [
            left + crop.width - 1,
            top + crop.width - 1,
        ]
        sides.append(crop.width)
        lefts.append(left / (200 - crop.width))
    assert 60 <= min(sides) < 64
    assert 104 < max(sides) < 108
    # Standard error of a uniform mean over 500 draws is 0.013.
    assert abs(np.mean(lefts) - 0.5) < 0.05


def test_crop_view_equals_crop_then_resize() -> None:
    image = noise(80, 60)
    made = make_views(image, view_generator(0, 0, 0), CLIP, ViewConfig(crop_side=(1, 1)))
    possible = {CLIP.resized(image.crop((left, 0, left + 60, 60))).tobytes() for left in range(21)}
    assert {crop.tobytes() for crop in made.crops} <= possible


def test_strong_box_has_the_drawn_area_and_ratio() -> None:
    rng = np.random.default_rng(0)
    areas, log_ratios = [], []
    for _ in range(2000):
        left, top, right, bottom = views._random_resized_box(400, 300, rng, PAPER)
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300
        areas.append((right - left) * (bottom - top) / 120_000)
        log_ratios.append(math.log((right - left) / (bottom - top)))
    assert 0.29 < min(areas) < 0.32
    assert max(areas) <= 1
    assert -0.3 < min(log_ratios) < -0.25  # log(3/4) = -0.288, rounding of the sides
    assert 0.25 < max(log_ratios) < 0.3


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [(1000, 10, (493, 0, 506, 10)), (10, 1000, (0, 493, 10, 506)), (2, 60, (0, 28, 2, 31))],
)
def test_strong_box_of_an_extreme_image_is_the_centre(
    width: int, height: int, box: tuple[int, int, int, int]
) -> None:
    assert views._random_resized_box(width, height, np.random.default_rng(0), PAPER) == box


def test_strong_view_without_augmentation_is_the_resized_box() -> None:
    image = noise(70, 50)
    config = ViewConfig(strong_scale=(1, 1), strong_ratio=(1.4, 1.4), flip=1.0, randaugment="")
    strong = make_views(image, view_generator(0, 0, 0), CLIP, config).strong
    expected = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(strong, np.asarray(expected)[:, ::-1])


def test_flip_has_its_probability() -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, :20] = 255
    image = Image.fromarray(pixels)
    config = ViewConfig(strong_scale=(1, 1), strong_ratio=(1, 1), randaugment="", crops=1)
    flipped = [
        make_views(image, view_generator(0, 0, i), CLIP, config).strong[0, 0, 0] == 0
        for i in range(400)
    ]
    assert 160 <= sum(flipped) <= 240  # four standard deviations


def same(a: views.Views, b: views.Views) -> list[bool]:
    return [np.array_equal(x, y) for x, y in zip(a, b, strict=True)]


def test_views_depend_on_seed_epoch_and_index_alone() -> None:
    image = noise(90, 61)
    first = make_views(image, view_generator(1, 2, 3), CLIP, PAPER)
    random.seed(99)
    np.random.seed(99)
    assert all(same(first, make_views(image, view_generator(1, 2, 3), CLIP, PAPER)))
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        again = make_views(image, view_generator(*other), CLIP, PAPER)
        # Not the weak view: it has so few possible places that two often agree.
        assert same(first, again)[1:] == [False, False]


def test_number_of_crops_leaves_the_other_views_as_they_are() -> None:
    image = noise(90, 61)
    eight = make_views(image, view_generator(0, 0, 0), CLIP, PAPER)
    two = make_views(image, view_generator(0, 0, 0), CLIP, ViewConfig(crops=2))
    np.testing.assert_array_equal(eight.strong, two.strong)
    np.testing.assert_array_equal(eight.crops[:2], two.crops)


def test_first_image_does_not_share_the_stream_that_shuffles() -> None:
    shuffle = np.random.default_rng([3, 1]).integers(2**32, size=4)
    assert not np.array_equal(view_generator(3, 1, 0).integers(2**32, size=4), shuffle)


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each operation was drawn (name) and applied (name + '!')."""
    counts: Counter[str] = Counter()
    original: Callable[[AugmentOp, Drawn], Drawn] = AugmentOp.__call__

    def counted(operation: AugmentOp, before: Drawn) -> Drawn:
        counts[operation.name] += 1
        result = original(operation, before)
        # timm returns what it was given when the operation's coin says no.
        counts[operation.name + "!"] += result is not before
        return result

    monkeypatch.setattr(AugmentOp, "__call__", counted)
    return counts


def test_randaugment_draws_two_of_fifteen_and_applies_each_with_half(
    applied: Counter[str],
) -> None:
    for index in range(1500):
        draw_cuts((SIZE, SIZE), view_generator(0, 0, index), CLIP, PAPER)
    names = randaugment_names(PAPER.randaugment)
    assert len(names) == 15
    assert sum(applied[name] for name in names) == 3000
    for name in names:
        assert 140 <= applied[name] <= 260  # 200 +- four standard deviations
        assert 0.35 <= applied[name + "!"] / applied[name] <= 0.65


def test_randaugment_draws_only_from_the_given_operations(applied: Counter[str]) -> None:
    chosen = ("ColorIncreasing", "AutoContrast")
    config = ViewConfig(randaugment_ops=chosen)
    for index in range(50):
        draw_cuts((40, 40), view_generator(0, 0, index), CLIP, config)
    assert {name for name in applied if not name.endswith("!")} == set(chosen)


def test_randaugment_is_the_transform_of_timm_with_a_black_border() -> None:
    parameters = {
        "translate_const": int(SIZE * 0.45),
        "img_mean": (0, 0, 0),
        "interpolation": Image.Resampling.BICUBIC,
    }
    reference = rand_augment_transform("rand-m9-mstd0.5-inc1", dict(parameters))
    ours = views._randaugment("rand-m9-mstd0.5-inc1", (), SIZE)
    image = noise(SIZE, SIZE)
    results: list[NDArray[np.uint8]] = []
    for transform in (reference, lambda image: augmented(image, ours(()))):
        for seed in range(30):
            with views._global_seeds(np.random.default_rng(seed)):
                results.append(np.array(transform(image)))
    np.testing.assert_array_equal(results[:30], results[30:])
    assert repr(reference) == repr(ours)
    white = Image.new("RGB", (SIZE, SIZE), "white")
    with views._global_seeds(np.random.default_rng(0)):
        shift = views._randaugment("rand-m9-p1.0", ("TranslateXRel",), SIZE)(())
    assert np.asarray(augmented(white, shift)).min() == 0


@pytest.mark.parametrize("increasing", ["-inc1", ""])
@pytest.mark.parametrize("magnitude", [0, 5, 10])
def test_every_operation_works_at_every_magnitude(magnitude: int, increasing: str) -> None:
    config = f"rand-m{magnitude}-p1.0-n1{increasing}"
    image = noise(SIZE, SIZE)
    for name in randaugment_names(config):
        with views._global_seeds(np.random.default_rng(0)):
            result = augmented(image, views._randaugment(config, (name,), SIZE)(()))
        assert (result.mode, result.size) == ("RGB", (SIZE, SIZE))


def test_posterizing_to_no_bits_is_black() -> None:
    augment = views._randaugment("rand-m10-p1.0-inc1", ("PosterizeIncreasing",), SIZE)
    assert np.asarray(augmented(noise(SIZE, SIZE), augment(()))).max() == 0


@pytest.mark.parametrize(
    "config", ["rand-m9-mstd0.5-inc1", "rand-m5-n3-p0.7-inc1", "rand-mstd101-tweights-inc1", ""]
)
def test_configurations_of_timm_are_accepted(config: str) -> None:
    made = make_views(noise(40, 40), view_generator(0, 0, 0), CLIP, ViewConfig(randaugment=config))
    assert made.strong.shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("config", ["augmix-m5", "rand-m9-x3", "rand-m", "9", "rand-m9 "])
def test_unknown_configurations_are_a_usage_error(config: str) -> None:
    with pytest.raises(UsageError, match="randaugment: expected '' or a timm configuration"):
        ViewConfig(randaugment=config)


@pytest.mark.parametrize(
    ("config", "ops"),
    [("rand-m9-inc1", ("Rotat",)), ("rand-m9-inc1", ("Color",)), ("", ("Rotate",))],
)
def test_unknown_operations_are_a_usage_error_with_the_known_ones(
    config: str, ops: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError, match=r"names among (AutoContrast, Equalize|none).*found"):
        ViewConfig(randaugment=config, randaugment_ops=ops)


@pytest.mark.parametrize(
    "wrong",
    [
        {"crops": 0},
        {"crop_side": (0.9, 0.5)},
        {"crop_side": (0.0, 0.5)},
        {"strong_scale": (0.3, 1.1)},
        {"strong_ratio": (2.0, 0.5)},
        {"flip": 1.5},
        {"fliip": 0.5},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ViewConfig.model_validate(wrong)
