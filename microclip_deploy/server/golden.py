"""The golden inference: one image whose answer is known shows that a model still works."""

from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from microclip_deploy.errors import VerificationError
from microclip_deploy.serving.exported import PROBES
from microclip_deploy.serving.session import Session

LEAST_COSINE = 0.98
"""Of [CLS] with the known answer: int8 stays above it, a broken device does not. How near an export
is to PyTorch is what `verify` proves."""


class Golden(NamedTuple):
    """An image and the [CLS] embedding that belongs to it."""

    image: NDArray[np.uint8]
    """(1, S, S, 3)."""
    cls: NDArray[np.float32]
    """(E,), unit length."""

    @classmethod
    def of(cls, directory: Path, session: Session) -> Self:
        """Return the first image that an export was proven on; for a run, noise and its answer.

        Raises:
            MicroclipError: the session fails.
        """
        try:
            stored = load_file(directory / PROBES)
            return cls(stored["images"][:1], stored["cls"][0])
        except (SafetensorError, OSError, KeyError):
            side = session.preprocess.size
            image = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)
            return cls(image, session.predict(image).cls[0])

    def check(self, session: Session) -> None:
        """Ask the session again.

        Raises:
            VerificationError: it says something else.
            MicroclipError: it fails.
        """
        answer = session.predict(self.image)
        cosine = float(answer.cls[0] @ self.cls)
        if not (cosine >= LEAST_COSINE and np.isfinite(answer.logits).all()):  # NaN, too
            raise VerificationError(
                f"golden image: expected [CLS] at a cosine of at least {LEAST_COSINE} to the known "
                f"answer and finite logits, found {cosine:.3f}; run `microclip-deploy verify`"
            )
