"""The half of `bench ncut` that needs a CUDA device: kernels and peers on one stream."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import cupy
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from microclip_deploy.bench.kernel import clock
from microclip_deploy.bench.kernel.clock import CaptureRefused, Launch
from microclip_deploy.bench.kernel.exact_masks import exact_masks
from microclip_deploy.bench.kernel.inputs import Buffers, device_tokens, make_buffers, random_fusion
from microclip_deploy.bench.kernel.peers import TooSlow, time_peer
from microclip_deploy.bench.kernel.report import (
    AFFINITY,
    CUPY_EIGH,
    FUSION,
    ITERATIVE,
    REPLAY,
    SOLVE,
    TORCH_EIGH,
    WHOLE,
    Case,
    TokenFacts,
    percentile,
    roofline,
)
from microclip_deploy.bench.kernel.run import (
    COMPARED,
    SPEC,
    KernelRequest,
    Measured,
    facts_of,
    width_of,
)
from microclip_deploy.bench.kernel.tokens import exact_values, stored, vit_tokens
from microclip_deploy.cuda.ncut import NCutKernels
from microclip_deploy.cuda.soap import CudaFusion
from microclip_deploy.ncut.steps import adjacency, saliency_iterative

LARGER_THAN_L2 = 2
"""Input sets that together are this many times the L2 cache never find their tokens in it."""
MOST_SETS = 12
"""More would be needed only where a batch is small, and then its tokens stay in the L2 cache, as
they do behind an encoder."""
DIFFERENT_IMAGES = 64
"""A batch of one is timed on this many images, because K2's time depends on the graph."""
STATISTICS_OF = 256
"""Images behind the shares and steps of the tokens."""
PEER_BUDGET_S = 70.0
"""After so many seconds of a run no further peer is started."""
FACT_FIELDS = ("mask", "components", "degenerate", "complete", "steps")


@contextmanager
def one_stream() -> Iterator[Any]:
    """Make one capturing stream the current one of CuPy and of torch."""
    stream = clock.new_stream()
    with stream, clock.torch_stream(stream):
        yield stream
        stream.synchronize()


def measure_cuda(request: KernelRequest, notes: Console) -> Measured:
    """Measure kernels, peers and ceilings on the first device."""
    deadline = time.monotonic() + PEER_BUDGET_S
    with one_stream() as stream:
        measured = Measured([], [], clock.ceilings(request.dtype, stream))
        for count in request.tokens:
            _measure_count(count, request, measured, stream, deadline, notes)
    return measured


def input_sets(batch: int, batch_bytes: int, l2_bytes: int) -> int:
    """Return how many batches take turns: enough to leave the L2 cache where a dozen can."""
    needed = math.ceil(LARGER_THAN_L2 * l2_bytes / batch_bytes)
    return max(2, math.ceil(DIFFERENT_IMAGES / batch), needed if needed <= MOST_SETS else 4)


def _measure_count(
    count: int,
    request: KernelRequest,
    measured: Measured,
    stream: Any,
    deadline: float,
    notes: Console,
) -> None:
    """Measure all batch sizes at one number of tokens."""
    width = width_of(count)
    kernels = NCutKernels.of(count=count, width=width, token=request.dtype, spec=SPEC)
    fusion = random_fusion(width)
    item_bytes = 4 if request.dtype == "float32" else 2
    l2_bytes = int(cupy.cuda.Device().attributes["L2CacheSize"])
    sets = {
        batch: input_sets(batch, batch * count * width * item_bytes, l2_bytes)
        for batch in request.batches
    }
    images = max(STATISTICS_OF, *(batch * number for batch, number in sets.items()))
    host = stored(vit_tokens(images, count, width, seed=count), request.dtype)
    tokens = device_tokens(host)
    for batch in request.batches:
        notes.print(f"N={count} B={batch}")
        mib = sets[batch] * batch * count * width * item_bytes / 2**20
        case = Case(count, width, batch, sets[batch], round(mib, 2))
        parts = [tokens[i * batch : (i + 1) * batch] for i in range(sets[batch])]
        buffers = [make_buffers(kernels, fusion, part, seed=i) for i, part in enumerate(parts)]
        _time_kernels(case, kernels, fusion, buffers, stream)
        del buffers
        _time_peers(case, as_torch(parts[0]), stream, deadline)
        if AFFINITY in case.times and measured.ceilings is not None:
            case.roofline = roofline(case, item_bytes, measured.ceilings)
        measured.cases.append(case)
    measured.facts.append(_facts(kernels, fusion, tokens, host, stream))


