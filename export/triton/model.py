"""An export behind Triton: what `microclip-deploy predict` runs, with Triton's batching before it.

`microclip-deploy export EXPORT --triton DIR` copies this file beside a copy of the export. Triton's
Python must have microclip-deploy installed: README.md of the repository.
"""

import io
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from microclip_deploy import open_session
from microclip_deploy.calibration import FOLDER, is_unknown, probabilities
from microclip_deploy.data.decode import decode_image
from microclip_deploy.errors import DataError, MicroclipError
from microclip_deploy.processors import usable_cpus
from microclip_deploy.serving import Prediction

MAX_PIXELS = 50_000_000
"""Width x height of a photo, as `serve` has it by itself."""


class TritonPythonModel:
    """One instance: a session on the device that Triton gives it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the export of this version; the model is ready after its warm-up.

        Raises:
            TritonModelException: the export cannot be served here.
        """
        _require_readable_bytes()
        export = Path(args["model_repository"], args["model_version"], "export")
        on_gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"
        parameters = json.loads(args["model_config"]).get("parameters", {})
        prior = parameters.get("prior", {}).get("string_value", FOLDER)
        try:
            self._session = open_session(export, device, prior=prior)
        except MicroclipError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        preprocess = self._session.preprocess
        limit = min(MAX_PIXELS, preprocess.photos.max_pixels)
        self._preprocess = preprocess.reading(max_pixels=limit)
        self._readers = ThreadPoolExecutor(usable_cpus())

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests that Triton has put together; a bad one costs only itself."""
        reading = [self._begin(request) for request in requests]
        given = [_images(request, views) for request, views in zip(requests, reading, strict=True)]
        images = [each for each in given if isinstance(each, np.ndarray)]
        answers = self._answers(images)
        return [
            pb_utils.InferenceResponse(_tensors(request, next(answers)))
            if isinstance(each, np.ndarray)
            else pb_utils.InferenceResponse(error=each)
            for request, each in zip(requests, given, strict=True)
        ]

    def finalize(self) -> None:
        """Release the session."""
        self._readers.shutdown()
        self._session.close()

    def _begin(self, request: Any) -> list[Future[NDArray[np.uint8]]]:
        """Start to read the photos of a request, if it has any."""
        photos = pb_utils.get_input_tensor_by_name(request, "photo")
        files = [] if photos is None else photos.as_numpy().ravel().tolist()
        return [
            self._readers.submit(self._view, file, Path(f"photo[{index}]"))
            for index, file in enumerate(files)
        ]

    def _view(self, file: bytes, name: Path) -> NDArray[np.uint8]:
        photo = decode_image(io.BytesIO(file), name, self._preprocess.photos)
        return self._preprocess.test_view(photo)

    def _answers(self, images: list[NDArray[np.uint8]]) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield what the session says about each request, all of them asked at once."""
        if not images:
            return
        found = self._session.predict(np.concatenate(images))
        known = self._session.calibration
        shares = probabilities(found.logits, known)
        unknown = is_unknown(shares.max(axis=1), known)
        read = {"probabilities": shares.astype(np.float32), "unknown": unknown}
        begin = 0
        for each in images:
            rows = slice(begin, begin := begin + len(each))
            named = dict(zip(Prediction._fields, (part[rows] for part in found), strict=True))
            yield {**named, **{name: part[rows] for name, part in read.items()}}


def _images(request: Any, views: list[Future[NDArray[np.uint8]]]) -> Any:
    """Return the test views of a request, uint8 (B, S, S, 3), or the error it is answered with."""
    image = pb_utils.get_input_tensor_by_name(request, "image")
    try:
        if (image is None) == (not views):
            raise DataError(
                "inputs: expected one of image and photo, found "
                f"{'none' if image is None else 'both'}; give test views or encoded files"
            )
        return np.stack([view.result() for view in views]) if image is None else image.as_numpy()
    except DataError as error:
        return pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)


def _tensors(request: Any, answer: dict[str, NDArray[Any]]) -> list[Any]:
    """Return the outputs a request asks for."""
    wanted = request.requested_output_names()
    return [pb_utils.Tensor(name, np.ascontiguousarray(answer[name])) for name in wanted]


def _require_readable_bytes() -> None:
    """Refuse a Triton that hands over garbage.

    Before 2.52 its arrays were those of NumPy 1: under NumPy 2 every array repeats its first
    byte, and the bytes of a photo end the process.
    """
    sent = np.arange(4, dtype=np.uint8)
    capsule = pb_utils.Tensor("sent", sent).to_dlpack()
    if not np.array_equal(pb_utils.Tensor.from_dlpack("received", capsule).as_numpy(), sent):
        raise pb_utils.TritonModelException(
            f"expected Triton 2.52 or newer, or NumPy below 2, found NumPy {np.__version__} with "
            'an older Triton, which reads its arrays wrongly; run: pip install "numpy<2"'
        )
