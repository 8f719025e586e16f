"""Made-up ViT patch tokens: segments, a direction all tokens share, and smooth noise.

No weights and no photos are needed, and yet the graphs are of the kinds that real tokens give:
one connected graph of a few loose communities, sometimes nearly complete, sometimes with a few
tokens that belong to nothing. As the method takes them, tokens are rows after a LayerNorm with
uneven gains: not normalised, squared length about D.

Everything happens in a space of RANK dimensions and is carried to D by one matrix product, so that
256 images of 576 tokens take about a second.

Rounding to float16 and bfloat16 happens on the host, so that a reference sees the very numbers the
kernels see. NumPy and CuPy know no bfloat16: such tokens travel as their 16 bits.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

RANK = 32
"""Dimensions in which prototypes and noise live; one more is the direction all tokens share."""
DTYPES = ("float16", "bfloat16", "float32")
"""Types of tokens the kernels take."""

SEGMENTS = (3, 13)
"""Range of the number of segments of an image; the end is excluded."""
SHARED = (0.0, 0.5)
"""Range of the share of a token's squared length that lies in the common direction."""
NOISE = (0.2, 0.8)
"""Range of the noise's length, against prototypes of length one."""
ODD_IMAGES = 0.2
"""Share of images with one to three tokens that point away from all others, as the registers of
a ViT do; their graphs fall apart."""
GAIN_DEVIATION = 0.25
"""Of the logarithm of the channels' gains."""
NOISE_DECAY = 1.2
"""Smooth noise has amplitude 1 / frequency**NOISE_DECAY, as natural images have."""


def vit_tokens(batch: int, count: int, width: int, *, seed: int) -> Floats:
    """Return float32 (B, N, D) tokens, the same for the same arguments.

    Args:
        batch: images B.
        count: tokens N of an image; they fill a square grid row by row.
        width: D, more than RANK.
        seed: of everything random.
    """
    rng = np.random.default_rng(seed)
    latent = np.empty((batch, count, RANK + 1), np.float32)
    latent[:, :, 1:] = _segments(rng, batch, count)
    _add_common_direction(rng, latent)
    _turn_odd_tokens(rng, latent)
    # A LayerNorm's mean is removed from the basis, and its deviation is a norm in the latent space.
    basis = _orthonormal(rng, RANK + 1, width)
    basis -= basis.mean(axis=1, keepdims=True)
    variance = np.einsum("bnr,rs,bns->bn", latent, basis @ basis.T / width, latent, optimize=True)
    latent /= np.sqrt(variance)[:, :, None]
    gains = rng.lognormal(0.0, GAIN_DEVIATION, width).astype(np.float32)
    tokens: Floats = latent @ (basis * gains)
    return tokens


def stored(tokens: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Round float32 tokens to float32, float16 or bfloat16 (as uint16), to nearest and even."""
    if dtype != "bfloat16":
        return tokens.astype(dtype)
    bits = tokens.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def exact_values(tokens: NDArray[Any]) -> NDArray[np.float64]:
    """Return what `stored` tokens stand for."""
    if tokens.dtype == np.uint16:
        tokens = (tokens.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return tokens.astype(np.float64)


def voronoi(rng: np.random.Generator, batch: int, count: int) -> NDArray[np.intp]:
    """Return the segment (B, N) of each token of a grid: 3 to 12 Voronoi cells an image."""
    side = grid_side(count)
    y, x = np.divmod(np.arange(count), side)
    most = SEGMENTS[1] - 1
    centres = rng.uniform(0, side, (batch, most, 2))
    unused = np.arange(most) >= rng.integers(*SEGMENTS, size=(batch, 1))
    down = y[:, None] - centres[:, None, :, 0]
    across = x[:, None] - centres[:, None, :, 1]
    distance = down * down + across * across
    distance[np.broadcast_to(unused[:, None], distance.shape)] = np.inf
    cells: NDArray[np.intp] = distance.argmin(axis=2)
    return cells


def smooth_noise(
    rng: np.random.Generator, batch: int, count: int, channels: int, decay: NDArray[np.float64]
) -> Floats:
    """Return 1 / frequency**decay noise (B, N, channels) of mean 0 and deviation 1.

    Args:
        rng: source of everything random.
        batch: images B.
        count: tokens N of an image.
        channels: independent fields of an image.
        decay: (B,).
    """
    side = grid_side(count)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    gains = (frequency ** -decay[:, None, None])[:, None].astype(np.float32)
    white = rng.standard_normal((batch, channels, side, side), dtype=np.float32)
    smooth = np.fft.irfft2(np.fft.rfft2(white) * gains, s=(side, side))
    smooth = smooth.reshape(batch, channels, -1)
    smooth /= smooth.std(axis=2, keepdims=True)
    return smooth[:, :, :count].transpose(0, 2, 1).astype(np.float32)


def grid_side(count: int) -> int:
    """Return the side of the smallest square grid that holds N tokens, row by row."""
    return math.isqrt(count - 1) + 1


def unit(rows: Floats) -> Floats:
    """Return rows of length one."""
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))


def _segments(rng: np.random.Generator, batch: int, count: int) -> Floats:
    """Return float32 (B, N, RANK) unit rows without their image's mean: prototypes and noise."""
    cells = voronoi(rng, batch, count)
    prototypes = unit(rng.standard_normal((batch, SEGMENTS[1] - 1, RANK), dtype=np.float32))
    tokens = np.take_along_axis(prototypes, cells[:, :, None], axis=1)
    strength = rng.uniform(*NOISE, (batch, 1, 1)).astype(np.float32) / math.sqrt(RANK)
    white = rng.standard_normal((batch, count, RANK), dtype=np.float32)
    smooth = smooth_noise(rng, batch, count, RANK, np.full(batch, NOISE_DECAY))
    tokens += strength * (0.6 * smooth + white)
    tokens -= tokens.mean(axis=1, keepdims=True)
    return unit(tokens)


def _add_common_direction(rng: np.random.Generator, latent: Floats) -> None:
    share = rng.uniform(*SHARED, (len(latent), 1, 1)).astype(np.float32)
    latent[:, :, 1:] *= np.sqrt(1 - share)
    latent[:, :, :1] = np.sqrt(share)


def _turn_odd_tokens(rng: np.random.Generator, latent: Floats) -> None:
    """Point a few tokens of some images away from the direction that the others share."""
    for image in np.flatnonzero(rng.random(len(latent)) < ODD_IMAGES):
        chosen = rng.integers(0, latent.shape[1], size=rng.integers(1, 4))
        latent[image, chosen, 1:] *= 0.1
        latent[image, chosen, 0] = -1.0


def _orthonormal(rng: np.random.Generator, rows: int, width: int) -> Floats:
    """Return float32 (rows, width) orthonormal rows."""
    return np.linalg.qr(rng.standard_normal((width, rows)))[0].T.astype(np.float32)
