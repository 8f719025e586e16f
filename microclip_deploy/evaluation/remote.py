"""Predictions of a server: photos are sent as they are, and answered by the model it serves."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import numpy as np
from pydantic import ValidationError

from microclip_deploy.data.archive import find
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.data.sources import ImageSet, read_ahead
from microclip_deploy.errors import EnvironmentProblem, UsageError, printable
from microclip_deploy.evaluation.predict import FailedImage, ImagePrediction, Result
from microclip_deploy.serving.classification import Guess

AT_ONCE = 8
"""Photos that are on their way together."""

ATTEMPTS = 8
"""Of a photo, while the server is full, restarts, or cannot be reached."""

_TIMEOUT_S = 120
_BUSY = (408, 429, 503, 504)
_LONGEST_WAIT_S = 10.0


class Server:
    """A server that `microclip-deploy serve` started, as one of its models."""

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None) -> None:
        """Ask what is served.

        Args:
            url: http://HOST:PORT, or https.
            api_key: if the server asks for one.
            model: name of one of several.

        Raises:
            EnvironmentProblem: the server cannot be reached or refuses.
            UsageError: no such address or model.
        """
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--server: expected http://HOST:PORT, found {url}; give another")
        self._parts, self._headers = parts, {"X-API-Key": api_key} if api_key else {}
        self._own = threading.local()
        self._opened: list[http.client.HTTPConnection] = []
        self.url = f"{parts.scheme}://{parts.netloc}"
        try:
            self._model, self.preprocess = self._chosen(model)
        except BaseException:
            self.close()
            raise

    def _chosen(self, model: str | None) -> tuple[str, Preprocess]:
        """Return the name of the model that will answer, and how it sees photos."""
        status, answer = self._asked("GET", "/v1/models")
        if status != 200:
            raise self._problem(answer.get("error", f"status {status}"))
        try:
            served = {each["name"]: each for each in answer["models"] if each["default"]}
            name = model or (next(iter(served)) if len(served) == 1 else None)
            if name is None or name not in served:
                found = f"no model {name}" if name else "several"
                raise UsageError(
                    f"--server {self.url}: expected one model, found {found} among "
                    f"{', '.join(served)}; name one: {self.url} --model NAME"
                )
            return name, Preprocess.model_validate(served[name]["preprocess"])
        except (KeyError, TypeError, ValidationError) as error:
            raise self._problem(f"another answer ({type(error).__name__})") from error

    def predict(
        self,
        listed: ImageSet,
        top_k: int,
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[Result]:
        """Yield a result for each photo, in their order; what the server refuses is one, too.

        Raises:
            EnvironmentProblem: the server cannot be reached, or stays busy.
        """
        one = partial(self._predicted, top_k)
        total = len(listed.paths)
        photos = zip(count(), listed.paths, strict=False)
        for result in read_ahead(one, photos, AT_ONCE):
            yield result
            progress(result.index + 1, total)

    def _predicted(self, top_k: int, photo: tuple[int, Path]) -> Result:
        index, path = photo
        try:
            member = find(path)
            body = path.read_bytes() if member is None else member.read()
        except OSError as error:
            return FailedImage(index, path, error.strerror or type(error).__name__)
        asked = {"model": self._model, "top_k": top_k, "saliency": "tokens", "heads": "true"}
        address = f"/v1/classify?{urlencode(asked, quote_via=quote)}"
        for attempt in range(ATTEMPTS):
            status, answer = self._asked("POST", address, body)
            if status == 200:
                return self._told(index, path, answer)
            if status not in _BUSY:
                break
            if attempt + 1 < ATTEMPTS:
                time.sleep(min(answer.get("retry_after_s", 2.0**attempt / 4), _LONGEST_WAIT_S))
        if status in (401, *_BUSY) or status >= 500:
            raise self._problem(answer.get("error", f"status {status}"))
        return FailedImage(index, path, str(answer.get("error", f"status {status}")))

    def _told(self, index: int, path: Path, answer: dict[str, Any]) -> ImagePrediction:
        try:
            tokens, saliency = answer["saliency"]["tokens"], answer["saliency"]
            return ImagePrediction(
                index=index,
                path=path,
                top=tuple(Guess(**each) for each in answer["classes"]),
                cls_top1=answer["heads"]["cls"][0]["name"],
                fg_top1=answer["heads"]["fg"][0]["name"],
                mask=np.array(tokens["mask"], bool),
                attention=np.array([*tokens["attention"], tokens["zero"]], np.float32),
                complete=saliency["complete"],
                view=np.empty((0, 0, 3), np.uint8),  # it stays with the server
                unknown=answer.get("unknown", False),
            )
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise self._problem(f"another answer ({type(error).__name__})") from error

    def _asked(self, method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, Any]]:
        """Return status and JSON of an answer; a lost connection is tried again."""
        reason: Exception | None = None
        for attempt in range(ATTEMPTS):
            connection = self._connection()
            try:
                kind = {"Content-Type": "application/octet-stream"} if body else {}
                connection.request(method, path, body or None, {**self._headers, **kind})
                response = connection.getresponse()
                answer = json.loads(response.read())
                if (wait := response.headers.get("Retry-After", "")).isdigit():
                    answer["retry_after_s"] = float(wait)
                return response.status, answer
            except (OSError, http.client.HTTPException, ValueError, TypeError) as error:
                connection.close()
                reason = error
                if isinstance(error, (ValueError, TypeError)):  # no server of ours
                    break
                time.sleep(0.05 * 2**attempt if attempt + 1 < ATTEMPTS else 0)
        raise self._problem(str(reason) or type(reason).__name__) from reason

    def _connection(self) -> http.client.HTTPConnection:
        """Return this thread's connection."""
        if not hasattr(self._own, "connection"):
            https = self._parts.scheme == "https"
            kind = http.client.HTTPSConnection if https else http.client.HTTPConnection
            self._own.connection = kind(self._parts.netloc, timeout=_TIMEOUT_S)
            self._opened.append(self._own.connection)
        connection: http.client.HTTPConnection = self._own.connection
        return connection

    def _problem(self, found: object) -> EnvironmentProblem:
        return EnvironmentProblem(
            f"--server {self.url}: expected answers of `microclip-deploy serve`, found: "
            f"{printable(str(found))}; start it, or give another address"
        )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        for connection in self._opened:
            connection.close()
