"""Models that are replaced, damaged, unloaded and protected while they are served."""

import contextlib
import io
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from microclip_deploy.artifact import MANIFEST
from microclip_deploy.export.class_rows import remove_classes
from microclip_deploy.server.worker import version_of
from microclip_deploy.serving import open_session
from tests.server.conftest import Encode
from tests.server.lasting import lasting
from tests.server.running import Running, running, within

TOLERANCE = 1e-4
"""Of a logit: batches of another size round otherwise."""

Change = Callable[[Path, Path], None]


@pytest.fixture
def exports(tiny_export: Path, tmp_path: Path) -> list[Path]:
    """Return an export with three classes and one with two."""
    found = [shutil.copytree(tiny_export, tmp_path / name) for name in ("three", "two")]
    remove_classes(found[1], ["green square"])
    return found


def logits_of(export: Path, photo: bytes) -> dict[str, float]:
    """Return what the session says of a photo."""
    with open_session(export) as session:
        [row] = session.predict_photos([Image.open(io.BytesIO(photo)).convert("RGB")]).logits
        return dict(zip(session.classes, row.tolist(), strict=True))


@contextlib.contextmanager
def load(server: Running, photo: bytes) -> Iterator[list[httpx.Response]]:
    """Ask in a closed loop of four clients until the block ends."""
    ended, answers = threading.Event(), list[httpx.Response]()

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            while not ended.is_set():
                answers.append(client.post("/v1/classify", content=photo))

    with ThreadPoolExecutor(4) as threads:
        clients = [threads.submit(ask) for _ in range(4)]
        try:
            yield answers
        finally:
            ended.set()
        for client in clients:
            client.result()


def served(server: Running) -> str:
    version: str = server.get("/v1/models").json()["models"][0]["version"]
    return version


def test_swaps_under_load(exports: list[Path], tmp_path: Path, encode: Encode) -> None:
    """Every answer is of one version alone: a rename, classes removed, a damaged export."""
    photo, live = encode(), tmp_path / "live"
    expected = {version_of(each): logits_of(each, photo) for each in exports}
    three, _ = expected
    damaged = shutil.copytree(exports[0], tmp_path / "damaged")
    (damaged / "full.onnx").write_bytes(b"no graph")
    (damaged / MANIFEST).write_text((damaged / MANIFEST).read_text() + " ")
    shutil.copytree(exports[1], live)
    with running(f"live={live}") as server, load(server, photo) as answers:
        within(10, lambda: len(answers) > 20)

        def replace(export: Path) -> None:
            live.rename(tmp_path / f"was before {export.name}")
            export.rename(live)

        replace(exports[0])
        within(30, lambda: served(server) == three)
        remove_classes(live, ["green square"])
        within(30, lambda: served(server) == version_of(live))
        expected[version_of(live)] = logits_of(live, photo)
        heard = len(answers)
        replace(damaged)
        within(30, lambda: "cannot be loaded" in server.output.read_text())
        within(10, lambda: len(answers) > heard + 50)
        time.sleep(1.5)  # it is not tried again
        assert server.output.read_text().count("cannot be loaded") == 1
        assert server.metric("microclip_reloads_total", outcome="failed") == 1
        assert server.is_ready()
        assert len(server.workers()) == 1
    assert {answer.status_code for answer in answers} == {200}
    found = [answer.json() for answer in answers]
    assert {each["version"] for each in found} == set(expected)
    for each in found:
        told = {guess["name"]: guess["logit"] for guess in each["classes"]}
        assert told == pytest.approx(expected[each["version"]], abs=TOLERANCE)


@lasting
def test_a_worker_never_comes_back_as_another_version(
    exports: list[Path], tmp_path: Path, encode: Encode
) -> None:
    """It dies when its directory holds another export already."""
    photo, live = encode(), shutil.copytree(exports[0], tmp_path / "live")
    expected = {version_of(each): logits_of(each, photo) for each in exports}
    with running(f"live={live}", "--max-delay", "1") as server:
        for _ in range(2):
            within(30, lambda: len(server.workers()) == 1)
            [worker] = server.workers()
            now = exports[1] if version_of(live) == version_of(exports[0]) else exports[0]
            live.rename(tmp_path / os.urandom(4).hex())
            shutil.copytree(now, live)
            worker.kill()
            with ThreadPoolExecutor(4) as threads:
                for answer in threads.map(server.classify, [photo] * 4):
                    if answer.status_code == 200:
                        told = {g["name"]: g["logit"] for g in answer.json()["classes"]}
                        wanted = expected[answer.json()["version"]]
                        assert told == pytest.approx(wanted, abs=TOLERANCE)
                    else:
                        assert answer.status_code == 503
            within(30, lambda: served(server) == version_of(live) and server.is_ready())
            assert server.classify(photo).status_code == 200


