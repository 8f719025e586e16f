"""The kernels of the cut on a CUDA device.

Run with: python -m pytest -m gpu tests/cuda/test_ncut.py
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from microclip_deploy.cuda.source import TOKEN_TYPES, TokenType
from microclip_deploy.errors import UsageError
from microclip_deploy.ncut.foreground import agreement_with
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import adjacency, saliency_exact, well_posed
from tests.cuda.kernels_on_cpu import affinity, cut_bits, packed, require_compiler
from tests.ncut.graphs import FAMILIES, Bools

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no CUDA device; run `pytest -m gpu` where there is one, with cupy-cuda13x",
    ),
]

cupy = pytest.importorskip("cupy", reason="needs CuPy: pip install cupy-cuda13x")
cuda = pytest.importorskip("microclip_deploy.cuda.ncut")
device_arrays = pytest.importorskip("microclip_deploy.cuda.arrays")

CASES = np.load(Path(__file__).parent.parent / "vectors" / "ncut_cases.npz")
SIZES = (49, 196, 256, 576)
SPEC = NCutSpec()
GRAPHS_A_FAMILY = 6
ABSURD_BATCH = 1 << 34
"""Images whose edges alone would take terabytes."""


def case(size: int, name: str) -> Any:
    return CASES[f"n{size}/{name}"]


def golden(size: int, token: str = "float32") -> torch.Tensor:
    return torch.from_numpy(case(size, "tokens")).cuda().to(getattr(torch, token))


def to_cupy(tokens: torch.Tensor) -> Any:
    """Return a view; bfloat16 needs ml_dtypes on the side of CuPy and is left to torch."""
    return cupy.from_dlpack(tokens)


def on_host(cut: Any) -> dict[str, NDArray[Any]]:
    """Return every output, the unwritten rest of `rows` set to 0."""
    found = {
        name: array.cpu().numpy() if isinstance(array, torch.Tensor) else cupy.asnumpy(array)
        for name, array in cut._asdict().items()
    }
    if "rows" in found:
        unwritten = np.arange(found["rows"].shape[1]) >= found["salient"][:, None]
        found["rows"] = np.where(unwritten, 0, found["rows"])
    return found


def assert_same_bits(found: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> None:
    for name, values in expected.items():
        assert found[name].tobytes() == values.tobytes(), f"expected the same {name}"


def kernels_for(tokens: torch.Tensor) -> Any:
    name = str(tokens.dtype).removeprefix("torch.")
    return cuda.NCutKernels.of(tokens.shape[1], tokens.shape[2], name, SPEC)


@pytest.fixture
def stream() -> Iterator[torch.cuda.Stream]:
    """Return a stream that is current for torch and CuPy."""
    own = torch.cuda.Stream()
    own.wait_stream(torch.cuda.current_stream())
    same = cupy.cuda.Stream.from_external(device_arrays.ForeignStream(own.cuda_stream))
    with torch.cuda.stream(own), same:
        yield own
    torch.cuda.synchronize()


# ------------------------------------------------------------------------------ results


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("token", TOKEN_TYPES)
def test_golden_masks(token: TokenType, size: int) -> None:
    tokens = golden(size, token)
    found = cuda.saliency_cuda(tokens, SPEC)
    assert_golden(found.mask.cpu().numpy(), found.degenerate.cpu().numpy(), size)
    if token != "bfloat16":  # CuPy has none of its own
        same = cuda.saliency_cuda(to_cupy(tokens), SPEC)
        assert isinstance(same.mask, cupy.ndarray)
        assert_same_bits(on_host(same), on_host(found))


@pytest.mark.parametrize("size", SIZES)
def test_the_object_rule_chooses_the_side_of_the_definition(size: int) -> None:
    tokens, spec = golden(size, "float32"), NCutSpec(threshold="otsu", side="object")
    agreement = agreement_with(tokens.mean(dim=1) + tokens[:, 0], tokens)
    on_cpu = [part.cpu().numpy() for part in (tokens, agreement)]
    expected = saliency_exact(on_cpu[0], spec, on_cpu[1]).mask
    posed = well_posed(adjacency(on_cpu[0], spec), spec, on_cpu[1])
    found = cuda.saliency_cuda(tokens, spec, agreement).mask.cpu().numpy()
    np.testing.assert_array_equal(found[posed], expected[posed])


def assert_golden(mask: Bools, degenerate: Bools, size: int) -> None:
    posed = case(size, "well_posed")
    undefined = np.isin(case(size, "kind"), ("complete", "empty", "star", "ring_symmetric"))
    np.testing.assert_array_equal(mask[posed], case(size, "mask")[posed])
    assert mask[undefined].all()
    assert degenerate[undefined].all()


@pytest.mark.parametrize("count", [*SIZES, 1024])
def test_the_cut_has_the_bits_of_the_cpu(count: int) -> None:
    require_compiler()
    rng = np.random.default_rng(count)
    each = GRAPHS_A_FAMILY if count < 500 else 1
    edges = np.concatenate([family(rng, each, count) for family in FAMILIES.values()])
    kernels = cuda.NCutKernels.of(count, 16, "float32", SPEC)
    work, cut = kernels.workspace(len(edges)), kernels.outputs(len(edges))
    bits = packed(kernels.layout, edges)
    work.edges.set(bits.view(np.int32))
    work.defects.fill(0)
    kernels.solve(work, cut)
    assert_same_bits(on_host(cut), as_on_device(*cut_bits(kernels.layout, bits, no_defects(work))))


@pytest.mark.parametrize("token", TOKEN_TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_golden_tokens_give_the_bits_of_the_cpu(size: int, token: TokenType) -> None:
    require_compiler()
    tokens = golden(size, token)
    held = tokens.view(torch.uint16) if token == "bfloat16" else tokens
    kernels = kernels_for(tokens)
    work, cut = kernels.workspace(len(tokens), tokens), kernels.outputs(len(tokens), tokens)
    kernels.run(tokens, work, cut)
    torch.cuda.synchronize()
    bits, defects = affinity(kernels.layout, held.cpu().numpy())
    assert work.edges.cpu().numpy().tobytes() == bits.tobytes()
    assert_same_bits(on_host(cut), as_on_device(*cut_bits(kernels.layout, bits, defects)))


def no_defects(work: Any) -> NDArray[np.int32]:
    return np.zeros(work.defects.shape, np.int32)


def as_on_device(found: Any, facts: Any) -> dict[str, NDArray[Any]]:
    """Return the outputs of the kernel on the CPU under the names of `Cut`."""
    unwritten = np.arange(facts.rows.shape[1]) >= facts.salient[:, None]
    return {
        **found._asdict(),
        "salient": facts.salient,
        "rows": np.where(unwritten, 0, facts.rows).astype(np.int16),
        "steps": facts.steps,
        "components": facts.components,
    }


# ------------------------------------------------------------------------------ streams and graphs


@pytest.mark.parametrize("size", [49, 196])
def test_a_torch_graph_replays_on_changing_tokens(size: int) -> None:
    tokens = golden(size)[:8].clone()
    cuda.saliency_cuda(tokens, SPEC)  # compiled outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = cuda.saliency_cuda(tokens, SPEC)
    for start in (0, 8, 16, 0):
        batch = golden(size)[start : start + 8]
        tokens.copy_(batch)
        graph.replay()
        torch.cuda.synchronize()
        expected = on_host(cuda.saliency_cuda(batch.clone(), SPEC))
        assert_same_bits(on_host(found), expected)


def test_a_cupy_graph_replays_on_changing_tokens() -> None:
    batches = [to_cupy(golden(196)[start : start + 8].clone()) for start in (0, 8, 16)]
    tokens = batches[0].copy()
    kernels = kernels_for(golden(196))
    work, cut = kernels.workspace(8), kernels.outputs(8)
    kernels.run(tokens, work, cut)
    own = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()
    with own:
        own.begin_capture()
        kernels.run(tokens, work, cut)
        graph = own.end_capture()
    for batch in (*batches, batches[0]):
        with own:
            tokens[...] = batch
            graph.launch()
        own.synchronize()
        other = kernels.outputs(8)
        kernels.run(batch, kernels.workspace(8), other)
        assert_same_bits(on_host(cut), on_host(other))


def test_two_streams_do_not_disturb_one_another() -> None:
    batches = [golden(196)[:40].clone(), golden(196)[40:80].clone()]
    expected = [on_host(cuda.saliency_cuda(batch, SPEC)) for batch in batches]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found: list[list[Any]] = [[], []]
    for _ in range(20):
        for number, own in enumerate(streams):
            with torch.cuda.stream(own):
                found[number].append(cuda.saliency_cuda(batches[number], SPEC))
    torch.cuda.synchronize()
    for number, results in enumerate(found):
        for result in results:
            assert_same_bits(on_host(result), expected[number])


def test_kernels_run_on_the_stream_of_torch(stream: torch.cuda.Stream) -> None:
    tokens = golden(49)
    cuda.saliency_cuda(tokens, SPEC)  # compiles
    stream.synchronize()
    torch.cuda._sleep(20_000_000)  # what follows waits behind this
    late = torch.zeros_like(tokens)
    late.copy_(tokens)
    found = cuda.saliency_cuda(late, SPEC)
    assert not stream.query(), "expected launches that return before the device is done"
    stream.synchronize()
    assert_golden(found.mask.cpu().numpy(), found.degenerate.cpu().numpy(), 49)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_device() -> None:
    tokens = golden(196)
    cuda.saliency_cuda(tokens, SPEC)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cuda.saliency_cuda(tokens, SPEC)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------ memory


def test_nothing_is_allocated_after_the_first_call() -> None:
    tokens = golden(196)
    kernels = kernels_for(tokens)
    work, cut = kernels.workspace(len(tokens), tokens), kernels.outputs(len(tokens), tokens)
    kernels.run(tokens, work, cut)
    before = allocated()
    for _ in range(5):
        kernels.run(tokens, work, cut)
    assert allocated() == before


def allocated() -> tuple[int, int, int]:
    """Return torch's bytes, torch's allocations ever made, and CuPy's bytes."""
    torch.cuda.synchronize()
    made = torch.cuda.memory_stats()["allocation.all.allocated"]
    return torch.cuda.memory_allocated(), made, cupy.get_default_memory_pool().used_bytes()


