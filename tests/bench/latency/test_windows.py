"""The measuring core: is what it says what happened?

Time itself is made up: `Clock` stands for the clock and requests move it. Only where threads are
concerned real time passes, and nothing is said about how much.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, cycle

import numpy as np
import pytest

from microclip_deploy.bench.latency import windows
from microclip_deploy.bench.latency.windows import (
    STABLE_WINDOWS,
    Plan,
    Window,
    measure,
    repeated,
    summary,
)

HEAVY = {"torch", "onnxruntime", "open_clip", "cupy", "rich", "typer"}


class Clock:
    """A clock that only requests move."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.turns: list[str] = []

    def __call__(self) -> float:
        return self.now_s

    def request(self, durations_s: Iterable[float], name: str = "it") -> Callable[[], None]:
        durations: Iterator[float] = iter(durations_s)

        def request() -> None:
            self.turns.append(name)
            self.now_s += next(durations)

        return request


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(windows, "perf_counter", made)
    monkeypatch.setattr(windows, "sleep", lambda _seconds: made.turns.append("pause"))
    return made


def made_up(*samples: Iterable[float]) -> list[Window]:
    """Return windows whose requests follow each other without a pause."""
    taken = [np.array([*window]) for window in samples]
    return [Window(float(window.sum()), window) for window in taken]


def test_numbers_are_those_of_the_last_three_windows() -> None:
    samples = np.random.default_rng(0).lognormal(size=(4, 50))
    found, kept = summary(made_up(*samples), 1.0), samples[1:].ravel()
    assert found.windows == 4
    np.testing.assert_array_equal(found.samples_s, kept)
    assert found.requests_per_s == pytest.approx(150 / kept.sum())


def test_the_spread_is_the_largest_departure_from_the_mean() -> None:
    taken = made_up([9.0], [1.0, 1.0], [1.0, 1.0], [1.3, 1.3])
    assert summary(taken, 0.2).spread == pytest.approx(1.3 / 1.1 - 1)
    assert summary(taken, 0.2).stable
    assert not summary(taken, 0.1).stable
    assert not summary(taken[1:3], 0.1).stable, "too few to agree"


@pytest.mark.parametrize(
    ("durations_s", "stable", "windows"),
    [
        (lambda number: 0.1 + 0.001 * (-1) ** number, True, [3]),
        (lambda number: 0.1 + 0.4 * 0.8**number, True, range(4, 7)),
        (lambda number: 0.001 * 1.5**number, False, [7]),
    ],
    ids=["steady", "settling", "slowing down"],
)
def test_windows_are_repeated_until_they_agree(
    durations_s: Callable[[int], float], stable: bool, windows: Sequence[int], clock: Clock
) -> None:
    plan = Plan(warmup_s=0.0, duration_s=3.0, most_windows=7)
    found = measure({"it": clock.request(map(durations_s, count()))}, plan)["it"]
    assert found.stable == stable == (found.spread <= plan.stable)
    assert found.windows in windows
    assert found.samples_s.sum() >= plan.duration_s
    if stable:
        assert found.samples_s.mean() == pytest.approx(0.1, rel=0.1)


def test_windows_take_turns_until_each_contestant_is_stable(clock: Clock) -> None:
    plan = Plan(warmup_s=0.0, duration_s=0.0, most_windows=4)  # a request a window
    growing = (0.001 * 1.5**number for number in count())
    requests = {
        "steady": clock.request(cycle((0.1,)), "steady"),
        "growing": clock.request(growing, "growing"),
    }
    measure(requests, plan)
    turns = [part for name in requests for part in ("pause", name)]
    assert clock.turns == [*requests, *turns * STABLE_WINDOWS, "pause", "growing"]


def test_a_request_longer_than_its_window_counts_whole(clock: Clock) -> None:
    found = measure({"it": clock.request(cycle((5.0,)))}, Plan(0.0, duration_s=0.3))["it"]
    np.testing.assert_array_equal(found.samples_s, [5.0] * STABLE_WINDOWS)
    assert found.requests_per_s == pytest.approx(1 / 5)


def test_the_warm_up_is_as_long_as_asked_and_not_among_the_samples(clock: Clock) -> None:
    cold_then_warm = (7.0 if number < 3 else 0.1 for number in count())
    found = measure({"it": clock.request(cold_then_warm)}, Plan(warmup_s=20.0))["it"]
    assert found.samples_s.max() == pytest.approx(0.1)


@pytest.mark.parametrize(("seconds", "calls"), [(10.0, 3), (0.5, 4), (0.001, 8)])
def test_calls_are_repeated_within_a_budget(seconds: float, calls: int, clock: Clock) -> None:
    call = clock.request(cycle((seconds,)))
    samples = repeated(call, budget_s=2.0, fewest=3, most=8)
    np.testing.assert_allclose(samples, [seconds] * calls)
    assert clock.turns == ["pause", *["it"] * (calls + 1)]


def test_clients_have_one_request_under_way_each() -> None:
    crew, most = threading.Barrier(4), []

    def request() -> None:
        most.append(crew.wait(timeout=60))  # passes when four are in it

    found = measure({"it": request}, Plan(0.0, 0.0, stable=1e9), clients=4)["it"]
    assert len(found.samples_s) == 4 * STABLE_WINDOWS
    assert sorted(most) == sorted([0, 1, 2, 3] * (1 + STABLE_WINDOWS))


@pytest.mark.parametrize("clients", [1, 4])
def test_what_a_request_raises_ends_everything(clients: int) -> None:
    numbers = count()

    def request() -> None:
        time.sleep(0.001)
        if next(numbers) == 9:
            raise OSError("the tenth")

    before = threading.active_count()
    with pytest.raises(OSError, match="the tenth"):
        measure({"failing": request}, Plan(3600.0, 3600.0), clients)
    assert threading.active_count() == before


def test_measuring_brings_nothing_heavy_into_the_process() -> None:
    code = (
        "import sys, microclip_deploy.bench.latency.windows,"
        f"microclip_deploy.bench.latency.cold_start; print(*{HEAVY!r} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""
