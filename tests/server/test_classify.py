"""POST /v1/classify: what it says is what the session says."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from microclip_deploy.serving import Session, open_session
from tests.server.conftest import Encode
from tests.server.running import Running, running, within


def test_answers_are_the_sessions(server: Running, session: Session, encode: Encode) -> None:
    body = encode(3, "JPEG", (90, 60))
    answer = server.classify(body, top_k=2, heads="true", saliency="tokens").json()
    expected = session.classify(Image.open(io.BytesIO(body)), top_k=2)
    assert answer["model"] == "tiny"
    assert answer["photo"] == {"width": 90, "height": 60}
    assert answer["classes"] == [guess._asdict() for guess in expected.top]
    assert answer["unknown"] is bool(expected.unknown)
    tokens = answer["saliency"]["tokens"]
    np.testing.assert_array_equal(np.array(tokens["mask"], bool), expected.tokens)
    attention = np.array([*tokens["attention"], tokens["zero"]], np.float32)
    np.testing.assert_array_equal(attention, expected.attention)
    assert answer["saliency"]["seen"] == pytest.approx(session.preprocess.seen((90, 60)), abs=1e-3)
    prediction = session.predict_photos([expected.photo()])
    for head, embedding in (("cls", prediction.cls), ("fg", prediction.fg)):
        best = int((embedding @ session.classifier().T).argmax())
        assert answer["heads"][head][0]["name"] == session.classes[best]
    stages = answer["timing_ms"]
    assert stages["encoder"] + stages["cut"] + stages["head"] == pytest.approx(
        stages["model"], abs=0.01
    )


def test_saliency_comes_as_pictures_and_outlines(
    server: Running, session: Session, encode: Encode
) -> None:
    body = encode(1, "PNG", (2000, 1400))
    expected = session.classify(Image.open(io.BytesIO(body)))

    def picture(form: str) -> Image.Image:
        answer = server.classify(body, saliency=form).json()
        return Image.open(io.BytesIO(base64.b64decode(answer["saliency"]["png"])))

    np.testing.assert_array_equal(np.asarray(picture("mask")), expected.mask)
    assert picture("overlay").size == (1024, 717)
    [polygon, *_] = server.classify(body, saliency="polygon").json()["saliency"]["polygons"]
    assert np.array(polygon).min() >= 0
    assert "saliency" not in server.classify(body).json()


def test_uploads_and_bodies_are_the_same(server: Running, encode: Encode) -> None:
    body = encode(2)
    address = f"{server.url}/v1/classify"
    plain = httpx.post(address, content=body, headers={"Content-Type": "image/png"})
    form = httpx.post(address, files={"photo": ("x.png", body)})
    assert plain.json()["classes"] == form.json()["classes"]


def test_the_clients_id_comes_back(server: Running, encode: Encode) -> None:
    address, body = f"{server.url}/v1/classify", encode()
    kept = httpx.post(address, content=body, headers={"X-Request-Id": "a-1"})
    made = httpx.post(address, content=body, headers={"X-Request-Id": "a b"})
    assert kept.headers["X-Request-Id"] == kept.json()["id"] == "a-1"
    assert len(made.headers["X-Request-Id"]) == 32


WRONG: dict[str, tuple[dict[str, Any], int]] = {
    "no classes": ({"top_k": 0}, 400),
    "no number": ({"top_k": "five"}, 400),
    "another form": ({"saliency": "heat"}, 400),
    "no flag": ({"heads": "yes"}, 400),
    "an unknown parameter": ({"topk": 3}, 400),
    "no such model": ({"model": "other"}, 404),
    "no such version": ({"version": "0"}, 404),
}


@pytest.mark.parametrize(("parameters", "status"), WRONG.values(), ids=WRONG)
def test_wrong_questions_are_refused(
    server: Running, encode: Encode, parameters: dict[str, Any], status: int
) -> None:
    answer = server.classify(encode(), **parameters)
    assert answer.status_code == status
    assert answer.json()["error"]


def test_other_bodies_are_refused(server: Running) -> None:
    assert server.classify(b"no photo").status_code == 400
    assert server.classify(b"").status_code == 400
    text = {"Content-Type": "text/html"}
    assert httpx.post(f"{server.url}/v1/classify", content=b"x", headers=text).status_code == 415
    assert server.get("/nothing").status_code == 404
    assert server.get("/v1/classify").status_code == 405


def test_requests_that_wait_together_are_computed_together(server: Running, encode: Encode) -> None:
    """One is under way while the worker stands still; the three that wait share a batch."""
    count, waiting = "microclip_batch_images_count", "microclip_queue_images"
    before, [worker] = server.metric(count), server.workers()
    worker.suspend()
    with ThreadPoolExecutor(4) as clients:
        answers = [clients.submit(server.classify, encode(seed)) for seed in range(4)]
        try:
            within(10, lambda: server.metric(waiting) == 3)
        finally:
            worker.resume()
        assert [each.result().status_code for each in answers] == [200] * 4
    assert server.metric(count) - before == 2


def test_every_request_is_logged_once(server: Running, encode: Encode) -> None:
    httpx.post(
        f"{server.url}/v1/classify", content=encode(), headers={"X-Request-Id": "logged-once"}
    )
    [entry] = within(5, lambda: [each for each in server.logged() if each["id"] == "logged-once"])
    assert (entry["status"], entry["route"], entry["model"]) == (200, "classify", "tiny")


def test_metrics_tell_every_stage(server: Running, encode: Encode) -> None:
    count = "microclip_stage_seconds_count"
    stages = ("decode", "preprocess", "queue", "model", "encoder", "cut", "head")
    before = [server.metric(count, stage=stage) for stage in stages]
    server.classify(encode())
    after = [server.metric(count, stage=stage) for stage in stages]
    assert after == [number + 1 for number in before]


def test_a_server_expects_the_classes_it_is_told(tiny_export: Path, encode: Encode) -> None:
    photos = [encode(seed) for seed in range(3)]
    with (
        running(f"tiny={tiny_export}", "--prior", "uniform") as server,
        open_session(tiny_export, prior="uniform") as session,
    ):
        for photo in photos:
            expected = session.classify(Image.open(io.BytesIO(photo)))
            answer = server.classify(photo).json()
            assert answer["classes"] == [guess._asdict() for guess in expected.top]
            assert answer["unknown"] is expected.unknown
        [model] = server.get("/v1/models").json()["models"]
        assert (model["prior"], model["unknown_below"]) == ("uniform", 0.5)
