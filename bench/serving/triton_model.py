"""Triton's Python backend with the product's session: a peer of `bench serve`.

Written into a model repository as model.py. Arrays go in and out by DLPack: under NumPy 2,
`as_numpy` of builds that know NumPy 1 alone gives garbage.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from microclip_deploy.serving import open_session


class TritonPythonModel:
    """Pixels in, logits out."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the session."""
        given = json.loads(args["model_config"])["parameters"]
        export, device, threads = (
            given[name]["string_value"] for name in ("export", "device", "threads")
        )
        self._session = open_session(Path(export), device, threads=int(threads) or None)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer all requests that Triton has put together at once."""
        views: list[NDArray[Any]] = [
            np.from_dlpack(pb_utils.get_input_tensor_by_name(each, "image")) for each in requests
        ]
        logits = self._session.predict(np.concatenate(views) if len(views) > 1 else views[0]).logits
        parts = np.split(logits, np.cumsum([len(each) for each in views])[:-1])
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor.from_dlpack("logits", np.ascontiguousarray(part))]
            )
            for part in parts
        ]

    def finalize(self) -> None:
        """Close the session."""
        self._session.close()
