"""Triton's own client, unchanged, against the server."""

import io
import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

from microclip_deploy.calibration import softmax
from microclip_deploy.serving import Session
from tests.conftest import CALIBRATION
from tests.server.conftest import Encode
from tests.server.running import Running

OUTPUTS = ("logits", "cls", "fg", "mask", "attention", "complete")


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    with triton.InferenceServerClient(server.address, concurrency=4) as opened:
        yield opened


@pytest.fixture(scope="module")
def images(session: Session) -> Any:
    side = session.preprocess.size
    return np.random.default_rng(1).integers(0, 256, (7, side, side, 3), np.uint8)


def given(images: Any, *, binary: bool = True) -> list[Any]:
    tensor = triton.InferInput("image", images.shape, "UINT8")
    tensor.set_data_from_numpy(images, binary_data=binary)
    return [tensor]


def test_health_and_metadata(client: Any, session: Session) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert not client.is_model_ready("other")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    [listed] = client.get_model_repository_index()
    about = client.get_model_metadata("tiny", listed["version"])
    assert listed["state"] == "READY"
    assert about["versions"] == [listed["version"]]
    side, classes = session.preprocess.size, len(session.classes)
    assert about["inputs"][0] == {
        "name": "image",
        "datatype": "UINT8",
        "shape": [-1, side, side, 3],
    }
    assert {"name": "logits", "datatype": "FP32", "shape": [-1, classes]} in about["outputs"]
    assert client.get_model_config("tiny")["max_batch_size"] == 4


@pytest.mark.parametrize("binary", [True, False], ids=["bytes", "json"])
def test_answers_are_the_sessions(client: Any, session: Session, images: Any, binary: bool) -> None:
    """More images than a batch holds, too."""
    wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in OUTPUTS]
    answer = client.infer("tiny", given(images, binary=binary), outputs=wanted, request_id="7")
    parts = [session.predict(images[start : start + 4]) for start in (0, 4)]
    assert answer.get_response()["id"] == "7"
    for name in OUTPUTS:
        expected = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(answer.as_numpy(name), expected)


def test_defaults_and_compression(client: Any, session: Session, images: Any) -> None:
    logits = session.predict(images[:1]).logits
    for algorithm in ("gzip", "deflate"):
        answer = client.infer("tiny", given(images[:1]), request_compression_algorithm=algorithm)
        np.testing.assert_array_equal(answer.as_numpy("logits"), logits)
        shares = softmax(logits, CALIBRATION["temperature"])
        np.testing.assert_allclose(answer.as_numpy("probabilities"), shares, rtol=1e-6)


def test_unknown_is_told_of_every_image(client: Any, session: Session, images: Any) -> None:
    answer = client.infer("tiny", given(images), outputs=[triton.InferRequestedOutput("unknown")])
    surest = softmax(session.predict(images).logits, CALIBRATION["temperature"]).max(axis=1)
    found = answer.as_numpy("unknown")
    np.testing.assert_array_equal(found, surest < CALIBRATION["unknown_below"])
    assert found.dtype == np.bool_


def test_classification_names_the_best(client: Any, session: Session, images: Any) -> None:
    wanted = [triton.InferRequestedOutput("logits", class_count=2)]
    answer = client.infer("tiny", given(images[:3]), outputs=wanted).as_numpy("logits")
    assert answer.shape == (3, 2)
    for row, logits in zip(answer, session.predict(images[:3]).logits, strict=True):
        value, index, name = row[0].decode().split(":")
        assert int(index) == logits.argmax()
        assert name == session.classes[int(index)]
        assert float(value) == pytest.approx(float(logits.max()), abs=1e-5)


def test_photos_are_read_as_the_session_reads_them(
    client: Any, session: Session, encode: Encode
) -> None:
    files = [encode(0), encode(1, "JPEG", (90, 60))]
    tensor = triton.InferInput("photo", [2], "BYTES")
    tensor.set_data_from_numpy(np.array(files, dtype=object))
    answer = client.infer("tiny", [tensor])
    photos = [Image.open(io.BytesIO(each)).convert("RGB") for each in files]
    expected = session.predict_photos(photos).logits
    np.testing.assert_array_equal(answer.as_numpy("logits"), expected)


def wrong(name: str, shape: list[int], datatype: str, **parameters: Any) -> dict[str, Any]:
    tensor = {"name": name, "shape": shape, "datatype": datatype, **parameters}
    return {"inputs": [tensor]}


WRONG = {
    "no JSON": (b"{", "see /openapi.json"),
    "deep": (b"[" * 100_000, "see /openapi.json"),
    "no inputs": (b'{"inputs": []}', "inputs"),
    "two inputs": (b'{"inputs": [{"name": "image"}, {"name": "photo"}]}', "inputs"),
    "another input": (wrong("pixels", [1], "UINT8", data=[1]), "image or photo"),
    "another size": (wrong("image", [1, 2, 2, 3], "UINT8", data=[0] * 12), r"\[B, 32, 32, 3\]"),
    "another type": (wrong("image", [1, 32, 32, 3], "FP32", data=[0]), "UINT8"),
    "no images": (wrong("image", [0, 32, 32, 3], "UINT8", data=[]), "from 1"),
    "a negative batch": (wrong("image", [-1, 32, 32, 3], "UINT8", data=[]), "from 1"),
    "too few numbers": (wrong("image", [1, 32, 32, 3], "UINT8", data=[1]), "3072 whole numbers"),
    "no numbers": (wrong("image", [1, 32, 32, 3], "UINT8", data="x"), "3072 whole numbers"),
    "large numbers": (wrong("image", [1, 32, 32, 3], "UINT8", data=[256] * 3072), "0 to 255"),
    "no base64": (wrong("photo", [1], "BYTES", data=["?"]), "base64"),
    "no photo": (wrong("photo", [1], "BYTES", data=["aGk="]), "photo that can be read"),
    "no photos": (wrong("photo", [2], "BYTES", data=["aGk="]), "2 photos"),
    "bytes that are not there": (
        wrong("image", [1, 32, 32, 3], "UINT8", parameters={"binary_data_size": 9}),
        "binary_data_size",
    ),
    "another output": (
        {**wrong("photo", [1], "BYTES", data=["aGk="]), "outputs": [{"name": 3}]},
        "outputs",
    ),
}


@pytest.mark.parametrize(("body", "told"), WRONG.values(), ids=WRONG)
def test_wrong_requests_are_explained(server: Running, body: Any, told: str) -> None:
    address = f"{server.url}/v2/models/tiny/infer"
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = httpx.post(address, **content, timeout=30)
    assert answer.status_code == 400
    assert re.search(told, answer.json()["error"])


def test_errors_reach_the_client(client: Any, images: Any) -> None:
    with pytest.raises(InferenceServerException, match="no model of this name"):
        client.infer("other", given(images))
    with pytest.raises(InferenceServerException, match="no such version"):
        client.get_model_metadata("tiny", "1")
    with pytest.raises(InferenceServerException, match="expected outputs of"):
        client.infer("tiny", given(images), outputs=[triton.InferRequestedOutput("other")])
    with pytest.raises(InferenceServerException, match="time limit"):
        client.infer("tiny", given(images), timeout=1)
