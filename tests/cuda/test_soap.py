"""The kernels of the serving head against fusion.py in float64, run on the CPU."""

import ctypes
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from microclip_deploy.cuda.source import TOKEN_TYPES, TokenType
from microclip_deploy.model import soap
from microclip_deploy.model.soap import SOAP, TokenMean
from microclip_deploy.model.token_fusion import fused_logits
from tests.cuda.kernels_on_cpu import build, require_compiler

cupy = pytest.importorskip("cupy", reason="needs CuPy, though no device: pip install cupy-cuda13x")
cuda_soap = pytest.importorskip("microclip_deploy.cuda.soap")

Floats = NDArray[np.float32]
CLS_SHARE = 0.3

SCORES = 3e-5
"""Scores are float32 sums of D products, of the size of sqrt(D) in all; the softmax passes their
absolute error on to the attention."""
LOGITS = 2e-3
"""100 times cosines of float32 vectors, whose pooled token carries the error of the attention."""


class Head(NamedTuple):
    """Images and a model, in float64."""

    soap: SOAP
    patches: torch.Tensor
    held: NDArray[Any]
    mask: torch.Tensor
    cls: torch.Tensor
    projection: torch.Tensor
    classifier: torch.Tensor


class Found(NamedTuple):
    """What the kernels give."""

    query: Floats
    attention: Floats
    pooled: Floats
    fg: Floats
    logits: Floats


@pytest.fixture(scope="module", autouse=True)
def _needs_a_compiler() -> None:
    require_compiler()


def make_head(count: int, width: int, embedding: int, classes: int, token: TokenType) -> Head:
    """Return three images, one with a class token in front, and random maps near the identity."""
    random = torch.Generator().manual_seed(width + count)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    soap = SOAP(width).double()
    for linear in (soap.query_proj, soap.key_proj, soap.value_proj):
        linear.weight.data += 0.3 / math.sqrt(width) * normal(width, width)
    patches = (normal(3, 1, width) + normal(3, count + 1, width)).to(getattr(torch, token))
    held = patches.view(torch.uint16) if token != "float32" else patches
    mask = torch.rand(3, count, generator=random) < torch.tensor([[0.05], [0.5], [1.1]])
    mask[:, 1] = True
    cls, classifier = (F.normalize(normal(n, embedding), dim=-1) for n in (3, classes))
    projection = normal(width, embedding) / math.sqrt(width)
    return Head(
        soap, patches.double()[:, 1:], held.numpy()[:, 1:], mask, cls, projection, classifier
    )


