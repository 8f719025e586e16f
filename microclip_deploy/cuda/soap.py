"""SOAP, TokenFusion and the classifier on CuPy arrays, folded for serving.

Three matrix products in float32 (product.cu) and small kernels between them (soap.cu). With
outputs made before, nothing is allocated and nothing waits: all of it can be captured in a graph.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from microclip_deploy.cuda.arrays import Array, Empty, empty_like, readable, type_name
from microclip_deploy.cuda.layout import Cut
from microclip_deploy.cuda.source import SHARED_UNASKED, TOKEN_TYPES, CudaSource, Launch
from microclip_deploy.errors import UsageError
from microclip_deploy.head import LOGIT_SCALE, Head

_THREADS = 256
_WARPS = _THREADS // 32
_COLUMNS = 64
"""Of the query that a block of `masked_mean` makes."""
_PRODUCT_ROWS = 16
"""Of the matrix that a block of `product` multiplies."""
_PRODUCT_IMAGES = 16
"""Most images that a block of `product` multiplies them with."""
_BLOCKS_WANTED = 264
"""Blocks of `attend` that fill a large GPU twice; smaller batches split their tokens, ..."""
_MOST_SPLITS = 16
"""... though not into more pieces than are soon merged."""


class Fused(NamedTuple):
    """Results and what lies between them, of a batch."""

    fg: Array
    """float32 (B, E), unit rows."""
    logits: Array
    """float32 (B, C), scale 100."""
    attention: Array
    """float32 (B, N+1); the last column is the zero token's."""
    query: Array
    """float32 (B, D): mean of the salient tokens."""
    key: Array
    """float32 (B, D)."""
    softmaxes: Array
    """float32 (B, splits, 2)."""
    sums: Array
    """float32 (B, splits, D)."""
    pooled: Array
    """float32 (B, D)."""
    projected: Array
    """float32 (B, E)."""
    fused: Array
    """float32 (B, E): times the class matrix these are the logits."""
    salient: Array | None = None
    """int32 (B,): N, where the plain mean takes every token for a salient one; ..."""
    rows: Array | None = None
    """int16 (B, N): ... and their numbers. Kept here: a graph that was captured holds them."""


class CudaFusion:
    """The head of an adapted model on the current device."""

    def __init__(
        self,
        match: Array | None,
        project: Array,
        classifier: Array,
        cls_share: float,
        cls_fallback: bool,
    ) -> None:
        """Upload the float32 matrices of a `Head`.

        Raises:
            UsageError: D or E is not a multiple of 4; rows are read 16 bytes at a time.
        """
        import cupy

        if any(size % 4 for size in project.shape):
            raise UsageError(
                f"head: expected widths that are multiples of 4 on a GPU, found {project.shape}; "
                "serve this model without CuPy"
            )
        match, project, classifier = (
            None if matrix is None else cupy.asarray(matrix, cupy.float32)
            for matrix in (match, project, classifier)
        )
        self.head = Head(match, project, classifier, cls_share, cls_fallback)

    def outputs(self, batch: int, count: int) -> Fused:
        """Return buffers for `batch` images of `count` tokens."""
        return outputs(self.head, batch, count, empty_like(None))

    def run(self, cls: Array, patches: Array, cut: Cut, fused: Fused) -> None:
        """Pool the patches by their likeness to the salient ones, fuse, and classify.

        Args:
            cls: float32 (B, E), unit rows, contiguous.
            patches: (B, N, D), float16, bfloat16 or float32.
            cut: what `NCutKernels` found in them.
            fused: where the results go.

        Raises:
            UsageError: more images than one launch can take.
        """
        for launch in launches(self.head, cls, patches, cut, fused):
            launch()
        if self.head.match is None:
            fused.attention[:, :-1] = np.float32(1 / patches.shape[1])
            fused.attention[:, -1] = 0


