"""The measuring core: is what it says what happened?

Where chance has no part, time itself is made up: `Clock` stands for the clock and requests move it.
Where real time passes, what is measured is compared with a second reading of the clock inside the
request, never with the time that was asked for: a busy machine sleeps longer.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, cycle

import numpy as np
import pytest

from microclip_deploy.bench.latency import windows
from microclip_deploy.bench.latency.windows import (
    STABLE_WINDOWS,
    Measured,
    Plan,
    Window,
    forgotten_synchronisation,
    measure,
)
from microclip_deploy.errors import UsageError

SLEEP_S = 0.02
SHORT = Plan(warmup_s=0.0, duration_s=0.6, most_windows=STABLE_WINDOWS)

AGREES = 0.05
"""Relative; the two readings of the clock are some microseconds of 20 ms apart."""
FULL_CREW = 0.1
"""Relative; of some 30 requests a client in a window the last one may leave the others idle."""

HEAVY = {"torch", "onnxruntime", "open_clip", "cupy", "rich", "typer"}


class Clock:
    """A clock that only requests move."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.told: list[str] = []

    def __call__(self) -> float:
        return self.now_s

    def request(self, durations_s: Iterable[float]) -> Callable[[], None]:
        durations: Iterator[float] = iter(durations_s)

        def request() -> None:
            self.now_s += next(durations)

        return request


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(windows, "perf_counter", made)
    monkeypatch.setattr(windows, "sleep", lambda _seconds: made.told.append("pause"))
    return made


class Sleeper:
    """A request that sleeps, and remembers how long it did."""

    def __init__(self) -> None:
        self.slept_s: list[float] = []

    def __call__(self) -> None:
        start = time.monotonic()
        time.sleep(SLEEP_S)
        self.slept_s.append(time.monotonic() - start)


def made_up(*windows: list[float]) -> Measured:
    """Return windows whose requests follow each other without a pause."""
    return Measured(tuple(Window(sum(taken), np.array(taken)) for taken in windows), stable=True)


def test_a_request_that_sleeps_takes_as_long_as_it_sleeps() -> None:
    sleeper = Sleeper()
    found = measure({"sleeper": sleeper}, SHORT)["sleeper"]
    slept_s = np.array(sleeper.slept_s[1:])  # the first one was the warm-up
    assert len(found.samples_s) == len(slept_s)
    assert (found.samples_s >= slept_s).all()
    assert np.median(found.samples_s) == pytest.approx(np.median(slept_s), rel=AGREES)
    assert np.median(found.samples_s) >= SLEEP_S


def test_the_same_request_measured_twice_agrees_within_the_spread_it_states() -> None:
    found = measure({"first": Sleeper(), "again": Sleeper()}, SHORT)
    first, again = found["first"], found["again"]
    tolerance = AGREES + first.spread + again.spread
    assert np.median(first.samples_s) == pytest.approx(np.median(again.samples_s), rel=tolerance)
    assert first.requests_per_s == pytest.approx(again.requests_per_s, rel=tolerance)


def test_four_clients_are_served_four_times_as_often() -> None:
    alone, together = Sleeper(), Sleeper()
    one = measure({"alone": alone}, SHORT)["alone"]
    four = measure({"together": together}, SHORT._replace(concurrency=4))["together"]
    slowdown = float(np.mean(together.slept_s) / np.mean(alone.slept_s))
    assert four.requests_per_s * slowdown == pytest.approx(4 * one.requests_per_s, rel=FULL_CREW)
    assert np.median(four.samples_s) == pytest.approx(np.median(together.slept_s), rel=AGREES)


def test_numbers_are_those_of_the_last_three_windows() -> None:
    samples = np.random.default_rng(0).lognormal(size=(4, 50))
    found = made_up(*(list(window) for window in samples))
    kept = samples[1:].ravel()
    np.testing.assert_array_equal(found.samples_s, kept)
    assert found.requests_per_s == pytest.approx(150 / kept.sum())


def test_the_spread_is_the_largest_departure_from_the_mean() -> None:
    found = made_up([9.0], [1.0, 1.0], [1.0, 1.0], [1.3, 1.3])
    assert found.spread == pytest.approx(1.3 / 1.1 - 1)


def test_a_steady_request_needs_three_windows(clock: Clock) -> None:
    plan = Plan(warmup_s=1.0, duration_s=6.0)
    found = measure({"steady": clock.request(cycle((0.099, 0.101)))}, plan)["steady"]
    assert found.stable
    assert len(found.windows) == STABLE_WINDOWS
    assert found.spread <= plan.stable
    assert all(window.seconds >= 2.0 for window in found.windows)
    assert sum(window.seconds for window in found.windows) >= plan.duration_s


