"""The kernels in every layout: sizes of graph and token, shared memory, rules and affinities."""

from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from microclip_deploy.cuda.layout import Device, KernelLayout, check_shape
from microclip_deploy.cuda.source import TOKEN_TYPES, TokenType
from microclip_deploy.errors import UsageError
from microclip_deploy.ncut.foreground import Saliency
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import adjacency, similarities
from tests.cuda.float64_cut import compare
from tests.cuda.kernels_on_cpu import (
    Facts,
    affinity,
    cut_bits,
    cut_edges,
    require_compiler,
    unpacked,
)
from tests.ncut.graphs import FAMILIES, Bools, layer_norm_tokens

SPEC = NCutSpec()
DEVICES = {
    "Turing": Device(75, 65536),
    "A100": Device(80, 166912),
    "Ada": Device(89, 101376),
    "Hopper": Device(90, 232448),
}
"""Those that differ in what their blocks may have."""
COUNTS = (4, 32, 33, 63, 64, 65, 66, 345, 577, 1024)
AFFINITIES = get_args(NCutSpec.model_fields["affinity"].annotation)
NEAR_TAU = 1e-5
"""Similarities so close to tau, relative to the longest tokens' product, may fall on either side in
float32."""


@pytest.fixture(scope="module", autouse=True)
def _needs_a_compiler() -> None:
    require_compiler()


def graphs(count: int, each: int = 1) -> Bools:
    """Return some graphs of every family."""
    rng = np.random.default_rng(count)
    return np.concatenate([family(rng, each, count) for family in FAMILIES.values()])


@cache
def with_all_memory(count: int) -> tuple[Saliency, Facts]:
    layout = KernelLayout(count, 16, "float32", SPEC, Device(90, 1 << 18))
    return cut_edges(layout, graphs(count)[::3])


@pytest.mark.parametrize("count", COUNTS)
def test_masks_are_exact_for_any_number_of_tokens(count: int) -> None:
    layout = KernelLayout(count, 16, "float32", SPEC, DEVICES["Hopper"])
    edges = graphs(count, 4) if count < 128 else graphs(count)
    found = compare(layout, edges if count < 600 else edges[3::4])
    assert found.wrong().tolist() == []
    assert found.kernel.mask.any(axis=1).all()
    assert found.binding.any()


@pytest.mark.parametrize("count", [577, 1024])
@pytest.mark.parametrize("name", DEVICES)
def test_every_device_gives_the_same_bits(name: str, count: int) -> None:
    here = KernelLayout(count, 16, "float32", SPEC, DEVICES[name])
    assert here.cut_bytes() <= here.device.shared_bytes
    expected, facts = with_all_memory(count)
    found, others = cut_edges(here, graphs(count)[::3])
    assert found.vector.tobytes() == expected.vector.tobytes()
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(others.steps, facts.steps)


def test_small_devices_spill() -> None:
    def layout(count: int, name: str) -> KernelLayout:
        return KernelLayout(count, 16, "float32", SPEC, DEVICES[name])

    assert all(layout(256, name).spilled_rows == 0 for name in ("A100", "Hopper"))
    assert layout(577, "Turing").spilled_rows > layout(577, "Hopper").spilled_rows > 0
    assert not layout(1024, "Turing").edges_in_shared, "expected edges that stay in global memory"


def test_the_mean_is_a_level_too() -> None:
    spec = NCutSpec(threshold="mean")
    found = compare(KernelLayout(196, 16, "float32", spec, DEVICES["Hopper"]), graphs(196, 3))
    assert found.wrong().tolist() == []
    assert found.binding.mean() > 0.5


# ------------------------------------------------------------------------------ affinity


def of_type(tokens: NDArray[np.float32], token: TokenType) -> tuple[NDArray[Any], Any]:
    """Return tokens rounded to a type as the kernel reads them, and the values they stand for."""
    if token != "bfloat16":
        rounded = tokens.astype(token)
        return rounded, rounded.astype(np.float64)
    brain = torch.from_numpy(tokens).bfloat16()
    return brain.view(torch.uint16).numpy(), brain.double().numpy()


