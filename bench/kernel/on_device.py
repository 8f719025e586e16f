"""The half of `bench ncut` that needs a CUDA device: kernels and peers on one stream."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cupy
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from microclip_deploy.bench.kernel import clock, cusolver
from microclip_deploy.bench.kernel.inputs import Batch, device_tokens, random_fusion
from microclip_deploy.bench.kernel.report import (
    AFFINITY,
    BATCHED_EIGH,
    CUPY_EIGH,
    FUSION,
    ITERATIVE,
    REPLAY,
    SOLVE,
    TORCH_EIGH,
    WHOLE,
    Case,
    Report,
    TokenFacts,
    percentile,
)
from microclip_deploy.bench.kernel.run import COMPARED, SPEC, facts_of, time_peer, width_of
from microclip_deploy.bench.kernel.tokens import exact_values, stored, vit_tokens
from microclip_deploy.cuda.ncut import NCutKernels
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


def measure_cuda(
    report: Report, tokens: Sequence[int], batches: Sequence[int], notes: Console
) -> None:
    """Measure kernels, peers and ceilings on the first device, and put them into the report."""
    deadline = time.monotonic() + PEER_BUDGET_S
    stream = clock.new_stream()
    with stream, clock.torch_stream(stream):
        report.ceilings = clock.ceilings(report.dtype, stream)
        for count in tokens:
            _measure_count(report, count, batches, stream, deadline, notes)
        stream.synchronize()


def input_sets(batch: int, batch_bytes: int, l2_bytes: int) -> int:
    """Return how many batches take turns: enough to leave the L2 cache where a dozen can."""
    needed = math.ceil(LARGER_THAN_L2 * l2_bytes / batch_bytes)
    return max(2, math.ceil(DIFFERENT_IMAGES / batch), needed if needed <= MOST_SETS else 4)


def _measure_count(
    report: Report,
    count: int,
    batches: Sequence[int],
    stream: Any,
    deadline: float,
    notes: Console,
) -> None:
    """Measure all batch sizes at one number of tokens."""
    width = width_of(count)
    kernels = NCutKernels.of(count=count, width=width, token=report.dtype, spec=SPEC)
    fusion = random_fusion(width)
    item_bytes = 4 if report.dtype == "float32" else 2
    image_bytes = count * width * item_bytes
    l2_bytes = int(cupy.cuda.Device().attributes["L2CacheSize"])
    sets = {batch: input_sets(batch, batch * image_bytes, l2_bytes) for batch in batches}
    images = max(STATISTICS_OF, *(batch * number for batch, number in sets.items()))
    host = stored(vit_tokens(images, count, width, seed=count), report.dtype)
    tokens = device_tokens(host)
    for batch, number in sets.items():
        notes.print(f"N={count} B={batch}")
        mib = round(number * batch * image_bytes / 2**20, 2)
        case = Case(tokens=count, width=width, batch=batch, input_sets=number, input_mib=mib)
        parts = [tokens[i * batch : (i + 1) * batch] for i in range(number)]
        inputs = [Batch.of(kernels, fusion, part, seed=i) for i, part in enumerate(parts)]
        _time_kernels(case, inputs, stream)
        del inputs
        _time_peers(case, from_dlpack(parts[0]), stream, deadline)
        case.derive(item_bytes, report.ceilings or {})
        report.cases.append(case)
    report.tokens.append(_facts(Batch.of(kernels, fusion, tokens[:STATISTICS_OF], seed=0), host))


def _time_kernels(case: Case, inputs: Sequence[Batch], stream: Any) -> None:
    for batch in inputs:  # every stage finds what the one before it wrote
        batch.run()
    stages: dict[str, list[clock.Launch]] = {
        AFFINITY: [partial(b.kernels.affinity, b.patches, b.work) for b in inputs],
        SOLVE: [partial(b.kernels.solve, b.work, b.cut) for b in inputs],
        FUSION: [b.fuse for b in inputs],
        WHOLE: [b.run for b in inputs],
    }
    for name, launches in stages.items():
        case.time(name, partial(clock.time_launches, launches, stream))
    case.time(REPLAY, partial(clock.time_replays, stages[WHOLE], stream))


def _time_peers(case: Case, tokens: Tensor, stream: Any, deadline: float) -> None:
    matrices = laplacians(tokens)
    shared = cupy.from_dlpack(matrices)
    peers: dict[str, Callable[[int], object]] = {
        ITERATIVE: lambda n: saliency_iterative(tokens[:n], SPEC),
        BATCHED_EIGH: lambda n: cusolver.eigh(matrices[:n]),
        TORCH_EIGH: lambda n: torch.linalg.eigh(matrices[:n]),
        CUPY_EIGH: lambda n: cupy.linalg.eigh(shared[:n]),
    }
    timed = partial(clock.time_call, stream=stream)
    for name, run in peers.items():
        if time.monotonic() > deadline:
            case.skipped[name] = f"the run had no time left ({PEER_BUDGET_S:.0f} s are for peers)"
        else:
            case.time(name, partial(time_peer, run, case.batch, timed))


def _facts(batch: Batch, host: NDArray[Any]) -> TokenFacts:
    """Run the kernels once more and look at what they found in the first tokens of `host`."""
    batch.kernels.run(batch.patches, batch.work, batch.cut)
    iterative = saliency_iterative(from_dlpack(batch.patches[:COMPARED]), SPEC).mask
    cut = {name: cupy.asnumpy(array) for name, array in batch.cut._asdict().items()}  # waits
    masks = {
        "kernels": cut["mask"][:COMPARED].astype(bool),
        ITERATIVE: iterative.cpu().numpy(),
    }
    facts = facts_of(exact_values(host[:COMPARED]), masks)
    facts.images = len(cut["mask"])
    facts.apart = float((cut["components"] > 1).mean())
    facts.degenerate = float(cut["degenerate"].astype(bool).mean())
    facts.complete = float(cut["complete"].astype(bool).mean())
    steps = [float(number) for number in cut["steps"] if number > 0]  # Lanczos was needed
    if steps:
        shares = {"p50": 50, "p90": 90, "max": 100}
        facts.steps = {name: int(percentile(steps, share)) for name, share in shares.items()}
    return facts


def laplacians(tokens: Tensor) -> Tensor:
    """Build the matrices that the eigensolvers get: the method's, float32 (B, N, N)."""
    joined = adjacency(tokens, SPEC).float()
    affinity = joined + SPEC.eps * (1 - joined)
    degree = affinity.sum(dim=2)
    root = degree.sqrt() + SPEC.eps
    scale: Tensor = root[:, :, None] * root[:, None, :]
    matrices: Tensor = (torch.diag_embed(degree) - affinity) / scale
    return matrices
