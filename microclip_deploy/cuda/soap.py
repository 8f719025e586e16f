"""SOAP, TokenFusion and the classifier on CuPy arrays, folded for serving.

Three matrix products in float32 (product.cu) and small kernels between them (soap.cu). With
outputs made before, nothing is allocated and nothing waits: all of it can be captured in a graph.
"""

import math
from typing import Any, NamedTuple

import cupy
import numpy as np
from numpy.typing import NDArray

from microclip_deploy.cuda.arrays import pointer, readable, type_name
from microclip_deploy.cuda.ncut import Cut
from microclip_deploy.cuda.source import TOKEN_TYPES, CudaSource
from microclip_deploy.data.classes import LOGIT_SCALE
from microclip_deploy.errors import UsageError

_THREADS = 256
_WARPS = _THREADS // 32
_COLUMNS = 64
_PRODUCT_ROWS = 16
_PRODUCT_BYTES = 49152
"""Shared memory for the images of a block of `product`: what every device gives unasked."""
_BLOCKS_WANTED = 264
"""Blocks of `attend` that fill a large GPU twice; smaller batches split their tokens, ..."""
_MOST_SPLITS = 16
"""... though not into more pieces than are soon merged."""


class Fused(NamedTuple):
    """Results and what lies between them, of a batch."""

    fg: Any
    """float32 (B, E), unit rows."""
    logits: Any
    """float32 (B, C), scale 100."""
    attention: Any
    """float32 (B, N+1); the last column is the zero token's."""
    query: Any
    """float32 (B, D): mean of the salient tokens."""
    key: Any
    """float32 (B, D)."""
    softmaxes: Any
    """float32 (B, splits, 2)."""
    sums: Any
    """float32 (B, splits, D)."""
    pooled: Any
    """float32 (B, D)."""
    projected: Any
    """float32 (B, E)."""
    fused: Any
    """float32 (B, E): times the class matrix these are the logits."""


