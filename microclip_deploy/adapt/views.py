"""Random views of one image for adaptation: weak, strong and crops, as uint8 arrays.

    weak     resize, random S x S crop; the test view where the model squashes or fills
    strong   random resized crop to S x S, horizontal flip, RandAugment
    crops    V times: random square of the original image, then the weak view of it

Every random number comes from one NumPy generator seeded with (seed, epoch, image), so a view
depends on nothing else: not on workers, batches, or where a run was resumed. The views are drawn in
the order above; changing the number of crops leaves the other two as they are.

`draw_cuts` draws, from the photo's size alone; `make_views` carries out what was drawn with Pillow,
and `device_views` with torch on the model's device.

Source: microCLIP, training transforms; timm `RandomResizedCropAndInterpolation`, `RandAugment`.
"""

import math
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, model_validator
from timm.data.auto_augment import (
    NAME_TO_OP,
    RandAugment,
    rand_augment_choices,
    rand_augment_transform,
)

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import UsageError

_Share = Annotated[float, Field(gt=0, le=1)]
_Ratio = Annotated[float, Field(gt=0, le=10)]

# timm's configuration language; timm itself ignores or asserts on what it does not know.
_RANDAUGMENT = re.compile(
    r"rand(-(m\d+|n\d+|p\d*\.?\d+|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t(weights|3a|3aw)))*"
)


class ViewConfig(BaseModel):
    """What the random views look like; the defaults are the paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    crops: int = Field(default=8, ge=1, le=64)
    """Number V of crops per image, from which the pseudo-label is computed."""
    crop_side: tuple[_Share, _Share] = (0.5, 0.9)
    """Range of a crop's side as a share of the image's short side; low <= high."""
    strong_scale: tuple[_Share, _Share] = (0.3, 1.0)
    """Range of the strong view's area as a share of the image's; low <= high."""
    strong_ratio: tuple[_Ratio, _Ratio] = (3 / 4, 4 / 3)
    """Range of the strong view's width / height before it is squared; low <= high."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of mirroring the strong view; 0 where left and right differ, such as text."""
    randaugment: str = "rand-m9-mstd0.5-inc1"
    """timm's RandAugment configuration of the strong view; '' for none."""
    randaugment_ops: tuple[str, ...] = ()
    """The operations RandAugment draws from, by timm's names; () for all 15. A data set whose
    classes differ by orientation or colour needs a subset."""
    device: Literal["cpu", "model"] = "cpu"
    """Where views are cut: by Pillow in the loading processes, which defines them; or by torch on
    the model's device, within a level of it but for RandAugment of that level, from photos reduced
    to a short side of 512 pixels (`device_views.sent_side`)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("crop_side", "strong_scale", "strong_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: expected low <= high, found ({low}, {high}); swap them")
        if self.randaugment and not _RANDAUGMENT.fullmatch(self.randaugment):
            raise UsageError(
                f"randaugment: expected '' or a timm configuration such as "
                f"'rand-m9-mstd0.5-inc1', found '{self.randaugment}'; correct it"
            )
        known = randaugment_names(self.randaugment)
        unknown = [name for name in self.randaugment_ops if name not in known]
        if unknown:
            raise UsageError(
                f"randaugment_ops: expected names among {', '.join(known) or 'none'} for "
                f"randaugment '{self.randaugment}', found {', '.join(unknown)}; use these names"
            )
        if self.device == "model" and "GaussianBlur" in (self.randaugment_ops or known):
            raise UsageError(
                f"views.device 'model': expected a randaugment without GaussianBlur, found "
                f"'{self.randaugment}'; leave it out of views.randaugment_ops, or set "
                "views.device to 'cpu'"
            )
        return self


class Operation(NamedTuple):
    """One operation of RandAugment that is applied."""

    name: str
    """timm's."""
    arguments: tuple[float, ...]
    """Of timm's function of that name: a factor, degrees, pixels, bits or thresholds."""


class Cut(NamedTuple):
    """How one view is made of a photo, pixels."""

    box: tuple[int, int, int, int]
    """Left, top, right and bottom of what is seen of the photo; nothing outside is read."""
    scaled: tuple[int, int]
    """Width and height that it is resized to."""
    offset: tuple[int, int] = (0, 0)
    """Left and top of the S x S window of the resized box; negative where it is filled."""
    mirrored: bool = False
    operations: tuple[Operation, ...] = ()
    """What is then done with the window, in this order."""


class Cuts(NamedTuple):
    """How all views of a photo are made."""

    weak: Cut
    strong: Cut
    crops: tuple[Cut, ...]


class Views(NamedTuple):
    """The views of one image, RGB, 0..255."""

    weak: NDArray[np.uint8]
    """(S, S, 3)"""
    strong: NDArray[np.uint8]
    """(S, S, 3)"""
    crops: NDArray[np.uint8]
    """(V, S, S, 3)"""


def randaugment_names(config: str) -> tuple[str, ...]:
    """Return the operations that a timm RandAugment configuration draws from; '' has none."""
    if not config:
        return ()
    sections = config.split("-")
    chosen = next((section[1:] for section in sections if section.startswith("t")), "")
    return tuple(rand_augment_choices(chosen, increasing="inc1" in sections))


