"""`microclip-deploy bench ncut`: the CUDA kernels of the cut against its peers, in one run.

What stands inside each timed region is in `kernel_report.TIMED` and in every report. Correctness
stands beside speed: masks are compared with exact float64 on the CPU, solved from the very tokens.
With `device="cpu"` only the CPU's two solvers are measured. Tokens are made up (tokens.py).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from microclip_deploy.bench.card import environment
from microclip_deploy.bench.kernel.exact_masks import ExactMasks, exact_masks
from microclip_deploy.bench.kernel.peers import TooSlow, time_peer, wall_clock_us
from microclip_deploy.bench.kernel.report import (
    EXACT_CPU,
    ITERATIVE_CPU,
    Case,
    Report,
    TokenFacts,
)
from microclip_deploy.bench.kernel.tokens import DTYPES, exact_values, stored, vit_tokens
from microclip_deploy.errors import EnvironmentProblem, UsageError, require
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import MIN_TOKENS, saliency_exact, saliency_iterative

SPEC = NCutSpec()

COMPARED = 64
"""Images a number of tokens that are compared with exact float64."""

WIDE_FROM = 256
"""From so many tokens on D is 1024, as in ViT-L; below it is 768, as in ViT-B."""


@dataclass(frozen=True)
class KernelRequest:
    """What is measured."""

    tokens: tuple[int, ...]
    batches: tuple[int, ...]
    dtype: str
    device: str

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype: expected {', '.join(DTYPES)}, found '{self.dtype}'")
        if self.device not in ("cuda", "cpu"):
            raise UsageError(f"--device: expected cuda or cpu, found '{self.device}'")
        if min(self.tokens) < MIN_TOKENS:
            raise UsageError(f"--tokens: expected {MIN_TOKENS} or more, found {min(self.tokens)}")


@dataclass
class Measured:
    """Times and facts, and the ceilings of a card."""

    cases: list[Case]
    facts: list[TokenFacts]
    ceilings: dict[str, Any] | None = None


def run_kernel_bench(request: KernelRequest, notes: Console) -> Report:
    """Measure everything that was asked for.

    Raises:
        EnvironmentProblem: CUDA is asked for, and a device or CuPy is missing.
    """
    start = time.monotonic()
    if request.device == "cpu":
        measured, name = measure_cpu(request, notes), "cpu"
    else:
        name = require_cuda()
        from microclip_deploy.bench.kernel.on_device import measure_cuda

        measured = measure_cuda(request, notes)
    return Report(
        dtype=request.dtype,
        device=name,
        date=time.strftime("%Y-%m-%d"),
        cases=measured.cases,
        facts=measured.facts,
        ceilings=measured.ceilings,
        seconds=round(time.monotonic() - start, 1),
        environment=environment(),
    )


def require_cuda() -> str:
    """Return the name of the CUDA device.

    Raises:
        EnvironmentProblem: PyTorch or CuPy is missing, or one of them sees no device.
    """
    instead = "use a machine with one, or --device cpu to measure the CPU's solvers"
    cupy = require("cupy", "gpu")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
        name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode() if count else ""
    except RuntimeError as error:
        raise EnvironmentProblem(f"CuPy finds no CUDA device ({error}); {instead}") from error
    if not count:
        raise EnvironmentProblem(f"CuPy finds no CUDA device; {instead}")
    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"this PyTorch ({torch.__version__}) has no CUDA device; {instead}"
        )
    return str(name)


def measure_cpu(request: KernelRequest, notes: Console) -> Measured:
    """Measure exact and iterative solver on the host."""
    measured = Measured([], [])
    for count in request.tokens:
        width = width_of(count)
        images = vit_tokens(max(request.batches), count, width, seed=count)
        values = exact_values(stored(images, request.dtype))
        peers = _cpu_peers(values.astype(np.float32))
        for batch in request.batches:
            notes.print(f"N={count} B={batch}")
            mib = batch * count * width * 4 / 2**20
            case = Case(count, width, batch, input_mib=round(mib, 2))
            for name, run in peers.items():
                try:
                    case.times[name] = time_peer(run, batch, wall_clock_us)
                except TooSlow as reason:
                    case.skipped[name] = str(reason)
            measured.cases.append(case)
        expected = exact_masks(values[:COMPARED], SPEC)
        masks = {name: np.asarray(run(COMPARED).mask) for name, run in peers.items()}
        measured.facts.append(facts_of(count, expected, masks))
    return measured


def _cpu_peers(tokens: NDArray[np.float32]) -> dict[str, Callable[[int], Any]]:
    as_torch = torch.from_numpy(tokens)
    return {
        EXACT_CPU: lambda n: saliency_exact(tokens[:n], SPEC),
        ITERATIVE_CPU: lambda n: saliency_iterative(as_torch[:n], SPEC),
    }


def facts_of(count: int, expected: ExactMasks, masks: dict[str, NDArray[np.bool_]]) -> TokenFacts:
    """Return what float64 says about the graphs, and how many masks of each contestant differ."""
    pairs = ~np.eye(count, dtype=bool)
    return TokenFacts(
        tokens=count,
        images=len(expected.mask),
        edge_share=float(expected.edges[:, pairs].mean()),
        apart=expected.apart(),
        degenerate=float(expected.degenerate.mean()),
        complete=float(expected.complete.mean()),
        steps=None,
        compared=len(expected.mask),
        binding=int(expected.binding.sum()),
        wrong={name: expected.wrong(mask) for name, mask in masks.items()},
    )


def width_of(count: int) -> int:
    """Return D of a ViT with N tokens."""
    return 1024 if count >= WIDE_FROM else 768
