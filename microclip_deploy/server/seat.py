"""A seat: a worker on a device, started again whenever it dies or hangs.

The worker computes one batch after the other. While it computes, a full batch may already be
written into the second slot. Whoever fills the slots is told what became of each batch.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.calibration import Calibration
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import CheckpointError, EnvironmentProblem, MicroclipError
from microclip_deploy.server.channel import READY, SLOTS, Memory, Shapes, line
from microclip_deploy.server.worker import Options
from microclip_deploy.serving.answer_block import Sizes
from microclip_deploy.serving.session import Prediction

PING_EVERY_S = 0.5
"""An idle worker is asked whether it lives."""

ANSWER_WITHIN_S = 1.2
"""For a ping, and the least that any batch is given: with the above, under 2 s to notice."""

_USUAL_TIMES = 10
"""A batch that takes so many times what its images usually take is late."""

_GRACE_S = 4.0
"""A late worker is not ready; after so much more it is replaced. Where processors are scarce it may
only have had none, and to load a model again would cost more."""

_LONGEST_PAUSE_S = 30.0
"""Between two attempts to start a worker that fails again and again."""

_LATE_S = 0.25
"""A timer that fires so late says nothing about the worker."""

_LINE_LIMIT = 64 * 1024 * 1024

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Facts:
    """What a worker says of its model."""

    version: str
    device: str
    classes: tuple[str, ...]
    unadapted: frozenset[str]
    preprocess: Preprocess
    shapes: Shapes
    shares: Mapping[str, float]
    """Of the model's time, by stage."""
    classifier: NDArray[np.float32]
    """(C, E), unit rows."""
    calibration: Calibration | None
    """How the logits are read."""


class Batch(Protocol):
    """What lies in a slot."""

    def __len__(self) -> int:
        """Return its images."""

    def write(self, pixels: NDArray[np.uint8]) -> None:
        """Put the images into the slot."""

    def answered(self, answers: Prediction, seconds: float, errors: Mapping[int, str]) -> None:
        """Take what the worker said; the arrays are overwritten later."""

    def lost(self, reason: str, *, computing: bool) -> None:
        """Hear that the worker is gone, which computed this batch or would have done so later."""