def test_results_are_freed_with_their_arrays() -> None:
    tokens = golden(196)
    found = cuda.saliency_cuda(tokens, SPEC)
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        found = cuda.saliency_cuda(tokens, SPEC)
    assert torch.cuda.memory_allocated() == before
    assert found.mask.any(dim=1).all()


def test_a_batch_too_large_leaves_the_next_call_working() -> None:
    tokens = golden(49)
    kernels = kernels_for(tokens)
    with pytest.raises(torch.OutOfMemoryError):
        kernels.workspace(ABSURD_BATCH, tokens)
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
        kernels.workspace(ABSURD_BATCH)
    found = cuda.saliency_cuda(tokens, SPEC)
    assert_golden(found.mask.cpu().numpy(), found.degenerate.cpu().numpy(), 49)


# ------------------------------------------------------------------------------ inputs


@pytest.mark.parametrize("token", TOKEN_TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_image_of_no_numbers_gives_every_token_of_it_only(token: TokenType, bad: float) -> None:
    tokens = golden(196, token)[:4].clone()
    expected = on_host(cuda.saliency_cuda(tokens, SPEC))
    tokens[1, 70, 5] = bad
    found = on_host(cuda.saliency_cuda(tokens, SPEC))
    assert found["mask"][1].all()
    assert found["degenerate"][1]
    others = [0, 2, 3]
    assert_same_bits(
        {name: values[others] for name, values in found.items()},
        {name: values[others] for name, values in expected.items()},
    )


def test_a_class_token_in_front_costs_no_copy() -> None:
    tokens = golden(196)
    whole = torch.cat([tokens.new_full((len(tokens), 1, tokens.shape[2]), 7.0), tokens], dim=1)
    patches = whole[:, 1:]
    assert device_arrays.readable(patches, tokens.shape[2])[0] is patches
    expected = on_host(cuda.saliency_cuda(tokens, SPEC))
    assert_same_bits(on_host(cuda.saliency_cuda(patches, SPEC)), expected)


@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_tokens_in_any_memory_layout(library: str) -> None:
    tokens = golden(196)
    expected = on_host(cuda.saliency_cuda(tokens, SPEC))
    wide = torch.cat([tokens, tokens], dim=2)
    for strange in (
        tokens.transpose(1, 2).contiguous().transpose(1, 2),
        wide[:, :, : tokens.shape[2]],
    ):
        given = to_cupy(strange) if library == "cupy" else strange
        assert_same_bits(on_host(cuda.saliency_cuda(given, SPEC)), expected)


def test_tokens_that_do_not_start_on_16_bytes() -> None:
    tokens = golden(196, "float16")
    flat = torch.zeros(tokens.numel() + 1, dtype=tokens.dtype, device="cuda")
    flat[1:] = tokens.reshape(-1)
    found = cuda.saliency_cuda(flat[1:].view_as(tokens), SPEC)
    assert_same_bits(on_host(found), on_host(cuda.saliency_cuda(tokens, SPEC)))


def test_an_empty_batch_gives_empty_results() -> None:
    found = cuda.saliency_cuda(golden(49)[:0], SPEC)
    assert found.mask.shape == (0, 49)


@pytest.mark.parametrize(
    ("shape", "message"), [((49, 16), r"expected \(B, N, D\)"), ((1, 3, 16), "expected 4 to 1024")]
)
def test_other_tokens_are_refused(shape: tuple[int, ...], message: str) -> None:
    for tokens in (torch.zeros(shape, device="cuda"), cupy.zeros(shape, "float32")):
        with pytest.raises(UsageError, match=message):
            cuda.saliency_cuda(tokens, SPEC)


@pytest.mark.parametrize("tokens", [torch.zeros(1, 49, 16), np.zeros((1, 49, 16), np.float32)])
def test_tokens_on_the_cpu_are_refused(tokens: Any) -> None:
    with pytest.raises(UsageError, match="use saliency_exact there"):
        cuda.saliency_cuda(tokens, SPEC)
