"""Views of whole photos, cut on the device that trains: `views.device = "model"`.

The loading processes send each photo once, at `sent_side` at most, with the cuts that
`views.draw_cuts` drew for it: the same as on a CPU. Resizing is linear in the pixels and separable,
so all views of a photo are two matrix products, whose matrices hold box, filter, window and mirror.

Pillow rounds after each of its two passes and so do these. What differs are its 22-bit weights, by
single levels, and in tall photos which pass comes first; docs/numerics.md section 10 has the sizes.
"""

import math
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from microclip_deploy.adapt.device_operations import augmented
from microclip_deploy.adapt.views import Cut, Cuts, Operation, ViewConfig, draw_cuts
from microclip_deploy.data.packing import PackConfig, reduced
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.model.clip import exact_float32

_AT_ONCE = 4_000_000
"""Weights of the views that are cut in one go: all of a photo that is not extremely long."""


def sent_side(preprocess: Preprocess, config: ViewConfig) -> int:
    """Return the short side, pixels, to which larger photos are reduced before they are sent.

    That of a pack, or more where the smallest crop would have to be enlarged.
    """
    return max(PackConfig().side, math.ceil(preprocess.size / config.crop_side[0]))


class WholePhoto(NamedTuple):
    """A photo and the cuts that were drawn for it."""

    pixels: NDArray[np.uint8]
    """(H, W, 3), RGB."""
    cuts: Cuts

    @classmethod
    def of(
        cls, image: Image.Image, rng: np.random.Generator, preprocess: Preprocess, views: ViewConfig
    ) -> "WholePhoto":
        """Reduce an image, mode RGB, to the size at which it is sent, and draw its cuts."""
        image = reduced(image, sent_side(preprocess, views))
        return cls(np.asarray(image), draw_cuts(image.size, rng, preprocess, views))


class PhotoBatch(NamedTuple):
    """B photos with their cuts, in few tensors: each costs a file handle between processes."""

    pixels: Tensor
    """uint8 (n,): the photos (H, W, 3), one behind the other."""
    sizes: list[tuple[int, int]]
    """Heights and widths."""
    cuts: Tensor
    """int64 (B, 2 + V, 9): box, scaled size, offset and mirrored of weak, strong and crops."""
    operations: list[tuple[Operation, ...]]
    """Of the strong views."""
    indices: Tensor
    """int64 (B,)."""

    @classmethod
    def of(cls, photos: list[WholePhoto], indices: Tensor) -> "PhotoBatch":
        """Stack photos."""
        pixels = np.concatenate([photo.pixels.ravel() for photo in photos])
        cuts = [[_numbers(cut) for cut in (*p.cuts[:2], *p.cuts.crops)] for p in photos]
        return cls(
            torch.from_numpy(pixels),
            [photo.pixels.shape[:2] for photo in photos],
            torch.tensor(cuts),
            [photo.cuts.strong.operations for photo in photos],
            indices,
        )

    def to(self, device: torch.device | str) -> Self:
        """Return the batch with pixels and cuts on a device."""
        pixels, cuts = (_sent(part, torch.device(device)) for part in (self.pixels, self.cuts))
        return self._replace(pixels=pixels, cuts=cuts)

    def views(self, preprocess: Preprocess) -> Tensor:
        """Return the views on that device: uint8 (B, 2 + V, 3, S, S); weak, strong, crops."""
        side = preprocess.size
        views = self.pixels.new_empty(*self.cuts.shape[:2], 3, side, side)
        areas = [height * width * 3 for height, width in self.sizes]
        for view, flat, size, own, operations in zip(
            views, self.pixels.split(areas), self.sizes, self.cuts, self.operations, strict=True
        ):
            photo = flat.view(*size, 3).permute(2, 0, 1).float()
            at_once = max(1, _AT_ONCE // (side * max(size)))
            for part, rows in zip(view.split(at_once), own.split(at_once), strict=True):
                part.copy_(cut_views(photo, rows, preprocess))
            view[1] = augmented(view[1], operations)
        return views


@exact_float32
def cut_views(photo: Tensor, cuts: Tensor, preprocess: Preprocess) -> Tensor:
    """Return views of a photo, before RandAugment.

    Args:
        photo: float32 (3, H, W), 0..255.
        cuts: int64 (V, 9), see `PhotoBatch.cuts`.
        preprocess: gives the side S, the filter and what is filled in.

    Returns:
        float32 (V, 3, S, S), whole numbers 0..255.
    """
    _, height, width = photo.shape
    left, top, right, bottom, *to, x, y, mirrored = cuts[..., None].unbind(dim=1)
    across, seen_across = _filter(left, right, to[0], x, mirrored, width, preprocess)
    down, seen_down = _filter(top, bottom, to[1], y, mirrored * 0, height, preprocess)
    narrow = _levels(photo.flatten(0, 1) @ across.mT).unflatten(1, (3, height))
    view = _levels(down[:, None] @ narrow)
    seen = seen_down[:, None, :, None] & seen_across[:, None, None, :]
    return torch.where(seen, view, float(preprocess.fill_color))


def _numbers(cut: Cut) -> list[int]:
    return [*cut.box, *cut.scaled, *cut.offset, int(cut.mirrored)]


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; CUDA copies it while this process goes on."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _levels(values: Tensor) -> Tensor:
    return (values + 0.5).floor_().clamp_(0, 255)


def _filter(
    begin: Tensor,
    end: Tensor,
    scaled: Tensor,
    offset: Tensor,
    mirrored: Tensor,
    length: int,
    preprocess: Preprocess,
) -> tuple[Tensor, Tensor]:
    """Return how S pixels along one side of a view are weighted means of a photo's.

    Args:
        begin: int64 (V, 1), where the box begins along this side; the others alike.
        end: behind the box's last pixel.
        scaled: to how many pixels the box is resized.
        offset: which of them is the view's first.
        mirrored: 1 where the view is the other way round.
        length: L, pixels of the photo.
        preprocess: gives S and the filter.

    Returns:
        float32 (V, S, L), whose rows sum to 1; and bool (V, S), false for pixels to be filled.

    Source: Pillow `Resample.c`, precompute_coeffs.
    """
    place = torch.arange(preprocess.size, device=begin.device).expand(len(begin), -1)
    place = torch.where(mirrored > 0, preprocess.size - 1 - place, place) + offset
    seen = (place >= 0) & (place < scaled)
    place = place.clamp(min=0).minimum(scaled - 1)
    scale = (end - begin).double() / scaled
    centre = begin + (place + 0.5) * scale
    pixel = torch.arange(length, device=begin.device) + 0.5
    distance = (pixel - centre[..., None]).abs_() / scale.clamp(min=1)[..., None]
    weights = _bicubic(distance) if preprocess.interpolation == "bicubic" else _bilinear(distance)
    weights *= (pixel > begin[..., None]) & (pixel < end[..., None])
    return (weights / weights.sum(dim=-1, keepdim=True)).float(), seen


def _bicubic(distance: Tensor) -> Tensor:
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def _bilinear(distance: Tensor) -> Tensor:
    return (1 - distance).clamp(min=0)
