"""What every backend offers: images in, predictions out, NumPy at both ends."""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self, cast, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from microclip_deploy.calibration import FOLDER, LEAST_SHARE, UNIFORM, Calibration
from microclip_deploy.data.picture import Picture, is_picture
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.data.prior import read_prior
from microclip_deploy.errors import CheckpointError, DataError, UsageError
from microclip_deploy.paths import StrPath, as_path
from microclip_deploy.serving.classification import Classification, classifications

_log = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """What a session says about a batch of B images."""

    cls: NDArray[np.float32]
    """(B, E), unit rows: [CLS] embedding."""
    fg: NDArray[np.float32]
    """(B, E), unit rows: [FG] embedding."""
    logits: NDArray[np.float32]
    """(B, C), scale 100: TokenFusion; for the class frequencies that the session expects."""
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
    calibration: Calibration | None = None
    """How the logits are read; None for a model without one."""


class Session(ABC):
    """A loaded model on a device. Use it as a context manager or call `close`.

    Several threads may use it. It stays in the process that opened it.
    """

    def __init__(self, facts: Facts, device: str) -> None:
        """Keep what every session tells.

        Args:
            facts: of the model.
            device: what runs it: "cpu", "cuda", "cuda:N" or "openvino"; never "auto".
        """
        self.classes, self.unadapted, self.preprocess, self._classifier, self.calibration = facts
        self.device = device
        self.prior = FOLDER
        self._bias: NDArray[np.float32] | None = None
        self._classifier.flags.writeable = False
        self._closed = False
        self._process = os.getpid()

    def predict(self, images: NDArray[np.uint8]) -> Prediction:
        """Classify uint8 (B, S, S, 3) images that `preprocess.test_view` made.

        Raises:
            DataError: another dtype, size or layout, or no image.
            CheckpointError: the model fails on them.
            EnvironmentProblem: the device fails, or is out of memory.
            UsageError: the session is closed, or was opened before this process was forked.
        """
        self._require_open()
        found = self._answer(checked_images(images, self.preprocess.size))
        bias = self._bias
        return found if bias is None else found._replace(logits=found.logits + bias)

    def expect(self, prior: StrPath) -> None:
        """Say how frequent the classes are where the next photos come from.

        Args:
            prior: "folder", as in the folder that the model was adapted to; "uniform"; or a file
                that `read_prior` reads.

        Raises:
            CheckpointError: the model has no calibration, which tells how frequent they were.
            DataError: the file is none of this model's classes.
            UsageError: neither a word nor a path.
        """
        self._bias = None if prior == FOLDER else self._bias_for(prior)
        self.prior = str(prior)

    def _bias_for(self, prior: StrPath) -> NDArray[np.float32]:
        if self.calibration is None:
            raise CheckpointError(
                f"--prior {prior}: expected a model with a calibration, found an older one "
                "without; run `microclip-deploy calibrate` on it, or adapt and export again"
            )
        if prior == UNIFORM:
            return self.calibration.bias()
        target = read_prior(as_path(prior, "--prior"), self.classes)
        rare = int((target * len(target) < LEAST_SHARE).sum())
        if rare:
            _log.warning(
                "warning: --prior: %d classes are taken for %g of the even share, so that their "
                "photos can still be found",
                rare,
                LEAST_SHARE,
            )
        return self.calibration.bias(target)

    def predict_photos(self, photos: Sequence[Image.Image]) -> Prediction:
        """Classify RGB photos of any sizes, as `read_image` decodes them; raises as `predict`."""
        self._require_open()
        wrong = is_picture(photos) or hasattr(photos, "__array__")
        if wrong or not photos:
            found = type(photos).__name__ if wrong else "none"
            raise DataError(
                f"photos: expected a list of at least one, found {found}; give decoded photos, or "
                "use `classify`"
            )
        return self.predict(np.stack([self.preprocess.test_view(photo) for photo in photos]))

    @overload
    def classify(  # type: ignore[overload-overlap]  # a text is one path, not a series of letters
        self, pictures: Picture, top_k: int = 5, *, batch_size: int = 32
    ) -> Classification: ...
    @overload
    def classify(
        self, pictures: Iterable[Picture], top_k: int = 5, *, batch_size: int = 32
    ) -> list[Classification]: ...
    def classify(
        self, pictures: Picture | Iterable[Picture], top_k: int = 5, *, batch_size: int = 32
    ) -> Classification | list[Classification]:
        """Classify a photo, or several, with named classes.

        Args:
            pictures: the path of a file, a PIL image, an array of RGB, or several of them: a list,
                a generator, or an array of four axes.
            top_k: how many classes are named a photo; all of them if there are fewer.
            batch_size: how many photos are in memory at a time.

        Returns:
            One result, or a list of results in the order of the pictures.

        Raises:
            DataError: one of them is no picture, or a bad one; it is named. And as `predict`.
            UsageError: `top_k` or `batch_size` is no whole number from 1 on; and as `predict`.
        """
        self._require_open()
        if is_picture(pictures):
            one = cast("Picture", pictures)
            [result] = classifications(self, [one], top_k, batch_size)
            return result
        several = cast("Iterable[Picture]", pictures)
        return list(classifications(self, several, top_k, batch_size))

    def classifier(self) -> NDArray[np.float32]:
        """Return the class matrix, (C, E), unit rows; read-only."""
        return self._classifier

    def close(self) -> None:
        """Release the model's memory, once the call that uses it is done."""
        self._closed = True
        if os.getpid() == self._process:  # what a fork inherits is its parent's to release
            self._release()

    @abstractmethod
    def _answer(self, pixels: NDArray[np.uint8]) -> Prediction:
        """Classify uint8 (B, S, S, 3), in C order, B of at least 1."""

    @abstractmethod
    def _release(self) -> None:
        """Let go of the model; may be called again."""

    def _require_open(self) -> None:
        """Refuse use after `close`, and in a fork: the threads of the libraries do not survive it.

        Raises:
            UsageError: closed, or opened by another process.
        """
        if self._closed:
            raise closed_session()
        if os.getpid() != self._process:
            raise UsageError(
                f"session: expected the process that opened it ({self._process}), found a fork of "
                f"it ({os.getpid()}), in which it could hang; open it after the fork"
            )

    def __enter__(self) -> Self:
        """Return the session.

        Raises:
            UsageError: as `predict`.
        """
        self._require_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the session."""
        self.close()

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or sent to another process.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "session: expected to stay in its process, found an attempt to copy or pickle it; open "
            "another one in each process"
        )


def checked_images(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return images in C order, uint8 (B, side, side, 3), B of at least 1.

    Raises:
        DataError: another dtype, size or layout, or no image.
    """
    try:
        pixels = np.asarray(images)
    except (TypeError, ValueError, RuntimeError) as error:  # other sizes in a list, a GPU's tensor
        raise _no_images(side, f"{type(images).__name__}: {error}", "give a NumPy array") from error
    if pixels.dtype == np.uint8 and pixels.shape[1:] == (side, side, 3) and pixels.size:
        return np.ascontiguousarray(pixels)
    if pixels.dtype.kind in "OU":
        found, remedy = type(images).__name__, "give files and pictures to `classify`"
    else:
        found, remedy = f"{pixels.dtype} {pixels.shape}", _remedy(pixels, side)
    raise _no_images(side, found, remedy)


def _remedy(pixels: NDArray[Any], side: int) -> str:
    """Say what turns an array into images, for the mistakes that are often made."""
    channels_first = (3, side, side)
    if pixels.dtype != np.uint8:
        return "give whole numbers from 0 to 255, not normalised ones"
    if pixels.shape in ((side, side, 3), channels_first):
        return "add the batch axis with images[None]"
    if pixels.shape[1:] == channels_first:
        return "move the channels last with images.transpose(0, 2, 3, 1)"
    return "give at least one image" if not pixels.size else f"bring them to {side} x {side} pixels"


def _no_images(side: int, found: str, remedy: str) -> DataError:
    return DataError(
        f"images: expected uint8 (B, {side}, {side}, 3) with B of at least 1, found {found}; "
        f"{remedy}, or let Preprocess.test_view make them from photos"
    )


def closed_session() -> UsageError:
    """Return the error of a session that is used after `close`."""
    return UsageError("session: expected an open one, found it closed; open it again")