def _time_kernels(
    case: Case, kernels: NCutKernels, fusion: CudaFusion, buffers: list[Buffers], stream: Any
) -> None:
    def whole(part: Buffers) -> None:
        kernels.run(part.patches, part.work, part.cut)
        fusion.run(part.cls, part.patches, part.cut, part.fused)

    for part in buffers:  # every stage finds what the one before it wrote
        whole(part)
    stages: dict[str, list[Launch]] = {
        AFFINITY: [partial(kernels.affinity, part.patches, part.work) for part in buffers],
        SOLVE: [partial(kernels.solve, part.work, part.cut) for part in buffers],
        FUSION: [
            partial(fusion.run, part.cls, part.patches, part.cut, part.fused) for part in buffers
        ],
        WHOLE: [partial(whole, part) for part in buffers],
    }
    for name, launches in stages.items():
        try:
            case.times[name] = clock.time_launches(launches, stream)
        except CaptureRefused as reason:
            case.skipped[name] = str(reason)
    case.add_sum()
    try:
        case.times[REPLAY] = clock.time_replays(stages[WHOLE], stream)
    except CaptureRefused as reason:
        case.skipped[REPLAY] = str(reason)


def _time_peers(case: Case, tokens: Tensor, stream: Any, deadline: float) -> None:
    matrices = laplacians(tokens)
    shared = cupy.from_dlpack(matrices)
    peers: dict[str, Callable[[int], object]] = {
        ITERATIVE: lambda n: saliency_iterative(tokens[:n], SPEC),
        TORCH_EIGH: lambda n: torch.linalg.eigh(matrices[:n]),
        CUPY_EIGH: lambda n: cupy.linalg.eigh(shared[:n]),
    }
    timed = partial(clock.time_call, stream=stream)
    for name, run in peers.items():
        if time.monotonic() > deadline:
            case.skipped[name] = f"the run had no time left ({PEER_BUDGET_S:.0f} s are for peers)"
            continue
        try:
            case.times[name] = time_peer(run, case.batch, timed)
        except TooSlow as reason:
            case.skipped[name] = str(reason)


def _facts(
    kernels: NCutKernels, fusion: CudaFusion, tokens: Any, host: NDArray[Any], stream: Any
) -> TokenFacts:
    """Run the kernels once more and look at what they found."""
    part = make_buffers(kernels, fusion, tokens[:STATISTICS_OF], seed=0)
    kernels.run(part.patches, part.work, part.cut)
    iterative = saliency_iterative(as_torch(tokens[:COMPARED]), SPEC).mask
    stream.synchronize()
    cut = {name: cupy.asnumpy(getattr(part.cut, name)) for name in FACT_FIELDS}
    masks = {
        "kernels": cut["mask"][:COMPARED].astype(bool),
        ITERATIVE: iterative.cpu().numpy(),
    }
    expected = exact_masks(exact_values(host[:COMPARED]), SPEC)
    facts = facts_of(tokens.shape[1], expected, masks)
    facts.images = len(cut["mask"])
    facts.apart = float((cut["components"] > 1).mean())
    facts.degenerate = float(cut["degenerate"].astype(bool).mean())
    facts.complete = float(cut["complete"].astype(bool).mean())
    steps = [float(number) for number in cut["steps"] if number > 0]  # Lanczos was needed
    if steps:
        shares = {"p50": 50, "p90": 90, "max": 100}
        facts.steps = {name: int(percentile(steps, share)) for name, share in shares.items()}
    return facts


def as_torch(patches: Any) -> Tensor:
    """Return tokens as a torch tensor of the same memory."""
    if isinstance(patches, Tensor):
        return patches
    tensor: Tensor = torch.utils.dlpack.from_dlpack(patches)
    return tensor


def laplacians(tokens: Tensor) -> Tensor:
    """Build the matrices that the eigensolvers get: the method's, float32 (B, N, N)."""
    joined = adjacency(tokens, SPEC).float()
    affinity = joined + SPEC.eps * (1 - joined)
    degree = affinity.sum(dim=2)
    root = degree.sqrt() + SPEC.eps
    scale: Tensor = root[:, :, None] * root[:, None, :]
    matrices: Tensor = (torch.diag_embed(degree) - affinity) / scale
    return matrices