def test_a_request_that_slows_down_is_not_stable_and_ends(clock: Clock) -> None:
    growing = (0.001 * 1.5**number for number in count())
    found = measure({"growing": clock.request(growing)}, Plan(most_windows=7))["growing"]
    assert not found.stable
    assert len(found.windows) == 7
    assert found.spread > Plan().stable


def test_a_request_that_settles_is_measured_until_it_has(clock: Clock) -> None:
    settling = (0.1 + 0.4 * 0.8**number for number in count())
    plan = Plan(warmup_s=0.0, duration_s=3.0)
    found = measure({"settling": clock.request(settling)}, plan)["settling"]
    assert found.stable
    assert STABLE_WINDOWS < len(found.windows) < plan.most_windows
    assert found.samples_s.mean() == pytest.approx(0.1, rel=0.1)


def test_windows_take_turns_until_each_contestant_is_stable(clock: Clock) -> None:
    told: list[str] = []

    def telling(name: str, durations_s: Iterable[float]) -> Callable[[], None]:
        request = clock.request(durations_s)

        def told_request() -> None:
            told.append(name)
            request()

        return told_request

    plan = Plan(warmup_s=0.0, duration_s=0.0, most_windows=4)  # a request a window
    growing = (0.001 * 1.5**number for number in count())
    requests = {"steady": telling("steady", cycle((0.1,))), "growing": telling("growing", growing)}
    clock.told = told
    measure(requests, plan)
    turns = [part for name in requests for part in ("pause", name)]
    assert told == [*requests, *turns * STABLE_WINDOWS, "pause", "growing"]


def test_a_request_longer_than_its_window_counts_whole(clock: Clock) -> None:
    plan = Plan(warmup_s=0.0, duration_s=0.3)
    found = measure({"long": clock.request(cycle((5.0,)))}, plan)["long"]
    assert [window.seconds for window in found.windows] == [5.0] * STABLE_WINDOWS
    np.testing.assert_array_equal(found.samples_s, [5.0] * STABLE_WINDOWS)


def test_the_warm_up_is_as_long_as_asked_and_not_among_the_samples(clock: Clock) -> None:
    cold_then_warm = (7.0 if number < 3 else 0.1 for number in count())
    found = measure({"cold": clock.request(cold_then_warm)}, Plan(warmup_s=20.0))["cold"]
    assert found.samples_s.max() == pytest.approx(0.1)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_what_a_request_raises_ends_everything(concurrency: int) -> None:
    numbers = count()

    def request() -> None:
        time.sleep(0.001)
        if next(numbers) == 9:
            raise OSError("the tenth")

    before, start = threading.active_count(), time.monotonic()
    with pytest.raises(OSError, match="the tenth"):
        measure({"failing": request}, Plan(60.0, 60.0, concurrency=concurrency))
    assert threading.active_count() == before
    assert time.monotonic() - start < 30.0


def test_a_device_that_works_longer_than_its_request_is_told() -> None:
    told = forgotten_synchronisation(wall_s=0.001, device_s=0.0015)
    assert told is not None
    assert "answered after 1 ms while the device works on it for 1.5 ms" in told


@pytest.mark.parametrize("device_s", [0.0, 0.0002, 0.001, 0.00104])
def test_possible_times_of_a_device_are_not_told(device_s: float) -> None:
    assert forgotten_synchronisation(0.001, device_s) is None


@pytest.mark.parametrize("waits", [True, False])
def test_only_a_request_that_does_not_wait_for_its_device_is_told(waits: bool) -> None:
    sleeper = Sleeper()
    with ThreadPoolExecutor(1) as device:

        def request() -> None:
            work = device.submit(sleeper)
            if waits:
                work.result()

        # A request a window: work that nobody waits for must not pile up.
        found = measure({"it": request}, SHORT._replace(duration_s=0.0))["it"]
    told = forgotten_synchronisation(
        float(np.median(found.samples_s)), float(np.median(sleeper.slept_s))
    )
    assert (told is None) == waits


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(concurrency=0), "expected 1 or more clients, found 0"),
        (Plan(most_windows=2), "expected 3 or more, as so many are compared, found 2"),
    ],
)
def test_plans_that_cannot_be_followed_are_usage_errors(plan: Plan, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        measure({"it": time.time}, plan)


def test_measuring_brings_nothing_heavy_into_the_process() -> None:
    code = (
        "import sys, microclip_deploy.bench.latency.windows, microclip_deploy.bench.option_text,"
        f"microclip_deploy.bench.latency.cold_start; print(*{HEAVY!r} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""
