"""Servers of the tiny export, and photos for them."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from microclip_deploy.serving import Session, open_session
from tests.server.running import Running, running

Encode = Callable[..., bytes]


@pytest.fixture(scope="session")
def server(tiny_export: Path) -> Iterator[Running]:
    """Return a server of one model, "tiny"."""
    with running(f"tiny={tiny_export}", "--max-batch", "4") as started:
        yield started


@pytest.fixture(scope="module")
def session(tiny_export: Path) -> Iterator[Session]:
    """Return the session that a server's answers must equal."""
    with open_session(tiny_export) as opened:
        yield opened


@pytest.fixture(scope="session")
def encode() -> Encode:
    """Return what makes the bytes of a photo; the same seed, the same photo."""

    def of(
        seed: int = 0, kind: str = "PNG", size: tuple[int, int] = (48, 40), **more: Any
    ) -> bytes:
        rng = np.random.default_rng(seed)
        pixels = rng.integers(0, 80, (size[1], size[0], 3), dtype=np.uint8)
        pixels[size[1] // 4 : -size[1] // 4, size[0] // 4 : -size[0] // 4, seed % 3] += 150
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind, **more)
        return stream.getvalue()

    return of
