"""The Open Inference Protocol, version 2, as KServe and Triton speak it over HTTP.

Tensors are JSON or follow the JSON as bytes (extension binary_tensor_data). With the extension
classification an output is given as its best classes, as "value:index:name".
"""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from microclip_deploy.calibration import Calibration, is_unknown, probabilities
from microclip_deploy.server.intake import from_base64
from microclip_deploy.server.refusal import Refusal
from microclip_deploy.server.seat import Facts
from microclip_deploy.serving.session import Prediction

EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration")
HEADER_LENGTH = "inference-header-content-length"
"""Header: bytes of the JSON, where tensors follow it."""

IMAGE, PHOTO = "image", "photo"
"""Inputs: views of the model's size, or encoded photos; one of them."""

_CLASSIFIED = ("logits", "probabilities")
_READ = ("probabilities", "unknown")
"""Outputs that the logits are read for."""

_LONGEST_US = 1e15
"""Of a time limit; JSON knows numbers that a float does not."""


class Tensor(BaseModel):
    """An input."""

    name: str
    shape: list[int] = Field(max_length=8)
    datatype: str
    parameters: dict[str, Any] = {}
    data: Any = None


class Wanted(BaseModel):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(BaseModel):
    """The JSON of a request."""

    id: str | None = Field(default=None, max_length=128)
    parameters: dict[str, Any] = {}
    inputs: list[Tensor] = Field(min_length=1, max_length=1)
    outputs: list[Wanted] = Field(default=[], max_length=16)


class Inputs(NamedTuple):
    """What a request brings: images or photos."""

    request: InferRequest
    images: NDArray[np.uint8] | None
    """(B, S, S, 3)."""
    photos: list[bytes]

    def timeout_s(self) -> float | None:
        """Return the client's own time limit; the parameter is in microseconds, as Triton's."""
        given = self.request.parameters.get("timeout")
        if not isinstance(given, (int, float)) or not given > 0:  # NaN, too
            return None
        return 1e-6 * min(given, _LONGEST_US)


def read(body: bytes, json_length: str | None, facts: Facts, most: int) -> Inputs:
    """Read a request.

    Args:
        body: JSON, and tensors behind it.
        json_length: value of HEADER_LENGTH; None for JSON alone.
        facts: of the model.
        most: images a request may hold.

    Raises:
        Refusal: 400, with what was expected.
    """
    length = len(body) if json_length is None else _whole(json_length, len(body))
    try:
        request = InferRequest.model_validate_json(body[:length])
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise _refused(f"{where}: {first['msg']}; see /openapi.json") from error
    [tensor] = request.inputs
    rest = memoryview(body)[length:]
    if tensor.name == IMAGE:
        return Inputs(request, _images(tensor, rest, facts, most), [])
    if tensor.name == PHOTO:
        return Inputs(request, None, _photos(tensor, rest, most))
    raise _refused(f"expected the input {IMAGE} or {PHOTO}, found another; name one of them")


def _whole(text: str, most: int) -> int:
    if text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= most:
        return int(text)
    raise _refused(
        "expected Inference-Header-Content-Length within the body; count the JSON's bytes"
    )


def _images(tensor: Tensor, rest: memoryview, facts: Facts, most: int) -> NDArray[np.uint8]:
    side = facts.shapes.side
    batch = tensor.shape[0] if tensor.shape else 0
    if tensor.shape[1:] != [side] * 2 + [3] or not 1 <= batch <= most or tensor.datatype != "UINT8":
        raise _refused(
            f"expected {IMAGE} as UINT8 [B, {side}, {side}, 3] with B from 1 to {most}, found "
            f"{tensor.datatype[:16]} {tensor.shape}; send views of the model's size"
        )
    if (binary := _binary(tensor, rest)) is not None:
        if len(binary) != math.prod(tensor.shape):
            raise _refused(
                f"expected {math.prod(tensor.shape)} bytes of {IMAGE}, found {len(binary)}; mend "
                "shape or data"
            )
        return np.frombuffer(binary, np.uint8).reshape(tensor.shape)
    try:
        return np.frombuffer(bytes(_flat(tensor.data)), np.uint8).reshape(tensor.shape)
    except (ValueError, TypeError) as error:
        raise _refused(
            f"expected {math.prod(tensor.shape)} whole numbers from 0 to 255 as data of {IMAGE}; "
            "mend shape or data"
        ) from error


def _flat(data: Any) -> list[Any]:
    """Return the numbers of a list, which may be nested as the shape is.

    Raises:
        TypeError: something else.
    """
    if not isinstance(data, list):
        raise TypeError("no list")
    while data and isinstance(data[0], list):
        data = [number for row in data for number in row]
    numbers: list[Any] = data
    return numbers


def _photos(tensor: Tensor, rest: memoryview, most: int) -> list[bytes]:
    count = math.prod(tensor.shape)
    positive = bool(tensor.shape) and min(tensor.shape) > 0
    if tensor.datatype != "BYTES" or not positive or count > most:
        raise _refused(
            f"expected {PHOTO} as BYTES [B] with B from 1 to {most}, found {tensor.datatype[:16]} "
            f"{tensor.shape}; send encoded files"
        )
    binary = _binary(tensor, rest)
    photos = _elements(binary, count) if binary is not None else tensor.data
    if not isinstance(photos, list) or len(photos) != count:
        raise _refused(f"expected a list of {count} {PHOTO}s as data; shape and data must agree")
    return photos if binary is not None else [from_base64(text) for text in photos]


def _binary(tensor: Tensor, rest: memoryview) -> memoryview | None:
    """Return the bytes of a tensor behind the JSON; None where its data are in the JSON."""
    size = tensor.parameters.get("binary_data_size")
    if size is None:
        return None
    if type(size) is not int or size != len(rest):
        raise _refused(
            f"expected binary_data_size to be the {len(rest)} bytes behind the JSON; count them"
        )
    return rest


