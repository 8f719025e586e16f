"""One training step with random weights: the product against the plain algorithm.

Inside the timed region: labelling (weak view and crops), the strong view forward and backward, and
AdamW, from normalised tensors on the device on. Outside: decoding, augmentation, upload, saving.
The two sides take turns, so that whatever else the machine does hits both. They start from the same
weights and see the same views; their first losses must agree before anything is timed. Arithmetic
is float32, what `adapt` uses unless told otherwise.
"""

import copy
import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from microclip_deploy.adapt.loader import AdaptImages, Batch
from microclip_deploy.adapt.train_step import AdaptConfig, Views, make_optimizer, train_step
from microclip_deploy.bench.geometry import Geometry, random_geometry
from microclip_deploy.bench.memory import forget_peak, peak_rss_bytes
from microclip_deploy.bench.training.plain import plain_of, plain_step
from microclip_deploy.bench.training.report import (
    BACKWARD,
    CROPS,
    FORWARD,
    OPTIMISER,
    PRODUCT,
    WEAK,
    Steps,
)
from microclip_deploy.errors import EnvironmentProblem, VerificationError
from microclip_deploy.model.clip import exact_float32

PARTS = (WEAK, CROPS, FORWARD, BACKWARD, OPTIMISER)

LOSS_TOLERANCE = 1e-3
"""Relative: float32 sums in another order, scaled by 100 in the logits."""

Step = Callable[[], Tensor]
"""Move the model once and return the loss."""
Mark = Any
"""A moment: seconds of the host's clock, or a CUDA event in the device's stream."""


class Work(NamedTuple):
    """What one step does."""

    geometry: str
    """Name as `random_geometry` takes it."""
    batch: int
    crops: int
    """V, of each image."""
    device: str
    """"cpu" or "cuda"."""


def measure_steps(geometry: Geometry, work: Work, sides: Sequence[str], repeats: int) -> Steps:
    """Time `repeats` steps of each side, taking turns, after a warm-up.

    Args:
        geometry: the model of `work`; it stays as it is.
        work: what a step does.
        sides: of PRODUCT and PLAIN; the product must be among them.
        repeats: at least 1.

    Raises:
        VerificationError: the sides compute different losses.
    """
    marks: list[Mark] = []
    steps = make_steps(geometry, work, sides, marks)
    losses = {side: step().item() for side, step in steps.items()}
    require_equal(losses)
    if work.device == "cuda":  # libraries choose kernels, the allocator grows
        for step in steps.values():
            step(), step()
    samples: dict[str, list[float]] = {side: [] for side in sides}
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    for _ in range(repeats):
        for side, step in steps.items():
            marks.clear()
            samples[side].append(_seconds(step, work.device))
            if side == PRODUCT:
                for part, (start, end) in zip(PARTS, pairwise(marks), strict=True):
                    parts[part].append(_between(start, end))
    return Steps(batch=work.batch, samples_s=samples, parts_s=parts, losses=losses)


def measure_before(
    work: Work, images: AdaptImages, repeats: int
) -> tuple[list[float], list[float]]:
    """Return seconds from a loaded batch to network input: of upload, and of views cut there."""
    (loaded,) = images.loaded(0, [list(range(work.batch))])
    device, preprocess = work.device, images.preprocess

    def timed(part: Callable[[], object]) -> list[float]:
        return [_seconds(part, device) for _ in range(repeats + 1)][1:]

    if isinstance(loaded, Batch):
        views = [part.flatten(0, -4) for part in loaded[:3]]
        return timed(lambda: [preprocess.normalize(view.to(device)) for view in views]), []
    sent = loaded.to(device)
    cut = timed(lambda: preprocess.normalize(sent.views(preprocess).flatten(0, 1)))
    return timed(lambda: loaded.to(device)), cut


def make_steps(
    geometry: Geometry, work: Work, sides: Sequence[str], marks: list[Mark]
) -> dict[str, Step]:
    """Return side -> its step; all start from the same weights and see the same views.

    The product's step appends the moments between which its parts lie to `marks`.
    """
    views = made_up_views(work, geometry.preprocess.size)
    steps = {}
    for side in sides:
        own = geometry._replace(visual=copy.deepcopy(geometry.visual))
        steps[side] = (
            _product_step(own, views, work.device, marks)
            if side == PRODUCT
            else _plain_step(own, views, work.device)
        )
    return steps


