"""Batches on a CUDA device, with the kernels, the weights and the buffers they are run with."""

from typing import Any, NamedTuple

import cupy
import numpy as np
from numpy.typing import NDArray

from microclip_deploy.cuda.layout import Cut, Workspace
from microclip_deploy.cuda.ncut import NCutKernels
from microclip_deploy.cuda.soap import CudaFusion, Fused
from microclip_deploy.ncut.spec import NCutSpec

EMBEDDING, CLASSES, CLS_SHARE = 512, 200, 0.5

SPECS = (NCutSpec(), NCutSpec(affinity="cosine"), NCutSpec(affinity="centered_cosine"))
"""One of each kernel of the affinity."""


class Batch(NamedTuple):
    """One batch of tokens and everything the kernels write for it."""

    kernels: NCutKernels
    fusion: CudaFusion
    patches: Any
    """(B, N, D): CuPy, or torch for bfloat16."""
    cls: Any
    """CuPy float32 (B, E), unit rows."""
    work: Workspace
    cut: Cut
    fused: Fused

    @classmethod
    def of(cls, kernels: NCutKernels, fusion: CudaFusion, patches: Any, *, seed: int) -> "Batch":
        """Allocate what these tokens need; the outputs are poisoned."""
        count, tokens = patches.shape[:2]
        rows = np.random.default_rng(seed).standard_normal((count, EMBEDDING), np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        work, cut = kernels.workspace(count), kernels.outputs(count)
        fused = fusion.outputs(count, tokens)
        batch = cls(kernels, fusion, patches, cupy.asarray(rows), work, cut, fused)
        batch.poison()
        return batch

    def run(self) -> None:
        """Launch everything: K1, K2 and K3."""
        self.kernels.run(self.patches, self.work, self.cut)
        self.fuse()

    def fuse(self) -> None:
        """Launch K3."""
        self.fusion.run(self.cls, self.patches, self.cut, self.fused)

    def poison(self) -> None:
        """Fill the outputs with bytes that no result has, so that what is unwritten shows."""
        for array in (*self.cut, *self.fused):
            if array is not None:  # on the current stream, as what follows
                array.data.memset_async(0xA5, array.nbytes)


def device_tokens(tokens: NDArray[Any]) -> Any:
    """Upload what `tokens.stored` made: a CuPy array, or a torch tensor for bfloat16."""
    if tokens.dtype != np.uint16:
        return cupy.asarray(tokens)
    import torch  # its start takes long under a sanitizer, so only where it is needed

    return torch.from_numpy(tokens.view(np.int16)).cuda().view(torch.bfloat16)


def random_fusion(width: int) -> CudaFusion:
    """Return the stages behind the cut with random weights of the usual size."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        scaled: NDArray[np.float32] = rng.standard_normal((rows, columns), np.float32)
        scaled /= np.float32(np.sqrt(columns))
        return scaled

    classifier = matrix(CLASSES, EMBEDDING)
    classifier /= np.linalg.norm(classifier, axis=1, keepdims=True)
    # Scores of about one, as trained pooling gives them: tokens have squared length `width`.
    match = matrix(width, width) / np.float32(np.sqrt(width))
    return CudaFusion(match, matrix(EMBEDDING, width), classifier, CLS_SHARE, cls_fallback=False)