@lasting
def test_idle_models_are_unloaded(exports: list[Path], encode: Encode) -> None:
    """The next request loads them again; two versions of a name, and another name."""
    three, two = (version_of(each) for each in exports)
    arguments = [f"m={exports[0]}", f"m={exports[1]}", f"other={exports[0]}"]
    with running(*arguments, "--unload-after", "1") as server:

        def ask(**question: Any) -> Any:
            return server.classify(encode(), **question)

        listed = server.get("/v1/models").json()["models"]
        assert [(each["name"], each["default"]) for each in listed] == [
            ("m", False),
            ("m", True),
            ("other", True),
        ]
        assert ask().status_code == 400  # several names
        within(10, lambda: not server.workers())
        assert server.is_ready()
        states = {each["state"] for each in server.get("/v1/models").json()["models"]}
        assert states == {"unloaded"}
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda _: ask(model="m"), range(8)))
        assert [each.status_code for each in found] == [200] * 8
        assert {each.json()["version"] for each in found} == {two}
        assert len(server.workers()) == 1
        assert ask(model="m", version=three).json()["version"] == three
        assert ask(model="m", version="other").status_code == 404
        assert ask(model="other").json()["version"] == three
        manifest = exports[1] / MANIFEST
        within(10, lambda: not server.workers())
        manifest.rename(exports[1] / "away")
        answer = ask(model="m")
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        assert "/" not in answer.json()["error"]
        (exports[1] / "away").rename(manifest)
        assert ask(model="m").status_code == 200
        within(10, lambda: not server.workers())
        exports[1].rename(exports[1].with_name("was"))
        shutil.copytree(exports[0], exports[1])
        assert ask(model="m", version=two).status_code == 404
        assert ask(model="m").json()["version"] == three
        assert "Traceback" not in server.output.read_text()


OPEN = ("/v2", "/v2/health/live", "/v2/health/ready", "/metrics", "/openapi.json")
CLOSED = (
    ("GET", "/v1/models"),
    ("POST", "/v1/classify"),
    ("POST", "/v1/nothing"),
    ("GET", "/v2/models/tiny"),
    ("GET", "/v2%2Fmodels/tiny"),
    ("GET", "/v2/%6dodels/tiny"),
    ("POST", "/v2/models/tiny/infer"),
    ("POST", "/v2/repository/index"),
)
WRONG_KEYS = (b"", b"other", b"schl\xfcssel", "schlüssel".encode()[:-1], b"\xff" * 4000)


def test_the_key(tiny_export: Path) -> None:
    key = "schlüssel"
    with running(f"tiny={tiny_export}", MICROCLIP_API_KEY=key) as server:
        assert [server.get(path).status_code for path in OPEN] == [200] * len(OPEN)
        with httpx.Client(base_url=server.url, timeout=30) as client:
            for method, path in CLOSED:
                for wrong in WRONG_KEYS:
                    for words in (b"X-API-Key: ", b"Authorization: Bearer "):
                        name, _, begin = words.partition(b": ")
                        answer = client.request(
                            method, path, headers=[(name, (begin + wrong).strip())]
                        )
                        assert answer.status_code == 401
                        assert "expected the API key" in answer.json()["error"]
            for headers in (
                [(b"X-API-Key", key.encode())],
                [(b"Authorization", b"Bearer " + key.encode())],
            ):
                assert client.get("/v1/models", headers=headers).status_code == 200
        assert key not in server.output.read_text() + server.log.read_text()


@lasting
def test_memory_is_given_back(exports: list[Path], encode: Encode) -> None:
    """Nothing is left of a model that was loaded and unloaded again and again."""
    with running(f"m={exports[0]}", "--unload-after", "0.2") as server:
        process, sizes = psutil.Process(server.process.pid), []
        for _ in range(4):
            assert server.classify(encode()).status_code == 200
            within(10, lambda: not server.workers())
            sizes.append((process.num_fds(), process.memory_info().rss))
        assert sizes[-1][0] <= sizes[1][0] + 1
        assert sizes[-1][1] < 1.05 * sizes[1][1]
