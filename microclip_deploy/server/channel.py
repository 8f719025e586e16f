"""What the server and a worker share: a socket for short messages, memory for what is large.

    memory   SLOTS batches of pixels, SLOTS batches of answers, the class matrix
    socket   one JSON object a line

The memory has no name: the worker sends its file descriptor, so nothing is left behind however
either side ends. It is reserved when it is made, so a full /dev/shm is an error at the start.
"""

import json
import math
import mmap
import os
import socket
import tempfile
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.errors import EnvironmentProblem
from microclip_deploy.serving.answer_block import Sizes, block_bytes, block_views
from microclip_deploy.serving.session import Prediction

SLOTS = 2
"""One batch is computed while the next one is written."""

READY, FAILED = b"R", b"F"
"""First byte of a worker: with the memory's descriptor, or with a reason on the line after it."""

_LONGEST = 64 * 1024 * 1024
"""Bytes of a line; more than the names of a million classes."""


class Shapes(NamedTuple):
    """What the size of the memory depends on."""

    batch: int
    """Most images of a slot."""
    side: int
    """S, pixels."""
    sizes: Sizes
    """Of the model."""

    def pixel_bytes(self) -> int:
        """Return the bytes of one slot's images."""
        return _padded(self.batch * self.side * self.side * 3)

    def answer_bytes(self) -> int:
        """Return the bytes of one slot's answers."""
        return block_bytes(self.batch, self.sizes)

    def total(self) -> int:
        """Return the bytes of the memory."""
        matrix = self.sizes.classes * self.sizes.joint * 4
        return SLOTS * (self.pixel_bytes() + self.answer_bytes()) + _padded(matrix)


class Memory:
    """The memory, as arrays that share it."""

    def __init__(self, descriptor: int, shapes: Shapes) -> None:
        """Map what `allocate` made; the descriptor stays the caller's."""
        self._shapes = shapes
        self._bytes = np.frombuffer(mmap.mmap(descriptor, shapes.total()), np.uint8)

    @classmethod
    def allocate(cls, shapes: Shapes) -> tuple[Self, int]:
        """Return new memory and its descriptor, which the caller closes.

        Raises:
            EnvironmentProblem: there is not enough.
        """
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("microclip")
        else:  # macOS
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, shapes.total())
            else:
                os.truncate(descriptor, shapes.total())
            return cls(descriptor, shapes), descriptor
        except OSError as error:
            os.close(descriptor)
            raise EnvironmentProblem(
                f"serve: expected {shapes.total() / 1e6:.0f} MB of shared memory, found: "
                f"{error.strerror}; lower --max-batch, or give the container more memory"
            ) from error

    def pixels(self, slot: int) -> NDArray[np.uint8]:
        """Return uint8 (batch, S, S, 3)."""
        batch, side, _ = self._shapes
        start = slot * self._shapes.pixel_bytes()
        return self._bytes[start : start + batch * side * side * 3].reshape(batch, side, side, 3)

    def answers(self, slot: int, count: int) -> Prediction:
        """Return the answers to the first `count` images of a slot."""
        start = SLOTS * self._shapes.pixel_bytes() + slot * self._shapes.answer_bytes()
        block = self._bytes[start : start + self._shapes.answer_bytes()]
        return block_views(block, count, self._shapes.sizes)

    def classifier(self) -> NDArray[np.float32]:
        """Return the class matrix, float32 (C, E)."""
        sizes = self._shapes.sizes
        start = SLOTS * (self._shapes.pixel_bytes() + self._shapes.answer_bytes())
        matrix = self._bytes[start : start + 4 * sizes.classes * sizes.joint]
        return matrix.view(np.float32).reshape(sizes.classes, sizes.joint)


def line(message: dict[str, Any]) -> bytes:
    """Return a message as it is sent."""
    return json.dumps(message).encode("ascii") + b"\n"


class Inbox:
    """Messages that arrive at a blocking socket."""

    def __init__(self, end: socket.socket) -> None:
        self._socket, self._pending = end, b""

    def read(self) -> dict[str, Any]:
        """Return the next message.

        Raises:
            EOFError: the other side is gone.
        """
        while b"\n" not in self._pending:
            part = self._socket.recv(1 << 20)
            self._pending += part
            if not part or len(self._pending) > _LONGEST:
                raise EOFError
        first, _, self._pending = self._pending.partition(b"\n")
        message: dict[str, Any] = json.loads(first)
        return message


def _padded(size: int) -> int:
    return math.ceil(size / 256) * 256
