"""What every backend offers: images in, predictions out, NumPy at both ends."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import DataError, UsageError


class Prediction(NamedTuple):
    """What a session says about a batch of B images."""

    cls: NDArray[np.float32]
    """(B, E), unit rows: [CLS] embedding."""
    fg: NDArray[np.float32]
    """(B, E), unit rows: [FG] embedding."""
    logits: NDArray[np.float32]
    """(B, C), scale 100: TokenFusion."""
    mask: NDArray[np.bool_]
    """(B, N), row-major token grid: saliency."""
    attention: NDArray[np.float32]
    """(B, N+1): SOAP's weights; the last column is the zero token's."""
    complete: NDArray[np.bool_]
    """(B,): the image's graph joins every pair of tokens and says nothing."""


class Facts(NamedTuple):
    """What a session says of its model."""

    classes: tuple[str, ...]
    """In the order of the logits."""
    unadapted: frozenset[str]
    """The classes added after adaptation: what is said of them is zero-shot."""
    preprocess: Preprocess
    classifier: NDArray[np.float32]
    """(C, E), unit rows."""


class Session(ABC):
    """A loaded model on a device. Use it as a context manager or call `close`."""

    def __init__(self, facts: Facts, device: str) -> None:
        """Keep what every session tells.

        Args:
            facts: of the model.
            device: what runs it: "cpu", "cuda", "cuda:N" or "openvino"; never "auto".
        """
        self.classes, self.unadapted, self.preprocess, self._classifier = facts
        self.device = device
        self._classifier.flags.writeable = False

    @abstractmethod
    def predict(self, images: NDArray[np.uint8]) -> Prediction:
        """Classify uint8 (B, S, S, 3) images that `preprocess.test_view` made.

        Raises:
            DataError: another dtype, size or layout, or no image.
            EnvironmentProblem: the device fails, or is out of memory.
            UsageError: the session is closed.
        """

    def predict_photos(self, photos: Sequence[Image.Image]) -> Prediction:
        """Classify RGB photos of any sizes, as `read_image` decodes them; raises as `predict`."""
        if not photos:
            raise DataError("photos: expected at least one, found none; give decoded photos")
        return self.predict(np.stack([self.preprocess.test_view(photo) for photo in photos]))

    def classifier(self) -> NDArray[np.float32]:
        """Return the class matrix, (C, E), unit rows; read-only."""
        return self._classifier

    @abstractmethod
    def close(self) -> None:
        """Release the model's memory, once the call that uses it is done."""

    def __enter__(self) -> Self:
        """Return the session."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the session."""
        self.close()


def checked_images(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return images in C order, uint8 (B, side, side, 3), B of at least 1.

    Raises:
        DataError: another dtype, size or layout, or no image.
    """
    pixels = np.asarray(images)
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (side, side, 3) or not pixels.size:
        raise DataError(
            f"images: expected uint8 (B, {side}, {side}, 3) with B of at least 1, found "
            f"{pixels.dtype} {pixels.shape}; build them with Preprocess.test_view"
        )
    return np.ascontiguousarray(pixels)


def closed_session() -> UsageError:
    """Return the error of a session that is used after `close`."""
    return UsageError("session: expected an open one, found it closed; open it again")
