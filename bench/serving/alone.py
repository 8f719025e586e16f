"""The session without a server: what serving is held against, and what answers must equal."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.bench.photos import decoded
from microclip_deploy.bench.serving.load import OK, Load, Until, Window
from microclip_deploy.serving import Session, open_session

Given = Sequence[bytes] | Sequence[NDArray[np.uint8]]
"""One photo's file, or uint8 views (B, S, S, 3), a request."""
Logits = list[NDArray[np.float32]]
"""One array (B, C) a request."""


@contextmanager
def alone(
    export: Path, device: str, threads: int | None, given: Given
) -> Iterator[Callable[[tuple[str, Load, Until] | None], Window | Logits]]:
    """Open the session and give what measures it; for a process of its own.

    What it gives answers None with the logits of every request, and a load as `load.clients` does,
    by one caller in a closed loop, whatever the load: the model uses all cores for each request.
    """
    with open_session(export, device, threads=threads) as session:
        yield (
            lambda asked: (
                [_answer(session, one) for one in given]
                if asked is None
                else _window(session, given, asked[-1])
            )
        )


def _answer(session: Session, one: bytes | NDArray[np.uint8]) -> NDArray[np.float32]:
    if isinstance(one, bytes):  # decoded here, as a server does
        return session.predict_photos(decoded([one], session.preprocess.photos)).logits
    return session.predict(one).logits


def _window(session: Session, given: Given, until: Until) -> Window:
    spans: list[tuple[float, float, float]] = []
    cpu = time.process_time()
    first = end = time.perf_counter()
    while not spans or end - first < until.seconds:
        start = time.perf_counter()
        _answer(session, given[len(spans) % len(given)])
        end = time.perf_counter()
        spans.append((start, start, end))
    starts, sent, ends = np.array(spans).T
    outcomes = np.full(len(spans), OK)
    cpu_s = time.process_time() - cpu
    return Window(starts, sent, ends, outcomes, 0.0, cpu_s)
