"""A worker: one model version on one device, in a process of its own.

Started by `seat` as `python -m microclip_deploy.server.worker DESCRIPTOR OPTIONS`. It answers
batches that lie in the shared memory until the socket closes. Signals that end the server reach it
too, in a terminal and under systemd; it ignores them, because the server still has to drain.
"""

import hashlib
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from microclip_deploy.artifact import MANIFEST
from microclip_deploy.errors import CheckpointError, MicroclipError
from microclip_deploy.server.channel import FAILED, READY, Inbox, Memory, Shapes, line
from microclip_deploy.server.golden import Golden
from microclip_deploy.server.stages import stage_shares
from microclip_deploy.serving import Session, open_session
from microclip_deploy.serving.answer_block import Sizes
from microclip_deploy.serving.session import Prediction

GOLDEN_EVERY_S = 30.0
"""A worker asks itself the golden image so often, when it is idle."""

_ATTEMPTS = 5
"""How often a model is opened whose manifest changes meanwhile."""

_log = logging.getLogger(__name__)


class Options(NamedTuple):
    """What a worker is told."""

    directory: str
    device: str
    threads: int | None
    max_batch: int
    prior: str


def version_of(directory: Path) -> str:
    """Return the version of a run or an export: the start of its manifest's sha256.

    Raises:
        CheckpointError: there is no manifest.
    """
    try:
        return hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise CheckpointError(
            f"{directory}: expected a directory that `adapt` or `export` wrote, found no "
            f"{MANIFEST} ({error.strerror}); give another"
        ) from error


class Worker:
    """An open session behind the channel."""

    def __init__(self, options: Options) -> None:
        """Open the model, warm it up and check it.

        Raises:
            MicroclipError: it cannot be opened, or fails on the golden image.
        """
        directory = Path(options.directory)
        self.session, self.version = _opened(directory, options)
        self.golden = Golden.of(directory, self.session)
        for count in getattr(self.session, "buckets", (1,)):  # captured at first use on a GPU
            if count <= options.max_batch:
                self.session.predict(np.repeat(self.golden.image, count, axis=0))
        self.golden.check(self.session)
        begun = time.perf_counter()
        first = self.session.predict(self.golden.image)
        self.image_s = time.perf_counter() - begun
        self.shares = stage_shares(directory, self.session, self.golden.image, options.threads)
        sizes = Sizes(first.mask.shape[1], *self.session.classifier().shape[::-1])
        self.shapes = Shapes(options.max_batch, self.session.preprocess.size, sizes)

    def hello(self) -> dict[str, Any]:
        """Return what the server must know."""
        session = self.session
        known = session.calibration
        return {
            "version": self.version,
            "device": session.device,
            "classes": session.classes,
            "unadapted": sorted(session.unadapted),
            "preprocess": session.preprocess.model_dump(mode="json"),
            "shapes": [*self.shapes[:2], *self.shapes.sizes],
            "image_s": self.image_s,
            "shares": self.shares,
            "calibration": known.model_dump(mode="json") if known else None,
        }

    def answer(self, memory: Memory, slot: int, count: int) -> dict[str, Any]:
        """Answer the images of a slot; an image that fails costs only itself.

        Raises:
            MicroclipError: every image fails, the golden one too: the device is broken.
        """
        pixels, answers = memory.pixels(slot)[:count], memory.answers(slot, count)
        begun, errors = time.perf_counter(), {}
        try:
            _write(answers, self.session.predict(pixels))
        except MicroclipError as error:
            _log.warning("warning: a batch failed and is asked again one by one: %s", error)
            for row in range(count):
                try:
                    _write(_row(answers, row), self.session.predict(pixels[row : row + 1]))
                except MicroclipError as reason:
                    errors[row] = type(reason).__name__
            if len(errors) == count:
                self.golden.check(self.session)
        return {"slot": slot, "seconds": time.perf_counter() - begun, "errors": errors}

    def serve(self, memory: Memory, end: socket.socket) -> None:
        """Answer until the other side goes.

        Raises:
            MicroclipError: the model fails on the golden image.
        """
        inbox, checked = Inbox(end), time.monotonic()
        while True:
            try:
                message = inbox.read()
            except EOFError:
                return
            if "slot" in message:
                end.sendall(line(self.answer(memory, message["slot"], message["count"])))
                continue
            end.sendall(line(message))  # a ping, which comes when there is nothing to do
            if time.monotonic() - checked > GOLDEN_EVERY_S:
                self.golden.check(self.session)
                checked = time.monotonic()


def _opened(directory: Path, options: Options) -> tuple[Session, str]:
    """Open a model and tell its version, also while its classes are being changed."""
    for _ in range(_ATTEMPTS):
        version = version_of(directory)
        session = open_session(
            directory, options.device, threads=options.threads, prior=options.prior
        )
        if version_of(directory) == version:
            return session, version
        session.close()
    raise CheckpointError(
        f"{directory}: expected a manifest that stays for a moment, found it changed {_ATTEMPTS} "
        "times while the model was opened; wait until it is written"
    )


def _write(target: Prediction, source: Prediction) -> None:
    for to, what in zip(target, source, strict=True):
        to[...] = what


def _row(answers: Prediction, row: int) -> Prediction:
    return Prediction._make(field[row : row + 1] for field in answers)


def _end_with(end: socket.socket) -> None:
    """End when the other side is gone, also in the middle of a load or of a batch that hangs."""
    poll = select.poll()
    poll.register(end, 0)
    poll.poll()
    os._exit(0)


def main(descriptor: int, options: Options) -> int:
    """Run a worker on an inherited socket; return the exit code of its process."""
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    with socket.socket(fileno=descriptor) as end:
        threading.Thread(target=_end_with, args=(end,), daemon=True).start()
        try:
            worker = Worker(options)
            memory, shared = Memory.allocate(worker.shapes)
        except MicroclipError as error:
            end.sendall(FAILED + line({"error": str(error), "exit_code": error.exit_code}))
            return error.exit_code
        memory.classifier()[...] = worker.session.classifier()
        try:
            socket.send_fds(end, [READY], [shared])
            end.sendall(line(worker.hello()))
            worker.serve(memory, end)
        except MicroclipError as error:
            _log.error("error: %s", error)
            return error.exit_code
        except (BrokenPipeError, ConnectionResetError):  # the server is gone
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Options(*json.loads(sys.argv[2]))))