class CudaFusion:
    """The head of an adapted model on the current device."""

    def __init__(
        self,
        match: NDArray[np.float32] | None,
        project: NDArray[np.float32],
        classifier: NDArray[np.float32],
        cls_share: float,
    ) -> None:
        """Upload the matrices.

        Args:
            match: float32 (D, D), Wk^T Wq / sqrt(D); None pools all tokens alike.
            project: float32 (E, D), (Wv^T P)^T.
            classifier: float32 (C, E), unit rows.
            cls_share: weight of [CLS] in the fused logits, 0 to 1.

        Raises:
            UsageError: D or E is not a multiple of 4; rows are read 16 bytes at a time.
        """
        if any(size % 4 for size in project.shape):
            raise UsageError(
                f"head: expected widths that are multiples of 4 on a GPU, found {project.shape}; "
                "serve this model without CuPy"
            )
        self.match = None if match is None else cupy.asarray(match, cupy.float32)
        self.project = cupy.asarray(project, cupy.float32)
        self.classifier = cupy.asarray(classifier, cupy.float32)
        self.cls_share = cls_share
        self._every_token: dict[tuple[int, int], tuple[Any, Any]] = {}

    def outputs(self, batch: int, count: int) -> Fused:
        """Return buffers for `batch` images of `count` tokens."""
        if self.match is None:  # what the plain mean takes for the salient tokens
            self._every_token[batch, count] = (
                cupy.full(batch, count, cupy.int32),
                cupy.tile(cupy.arange(count, dtype=cupy.int16), (batch, 1)),
            )
        embedding, width = self.project.shape
        splits = max(1, min(_BLOCKS_WANTED // max(batch, 1), -(-count // _WARPS), _MOST_SPLITS))

        def empty(*shape: int) -> Any:
            return cupy.empty((batch, *shape), cupy.float32)

        return Fused(
            fg=empty(embedding),
            logits=empty(len(self.classifier)),
            attention=empty(count + 1),
            query=empty(width),
            key=empty(width),
            softmaxes=empty(splits, 2),
            sums=empty(splits, width),
            pooled=empty(width),
            projected=empty(embedding),
            fused=empty(embedding),
        )

    def run(self, cls: Any, patches: Any, cut: Cut, fused: Fused) -> None:
        """Pool the patches by their likeness to the salient ones, fuse, and classify.

        Args:
            cls: float32 (B, E), unit rows, contiguous.
            patches: (B, N, D), float16, bfloat16 or float32.
            cut: what `NCutKernels` found in them.
            fused: where the results go.
        """
        batch, count, width = patches.shape
        module = fusion_source(width, type_name(patches.dtype)).module()
        patches, stride = readable(patches, width)
        tokens = (pointer(patches), np.int64(stride), np.int32(count))
        if self.match is None:
            self._mean(module, tokens, fused)
        else:
            salient = (pointer(cut.salient), pointer(cut.rows))
            _masked_mean(module, tokens, salient, fused.query)
            _product(fused.query, self.match, fused.key)
            self._attend(module, tokens, fused)
        _product(fused.pooled, self.project, fused.projected)
        embedding = np.int32(self.project.shape[0])
        arguments = (embedding, np.float32(self.cls_share), cls, fused.projected, fused.fg)
        module.get_function("fuse")(
            (batch,), (_THREADS,), (*arguments, fused.fused), shared_mem=_WARPS * 4
        )
        _product(fused.fused, self.classifier, fused.logits)

    def _attend(self, module: Any, tokens: tuple[Any, ...], fused: Fused) -> None:
        batch, splits, width = fused.sums.shape
        attend, merge = module.get_function("attend"), module.get_function("merge")
        shared = _WARPS * (width * 4 + 8)
        attend.max_dynamic_shared_size_bytes = shared
        arguments = (*tokens, fused.key, fused.attention, fused.softmaxes, fused.sums)
        attend((splits, batch), (_THREADS,), arguments, shared_mem=shared)
        parts = (fused.softmaxes, fused.sums, fused.attention, fused.pooled)
        merge((batch,), (_THREADS,), (tokens[2], np.int32(splits), *parts), shared_mem=4 * splits)

    def _mean(self, module: Any, tokens: tuple[Any, ...], fused: Fused) -> None:
        """Pool every token alike, as `TokenMean`."""
        counts, rows = self._every_token[len(fused.pooled), int(tokens[2])]
        _masked_mean(module, tokens, (pointer(counts), pointer(rows)), fused.pooled)
        fused.attention[:, :-1] = np.float32(1 / int(tokens[2]))
        fused.attention[:, -1] = 0


def product_source(width: int) -> CudaSource:
    """Return the kernel of products over `width` numbers."""
    return CudaSource.of("product.cu", {"PRODUCT_WIDTH": width})


def fusion_source(width: int, token: str) -> CudaSource:
    """Return the kernels for tokens of a width and type."""
    constants = {
        "SOAP_WIDTH": width,
        "SOAP_LOGIT_SCALE": LOGIT_SCALE,
        "TOKEN_TYPE": TOKEN_TYPES.index(token),
    }
    return CudaSource.of("soap.cu", constants)


def _masked_mean(module: Any, tokens: tuple[Any, ...], salient: tuple[int, int], out: Any) -> None:
    batch, width = out.shape
    grid = (math.ceil(width / _COLUMNS), batch)
    shared = _WARPS * _COLUMNS * 4
    module.get_function("masked_mean")(
        grid, (_THREADS,), (*tokens, *salient, pointer(out)), shared_mem=shared
    )


def _product(x: Any, matrix: Any, out: Any) -> None:
    """Write x (B, K) times matrix (R, K) transposed to out (B, R), float32."""
    (batch, width), rows = x.shape, len(matrix)
    images = max(1, min(16, batch, _PRODUCT_BYTES // (4 * width)))
    arguments = (np.int32(batch), np.int32(images), np.int32(rows), x, matrix, out)
    grid = (math.ceil(rows / _PRODUCT_ROWS), math.ceil(batch / images))
    product = product_source(width).module().get_function("product")
    product(grid, (_THREADS,), arguments, shared_mem=4 * width * images)
