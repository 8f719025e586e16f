"""Weights and buffers on a CUDA device, as the kernels take them."""

from typing import Any, NamedTuple

import cupy
import numpy as np
from numpy.typing import NDArray

from microclip_deploy.cuda.ncut import NCutKernels
from microclip_deploy.cuda.soap import CudaFusion
from microclip_deploy.ncut.spec import NCutSpec

EMBEDDING, CLASSES, CLS_SHARE = 512, 200, 0.5

SPECS = (NCutSpec(), NCutSpec(affinity="cosine"), NCutSpec(affinity="centered_cosine"))
"""One of each kernel of the affinity."""


class Buffers(NamedTuple):
    """One batch of tokens and everything the kernels write for it."""

    patches: Any
    """(B, N, D): CuPy, or torch for bfloat16."""
    cls: Any
    """CuPy float32 (B, E), unit rows."""
    work: Any
    cut: Any
    fused: Any


def device_tokens(tokens: NDArray[Any]) -> Any:
    """Upload what `tokens.stored` made: a CuPy array, or a torch tensor for bfloat16."""
    if tokens.dtype != np.uint16:
        return cupy.asarray(tokens)
    import torch  # its start takes long under a sanitizer, so only where it is needed

    return torch.from_numpy(tokens.view(np.int16)).cuda().view(torch.bfloat16)


def random_fusion(width: int, *, seed: int = 0) -> CudaFusion:
    """Return the stages behind the cut with random weights of the usual size."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        scaled: NDArray[np.float32] = rng.standard_normal((rows, columns), np.float32)
        scaled /= np.float32(np.sqrt(columns))
        return scaled

    classifier = matrix(CLASSES, EMBEDDING)
    classifier /= np.linalg.norm(classifier, axis=1, keepdims=True)
    # Scores of about one, as trained pooling gives them: tokens have squared length `width`.
    match = matrix(width, width) / np.float32(np.sqrt(width))
    return CudaFusion(match, matrix(EMBEDDING, width), classifier, CLS_SHARE)


def make_buffers(kernels: NCutKernels, fusion: CudaFusion, patches: Any, *, seed: int) -> Buffers:
    """Allocate what a batch needs. The outputs are poisoned, so that what is unwritten shows."""
    batch, count = patches.shape[:2]
    rng = np.random.default_rng(seed)
    cls = rng.standard_normal((batch, EMBEDDING), np.float32)
    cls /= np.linalg.norm(cls, axis=1, keepdims=True)
    work, cut = kernels.workspace(batch), kernels.outputs(batch)
    fused = fusion.outputs(batch, count)
    poison(cut)
    poison(fused)
    return Buffers(patches, cupy.asarray(cls), work, cut, fused)


def poison(outputs: Any) -> None:
    """Fill the arrays of a NamedTuple with bytes that no result has."""
    for array in outputs:
        array.data.memset_async(0xA5, array.nbytes)  # on the current stream, as what follows
