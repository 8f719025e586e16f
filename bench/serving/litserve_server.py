"""LitServe with the product's session: a peer of `bench serve`.

    python -m microclip_deploy.bench.serving.litserve_server EXPORT DEVICE THREADS PORT REQUESTS

As lean as LitServe allows: a request's body is the pixels themselves and an answer's the logits, so
that no JSON, no base64 and no validation of numbers is paid for; batches of whatever waits, without
waiting for more, which LitServe does by asking in a busy loop; no request logs and no schema. Its
default queue was faster than ZeroMQ (`fast_queue`) here.
One worker, as the session itself uses all cores, and one process for HTTP.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import litserve
import numpy as np
from fastapi import Body
from fastapi.responses import Response
from numpy.typing import NDArray

from microclip_deploy.serving import open_session


class SessionAPI(litserve.LitAPI):  # type: ignore[misc]  # LitServe is not there for mypy
    """Pixels in, logits out."""

    def __init__(self, export: Path, threads: int | None, requests: int) -> None:
        """Answer so many requests at once at most."""
        super().__init__(max_batch_size=requests, batch_timeout=0.0)
        self._export, self._threads = export, threads

    def setup(self, device: str) -> None:
        """Open the session in the worker's process."""
        self._session = open_session(self._export, device, threads=self._threads)
        self._side = self._session.preprocess.size

    def decode_request(self, request: Annotated[bytes, Body()]) -> NDArray[np.uint8]:
        """Read uint8 (B, S, S, 3)."""
        return np.frombuffer(request, np.uint8).reshape(-1, self._side, self._side, 3)

    def batch(self, inputs: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """Leave requests as they are: `predict` needs to know how many images each has."""
        return inputs

    def predict(self, x: Any) -> Any:
        """Answer all requests of a batch at once; without batching there is one array."""
        if isinstance(x, np.ndarray):
            return self._session.predict(x).logits
        logits = self._session.predict(np.concatenate(x)).logits
        return np.split(logits, np.cumsum([len(views) for views in x])[:-1])

    def unbatch(self, output: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Leave answers as they are."""
        return output

    def encode_response(self, output: NDArray[np.float32]) -> Response:
        """Send the logits themselves."""
        return Response(output.tobytes(), media_type="application/octet-stream")


def main(export: str, device: str, threads: str, port: str, requests: str) -> None:
    """Serve until the process is ended."""
    api = SessionAPI(Path(export), int(threads) or None, int(requests))
    server = litserve.LitServer(
        api,
        accelerator=device.partition(":")[0],
        devices=1,
        timeout=False,
        disable_openapi_url=True,
    )
    server.run(
        host="127.0.0.1",
        port=int(port),
        num_api_servers=1,
        log_level="error",
        generate_client_file=False,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