def run_kernels(head: Head, token: TokenType, splits: int, *, order: int = 0) -> Found:
    """Run the head as CudaFusion.run does."""
    batch, count, width = head.held.shape
    embedding = head.projection.shape[1]
    library = build("soap_on_cpu.cpp", cuda_soap.fusion_source(width, token))
    tokens = (pointer(head.held), ctypes.c_longlong(head.held.strides[0] // head.held.itemsize))
    rows, salient = listed(head.mask)
    query, pooled = empty(batch, width), empty(batch, width)
    blocks = math.ceil(width / cuda_soap._COLUMNS)
    chosen = (pointer(salient), pointer(rows))
    library.masked_mean_on_cpu(blocks, batch, *tokens, count, *chosen, pointer(query), order)
    soap = head.soap
    match = (soap.key_proj.weight.T @ soap.query_proj.weight / math.sqrt(width)).detach()
    key = product(query, to_float32(match), order)
    attention, softmaxes, sums = (
        empty(batch, count + 1),
        empty(batch, splits, 2),
        empty(batch, splits, width),
    )
    parts = (pointer(softmaxes), pointer(sums))
    library.attend_on_cpu(
        splits, batch, *tokens, count, pointer(key), pointer(attention), *parts, order
    )
    library.merge_on_cpu(batch, count, splits, *parts, pointer(attention), pointer(pooled), order)
    project = (head.projection.T @ soap.value_proj.weight).detach()
    projected = product(pooled, to_float32(project), order)
    fg, fused = empty(batch, embedding), empty(batch, embedding)
    share, cls = ctypes.c_float(CLS_SHARE), to_float32(head.cls)
    arguments = map(pointer, (cls, projected, fg, fused))
    library.fuse_on_cpu(batch, embedding, share, *arguments, order)
    logits = product(fused, to_float32(head.classifier), order)
    return Found(query, attention, pooled, fg, logits)


def product(x: Floats, matrix: Floats, order: int) -> Floats:
    """Run product.cu as cuda_soap._product does; blocks of two images, the last of one."""
    (batch, width), rows, images = x.shape, len(matrix), 2
    y = empty(batch, rows)
    library = build("product_on_cpu.cpp", cuda_soap.product_source(width))
    grid = (math.ceil(rows / cuda_soap._PRODUCT_ROWS), math.ceil(batch / images))
    library.product_on_cpu(*grid, batch, images, rows, *map(pointer, (x, matrix, y)), order)
    return y


def expected(head: Head) -> Found:
    pooled = head.soap(head.patches, head.mask)
    fg = F.normalize(pooled.vector @ head.projection, dim=-1)
    logits = fused_logits(head.cls, fg, head.classifier, CLS_SHARE)
    query = soap.masked_mean(head.patches, head.mask)
    mixed = torch.einsum("bn,bnd->bd", pooled.attention[:, :-1], head.patches)
    tensors = (query, pooled.attention, mixed, fg, logits)
    return Found(*(tensor.detach().numpy() for tensor in tensors))


def assert_close(found: Found, head: Head) -> None:
    exact = expected(head)
    np.testing.assert_allclose(found.query, exact.query, atol=3e-6)  # float32 means of N numbers
    np.testing.assert_allclose(found.attention, exact.attention, atol=SCORES)
    np.testing.assert_allclose(found.attention.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found.pooled, exact.pooled, atol=20 * SCORES)
    np.testing.assert_allclose(found.fg, exact.fg, atol=SCORES)
    np.testing.assert_allclose(found.logits, exact.logits, atol=LOGITS)


def listed(mask: torch.Tensor) -> tuple[NDArray[np.uint16], NDArray[np.int32]]:
    """Return the numbers of the salient tokens, poisoned past their end, and how many there are."""
    rows = np.full(mask.shape, 65535, np.uint16)
    salient = mask.sum(dim=1).numpy().astype(np.int32)
    for row, image in zip(rows, mask.numpy(), strict=True):
        row[: image.sum()] = np.flatnonzero(image)
    return rows, salient


def empty(*shape: int) -> Floats:
    return np.full(shape, np.nan, np.float32)


def to_float32(tensor: torch.Tensor) -> Floats:
    return np.ascontiguousarray(tensor.numpy(), dtype=np.float32)


def pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


@pytest.mark.parametrize("token", TOKEN_TYPES)
@pytest.mark.parametrize(
    ("count", "width", "embedding", "classes", "splits"),
    [(49, 64, 32, 3, 1), (49, 784, 36, 37, 7), (197, 144, 132, 17, 5), (4, 16, 4, 1, 1)],
)
def test_the_head_is_that_of_fusion(
    count: int, width: int, embedding: int, classes: int, splits: int, token: TokenType
) -> None:
    head = make_head(count, width, embedding, classes, token)
    assert_close(run_kernels(head, token, splits), head)


@pytest.mark.parametrize("splits", [1, 2, 6, 16])
def test_any_number_of_splits_gives_the_same_head(splits: int) -> None:
    head = make_head(100, 80, 20, 5, "float16")
    assert_close(run_kernels(head, "float16", splits), head)


def test_the_head_does_not_depend_on_the_order_of_threads() -> None:
    head = make_head(49, 144, 20, 5, "bfloat16")
    first = run_kernels(head, "bfloat16", 3)
    for order in (1, 2, 3):
        for name, values in run_kernels(head, "bfloat16", 3, order=order)._asdict().items():
            assert values.tobytes() == getattr(first, name).tobytes(), name


def test_scores_far_apart_stay_finite() -> None:
    head = make_head(49, 64, 32, 3, "float32")
    large = head._replace(patches=40 * head.patches, held=np.asarray(40 * head.held))
    found, exact = run_kernels(large, "float32", 4), expected(large)
    assert np.isfinite(found.logits).all()
    # Scores of thousands lose three digits of float32; the softmax is close to one token's.
    np.testing.assert_allclose(found.attention, exact.attention, atol=0.02)


def test_a_mask_of_every_token_is_the_plain_mean() -> None:
    head = make_head(49, 64, 32, 3, "float32")
    everything = head._replace(mask=torch.ones_like(head.mask))
    found = run_kernels(everything, "float32", 2)
    mean = TokenMean()(head.patches, head.mask).vector
    np.testing.assert_allclose(found.query, mean.numpy(), atol=3e-6)


@pytest.mark.parametrize("width", [16, 512, 768, 1024, 1280])
def test_shared_memory_of_products_needs_no_opt_in(width: int) -> None:
    images = max(1, min(16, cuda_soap._PRODUCT_BYTES // (4 * width)))
    assert 4 * width * images <= 48 * 1024
