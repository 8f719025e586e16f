"""`microclip-deploy bench ncut`: the CUDA kernels of the cut against its peers, in one run.

What stands inside each timed region is in `report.TIMED` and in every report. Correctness
stands beside speed: masks are compared with exact float64 on the CPU, solved from the very tokens.
With `device="cpu"` only the CPU's two solvers are measured. Tokens are made up (tokens.py).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from microclip_deploy.bench.card import environment
from microclip_deploy.bench.kernel.exact_masks import exact_masks
from microclip_deploy.bench.kernel.report import (
    EXACT_CPU,
    ITERATIVE_CPU,
    TIMED,
    Case,
    NotTimed,
    Report,
    Timing,
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

CAP_S = 3.0
"""A peer's call that takes longer is not repeated."""
REPEAT_S = 1.0
"""Time given to the repeats of a peer's call."""
REPEATS = (2, 10)


def run_kernel_bench(
    tokens: Sequence[int], batches: Sequence[int], notes: Console, *, dtype: str, device: str
) -> Report:
    """Measure everything that was asked for.

    Args:
        tokens: numbers of patch tokens an image.
        batches: images a batch.
        notes: gets a line a case.
        dtype: of the tokens, one of `DTYPES`.
        device: "cuda" or "cpu".

    Raises:
        EnvironmentProblem: CUDA is asked for, and a device or CuPy is missing.
        UsageError: something that cannot be measured.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype: expected {', '.join(DTYPES)}, found '{dtype}'")
    if device not in ("cuda", "cpu"):
        raise UsageError(f"--device: expected cuda or cpu, found '{device}'")
    if min(tokens) < MIN_TOKENS:
        raise UsageError(f"--tokens: expected {MIN_TOKENS} or more, found {min(tokens)}")
    start = time.monotonic()
    name = device if device == "cpu" else require_cuda()
    report = Report(dtype=dtype, device=name, date=time.strftime("%Y-%m-%d"))
    if device == "cpu":
        _measure_cpu(report, tokens, batches, notes)
    else:
        from microclip_deploy.bench.kernel.on_device import measure_cuda

        measure_cuda(report, tokens, batches, notes)
    measured = {name for case in report.cases for name in case.times}
    report.timed = {name: what for name, what in TIMED.items() if name in measured}
    report.seconds = round(time.monotonic() - start, 1)
    report.environment = environment()
    return report


def require_cuda() -> str:
    """Return the name of the CUDA device.

    Raises:
        EnvironmentProblem: PyTorch or CuPy is missing, or one of them sees no device.
    """
    instead = "use a machine with one, or --device cpu to measure the CPU's solvers"
    cupy = require("cupy", "gpu")
    try:
        name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    except RuntimeError as error:
        raise EnvironmentProblem(f"CuPy finds no CUDA device ({error}); {instead}") from error
    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"this PyTorch ({torch.__version__}) has no CUDA device; {instead}"
        )
    return str(name)


def time_peer(
    run: Callable[[int], object], batch: int, clock: Callable[[Callable[[], object]], float]
) -> Timing:
    """Time a contestant that is no kernel of ours: few calls, and none that takes too long.

    Args:
        run: works on the given number of images.
        batch: that number.
        clock: returns microseconds of one call.

    Raises:
        NotTimed: an eighth of the batch, or one call, shows that it takes longer than CAP_S.
    """
    run(1)  # handles, loaded modules, memory
    part = max(batch // 8, 1)
    taken_s = clock(lambda: run(part)) / 1e6
    if taken_s * batch / part > 2 * CAP_S:
        raise NotTimed(f"{part} of {batch} images took {taken_s:.1f} s, too long for all")
    taken_s = clock(lambda: run(batch)) / 1e6
    if taken_s > CAP_S:
        raise NotTimed(f"one call took {taken_s:.1f} s, longer than {CAP_S:.0f} s")
    repeats = max(REPEATS[0], min(REPEATS[1], int(REPEAT_S / max(taken_s, 1e-6))))
    return Timing.of([clock(lambda: run(batch)) for _ in range(repeats)], 1)


def facts_of(values: NDArray[np.float64], masks: Mapping[str, NDArray[np.bool_]]) -> TokenFacts:
    """Return what float64 says about the graphs, and how many masks of each contestant differ.

    Args:
        values: the numbers of the tokens (B, N, D).
        masks: contestant -> masks (B, N).
    """
    expected = exact_masks(values, SPEC)
    images, count = expected.mask.shape
    pairs = ~np.eye(count, dtype=bool)
    return TokenFacts(
        tokens=count,
        images=images,
        edge_share=float(expected.edges[:, pairs].mean()),
        apart=expected.apart(),
        degenerate=float(expected.degenerate.mean()),
        complete=float(expected.complete.mean()),
        compared=images,
        binding=int(expected.binding.sum()),
        wrong={name: expected.wrong(mask) for name, mask in masks.items()},
    )


def width_of(count: int) -> int:
    """Return D of a ViT with N tokens."""
    return 1024 if count >= WIDE_FROM else 768


def _measure_cpu(
    report: Report, tokens: Sequence[int], batches: Sequence[int], notes: Console
) -> None:
    """Measure exact and iterative solver on the host."""
    for count in tokens:
        width = width_of(count)
        images = vit_tokens(max(batches), count, width, seed=count)
        values = exact_values(stored(images, report.dtype))
        solvers = _cpu_solvers(values.astype(np.float32))
        for batch in batches:
            notes.print(f"N={count} B={batch}")
            mib = batch * count * width * 4 / 2**20
            case = Case(tokens=count, width=width, batch=batch, input_mib=round(mib, 2))
            for name, run in solvers.items():
                case.time(name, partial(time_peer, run, batch, _wall_clock_us))
            report.cases.append(case)
        masks = {name: np.asarray(run(COMPARED).mask) for name, run in solvers.items()}
        report.tokens.append(facts_of(values[:COMPARED], masks))


def _cpu_solvers(tokens: NDArray[np.float32]) -> dict[str, Callable[[int], Any]]:
    as_torch = torch.from_numpy(tokens)
    return {
        EXACT_CPU: lambda n: saliency_exact(tokens[:n], SPEC),
        ITERATIVE_CPU: lambda n: saliency_iterative(as_torch[:n], SPEC),
    }


def _wall_clock_us(call: Callable[[], object]) -> float:
    """Return microseconds of one call on the host."""
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)