def outputs(head: Head, batch: int, count: int, empty: Empty) -> Fused:
    """Return buffers for `batch` images of `count` tokens."""
    embedding, width = head.project.shape
    splits = max(1, min(_BLOCKS_WANTED // max(batch, 1), -(-count // _WARPS), _MOST_SPLITS))
    salient = rows = None
    if head.match is None:
        salient, rows = empty("int32", batch), empty("int16", batch, count)
        salient[:] = count
        rows[:] = array_namespace(rows).arange(count, dtype=rows.dtype)

    def floats(*shape: int) -> Any:
        return empty("float32", batch, *shape)

    return Fused(
        fg=floats(embedding),
        logits=floats(len(head.classifier)),
        attention=floats(count + 1),
        query=floats(width),
        key=floats(width),
        softmaxes=floats(splits, 2),
        sums=floats(splits, width),
        pooled=floats(width),
        projected=floats(embedding),
        fused=floats(embedding),
        salient=salient,
        rows=rows,
    )


def launches(head: Head, cls: Array, patches: Array, cut: Cut, fused: Fused) -> Iterator[Launch]:
    """Yield the work of `CudaFusion.run` in order; the matrices may be of any library."""
    count, width = patches.shape[1:]
    source = fusion_source(width, type_name(patches.dtype))
    patches, stride = readable(patches, width)
    tokens = (patches, np.int64(stride), np.int32(count))
    if head.match is None:
        yield _masked_mean(source, tokens, (fused.salient, fused.rows), fused.pooled)
    else:
        yield _masked_mean(source, tokens, (cut.salient, cut.rows), fused.query)
        yield _product(fused.query, head.match, fused.key)
        yield from _attend(source, tokens, fused)
    yield _product(fused.pooled, head.project, fused.projected)
    salient = cut.salient if head.cls_fallback else np.uint64(0)
    yield _fuse(source, cls, head, (tokens[2], salient), fused)
    yield _product(fused.fused, head.classifier, fused.logits)


def product_source(width: int) -> CudaSource:
    """Return the kernel of products over `width` numbers."""
    constants = {
        "PRODUCT_WIDTH": width,
        "PRODUCT_THREADS": _THREADS,
        "PRODUCT_ROWS": _PRODUCT_ROWS,
    }
    return CudaSource.of("product.cu", constants)


def fusion_source(width: int, token: str) -> CudaSource:
    """Return the kernels for tokens of a width and type."""
    constants = {
        "SOAP_WIDTH": width,
        "SOAP_LOGIT_SCALE": LOGIT_SCALE,
        "SOAP_THREADS": _THREADS,
        "SOAP_COLUMNS": _COLUMNS,
        "TOKEN_TYPE": TOKEN_TYPES.index(token),
    }
    return CudaSource.of("soap.cu", constants)


def attend_bytes(width: int) -> int:
    """Return the shared memory of `attend`: a sum and a softmax a warp."""
    return _WARPS * (width * 4 + 8)


def _masked_mean(
    source: CudaSource, tokens: tuple[Any, ...], salient: tuple[Array, Array], out: Array
) -> Launch:
    batch, width = out.shape
    grid, shared = (math.ceil(width / _COLUMNS), batch), _WARPS * _COLUMNS * 4
    return Launch(source, "masked_mean", grid, _THREADS, (*tokens, *salient, out), shared)


def _attend(source: CudaSource, tokens: tuple[Any, ...], fused: Fused) -> Iterator[Launch]:
    batch, splits, width = fused.sums.shape
    scores = (*tokens, fused.key, fused.attention, fused.softmaxes, fused.sums)
    yield Launch(source, "attend", (splits, batch), _THREADS, scores, attend_bytes(width))
    parts = (fused.softmaxes, fused.sums, fused.attention, fused.pooled)
    merged = (tokens[2], np.int32(splits), *parts)
    yield Launch(source, "merge", (batch, 1), _THREADS, merged, 4 * splits)


def _fuse(
    source: CudaSource, cls: Array, head: Head, salient: tuple[Any, ...], fused: Fused
) -> Launch:
    batch, embedding = fused.projected.shape
    numbers = (np.int32(embedding), np.float32(head.cls_share))
    arguments = (*numbers, *salient, cls, fused.projected, fused.fg, fused.fused)
    return Launch(source, "fuse", (batch, 1), _THREADS, arguments, _WARPS * 4)


def _product(x: Array, matrix: Array, out: Array) -> Launch:
    """Write x (B, K) times matrix (R, K) transposed to out (B, R), float32."""
    (batch, width), rows = x.shape, len(matrix)
    images = max(1, min(_PRODUCT_IMAGES, batch, SHARED_UNASKED // (4 * width)))
    arguments = (np.int32(batch), np.int32(images), np.int32(rows), x, matrix, out)
    grid = (math.ceil(rows / _PRODUCT_ROWS), math.ceil(batch / images))
    shared = 4 * width * images
    return Launch(product_source(width), "product", grid, _THREADS, arguments, shared)
