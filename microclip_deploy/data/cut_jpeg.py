"""JPEG files whose end is missing: how much of the picture went with it.

Decoders go on with grey where the bytes end, and do not say where that begins. So the file is
decoded twice, completed in two ways: pixels that differ were made up.
"""

import numpy as np
from numpy.typing import NDArray

_END = b"\xff\xd9"
_BLOCK = 16
"""Rows of pixels that JPEG stores together, at most."""


def completions(content: bytes) -> tuple[bytes, bytes]:
    """Return a JPEG that ends early with an end, and once more with noise before its end."""
    count = len(content) // 20 + 1024
    noise = bytes(97 * i % 255 for i in range(count))  # 255 would begin a marker
    return content + _END, content + noise + _END


def missing_share(plain: NDArray[np.uint8], noisy: NDArray[np.uint8]) -> float:
    """Return the share of pixels that are made up.

    Args:
        plain: (H, W, 3), the first of the completions as it is stored, not turned upright.
        noisy: (H, W, 3), the second.
    """
    differing = (plain != noisy).any(axis=2)
    height, width = differing.shape
    first = int(differing.any(axis=1).argmax()) if differing.any() else height
    # Noise may end before the picture does: all that follows the row of blocks where it began is
    # made up as well.
    below = max(0, height - first - _BLOCK) * width
    return float((differing[first : first + _BLOCK].sum() + below) / differing.size)
