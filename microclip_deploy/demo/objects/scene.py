"""Scenes: drawings of animals pasted small on a textured ground among clutter.

Whole batches are drawn at once in torch, on the device of the generator, which decides every pixel;
the benchmark's is on the CPU. The ground comes from the same family in pretraining and in the
benchmark, so that what is new to the model are the drawings.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from microclip_deploy.demo.objects.drawings import Drawings

PATCH = 8
"""Side of the model's patches, pixels."""

SIDE = 96
"""Side of a scene, pixels."""

COVERED = 0.3
"""A token shows an object when at least this share of its pixels does."""


class Domain(NamedTuple):
    """What scenes look like; sizes in pixels."""

    number: tuple[float, ...] = (1.0, 0.0, 0.0)
    """Share of the scenes with one, two, three named objects."""
    sizes: tuple[tuple[int, int], ...] = ((27, 42), (20, 32), (18, 28))
    """Least and largest side of an object in scenes with one, two, three."""
    clutter: float = 0.5
    """Chance of each of two unnamed things."""
    clutter_sizes: tuple[int, int] = (12, 21)
    shapes: float = 0.5
    """Chance of each of four rectangles, ellipses and lines."""
    jitter: float = 1.0
    """Scale of the changes to colours and geometry of a drawing."""
    bend: float = 0.0
    """How far parts of a drawing are moved, in halves of its side."""


TEXTURE, FIELD, NOISE = 0.2, 0.2, 0.04
"""Largest contrast of pattern, of the slow change of colour, and of the noise; of a range of 1."""

_SHAPES, _CLUTTER = 4, 2


class Scenes(NamedTuple):
    """A batch of rendered scenes."""

    images: Tensor
    """float32 (B, 3, S, S) in [0, 1]."""
    labels: Tensor
    """int64 (B, K): the objects shown, as indices into the drawings' things; -1 for none."""
    cover: Tensor
    """float32 (B, K, S, S) in [0, 1]: where each object is."""


def render(
    objects: Drawings,
    clutter: Drawings,
    count: int,
    domain: Domain,
    generator: torch.Generator,
    *,
    side: int = SIDE,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
) -> Scenes:
    """Render a batch of scenes.

    Args:
        objects: what may be named.
        clutter: what lies about.
        count: B.
        domain: what the scenes look like.
        generator: decides every pixel; on the device of the drawings, as are labels and weights.
        side: S, pixels; objects keep their size.
        labels: int64 (B,), the first object of each scene; None draws it. With several in a scene
            another may be the same.
        weights: float (things,), how often each object is drawn; None for all alike.
    """
    images = _ground(count, domain, generator, side)
    for _ in range(_CLUTTER):
        which = _integers(generator, 0, len(clutter.things), count)
        drawn = clutter.draw(which, generator)
        size = _uniform(generator, count, low=domain.clutter_sizes[0], high=domain.clutter_sizes[1])
        x, y = (_uniform(generator, count, low=-0.85, high=0.85) for _ in range(2))
        shown = _uniform(generator, count) < domain.clutter
        images, _cover = _paste(images, drawn, size, (x, y), shown, domain, generator)
    images, named, cover = _place(objects, images, domain, generator, labels, weights)
    images = images + _normal(generator, *images.shape) * NOISE * _uniform(
        generator, count, 1, 1, 1
    )
    return Scenes(images.clamp(0, 1), named, cover)


def token_cover(cover: Tensor) -> Tensor:
    """Return the covered share of each token, float (..., N) row-major, from (..., S, S)."""
    grid = cover.shape[-1] // PATCH
    cells: Tensor = cover.unflatten(-1, (grid, PATCH)).unflatten(-3, (grid, PATCH))
    return cells.mean((-3, -1)).flatten(-2)


