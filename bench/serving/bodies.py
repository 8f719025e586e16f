"""What requests hold: photos as files, or pixels in the Open Inference Protocol's binary form."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.bench.serving.connection import Answer, Endpoint, ask, request_bytes
from microclip_deploy.errors import EnvironmentProblem, UsageError

OCTETS = "application/octet-stream"
BODIES = ("photo", "pixels")

EVERY_CLASS = 100_000
"""The most that /v1/classify names."""


class Model(NamedTuple):
    """A model that a server has."""

    name: str
    size: int
    """S of its test views, pixels."""
    classes: int


def model_of(endpoint: Endpoint, name: str | None, headers: Mapping[str, str]) -> Model:
    """Ask a server, by the Open Inference Protocol, for its model.

    Args:
        endpoint: of the server.
        name: None where it serves one.
        headers: of every request, such as an API key.

    Raises:
        EnvironmentProblem: it does not answer, or otherwise than expected.
        UsageError: it has several models, or none of that name.
    """
    if name is None:
        listed = told(endpoint, "POST", "/v2/repository/index", headers)
        names = sorted({model["name"] for model in listed})
        if len(names) != 1:
            raise UsageError(
                f"--model: expected one of {', '.join(names) or 'no model at all'} of "
                f"{endpoint.url}, found none; name the one to measure"
            )
        [name] = names
    path = f"/v2/models/{name}"
    try:
        facts = told(endpoint, "GET", path, headers)
        inputs = {each["name"]: each["shape"] for each in facts["inputs"]}
        outputs = {each["name"]: each["shape"] for each in facts["outputs"]}
        return Model(name, int(inputs["image"][1]), int(outputs["logits"][1]))
    except (KeyError, IndexError, TypeError) as error:
        raise EnvironmentProblem(
            f"{endpoint.url}{path}: expected a model with the input 'image' (-1, S, S, 3) and the "
            f"output 'logits' (-1, C), found no {error}; give a server of microclip-deploy"
        ) from error


def photo_request(
    endpoint: Endpoint, model: str, photo: bytes, headers: Mapping[str, str], top_k: int = 5
) -> bytes:
    """Return a request that uploads one photo."""
    path = f"/v1/classify?model={model}&top_k={top_k}"
    return request_bytes(endpoint, "POST", path, {**headers, "Content-Type": OCTETS}, photo)


def pixel_request(
    endpoint: Endpoint, model: str, views: NDArray[np.uint8], headers: Mapping[str, str]
) -> bytes:
    """Return a request for the logits of uint8 (B, S, S, 3), both as binary tensors."""
    tensor = {"name": "image", "shape": list(views.shape), "datatype": "UINT8"}
    asked = {
        "inputs": [{**tensor, "parameters": {"binary_data_size": views.nbytes}}],
        "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
    }
    head = json.dumps(asked).encode()
    headers = {
        **headers,
        "Content-Type": OCTETS,
        "Inference-Header-Content-Length": str(len(head)),
    }
    path = f"/v2/models/{model}/infer"
    return request_bytes(endpoint, "POST", path, headers, head + views.tobytes())


def read_logits(body: bytes, images: int, classes: int) -> NDArray[np.float32]:
    """Return float32 (B, C): the last bytes of an answer whose only binary tensor they are.

    Raises:
        ValueError: it is shorter.
    """
    count = images * classes
    logits: NDArray[np.float32] = np.frombuffer(body[-4 * count :], "<f4", count)
    return logits.reshape(images, classes)


def read_tops(body: bytes, images: int, classes: int) -> tuple[int, ...]:
    """Return the row of the most probable class of each image; raises as `read_logits`."""
    return tuple(read_logits(body, images, classes).argmax(axis=1).tolist())


def read_class(body: bytes) -> str:
    """Return the most probable class of a photo.

    Raises:
        ValueError, KeyError, IndexError: no such answer.
    """
    return str(json.loads(body)["classes"][0]["name"])


def read_class_logits(body: bytes, names: Sequence[str]) -> NDArray[np.float32]:
    """Return float32 (1, C) of an answer that names every class; raises as `read_class`."""
    logits = {each["name"]: each["logit"] for each in json.loads(body)["classes"]}
    return np.array([[logits[name] for name in names]], np.float32)


def reading_tops(images: int, classes: int) -> "partial[tuple[int, ...]]":
    """Return `read_tops` for answers of one shape; it can be sent to another process."""
    return partial(read_tops, images=images, classes=classes)


def told(endpoint: Endpoint, method: str, path: str, headers: Mapping[str, str]) -> Any:
    """Return the JSON that a server answers with.

    Raises:
        EnvironmentProblem: it does not answer, or something else.
    """
    answer = ask(endpoint, method, path, headers)
    if answer.status == 200:
        try:
            return json.loads(answer.body)
        except ValueError:
            pass
    raise refused(endpoint.url + path, answer)


def refused(what: str, answer: Answer) -> EnvironmentProblem:
    """Return the error of an answer that is not the one hoped for."""
    said = answer.body[:200].decode(errors="replace")
    return EnvironmentProblem(
        f"{what}: expected 200 and an answer, found {answer.status}: {said or 'nothing'}; give "
        "the address of a running server, and --api-key if it asks for one"
    )
