"""All answers to a batch in one block of bytes, so that one copy brings them to the host."""

import math
from typing import Any, NamedTuple

import numpy as np

from microclip_deploy.serving.session import Prediction

_ALIGNMENT = 256
"""Bytes; as CUDA aligns what it allocates, so that kernels may read vectors."""


class Sizes(NamedTuple):
    """What the shapes of a prediction depend on, besides the batch."""

    tokens: int
    """N."""
    joint: int
    """E."""
    classes: int
    """C."""


def block_bytes(batch: int, sizes: Sizes) -> int:
    """Return the size of the block in bytes."""
    return sum(_padded(*field) for field in _fields(batch, sizes))


def block_views(block: Any, batch: int, sizes: Sizes) -> Prediction:
    """Return a prediction whose arrays are parts of a block.

    Args:
        block: uint8 (`block_bytes`,) of NumPy or CuPy.
        batch: B.
        sizes: of the model.

    Returns:
        Arrays of the same library, C-contiguous, that share the block's memory.
    """
    views, start = [], 0
    for dtype, shape in _fields(batch, sizes):
        end = start + dtype.itemsize * math.prod(shape)
        views.append(block[start:end].view(dtype).reshape(shape))
        start += _padded(dtype, shape)
    return Prediction(*views)


def _fields(batch: int, sizes: Sizes) -> tuple[tuple[np.dtype[Any], tuple[int, ...]], ...]:
    """Return dtype and shape of each field of a prediction, in their order."""
    real, flag = np.dtype(np.float32), np.dtype(np.bool_)
    return (
        (real, (batch, sizes.joint)),  # cls
        (real, (batch, sizes.joint)),  # fg
        (real, (batch, sizes.classes)),  # logits
        (flag, (batch, sizes.tokens)),  # mask
        (real, (batch, sizes.tokens + 1)),  # attention
        (flag, (batch,)),  # complete
    )


def _padded(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Return the bytes of an array and of the gap behind it."""
    return -(-dtype.itemsize * math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