class Seat:
    """A worker that is replaced when it must be; lives in the server's event loop."""

    def __init__(
        self, options: Options, hang_timeout_s: float | None, on_change: Callable[[], None]
    ) -> None:
        """Describe the worker; `start` starts it.

        Args:
            options: what it is told.
            hang_timeout_s: longest batch; None for a multiple of what is usual.
            on_change: called when a slot has become free, or the worker ready or not.
        """
        self.facts: Facts | None = None
        self.ready = False
        self.failed = False
        """The last attempt to start the worker failed."""
        self.restarts = 0
        self._options, self._hang_timeout_s, self._on_change = options, hang_timeout_s, on_change
        self._batches: dict[int, Batch] = {}
        self._task: asyncio.Task[None] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._image_s = 0.0

    async def start(self) -> Facts:
        """Start the worker and wait until it can answer.

        Raises:
            MicroclipError: it cannot; the error is the worker's.
        """
        connection = await asyncio.to_thread(self._launched)
        assert self.facts is not None
        self._task = asyncio.create_task(self._keep(connection))
        return self.facts

    async def stop(self) -> None:
        """End the worker; what it still computes is lost."""
        self.ready = False
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await asyncio.to_thread(self._end)

    def free(self) -> bool:
        """Say whether the worker has nothing to do."""
        return self.ready and not self._batches

    def can_prepare(self) -> bool:
        """Say whether a batch may be written while another one is computed."""
        return self.ready and len(self._batches) < SLOTS

    def load(self) -> int:
        """Return how many batches it has."""
        return len(self._batches)

    def image_s(self) -> float:
        """Return how long an image usually takes, seconds."""
        return self._image_s

    def give(self, batch: Batch) -> None:
        """Let the worker compute a batch; a slot must be free."""
        slot = next(s for s in range(SLOTS) if s not in self._batches)
        batch.write(self._memory.pixels(slot)[: len(batch)])
        self._batches[slot] = batch
        self._writer.write(line({"slot": slot, "count": len(batch)}))
        if len(self._batches) == 1:
            self._expect(self._patience_s(len(batch)))

    def _launched(self) -> socket.socket:
        """Start a process and wait for its first words; blocks.

        Raises:
            MicroclipError: as `start`.
        """
        own, its = socket.socketpair()
        process = None
        command = [sys.executable, "-m", "microclip_deploy.server.worker"]
        try:
            with its:
                self._process = process = subprocess.Popen(
                    [*command, str(its.fileno()), json.dumps(self._options)],
                    pass_fds=[its.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=sys.stderr.fileno(),
                )
            first, descriptors, _, _ = socket.recv_fds(own, 1, 1)
            with own.makefile("rb") as stream:
                words = stream.readline(_LINE_LIMIT)
            told = json.loads(words) if words.endswith(b"\n") else {}
            if first != READY or not told:
                raise _failure(told, process.wait())
            memory, facts = _facts(told, descriptors[0])
            if self.facts is not None and facts.version != self.facts.version:
                raise CheckpointError(
                    f"{self._options.directory}: expected version {self.facts.version}, found "
                    f"{facts.version}; it was replaced and is loaded as a version of its own"
                )
            self._memory, self.facts = memory, facts
        except BaseException as error:
            own.close()
            self._end()
            if isinstance(error, (OSError, ValueError)):
                raise EnvironmentProblem(f"serve: a worker cannot be started: {error}") from error
            raise
        self._image_s = told["image_s"]
        own.setblocking(False)
        return own

    async def _keep(self, connection: socket.socket | None) -> None:
        """Listen to the worker, and start another when it is gone."""
        pause_s = 0.0
        while True:
            if connection is not None:
                begun = asyncio.get_running_loop().time()
                await self._listen(connection)
                if asyncio.get_running_loop().time() - begun > _LONGEST_PAUSE_S:
                    pause_s = 0.0
            await asyncio.sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, max(0.5, 2 * pause_s))
            self.restarts += 1
            try:
                connection = await asyncio.to_thread(self._launched)
            except MicroclipError as error:
                connection = None
                self.failed = True
                self._on_change()
                _log.error("error: the worker on %s cannot start: %s", self._options.device, error)

    async def _listen(self, connection: socket.socket) -> None:
        """Hand out answers until the worker dies or hangs; it is gone afterwards."""
        reader, self._writer = await asyncio.open_connection(sock=connection, limit=_LINE_LIMIT)
        self._timer: asyncio.TimerHandle | None = None
        self.ready, self.failed, self._hangs = True, False, False
        self._idle()
        self._on_change()
        reason = "died"
        try:
            while words := await reader.readline():
                self._hear(json.loads(words))
        except (ConnectionError, ValueError):
            pass
        finally:
            self.ready = False
            if self._timer is not None:
                self._timer.cancel()
            self._writer.close()
            reason = "hung" if self._hangs else reason
            lost, self._batches = list(self._batches.values()), {}
            for batch in reversed(lost):  # the first one was computed, the other one waited
                batch.lost(reason, computing=batch is lost[0])
            self._on_change()
        _log.error("error: the worker on %s %s; starting another", self._options.device, reason)
        await asyncio.to_thread(self._end)

    def _hear(self, message: dict[str, Any]) -> None:
        """Take an answer to a batch or to a ping."""
        self.ready = not self._hangs
        if "slot" in message:
            slot = message["slot"]
            batch = self._batches.pop(slot)
            errors = {int(row): reason for row, reason in message["errors"].items()}
            batch.answered(self._memory.answers(slot, len(batch)), message["seconds"], errors)
            self._image_s += (message["seconds"] / len(batch) - self._image_s) / 10
        self._on_change()
        if self._batches:
            self._expect(self._patience_s(max(len(batch) for batch in self._batches.values())))
        else:
            self._idle()

    def _patience_s(self, images: int) -> float:
        if self._hang_timeout_s is not None:
            return self._hang_timeout_s
        return max(ANSWER_WITHIN_S, _USUAL_TIMES * self._image_s * images)

    def _idle(self) -> None:
        """Ask in a moment whether the worker lives."""

        def ping() -> None:
            self._writer.write(line({"ping": True}))
            # It may be at its golden image.
            self._expect(max(ANSWER_WITHIN_S, _USUAL_TIMES * self._image_s))

        self._set_timer(PING_EVERY_S, ping)

    def _expect(self, within_s: float) -> None:
        """Take a worker that does not speak in time for not ready, and after a while for hung."""

        def suspect() -> None:
            self.ready = False
            self._unless_late(_GRACE_S if self._hang_timeout_s is None else 0.0, hang)

        def hang() -> None:
            self._hangs = True
            if self._process is not None:
                self._process.kill()

        self._unless_late(within_s, suspect)

    def _unless_late(self, after_s: float, then: Callable[[], None]) -> None:
        """Do something at a time; if this process was busy then, give the worker another moment."""
        loop = asyncio.get_running_loop()
        planned = loop.time() + after_s

        def over() -> None:
            if loop.time() > planned + _LATE_S:  # what it said may wait to be read
                self._unless_late(ANSWER_WITHIN_S, then)
            else:
                then()

        self._set_timer(after_s, over)

    def _set_timer(self, after_s: float, then: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(after_s, then)

    def _end(self) -> None:
        """Wait for the process to end, as it does when the socket closes; then kill it."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.wait(ANSWER_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _facts(told: dict[str, Any], descriptor: int) -> tuple[Memory, Facts]:
    batch, side, *sizes = told["shapes"]
    shapes, known = Shapes(batch, side, Sizes(*sizes)), told["calibration"]
    try:
        memory = Memory(descriptor, shapes)
    finally:
        os.close(descriptor)
    facts = Facts(
        told["version"],
        told["device"],
        tuple(told["classes"]),
        frozenset(told["unadapted"]),
        Preprocess.model_validate(told["preprocess"]),
        shapes,
        told["shares"],
        memory.classifier().copy(),
        known and Calibration.model_validate(known),
    )
    return memory, facts


def _failure(told: dict[str, Any], code: int) -> MicroclipError:
    """Return a worker's error as if it had happened here."""
    if "error" not in told:
        return EnvironmentProblem(
            f"serve: expected a worker that starts, found one that ended with code {code}; see "
            "what it wrote before"
        )
    error = MicroclipError(told["error"])
    error.exit_code = told["exit_code"]
    return error
