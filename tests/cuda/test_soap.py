"""The kernels of the serving head against SOAP and TokenFusion in float64, run on the CPU."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from microclip_deploy.cuda import soap as cuda_soap
from microclip_deploy.cuda.layout import Device, KernelLayout
from microclip_deploy.cuda.source import MAX_GRID_Y, TOKEN_TYPES, Launch, TokenType
from microclip_deploy.errors import UsageError
from microclip_deploy.head import Head as Folded
from microclip_deploy.model import soap
from microclip_deploy.model.soap import SOAP
from microclip_deploy.model.token_fusion import fused_logits
from microclip_deploy.ncut.spec import NCutSpec
from tests.cuda.kernels_on_cpu import poisoned, require_compiler, run

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
    held: torch.Tensor
    """The patches in the type that kernels read."""
    mask: torch.Tensor
    cls: torch.Tensor
    projection: torch.Tensor
    classifier: torch.Tensor

    def folded(self) -> Folded:
        """Return what serving uploads."""
        query, key, value = (
            linear.weight.detach()
            for linear in (self.soap.query_proj, self.soap.key_proj, self.soap.value_proj)
        )
        match = to_float32(key.T @ query / math.sqrt(len(query)))
        project = to_float32(self.projection.T @ value)
        return Folded(match, project, to_float32(self.classifier), CLS_SHARE, False)


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


def make_head(
    count: int, width: int, embedding: int, classes: int, token: TokenType, images: int = 3
) -> Head:
    """Return images with a class token in front of each, and random maps near the identity."""
    random = torch.Generator().manual_seed(width + count)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    soap = SOAP(width).double()
    for linear in (soap.query_proj, soap.key_proj, soap.value_proj):
        linear.weight.data += 0.3 / math.sqrt(width) * normal(width, width)
    held = (normal(images, 1, width) + normal(images, count + 1, width)).to(getattr(torch, token))
    share = torch.tensor([0.05, 0.5, 1.1]).repeat(images)[:images, None]
    mask = torch.rand(images, count, generator=random) < share
    mask[:, 1] = True
    cls, classifier = (F.normalize(normal(n, embedding), dim=-1) for n in (images, classes))
    projection = normal(width, embedding) / math.sqrt(width)
    held = held[:, 1:]
    return Head(soap, held.double(), held, mask, cls, projection, classifier)


def run_kernels(
    head: Head, splits: int, *, order: int = 0, pooling: bool = True, cls_fallback: bool = False
) -> Found:
    """Run the head as CudaFusion.run does."""
    batch, count, width = head.held.shape
    folded = head.folded()._replace(cls_fallback=cls_fallback)
    folded = folded if pooling else folded._replace(match=None)
    fused = cuda_soap.outputs(folded, batch, count, poisoned)._replace(
        softmaxes=poisoned("float32", batch, splits, 2),
        sums=poisoned("float32", batch, splits, width),
    )
    layout = KernelLayout(count, 16, "float32", NCutSpec(), Device(90, 232448))
    rows, salient = listed(head.mask)
    cut = layout.outputs(batch, poisoned)._replace(salient=salient, rows=rows)
    for launch in cuda_soap.launches(folded, to_float32(head.cls), head.held, cut, fused):
        run(launch, order=order)
    return Found(fused.query, fused.attention, fused.pooled, fused.fg, fused.logits)


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


def to_float32(tensor: torch.Tensor) -> Floats:
    return np.ascontiguousarray(tensor.numpy(), dtype=np.float32)


@pytest.mark.parametrize(
    ("images", "count", "width", "embedding", "classes", "splits", "token"),
    [
        (3, 49, 64, 32, 3, 1, "float32"),
        *((3, 49, 784, 36, 37, 7, token) for token in TOKEN_TYPES),
        (3, 197, 144, 132, 17, 5, "bfloat16"),
        (17, 4, 16, 4, 1, 1, "float16"),
    ],
)
def test_the_head_is_that_of_fusion(
    images: int,
    count: int,
    width: int,
    embedding: int,
    classes: int,
    splits: int,
    token: TokenType,
) -> None:
    head = make_head(count, width, embedding, classes, token, images)
    assert_close(run_kernels(head, splits), head)


@pytest.mark.parametrize("splits", [1, 2, 6, 16])
def test_any_number_of_splits_gives_the_same_head(splits: int) -> None:
    head = make_head(100, 144, 132, 5, "bfloat16")
    assert_close(run_kernels(head, splits), head)


def test_the_head_does_not_depend_on_the_order_of_threads() -> None:
    head = make_head(49, 144, 132, 5, "bfloat16")
    first = run_kernels(head, 3)
    for order in (1, 2, 3):
        for name, values in run_kernels(head, 3, order=order)._asdict().items():
            assert values.tobytes() == getattr(first, name).tobytes(), name


def test_scores_far_apart_stay_finite() -> None:
    head = make_head(49, 64, 32, 3, "float32")
    large = head._replace(patches=40 * head.patches, held=40 * head.held)
    found, exact = run_kernels(large, 4), expected(large)
    assert np.isfinite(found.logits).all()
    # Scores of thousands lose three digits of float32; the softmax is close to one token's.
    np.testing.assert_allclose(found.attention, exact.attention, atol=0.02)


def test_fg_is_cls_where_every_token_is_salient_if_the_rule_says_so() -> None:
    head = make_head(49, 64, 32, 3, "float32")
    assert head.mask.all(dim=1).tolist() == [False, False, True]
    exact, found = expected(head), run_kernels(head, 2, cls_fallback=True)
    np.testing.assert_array_equal(found.fg[2], to_float32(head.cls)[2])
    np.testing.assert_allclose(found.fg[:2], exact.fg[:2], atol=SCORES)
    alone = 100 * (head.cls @ head.classifier.T).numpy()
    np.testing.assert_allclose(found.logits[2], alone[2], atol=LOGITS)


def test_without_maps_the_tokens_are_pooled_alike() -> None:
    head = make_head(49, 64, 32, 3, "float32")
    found = run_kernels(head, 2, pooling=False)
    np.testing.assert_allclose(found.pooled, head.patches.mean(dim=1).numpy(), atol=3e-6)


def test_more_images_than_a_grid_has_are_refused() -> None:
    pytest.importorskip("cupy", reason="needs CuPy, though no device: pip install cupy-cuda13x")
    launch = Launch(cuda_soap.product_source(16), "product", (1, MAX_GRID_Y + 1), 256, ())
    with pytest.raises(UsageError, match=f"at most {MAX_GRID_Y} in a batch"):
        launch()
