"""RandAugment's operations on a device: timm's functions of Pillow images, on torch tensors.

Each follows Pillow's arithmetic: colours are equal, geometry is within one level. Pillow's own
bicubic of a transform is steeper than torch's `grid_sample`, which is why it is written out here.

Source: Pillow `ImageOps`, `ImageEnhance`, `Blend.c`, `Filter.c`, `Geometry.c`; timm
`data/auto_augment.py`.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from microclip_deploy.adapt.views import Operation


def augmented(image: Tensor, operations: Iterable[Operation]) -> Tensor:
    """Return an image after operations that RandAugment drew.

    Args:
        image: uint8 (3, S, S), RGB.
        operations: of any names but GaussianBlur.

    Returns:
        uint8 (3, S, S), on the image's device.
    """
    for name, arguments in operations:
        image = _FUNCTIONS[name](image, *arguments)
    return image


def _by_table(image: Tensor, table: Tensor) -> Tensor:
    """Replace each level by its entry in a table (256,), or in its channel's (3, 256)."""
    levels = table.clamp(0, 255).to(torch.uint8).expand(3, 256)
    return levels.gather(1, image.flatten(1).long()).view_as(image)


def _levels(image: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.arange(256, dtype=dtype, device=image.device)


def _auto_contrast(image: Tensor) -> Tensor:
    low, high = (end.to(torch.float64)[:, None] for end in image.flatten(1).aminmax(dim=1))
    levels = _levels(image, torch.float64)
    # Not 255 / ..., which torch takes for a product with the reciprocal.
    scale = torch.full_like(high, 255.0) / (high - low).clamp(min=1)
    return _by_table(image, torch.where(high > low, levels * scale - low * scale, levels))


def _equalize(image: Tensor) -> Tensor:
    flat = image.flatten(1).long()
    counts = flat.new_zeros(3, 256).scatter_add_(1, flat, torch.ones_like(flat))
    highest = counts.gather(1, flat.amax(dim=1, keepdim=True))
    step = (counts.sum(dim=1, keepdim=True) - highest) // 255
    # Where only one level occurs, step is 0 as well.
    table = (step // 2 + counts.cumsum(dim=1) - counts) // step.clamp(min=1)
    return _by_table(image, torch.where(step > 0, table, _levels(image)))


def _invert(image: Tensor) -> Tensor:
    return 255 - image


def _posterize(image: Tensor, bits: float) -> Tensor:
    return image & (256 - 2 ** max(8 - int(bits), 0)) if bits >= 1 else torch.zeros_like(image)


def _solarize(image: Tensor, threshold: float) -> Tensor:
    levels = _levels(image)
    return _by_table(image, torch.where(levels < threshold, levels, 255 - levels))


def _solarize_add(image: Tensor, added: float) -> Tensor:
    levels = _levels(image)
    return _by_table(image, torch.where(levels < 128, levels + int(added), levels))


def _blend(plain: Tensor, image: Tensor, factor: float) -> Tensor:
    """Return what lies between a plainer image and the image, or beyond it; fractions drop off."""
    between = plain + factor * (image.float() - plain)
    return between.clamp(0, 255).to(torch.uint8)


def _gray(image: Tensor) -> Tensor:
    """Return Pillow's mode L: int32 (1, S, S)."""
    red, green, blue = image.int().unbind()
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16)[None]


def _color(image: Tensor, factor: float) -> Tensor:
    return _blend(_gray(image).float(), image, factor)


def _desaturate(image: Tensor, factor: float) -> Tensor:
    return _color(image, min(1.0, max(0.0, 1.0 - factor)))


def _contrast(image: Tensor, factor: float) -> Tensor:
    return _blend((_gray(image).double().mean() + 0.5).floor().float(), image, factor)


def _brightness(image: Tensor, factor: float) -> Tensor:
    return _blend(torch.zeros((), device=image.device), image, factor)


def _sharpness(image: Tensor, factor: float) -> Tensor:
    smooth = image.float()
    inner = F.avg_pool2d(smooth, 3, stride=1, divisor_override=1) + 4 * smooth[:, 1:-1, 1:-1]
    smooth[:, 1:-1, 1:-1] = (inner / 13 + 0.5).floor()
    return _blend(smooth, image, factor)


def _shear_x(image: Tensor, factor: float) -> Tensor:
    return _transformed(image, (1, factor, 0, 0, 1, 0))


def _shear_y(image: Tensor, factor: float) -> Tensor:
    return _transformed(image, (1, 0, 0, factor, 1, 0))


def _translate_x(image: Tensor, share: float) -> Tensor:
    return _transformed(image, (1, 0, share * image.shape[2], 0, 1, 0))


def _translate_y(image: Tensor, share: float) -> Tensor:
    return _transformed(image, (1, 0, 0, 0, 1, share * image.shape[1]))


def _rotate(image: Tensor, degrees: float) -> Tensor:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = image.shape[2] / 2, image.shape[1] / 2
    about = (x - cosine * x + sine * y, y - sine * x - cosine * y)
    return _transformed(image, (cosine, -sine, about[0], sine, cosine, about[1]))


def _transformed(image: Tensor, matrix: tuple[float, ...]) -> Tensor:
    """Return the image where each pixel (x, y) is read at (ax + by + c, dx + ey + f), else black.

    Bicubic with slope -1, without antialiasing; beyond the edge its pixels are repeated.
    """
    _, height, width = image.shape
    a, b, c, d, e, f = matrix
    column = torch.arange(width, dtype=torch.float64, device=image.device) + 0.5
    row = torch.arange(height, dtype=torch.float64, device=image.device)[:, None] + 0.5
    x, y = a * column + b * row + c, d * column + e * row + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    columns, x_weights = _taps(x - 0.5, width)
    rows, y_weights = _taps(y - 0.5, height)
    near = image[:, rows[..., :, None], columns[..., None, :]].double()
    value = torch.einsum("chwyx,hwy,hwx->chw", near, y_weights, x_weights)
    # Fractions drop off; the little keeps whole numbers whole.
    return ((value + 1e-6).clamp(0, 255) * inside).to(torch.uint8)


def _taps(place: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the four pixels next to a place, int64 (..., 4), and their weights, float64."""
    first = place.floor()
    taps = torch.arange(-1, 3, device=place.device)
    distance = (place[..., None] - first[..., None] - taps).abs()
    weights = torch.where(
        distance < 1,
        (distance - 2) * distance**2 + 1,
        4 - 8 * distance + 5 * distance**2 - distance**3,
    )
    return (first[..., None].long() + taps).clamp(0, length - 1), weights


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "PosterizeIncreasing": _posterize,
    "Solarize": _solarize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _color,
    "ColorIncreasing": _color,
    "Contrast": _contrast,
    "ContrastIncreasing": _contrast,
    "Brightness": _brightness,
    "BrightnessIncreasing": _brightness,
    "Sharpness": _sharpness,
    "SharpnessIncreasing": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
    "Desaturate": _desaturate,
}
