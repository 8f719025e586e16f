"""Preprocess equals torchvision byte for byte and is one definition for both array libraries."""

from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import DataError

SIZE = 32
CLIP = Preprocess(
    size=SIZE,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
SHAPES = [(32, 32), (33, 47), (47, 33), (100, 31), (31, 100), (2, 2), (2, 200), (200, 2), (65, 64)]


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def batch() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3)).astype(np.uint8)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize(("interpolation", "fill_color"), [("bicubic", 0), ("bilinear", 128)])
def test_test_view_equals_open_clips_byte_for_byte(
    resize_mode: Any, interpolation: Any, fill_color: int
) -> None:
    settings = {
        "interpolation": interpolation,
        "resize_mode": resize_mode,
        "fill_color": fill_color,
    }
    preprocess = CLIP.model_copy(update=settings)
    plain = PreprocessCfg(size=SIZE, mean=(0, 0, 0), std=(1, 1, 1), **settings)
    reference = image_transform_v2(plain, is_train=False)
    for width, height in SHAPES:
        if resize_mode == "longest" and max(width, height) > SIZE * min(width, height):
            continue  # open_clip itself fails on it
        view = preprocess.test_view(noise(width, height))
        assert view.dtype == np.uint8
        assert view.flags.c_contiguous
        expected = (255 * reference(noise(width, height))).round().byte().permute(1, 2, 0)
        np.testing.assert_array_equal(view, expected.numpy(), err_msg=f"{width} x {height}")


def test_stored_fields_are_those_of_older_artifacts_wherever_they_say_enough() -> None:
    assert [*CLIP.model_dump()] == ["size", "mean", "std", "interpolation"]
    squashed = CLIP.model_copy(update={"resize_mode": "squash", "fill_color": 7})
    assert Preprocess(**squashed.model_dump()) == squashed


def test_long_side_is_truncated_as_torchvision_does() -> None:
    assert CLIP.resized(noise(30, 47)).size == (32, 50)  # 32 * 47 / 30 = 50.13
    assert CLIP.resized(noise(59, 30)).size == (62, 32)  # 32 * 59 / 30 = 62.93


def test_normalize_equals_torchvision_to_the_last_bit() -> None:
    images = batch()
    reference = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(CLIP.mean, CLIP.std)]
    )
    expected = torch.stack([reference(Image.fromarray(image)) for image in images])
    np.testing.assert_array_equal(CLIP.normalize(images), expected.numpy())


def test_normalize_gives_the_same_bits_for_numpy_and_torch_and_both_layouts() -> None:
    images = batch()
    expected = CLIP.normalize(images)
    first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    assert expected.dtype == np.float32
    assert expected.flags.c_contiguous
    np.testing.assert_array_equal(CLIP.normalize(first), expected)
    for layout in (images, first):
        result = CLIP.normalize(torch.from_numpy(layout))
        assert result.dtype == torch.float32
        assert result.is_contiguous()
        np.testing.assert_array_equal(result.numpy(), expected)


def test_normalize_fills_its_constants_where_the_images_are() -> None:
    """A copy from the host would wait for the device; on "meta" it cannot even be read back."""
    images = torch.from_numpy(batch()).to("meta")
    made: list[str] = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made.append(str(func))
            return func(*args, **(kwargs or {}))

    with Recorded():  # type: ignore[no-untyped-call]  # torch's own initialiser
        assert CLIP.normalize(images).device.type == "meta"
    assert "aten.full.default" in made
    assert not [name for name in made if "lift_fresh" in name or "item" in name]
    assert not [name for name in made if name == "aten.copy_.default"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_normalize_never_waits_for_the_device() -> None:
    images = torch.from_numpy(batch()).cuda()
    CLIP.normalize(images)  # warm-up
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = CLIP.normalize(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    np.testing.assert_array_equal(found.cpu().numpy(), CLIP.normalize(batch()))


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, SIZE, SIZE, 3), np.float32),
        np.zeros((SIZE, SIZE, 3), np.uint8),
        np.zeros((1, SIZE, SIZE + 1, 3), np.uint8),
        np.zeros((1, 1, SIZE, SIZE), np.uint8),
    ],
)
def test_normalize_refuses_another_dtype_or_shape(
    wrong: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
) -> None:
    with pytest.raises(DataError, match=r"expected uint8 \(B, 32, 32, 3\)"):
        CLIP.normalize(wrong)


def test_resizing_refuses_images_that_are_not_rgb() -> None:
    with pytest.raises(DataError, match="expected mode RGB, found L"):
        CLIP.test_view(Image.new("L", (40, 40)))


def test_json_round_trip_is_exact_and_frozen() -> None:
    copy = Preprocess.model_validate_json(CLIP.model_dump_json())
    assert copy == CLIP
    assert hash(copy) == hash(CLIP)
    with pytest.raises(ValidationError, match="frozen"):
        copy.size = 64


@pytest.mark.parametrize(
    "change", [{"std": (0.0, 1, 1)}, {"mean": (float("nan"), 0, 0)}, {"size": 0}, {"crop": 1}]
)
def test_impossible_values_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Preprocess.model_validate(CLIP.model_dump() | change)