def require_equal(losses: dict[str, float]) -> None:
    """Accept no times of sides that compute something else.

    Raises:
        VerificationError: a loss is not finite or departs from the first.
    """
    expected = next(iter(losses.values()))
    for side, loss in losses.items():
        if not math.isfinite(loss) or abs(loss - expected) > LOSS_TOLERANCE * abs(expected):
            raise VerificationError(
                f"first training step: expected the same loss within {LOSS_TOLERANCE:g} of all "
                f"sides, found {losses} ({side}); no time of such steps is to be used"
            )


def made_up_views(work: Work, size: int) -> Views:
    """Return normalised views of soft colour fields, `size` pixels a side, on the device.

    White noise would give near-complete graphs, whose masks no two solvers need agree on.
    """
    generator = torch.Generator().manual_seed(0)

    def fields(count: int) -> Tensor:
        coarse = torch.randn(count, 3, 5, 5, generator=generator)
        return torch.nn.functional.interpolate(coarse, size, mode="bilinear").to(work.device)

    crops = fields(work.batch * work.crops).unflatten(0, (work.batch, work.crops))
    return Views(fields(work.batch), fields(work.batch), crops)


def peak_memory_mib(work: Work, side: str) -> float:
    """Return the peak memory of two steps of a side in a fresh process, MiB.

    On a CPU it is the resident size, with Python and its libraries in it; on CUDA what torch
    allocated. Building the model is not part of it, its weights are.

    Raises:
        EnvironmentProblem: the process failed or was killed, as for want of memory.
    """
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawn) as fresh:
            return fresh.submit(_peak_mib, work, side).result()
    except (MemoryError, RuntimeError) as error:  # torch's, or that of a broken pool
        raise EnvironmentProblem(
            f"peak memory of {work.geometry}, {side}: expected a fresh process to take two steps, "
            f"found: {str(error)[:300]}; use a smaller --batch-size or fewer --crops"
        ) from error


def _peak_mib(work: Work, side: str) -> float:
    step = make_steps(random_geometry(work.geometry), work, [side], [])[side]
    if work.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(), step()
        return torch.cuda.max_memory_allocated() / 2**20
    forget_peak()
    step(), step()
    return peak_rss_bytes() / 2**20


def _product_step(geometry: Geometry, views: Views, device: str, marks: list[Mark]) -> Step:
    """Take the moments by hooks in the very step that is timed, so that its parts add up."""
    model, config = geometry.model().to(device), AdaptConfig()
    optimizer = make_optimizer(model.trainable(), config)

    def mark(*_: object) -> None:
        marks.append(_now(device))

    def before_strong(*_: object) -> None:
        if torch.is_grad_enabled():  # labels are computed without gradient
            mark()

    model.register_forward_pre_hook(before_strong)
    model.register_forward_hook(mark)  # weak, and strong; crops do not pass through it
    optimizer.register_step_pre_hook(mark)

    def step() -> Tensor:
        mark()
        taken = train_step(model, optimizer, views, config, average=None, rate=config.lr)
        mark()
        return taken.losses.total.detach()

    return step


def _plain_step(geometry: Geometry, views: Views, device: str) -> Step:
    model, config = plain_of(geometry.model()).to(device).eval(), AdaptConfig()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config.lr, weight_decay=config.weight_decay)

    @exact_float32  # as the product's own step
    def step() -> Tensor:
        return plain_step(model, optimizer, views, config)

    return step


def _now(device: str) -> Mark:
    if device != "cuda":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Mark, end: Mark) -> float:
    """Return the seconds between two moments of one clock; the device must have reached events."""
    on_host = isinstance(start, float)
    return float(end - start if on_host else start.elapsed_time(end) / 1000)


def _seconds(step: Callable[[], object], device: str) -> float:
    """Return the wall clock of some work, until the device has done it."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start