def _place(
    objects: Drawings,
    images: Tensor,
    domain: Domain,
    generator: torch.Generator,
    labels: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Paste the named objects; several keep to a quadrant each, so that they hardly overlap."""
    count, side, most = len(images), images.shape[-1], len(domain.number)
    device = generator.device
    shares = torch.tensor(domain.number, device=device)
    number = torch.multinomial(shares, count, replacement=True, generator=generator)
    weights = torch.ones(len(objects.things), device=device) if weights is None else weights
    named = torch.multinomial(weights.expand(count, -1), most, generator=generator)
    if labels is not None:
        named[:, 0] = labels
    quadrants = _uniform(generator, count, 4).argsort(1)
    cover = torch.zeros(count, most, side, side, device=device)
    sizes = torch.tensor(domain.sizes, dtype=torch.float32, device=device)
    low, high = sizes[number].unbind(1)
    for k in range(most):
        shown = number >= k
        if shown.any():
            size = low + (high - low) * _uniform(generator, count)
            room = (1 - size / side).clamp(min=0.02)
            halves = (quadrants[:, k] % 2, quadrants[:, k] // 2)
            centre = [_position(half, number, generator) * room for half in halves]
            drawn = objects.draw(named[:, k], generator)
            images, mask = _paste(
                images, drawn, size, (centre[0], centre[1]), shown, domain, generator
            )
            cover[:, :k] *= (1 - mask)[:, None]
            cover[:, k] = mask
        named[:, k] = torch.where(shown, named[:, k], -1)
    return images, named, cover


def _position(half: Tensor, number: Tensor, generator: torch.Generator) -> Tensor:
    """Return one coordinate of a centre in [-1, 1]: anywhere, or in the half of several objects."""
    anywhere = _uniform(generator, len(half), low=-1)
    within = half * 2.0 - 1 + 0.35 * _uniform(generator, len(half), low=-1)
    return torch.where(number == 0, anywhere, within).clamp(-1, 1)


def _paste(
    images: Tensor,
    drawn: Tensor,
    size: Tensor,
    centre: tuple[Tensor, Tensor],
    shown: Tensor,
    domain: Domain,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Paste one drawing into each image; return the images and the cover (B, S, S)."""
    count, side, jitter = len(images), images.shape[-1], domain.jitter
    drawn = drawn.clone()
    flipped = _uniform(generator, count) < 0.5
    drawn[flipped] = drawn[flipped].flip(-1)
    mix = torch.eye(3, device=generator.device) + 0.06 * jitter * _normal(generator, count, 3, 3)
    light = 1 + jitter * _uniform(generator, count, 1, 1, 1, low=-0.3, high=0.15)
    drawn[:, :3] = torch.einsum("bij,bjhw->bihw", mix, drawn[:, :3]) * light
    affine = _affine(side / size, centre, jitter, generator)
    grid = F.affine_grid(affine, [count, 4, side, side], align_corners=False)
    if domain.bend:
        drawn = _bent(drawn, domain.bend, generator)
    layer = F.grid_sample(drawn, grid, align_corners=False) * shown.float().view(-1, 1, 1, 1)
    mask = layer[:, 3:].clamp(0, 1)
    return images * (1 - mask) + torch.minimum(layer[:, :3].clamp(0, 1), mask), mask[:, 0]


def _bent(drawn: Tensor, reach: float, generator: torch.Generator) -> Tensor:
    """Return drawings whose parts are moved apart and together, smoothly."""
    count, _, side, _ = drawn.shape
    straight = F.affine_grid(
        torch.eye(2, 3).to(drawn).expand(count, 2, 3), list(drawn.shape), False
    )
    moved = reach * _smooth(generator, count, 2, 4, side).permute(0, 2, 3, 1)
    return F.grid_sample(drawn, straight + moved, align_corners=False)


def _affine(
    scale: Tensor, centre: tuple[Tensor, Tensor], jitter: float, generator: torch.Generator
) -> Tensor:
    """Return (B, 2, 3): from an image to a drawing `scale` times smaller, turned and sheared."""
    count, (x, y) = len(scale), centre
    turn = 0.14 * jitter * _normal(generator, count)
    aspect = (0.08 * jitter * _normal(generator, count)).exp()
    shear = 0.08 * jitter * _normal(generator, count)
    cos, sin = turn.cos() * scale, turn.sin() * scale
    xx, xy = cos * aspect, -sin + shear * scale
    top = torch.stack([xx, xy, -(xx * x + xy * y)], 1)
    bottom = torch.stack([sin, cos, -(sin * x + cos * y)], 1)
    return torch.stack([top, bottom], 1)


def _ground(count: int, domain: Domain, generator: torch.Generator, side: int) -> Tensor:
    """Return textured grounds with shapes on them, (B, 3, S, S)."""
    images = _uniform(generator, count, 3, 1, 1, low=0.12, high=0.92)
    slow = FIELD * _uniform(generator, count, 1, 1, 1)
    cells = int(_integers(generator, 3, 7))
    images = images + slow * _smooth(generator, count, 3, cells, side) * 1.5
    pattern = _pattern(count, generator, side)
    tint = _normal(generator, count, 3, 1, 1) + 1
    tint = tint / tint.abs().amax(1, keepdim=True)
    images = images + TEXTURE * _uniform(generator, count, 1, 1, 1) * pattern[:, None] * tint
    for _ in range(_SHAPES):
        mask = _shape(count, domain.shapes, generator, side)[:, None]
        images = images + (_uniform(generator, count, 3, 1, 1) - images) * mask
    return images.clamp(0, 1)


def _pattern(count: int, generator: torch.Generator, side: int) -> Tensor:
    """Return waves, stripes, checks, blobs or clouds in [-1, 1], (B, S, S)."""
    x, y = _coordinates(side, generator.device)
    frequency = _uniform(generator, count, 1, 1, low=2, high=9) * side / SIDE
    turn = _uniform(generator, count, 1, 1, high=math.pi)
    phase = _uniform(generator, count, 1, 1, high=6.28)
    along, across = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    wave = torch.sin(math.pi * frequency * along + phase)
    check = wave * torch.sin(math.pi * frequency * across)
    cells = int(_integers(generator, 5, 16))
    blobs = _smooth(generator, count, 1, cells, side)[:, 0] * 3
    clouds = sum(
        (_smooth(generator, count, 1, n, side)[:, 0] for n in (4, 8, 16, 32)), torch.zeros_like(x)
    )
    kind = _integers(generator, 0, 6, count)
    hard = [(8 * wave).clamp(-1, 1), (8 * check).clamp(-1, 1), (3 * blobs).clamp(-1, 1)]
    return torch.stack([wave, *hard, clouds, clouds * 0.5], 1)[
        torch.arange(count, device=kind.device), kind
    ]


def _shape(count: int, chance: float, generator: torch.Generator, side: int) -> Tensor:
    """Return a rectangle, ellipse or line of each image, or nothing, (B, S, S) in [0, 1]."""
    x, y = _coordinates(side, generator.device)
    shown = (_uniform(generator, count) < chance).float().view(-1, 1, 1)
    left, top = (_uniform(generator, count, 1, 1, low=-1.1, high=1.1) for _ in range(2))
    turn = _uniform(generator, count, 1, 1, high=math.pi)
    line = _uniform(generator, count) < 0.3

    def half(low: float, high: float) -> Tensor:
        long = _uniform(generator, count, low=low, high=high)
        return torch.where(line, long, _uniform(generator, count, low=0.06, high=0.25)).view(
            -1, 1, 1
        )

    width, height = half(0.5, 1.2), half(0.01, 0.04)
    across = ((x - left) * turn.cos() + (y - top) * turn.sin()) / width
    down = ((y - top) * turn.cos() - (x - left) * turn.sin()) / height
    square = (_uniform(generator, count) < 0.5).view(-1, 1, 1)
    reach = torch.where(
        square, torch.maximum(across.abs(), down.abs()), (across * across + down * down).sqrt()
    )
    return ((1 - reach) * torch.minimum(width, height) * side / 2).clamp(0, 1) * shown


def _coordinates(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return x and y of the pixels' centres in [-1, 1], broadcast to (1, S, S)."""
    line = (torch.arange(side, device=device) + 0.5) / side * 2 - 1
    return line.view(1, 1, side), line.view(1, side, 1)


def _smooth(generator: torch.Generator, count: int, channels: int, cells: int, side: int) -> Tensor:
    """Return noise whose grain is a cell, (B, C, S, S)."""
    noise = _uniform(generator, count, channels, cells, cells, low=-1)
    return F.interpolate(noise, size=side, mode="bicubic", align_corners=False)


def _uniform(
    generator: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0
) -> Tensor:
    return torch.rand(*shape, generator=generator, device=generator.device) * (high - low) + low


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)


def _integers(generator: torch.Generator, low: int, end: int, *shape: int) -> Tensor:
    return torch.randint(low, end, shape, generator=generator, device=generator.device)