def view_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the generator for the views of one image in one epoch.

    Args:
        seed: the run's seed, >= 0.
        epoch: >= 0.
        index: position of the image in the run's list, >= 0.
    """
    # NumPy pads seeds with zeros: index 0 would repeat the stream of [seed, epoch], which shuffles.
    return np.random.default_rng([seed, epoch, index + 1])


def make_views(
    image: Image.Image, rng: np.random.Generator, preprocess: Preprocess, config: ViewConfig
) -> Views:
    """Return the random views of one image.

    Not for threads: see `draw_cuts`.

    Args:
        image: mode RGB.
        rng: the only source of randomness; see `view_generator`.
        preprocess: gives the side S and the resizing.
        config: what the views look like.
    """
    cuts = draw_cuts(image.size, rng, preprocess, config)
    weak, strong, *crops = (_view(image, cut, preprocess) for cut in (*cuts[:2], *cuts.crops))
    return Views(weak, strong, np.stack(crops))


def draw_cuts(
    size: tuple[int, int], rng: np.random.Generator, preprocess: Preprocess, config: ViewConfig
) -> Cuts:
    """Draw how the views of a photo are made: the only place where anything random happens.

    Not for threads: while RandAugment draws, the global states of `random` and NumPy are replaced.

    Args:
        size: width and height of the photo, pixels.
        rng: the only source of randomness; see `view_generator`.
        preprocess: gives the side S and the resizing.
        config: what the views look like.
    """
    weak = _draw_window((0, 0, *size), rng, preprocess)
    strong = _draw_strong(size, rng, preprocess, config)
    crops = tuple(
        _draw_window(_random_square(size, rng, config.crop_side), rng, preprocess)
        for _ in range(config.crops)
    )
    return Cuts(weak, strong, crops)


def _draw_window(
    box: tuple[int, int, int, int], rng: np.random.Generator, preprocess: Preprocess
) -> Cut:
    """Draw a square of the resized box; the only one where it fits."""
    left, top, right, bottom = box
    scaled = preprocess.scaled((right - left, bottom - top))
    x, y = (
        int(rng.integers(rest, endpoint=True)) if rest >= 0 else preprocess.offset(length)
        for length, rest in ((side, side - preprocess.size) for side in scaled)
    )
    return Cut(box, scaled, (x, y))


def _random_square(
    size: tuple[int, int], rng: np.random.Generator, share: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Return a square whose side is a random share of the short side, placed uniformly."""
    width, height = size
    side = max(1, int(rng.uniform(*share) * min(size)))
    left = int(rng.integers(width - side, endpoint=True))
    top = int(rng.integers(height - side, endpoint=True))
    return left, top, left + side, top + side


def _draw_strong(
    size: tuple[int, int], rng: np.random.Generator, preprocess: Preprocess, config: ViewConfig
) -> Cut:
    """Draw the augmented view."""
    box = _random_resized_box(*size, rng, config)
    mirrored = bool(rng.random() < config.flip)
    operations: tuple[Operation, ...] = ()
    if config.randaugment:
        augment = _randaugment(config.randaugment, config.randaugment_ops, preprocess.size)
        with _global_seeds(rng):
            operations = augment(())
    return Cut(box, (preprocess.size, preprocess.size), (0, 0), mirrored, operations)


def _view(image: Image.Image, cut: Cut, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Return what was drawn: uint8 (S, S, 3)."""
    # Cropping first keeps the filter from reading pixels outside the box, as torchvision does;
    # resize(box=...) would not.
    part = image if cut.box == (0, 0, *image.size) else image.crop(cut.box)
    resized = part.resize(cut.scaled, Image.Resampling[preprocess.interpolation.upper()])
    if cut.mirrored:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = preprocess.window(resized, *cut.offset)
    if not cut.operations:
        return pixels
    return np.array(augmented(Image.fromarray(pixels), cut.operations))


def augmented(image: Image.Image, operations: tuple[Operation, ...]) -> Image.Image:
    """Return an image after operations that RandAugment drew, by timm's functions."""
    kept = {"fillcolor": (0, 0, 0), "resample": Image.Resampling.BICUBIC}
    for name, arguments in operations:
        image = _BY_NAME[name](image, *arguments, **kept)
    return image


def _random_resized_box(
    width: int, height: int, rng: np.random.Generator, config: ViewConfig
) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a box with random area and aspect ratio.

    Ten attempts to fit the drawn shape, then the largest centred box whose ratio is in range.

    Source: torchvision `RandomResizedCrop.get_params`, the algorithm timm uses too.
    """
    low, high = config.strong_ratio
    for _ in range(10):
        area = rng.uniform(*config.strong_scale) * width * height
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w, endpoint=True))
            top = int(rng.integers(height - h, endpoint=True))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * high)))
    h = min(height, max(1, round(width / low)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """Posterize as timm does, also to 0 bits, which is black and which Pillow 13 refuses.

    At magnitude 9 with deviation 0.5 the clipped magnitude 10, and so 0 bits, is drawn in 2%.
    """
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, bits_to_keep)


_BY_NAME: dict[str, Any] = {
    **NAME_TO_OP,
    **{name: _posterize for name in NAME_TO_OP if name.startswith("Posterize")},
}


@lru_cache(maxsize=8)
def _randaugment(config: str, ops: tuple[str, ...], side: int) -> RandAugment:
    """Build timm's transform as its `create_transform` does for mean 0 and bicubic.

    It draws and applies in one go; here each operation only notes what it was drawn with, so that
    the transform takes a tuple of operations and returns it with those that it would apply.
    """
    parameters = {"translate_const": int(side * 0.45)}
    augment: RandAugment = rand_augment_transform(config, parameters, transforms=list(ops) or None)
    for operation in augment.ops:
        operation.aug_fn = partial(_noted, operation.name)
    return augment


def _noted(
    name: str, before: tuple[Operation, ...], *arguments: float, **_: object
) -> tuple[Operation, ...]:
    return (*before, Operation(name, arguments))


@contextmanager
def _global_seeds(rng: np.random.Generator) -> Iterator[None]:
    """Seed the global generators, which timm draws from, and restore their states afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    python_seed, numpy_seed = (int(seed) for seed in rng.integers(2**32, size=2))
    try:
        random.seed(python_seed)
        np.random.seed(numpy_seed)
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