def _elements(data: memoryview, count: int) -> list[bytes]:
    """Return the elements of a BYTES tensor, each after its length: 4 bytes, little-endian.

    Where there are more than `count`, one of them too many shows it.
    """
    found: list[bytes] = []
    at = 0
    while at < len(data) and len(found) <= count:
        size = int.from_bytes(data[at : at + 4], "little")
        at += 4 + size
        if at > len(data):
            raise _refused(f"expected elements of {PHOTO} that end within the body; send all")
        found.append(bytes(data[at - size : at]))
    return found


def write(
    inputs: Inputs, model: str, facts: Facts, prediction: Prediction
) -> tuple[bytes, dict[str, str]]:
    """Return the body of an answer and its headers.

    Args:
        inputs: the request.
        model: its name.
        facts: of the model.
        prediction: what the model says; the outputs that are asked for are sent.

    Raises:
        Refusal: 400, an output that there is not.
    """
    request = inputs.request
    wanted = request.outputs or [Wanted(name=name) for name in _CLASSIFIED]
    all_binary = request.parameters.get("binary_data_output") is True
    told, blobs = [], []
    for each in wanted:
        values = _output(each.name, prediction, facts.calibration)
        if count := each.parameters.get("classification"):
            values = _classified(each.name, values, facts, count)
        entry: dict[str, Any] = {
            "name": each.name,
            "datatype": datatype_of(values.dtype),
            "shape": list(values.shape),
        }
        if each.parameters.get("binary_data", all_binary) is True:
            blobs.append(_bytes(values))
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            entry["data"] = values.ravel().tolist()
        told.append(entry)
    answer = {"model_name": model, "model_version": facts.version, "outputs": told}
    if request.id is not None:
        answer["id"] = request.id
    head = json.dumps(answer, separators=(",", ":")).encode("ascii")
    if not blobs:
        return head, {"content-type": "application/json"}
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(head))}
    return b"".join((head, *blobs)), headers


def _output(name: str, prediction: Prediction, calibration: Calibration | None) -> NDArray[Any]:
    if name in _READ:
        shares = probabilities(prediction.logits, calibration)
        unknown: NDArray[np.bool_] = is_unknown(shares.max(axis=1), calibration)
        return unknown if name == "unknown" else shares.astype(np.float32)
    if name in Prediction._fields:
        values: NDArray[Any] = getattr(prediction, name)
        return values
    known = ", ".join((*_READ, *Prediction._fields))
    raise _refused(f"expected outputs of {known}, found another; see the metadata")


def _classified(
    name: str, values: NDArray[np.float32], facts: Facts, count: object
) -> NDArray[np.object_]:
    """Return the best classes of each row."""
    if name not in _CLASSIFIED or type(count) is not int or count < 1:
        raise _refused(
            f"expected classification, a number from 1 on, of {' or '.join(_CLASSIFIED)}; mend it"
        )
    best = np.argsort(-values, axis=1, kind="stable")[:, :count]
    rows = [
        [f"{row[c]:f}:{c}:{facts.classes[c]}" for c in order]
        for row, order in zip(values, best.tolist(), strict=True)
    ]
    return np.array(rows, dtype=object)


def _bytes(values: NDArray[Any]) -> bytes:
    if values.dtype != object:
        return values.tobytes()
    texts = [text.encode("utf-8") for text in values.ravel()]
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


def datatype_of(dtype: np.dtype[Any]) -> str:
    """Return the protocol's name of a dtype that we send."""
    return {"float32": "FP32", "bool": "BOOL", "object": "BYTES", "uint8": "UINT8"}[dtype.name]


def metadata(name: str, versions: Sequence[str], facts: Facts) -> dict[str, Any]:
    """Return what the protocol says of a model."""
    return {
        "name": name,
        "versions": list(versions),
        "platform": "microclip",
        "inputs": [_tensor(*each) for each in _inputs(facts)],
        "outputs": [_tensor(*each) for each in _outputs(facts)],
    }


def configuration(name: str, facts: Facts) -> dict[str, Any]:
    """Return what Triton's clients read as a configuration."""

    def tensor(each: str, datatype: str, shape: list[int]) -> dict[str, Any]:
        return {
            "name": each,
            "data_type": f"TYPE_{_TRITON.get(datatype, datatype)}",
            "dims": shape[1:] or [1],
        }

    return {
        "name": name,
        "platform": "microclip",
        "max_batch_size": facts.shapes.batch,
        "dynamic_batching": {},
        "input": [tensor(*each) for each in _inputs(facts)],
        "output": [tensor(*each) for each in _outputs(facts)],
    }


_TRITON = {"BYTES": "STRING"}


def _inputs(facts: Facts) -> list[tuple[str, str, list[int]]]:
    side = facts.shapes.side
    return [(IMAGE, "UINT8", [-1, side, side, 3]), (PHOTO, "BYTES", [-1])]


def _outputs(facts: Facts) -> list[tuple[str, str, list[int]]]:
    tokens, joint, classes = facts.shapes.sizes
    return [
        ("logits", "FP32", [-1, classes]),
        ("probabilities", "FP32", [-1, classes]),
        ("cls", "FP32", [-1, joint]),
        ("fg", "FP32", [-1, joint]),
        ("mask", "BOOL", [-1, tokens]),
        ("attention", "FP32", [-1, tokens + 1]),
        ("complete", "BOOL", [-1]),
        ("unknown", "BOOL", [-1]),
    ]


def _tensor(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}


def _refused(message: str) -> Refusal:
    return Refusal(400, message, "body")
