"""Dynamic batching: requests of a model that wait together are computed together.

A worker with nothing to do gets what waits at once, or after `max_delay_s` if a fuller batch is
hoped for; while it computes, the next batch forms by itself. Requests that were given up or are
too late leave the queue before they cost anything.
"""

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.server.refusal import Refusal, late
from microclip_deploy.server.seat import Seat
from microclip_deploy.serving.session import Prediction


class Answer(NamedTuple):
    """What a model says about the images of a request, with the seconds it took."""

    prediction: Prediction
    queue_s: float
    model_s: float
    """Of the batch that the images were in."""


class Job:
    """Images of a request that are computed in one batch."""

    def __init__(self, pixels: NDArray[np.uint8], due: float) -> None:
        loop = asyncio.get_running_loop()
        self.pixels, self.due, self.since = pixels, due, loop.time()
        self.answer: asyncio.Future[Answer] = loop.create_future()
        self.alone = False
        """Its batch was lost with a worker; whether it was the cause shows when it is alone."""

    def __len__(self) -> int:
        return len(self.pixels)

    def refuse(self, refusal: Refusal) -> None:
        """Answer with an error, unless nobody waits any more."""
        if not self.answer.done():
            self.answer.set_exception(refusal)


class Batch:
    """Jobs that a worker computes together."""

    def __init__(self, jobs: Sequence[Job], batcher: "Batcher") -> None:
        self._jobs, self._batcher = jobs, batcher

    def __len__(self) -> int:
        return sum(map(len, self._jobs))

    def write(self, pixels: NDArray[np.uint8]) -> None:
        """Put all images into a slot."""
        start = 0
        for job in self._jobs:
            pixels[start : start + len(job)] = job.pixels
            start += len(job)

    def answered(self, answers: Prediction, seconds: float, errors: Mapping[int, str]) -> None:
        """Give each job its rows."""
        now, start = asyncio.get_running_loop().time(), 0
        for job in self._jobs:
            rows = range(start, start := start + len(job))
            if bad := [errors[row] for row in rows if row in errors]:
                job.refuse(
                    Refusal(
                        500, f"the model failed on this image ({bad[0]}); send another", "model"
                    )
                )
            elif not job.answer.done():
                own = Prediction._make(field[rows.start : rows.stop].copy() for field in answers)
                waited = max(now - job.since - seconds, 0.0)
                job.answer.set_result(Answer(own, waited, seconds))

    def lost(self, reason: str, *, computing: bool) -> None:
        """Queue the jobs again.

        One of those that were computed may be the cause: each gets a batch of its own, and one that
        was alone already is refused.
        """
        if computing and len(self._jobs) == 1 and self._jobs[0].alone:
            self._jobs[0].refuse(
                Refusal(503, f"the worker {reason} on this image; send another", "worker", 1)
            )
            return
        for job in reversed(self._jobs):
            job.alone = job.alone or computing
            self._batcher.put_back(job)


class Batcher:
    """The queue of a model, and the seats that empty it."""

    def __init__(
        self, seats: Sequence[Seat], *, max_batch: int, max_delay_s: float, max_queue: int
    ) -> None:
        self._seats = seats
        self._max_batch, self._max_delay_s, self._max_queue = max_batch, max_delay_s, max_queue
        self._jobs: deque[Job] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self.on_batch: Callable[[int], None] = lambda images: None

    def waiting(self) -> int:
        """Return the images in the queue."""
        return sum(map(len, self._jobs))

    async def ask(self, pixels: NDArray[np.uint8], due: float) -> Answer:
        """Return what the model says; cancelling this leaves the queue.

        Args:
            pixels: uint8 (B, S, S, 3), B of at least 1; more than a batch holds are divided.
            due: when the answer is too late, in the loop's time.

        Raises:
            Refusal: 429 the queue is full, 504 too late, 503 the worker died, 500 the model fails.
        """
        self._require_room(len(pixels))
        step = self._max_batch
        jobs = [Job(pixels[i : i + step], due) for i in range(0, len(pixels), step)]
        self._jobs.extend(jobs)
        self.pump()
        try:
            async with asyncio.timeout_at(due):
                answers = await asyncio.gather(*(job.answer for job in jobs))
        except TimeoutError:
            raise late() from None
        finally:
            for job in jobs:
                if job.answer.done() and not job.answer.cancelled():
                    continue
                job.answer.cancel()
                with contextlib.suppress(ValueError):  # a worker has it
                    self._jobs.remove(job)
        if len(answers) == 1:
            return answers[0]
        parts = zip(*(answer.prediction for answer in answers), strict=True)
        whole = Prediction._make(np.concatenate(part) for part in parts)
        waited = max(answer.queue_s for answer in answers)
        return Answer(whole, waited, sum(answer.model_s for answer in answers))

    def _require_room(self, images: int) -> None:
        if all(seat.failed for seat in self._seats):
            raise _no_worker()
        waiting = self.waiting()
        if waiting and waiting + images > self._max_queue:
            raise Refusal(
                429, "too many images are waiting; send again later", "full", self._wait_s()
            )

    def _wait_s(self) -> int:
        """Return the seconds after which what waits now will be done, at least 1."""
        rate = sum(1 / seat.image_s() for seat in self._seats if seat.image_s() > 0)
        return min(60, max(1, math.ceil(self.waiting() / rate))) if rate else 1

    def put_back(self, job: Job) -> None:
        """Take a job again, before the others."""
        self._jobs.appendleft(job)

    def refuse_all(self, refusal: Refusal) -> None:
        """Empty the queue."""
        while self._jobs:
            self._jobs.popleft().refuse(refusal)

    def pump(self) -> None:
        """Give waiting jobs to seats that can take them."""
        if all(seat.failed for seat in self._seats):
            self.refuse_all(_no_worker())
        while self._jobs:
            seat = min(self._seats, key=lambda s: (not s.ready, s.load()))
            if not (seat.free() or (seat.can_prepare() and self._is_full())):
                return
            if seat.free() and self._waits():
                return
            if jobs := self._take():
                batch = Batch(jobs, self)
                self.on_batch(len(batch))
                seat.give(batch)

    def _is_full(self) -> bool:
        return self.waiting() >= self._max_batch

    def _waits(self) -> bool:
        """Say whether a fuller batch is worth waiting for, and wake up when it is not."""
        now = asyncio.get_running_loop().time()
        rest_s = self._jobs[0].since + self._max_delay_s - now
        if rest_s <= 0 or self._is_full():
            return False
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(rest_s, self.pump)
        return True

    def _take(self) -> list[Job]:
        """Take the oldest jobs that fit into one batch; drop what nobody waits for."""
        now, images = asyncio.get_running_loop().time(), 0
        taken: list[Job] = []
        while self._jobs and images + len(self._jobs[0]) <= self._max_batch:
            job = self._jobs[0]
            if job.alone and taken and not job.answer.done():
                break
            self._jobs.popleft()
            if job.answer.done() or job.due <= now:
                continue
            taken.append(job)
            images += len(job)
            if job.alone:
                break
        return taken


def _no_worker() -> Refusal:
    return Refusal(503, "no worker can be started; see the log, and send again later", "worker", 5)
