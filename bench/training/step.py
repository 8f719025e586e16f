"""One training step with random weights: the product against the plain algorithm.

Inside the timed region: labelling (weak view and crops), the strong view forward and backward, and
AdamW, from normalised tensors on the device on. Outside: decoding, augmentation, upload, saving.
The two sides take turns, so that whatever else the machine does hits both. They start from the same
weights and see the same views; their first losses must agree before anything is timed. Arithmetic
is float32, what `adapt` uses unless told otherwise.
"""

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from microclip_deploy.adapt.train_step import AdaptConfig, Views, make_optimizer, train_step
from microclip_deploy.bench.geometry import Geometry, random_geometry
from microclip_deploy.bench.memory import forget_peak, peak_rss_bytes
from microclip_deploy.bench.training.plain import PlainMicroCLIP, plain_step
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import EnvironmentProblem, VerificationError
from microclip_deploy.model.text import TextHeads

PRODUCT, PLAIN = "product", "plain"
LABELLING, STRONG, OPTIMISER = "labelling", "strong view", "optimiser"
PARTS = (LABELLING, STRONG, OPTIMISER)

LOSS_TOLERANCE = 1e-3
"""Relative: float32 sums in another order, scaled by 100 in the logits."""

_MODULE = "microclip_deploy.bench.training.step"  # __name__ is "__main__" in the fresh process

Step = Callable[[], Tensor]
"""Move the model once and return the loss."""
Mark = float | torch.cuda.Event
"""A moment: seconds of the host's clock, or an event in the device's stream."""


class Work(NamedTuple):
    """What one step does."""

    geometry: str
    """Name as `random_geometry` takes it."""
    batch: int
    crops: int
    """V, of each image."""
    device: str
    """"cpu" or "cuda"."""


class StepTimes(NamedTuple):
    """Raw samples of the steps, which took turns."""

    samples_s: dict[str, list[float]]
    """Side -> seconds a step."""
    parts_s: dict[str, list[float]]
    """Part -> seconds of it in each of the product's steps."""
    losses: dict[str, float]
    """Side -> loss of its first step, which was not timed."""
    preprocess: Preprocess
    """Of the geometry."""


def measure_steps(work: Work, sides: Sequence[str], repeats: int) -> StepTimes:
    """Time `repeats` steps of each side, taking turns, after a warm-up.

    Args:
        work: what a step does.
        sides: of PRODUCT and PLAIN; the product must be among them.
        repeats: at least 1.

    Raises:
        VerificationError: the sides compute different losses.
    """
    marks: list[Mark] = []
    geometry = random_geometry(work.geometry)
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
    return StepTimes(samples, parts, losses, geometry.preprocess)


def make_steps(
    geometry: Geometry, work: Work, sides: Sequence[str], marks: list[Mark]
) -> dict[str, Step]:
    """Return side -> its step; all start from the same weights and see the same views."""
    if work.device == "cuda":  # as load_clip does: float32 means float32
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    views = made_up_views(work, geometry.preprocess.size)
    return {
        side: product_side(geometry, views, work.device, marks)
        if side == PRODUCT
        else plain_side(geometry, views, work.device)
        for side in sides
    }


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


def product_side(geometry: Geometry, views: Views, device: str, marks: list[Mark]) -> Step:
    """Return the product's step; it appends the moments between which its parts lie to `marks`.

    The moments come from hooks in the very step that is timed, so that the parts add up to it.
    """
    own = geometry._replace(visual=copy.deepcopy(geometry.visual))
    model, config = own.model().to(device), AdaptConfig()
    optimizer = make_optimizer(model.trainable(), config)

    def at_forward(*_: object) -> None:
        if torch.is_grad_enabled():  # the strong view; labels are computed without gradient
            marks.append(_mark(device))

    model.register_forward_pre_hook(at_forward)
    optimizer.register_step_pre_hook(lambda *_: marks.append(_mark(device)))

    def step() -> Tensor:
        marks.append(_mark(device))
        taken = train_step(model, optimizer, views, config, average=None, rate=config.lr)
        marks.append(_mark(device))
        return taken.losses.total.detach()

    return step


def plain_side(geometry: Geometry, views: Views, device: str) -> Step:
    """Return the step of the plain algorithm."""
    heads = TextHeads(*(matrix.to(device) for matrix in geometry.heads))
    model = PlainMicroCLIP(copy.deepcopy(geometry.visual), heads).eval().to(device)
    config = AdaptConfig()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config.lr, weight_decay=config.weight_decay)
    return lambda: plain_step(model, optimizer, views, config)


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
        EnvironmentProblem: the process ended early, as for want of memory.
    """
    # -P: a file named torch.py in the working directory must not be taken for the package.
    call = [sys.executable, "-P", "-m", _MODULE, side, *map(str, work)]
    done = subprocess.run(call, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"no message, exit {done.returncode}"])[-1]
        raise EnvironmentProblem(
            f"peak memory of {work.geometry}, {side}: expected a fresh process to take two steps, "
            f"found: {last[:300]}; use a smaller --batch-size or fewer --crops"
        )
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


def tell_peak(arguments: Sequence[str]) -> None:
    """Take two steps in this process and print their peak memory as one line of JSON.

    Args:
        arguments: side, geometry, batch, crops, device.
    """
    side, geometry, batch, crops, device = arguments
    work = Work(geometry, int(batch), int(crops), device)
    step = make_steps(random_geometry(geometry), work, [side], [])[side]
    _forget_peak(device)
    step(), step()
    print(json.dumps({"peak_mib": _peak_bytes(device) / 2**20}))


def _forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()


def _peak_bytes(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_rss_bytes()


def _mark(device: str) -> Mark:
    if device != "cuda":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Mark, end: Mark) -> float:
    """Return the seconds between two moments of one clock; the device must have reached events."""
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return float(start.elapsed_time(end)) / 1000


def _seconds(step: Step, device: str) -> float:
    """Return the wall clock of a step, until the device has done it."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start


if __name__ == "__main__":
    tell_peak(sys.argv[1:])
