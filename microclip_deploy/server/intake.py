"""Encoded photos -> test views, in threads: Pillow lets go of the interpreter while it works."""

import asyncio
import base64
import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from microclip_deploy.data.decode import BadImage, decode_image
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.processors import usable_cpus
from microclip_deploy.server.refusal import Refusal, late

SHOWN_SIDE = 1024
"""Longest side of an overlay, pixels."""


class View(NamedTuple):
    """A photo as the model sees it."""

    pixels: NDArray[np.uint8]
    """(S, S, 3)."""
    size: tuple[int, int]
    """Width and height of the photo, upright."""
    shown: Image.Image | None
    """The photo with a long side of at most SHOWN_SIDE, where it was asked for."""
    decode_s: float
    preprocess_s: float


class Intake:
    """Threads that read photos, and a bound on how many wait for them."""

    def __init__(self, max_waiting: int, max_pixels: int) -> None:
        self._threads = ThreadPoolExecutor(usable_cpus(), "intake")
        self._waiting, self._max_waiting = 0, max_waiting
        self._max_pixels = max_pixels

    async def view(
        self, body: bytes, preprocess: Preprocess, due: float, *, shown: bool = False
    ) -> View:
        """Read a photo.

        Args:
            body: the bytes of a file.
            preprocess: of the model that will see it.
            due: when it is too late, in the loop's time.
            shown: keep a small copy to draw on.

        Raises:
            Refusal: 400, it is no photo or a bad one; 429, too many wait; 504, too late.
        """
        if self._waiting >= self._max_waiting:
            raise Refusal(429, "too many photos are waiting; send again later", "full", 1)
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            async with asyncio.timeout_at(due):
                return await loop.run_in_executor(
                    self._threads, self._read, body, preprocess, shown
                )
        except TimeoutError:
            raise late() from None
        except BadImage as error:
            raise Refusal(
                400,
                f"expected a photo that can be read, found one that cannot ({error.reason}); "
                "send another",
                "photo",
            ) from error
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _read(self, body: bytes, preprocess: Preprocess, shown: bool) -> View:
        begun = time.perf_counter()
        limit = min(self._max_pixels, preprocess.photos.max_pixels)
        config = preprocess.photos.changed(max_pixels=limit)
        photo = decode_image(io.BytesIO(body), Path("photo"), config)
        decoded = time.perf_counter()
        pixels = preprocess.test_view(photo)
        done = time.perf_counter()
        size = photo.size
        if shown:
            photo.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        return View(pixels, size, photo if shown else None, decoded - begun, done - decoded)


def from_base64(text: object) -> bytes:
    """Return bytes of a photo that stands in JSON.

    Raises:
        Refusal: 400, no base64.
    """
    try:
        if not isinstance(text, str):
            raise ValueError("no text")
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise Refusal(
            400, "expected photos as base64 text; send the bytes as binary data", "body"
        ) from error
