"""Times of the contestants that are no kernels of ours: few calls, and none that takes too long."""

import statistics
import time
from collections.abc import Callable

from microclip_deploy.bench.kernel.report import Timing, percentile

CAP_S = 3.0
"""A call that takes longer is not repeated."""
REPEAT_S = 1.0
"""Time given to the repeats of a call."""
REPEATS = (2, 10)

Clock = Callable[[Callable[[], object]], float]
"""Returns microseconds of one call."""


class TooSlow(Exception):
    """A contestant is left out; the message says why."""


def time_peer(run: Callable[[int], object], batch: int, clock: Clock) -> Timing:
    """Time a contestant on a batch, after a warm-up.

    Args:
        run: works on the given number of images.
        batch: that number.
        clock: measures a call.

    Raises:
        TooSlow: an eighth of the batch, or one call, shows that it takes longer than CAP_S.
    """
    run(1)  # handles, loaded modules, memory
    part = max(batch // 8, 1)
    taken_s = clock(lambda: run(part)) / 1e6
    if taken_s * batch / part > 2 * CAP_S:
        raise TooSlow(f"{part} of {batch} images took {taken_s:.1f} s, too long for all")
    taken_s = clock(lambda: run(batch)) / 1e6
    if taken_s > CAP_S:
        raise TooSlow(f"one call took {taken_s:.1f} s, longer than {CAP_S:.0f} s")
    repeats = max(REPEATS[0], min(REPEATS[1], int(REPEAT_S / max(taken_s, 1e-6))))
    samples = [clock(lambda: run(batch)) for _ in range(repeats)]
    return Timing(statistics.median(samples), percentile(samples, 95), min(samples), repeats, 1)


def wall_clock_us(call: Callable[[], object]) -> float:
    """Return microseconds of one call on the host."""
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)