def assert_graph(layout: KernelLayout, bits: NDArray[np.uint32], values: Any) -> None:
    """Compare bits with the definition on the same values, except where rounding may decide."""
    count = layout.count
    found = unpacked(layout, bits)
    inner = found[:, :count, :count]
    np.testing.assert_array_equal(inner, inner.transpose(0, 2, 1))
    assert not found[:, count:].any()
    assert not found[:, :, count:].any()
    scale = 1.0
    if layout.spec.affinity == "dot":
        scale = float((values * values).sum(axis=2).max())
    clear = np.abs(similarities(values, layout.spec) - layout.spec.tau) > NEAR_TAU * scale
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(inner[clear], adjacency(values, layout.spec)[clear])


@pytest.mark.parametrize("name", AFFINITIES)
@pytest.mark.parametrize("token", TOKEN_TYPES)
def test_bits_are_the_definition(token: TokenType, name: Any) -> None:
    layout = KernelLayout(100, 144, token, NCutSpec(affinity=name), DEVICES["Hopper"])
    held, values = of_type(layer_norm_tokens(np.random.default_rng(0), 4, 100, 144), token)
    bits, defects = affinity(layout, held)
    assert not defects.any()
    assert_graph(layout, bits, values)


@pytest.mark.parametrize("token", ["float16", "float32"])  # 2 and 4 bytes
@pytest.mark.parametrize("width", [16, 80, 784])
def test_widths_that_do_not_fill_a_chunk(width: int, token: TokenType) -> None:
    layout = KernelLayout(66, width, token, SPEC, DEVICES["Hopper"])
    held, values = of_type(layer_norm_tokens(np.random.default_rng(width), 2, 66, width), token)
    assert_graph(layout, affinity(layout, held)[0], values)


@pytest.mark.parametrize("token", ["float16", "float32"])
def test_turing_keeps_fewer_chunks_on_their_way(token: TokenType) -> None:
    layout = KernelLayout(66, 784, token, SPEC, DEVICES["Turing"])
    held, values = of_type(layer_norm_tokens(np.random.default_rng(0), 2, 66, 784), token)
    assert_graph(layout, affinity(layout, held)[0], values)


@pytest.mark.parametrize("count", COUNTS)
def test_bits_for_any_number_of_tokens(count: int) -> None:
    layout = KernelLayout(count, 32, "float16", SPEC, DEVICES["Hopper"])
    tokens = layer_norm_tokens(np.random.default_rng(count), 1, count, 32)
    held, values = of_type(tokens, "float16")
    bits, defects = affinity(layout, held)
    assert_graph(layout, bits, values)
    assert cut_bits(layout, bits, defects)[0].mask.any()


@pytest.mark.parametrize("name", AFFINITIES)
@pytest.mark.parametrize("token", TOKEN_TYPES)
def test_a_class_token_in_front_is_skipped(token: TokenType, name: Any) -> None:
    layout = KernelLayout(100, 144, token, NCutSpec(affinity=name), DEVICES["Hopper"])
    tokens = layer_norm_tokens(np.random.default_rng(1), 2, 101, 144)
    held, _ = of_type(tokens, token)
    expected = affinity(layout, np.ascontiguousarray(held[:, 1:]))
    found = affinity(layout, held[:, 1:])
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 16, "float32", 90), "expected 4 to 1024 an image"),
        ((1025, 16, "float32", 90), "use saliency_iterative"),
        ((49, 20, "float32", 90), "pad them with zeros"),
        ((49, 0, "float32", 90), "multiple of 16"),
        ((49, 16, "float64", 90), "convert them to float32"),
        ((49, 16, "bfloat16", 75), r"compute capability 8\.0, found 7\.5"),
    ],
)
def test_other_shapes_are_refused(shape: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_shape(*shape)


def test_the_largest_and_smallest_shapes_are_taken() -> None:
    for count in (4, 1024):
        check_shape(count, 16, "bfloat16", 80)
