"""Loads: what waits has waited, and every outcome is counted for what it is."""

import time
from itertools import count

import numpy as np
import pytest

from microclip_deploy.bench.serving import load
from microclip_deploy.bench.serving.connection import Endpoint, ask, endpoint_of, request_bytes
from microclip_deploy.bench.serving.load import (
    NO_ANSWER,
    OK,
    WRONG,
    Closed,
    Open,
    Request,
    Target,
    Until,
    Window,
    run_window,
)
from microclip_deploy.bench.serving.processes import free_port
from microclip_deploy.errors import EnvironmentProblem, UsageError
from tests.bench.serving.stand_in import Answers, stand_in

STALL_S = 0.4


def stalling() -> Answers:
    """Stall once, at the sixth request."""
    numbers = count()

    def answers(_path: str, _body: bytes) -> tuple[int, bytes]:
        if next(numbers) == 5:
            time.sleep(STALL_S)
        return 200, b"a"

    return answers


def target(endpoint: Endpoint, *bodies: bytes) -> Target:
    """Send these bodies in turn; whatever they are, the answer must be "a"."""
    raw = (request_bytes(endpoint, "POST", "/x", {}, body) for body in bodies or (b"",))
    return Target(endpoint, [Request(each, b"a") for each in raw], bytes)


def waited(window: Window) -> int:
    """Count those that took half of the stall or more."""
    return int((window.latencies_s > STALL_S / 2).sum())


def test_a_stall_is_seen_by_all_that_were_due() -> None:
    with stand_in(stalling()) as endpoint:
        closed = run_window(target(endpoint), Closed(1), Until(0.0, 60))
    with stand_in(stalling()) as endpoint:
        opened = run_window(target(endpoint), Open(100.0, seed=2), Until(0.8))
    # Of about 40 requests due within the stall, those of its first half wait over half of it.
    assert waited(opened) >= 10 > waited(closed) >= 1


def test_a_client_that_is_not_free_has_kept_its_request_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load, "MOST_CONNECTIONS", 1)
    with stand_in(stalling()) as endpoint:
        window = run_window(target(endpoint), Open(100.0, seed=2), Until(0.8))
    sent_to_answered = window.ended_s - window.sent_s
    assert window.late >= 10
    assert waited(window) >= 10 > (sent_to_answered > STALL_S / 2).sum()


def test_outcomes_are_counted_apart() -> None:
    said: dict[bytes, tuple[int, bytes] | None] = {
        b"right": (200, b"a"), b"other": (200, b"b"), b"full": (429, b""), b"bad": (500, b""),
        b"gone": None,
    }  # fmt: skip
    with stand_in(lambda _path, body: said[body]) as endpoint:
        window = run_window(target(endpoint, *said), Closed(2), Until(0.0, 10))
    assert window.counted() == {OK: 2, WRONG: 2, 429: 2, 500: 2, NO_ANSWER: 2}
    assert len(window.latencies_s) == 2
    assert np.all(window.ended_s >= window.sent_s)


def test_a_server_that_is_gone_is_an_outcome_of_a_load_and_an_error_of_a_question() -> None:
    nobody = free_port()
    assert run_window(target(nobody), Closed(2), Until(0.0, 4)).counted() == {NO_ANSWER: 4}
    assert run_window(target(nobody), Open(50.0), Until(0.1)).counted().keys() == {NO_ANSWER}
    with pytest.raises(EnvironmentProblem, match="expected a server that answers"):
        ask(nobody, "GET", "/")


def test_addresses() -> None:
    assert endpoint_of("http://a:80/") == Endpoint("a", 80)
    assert endpoint_of("https://[::1]:9") == Endpoint("::1", 9, tls=True)
    assert endpoint_of("https://[::1]:9").url == "https://[::1]:9"
    for url in ("http://", "ftp://a", "http://a/path", "http://a:b", "http://me@a"):
        with pytest.raises(UsageError, match="expected an address"):
            endpoint_of(url)
