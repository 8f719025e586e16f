"""The page's server, asked over HTTP."""

import http.client
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from microclip_deploy.audit.clicks import Sheet
from microclip_deploy.audit.desk import Desk
from microclip_deploy.audit.plan import Plan
from microclip_deploy.audit.server import PageServer

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def server(plan: Plan, sheet: Sheet, album: Path) -> Iterator[PageServer]:
    with PageServer(Desk(plan, sheet, album)) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ask(
    server: PageServer, path: str, body: Any = None, *, token: str | None = None, **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    known = {name.replace("_", "-"): value for name, value in headers.items()}
    content = None if body is None else json.dumps(body)
    where = f"/{server.token if token is None else token}/{path}"
    connection.request(
        "GET" if body is None else "POST", where, content, (JSON if body else {}) | known
    )
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def state(server: PageServer) -> dict[str, Any]:
    return dict(json.loads(ask(server, "state")[1]))


def test_answers_go_into_the_file(server: PageServer, sheet: Sheet) -> None:
    now = state(server)
    assert (now["number"], now["answered"], now["total"]) == (1, 0, 9)
    status, body, _ = ask(server, "answer", {"number": 1, "answer": now["candidates"][0]["name"]})
    assert (status, json.loads(body)["number"]) == (200, 2)
    assert sheet.read()[0].answer == now["candidates"][0]["name"]
    assert json.loads(ask(server, "undo", {"x": 1})[1])["number"] == 1


def test_page_is_not_told_which_model_says_what(server: PageServer, plan: Plan) -> None:
    assert set(state(server)["candidates"][0]) == {"name", "class", "examples"}
    first = {row.shown[0] == row.classes[0] for row in plan.drawn if row.differ}
    assert first == {True, False}


def test_pictures_are_those_drawn(server: PageServer) -> None:
    status, body, headers = ask(server, "photo/3")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(body)).size == (80, 60)
    assert ask(server, "example/0/0")[0] == 200


@pytest.mark.parametrize(
    "path",
    ["photo/0", "photo/10", "photo/x", "photo/../1", "example/0/1", "example/9/0", "-1.png",
     "../clicks.csv", "%2e%2e/clicks.csv", "page.js/..", "answer"],
)  # fmt: skip
def test_nothing_else_is_served(server: PageServer, path: str) -> None:
    assert ask(server, path)[0] == 404


def test_photo_that_is_gone_is_told(server: PageServer, plan: Plan, album: Path) -> None:
    (album / plan.drawn[0].path).unlink()
    assert ask(server, "photo/1")[0] == 410


@pytest.mark.parametrize(
    ("token", "headers"),
    [("", {}), ("wrong", {}), (None, {"Host": "evil.example:80"}), (None, {"Host": "127.0.0.1"})],
)
def test_strangers_are_refused(
    server: PageServer, token: str | None, headers: dict[str, str]
) -> None:
    assert ask(server, "state", token=token, **headers)[0] == 404


def test_forms_of_other_sites_change_nothing(server: PageServer) -> None:
    body = {"number": 1, "answer": "hen"}
    assert ask(server, "answer", body, Content_Type="text/plain")[0] == 404
    assert state(server)["answered"] == 0


@pytest.mark.parametrize(
    "body", [[], {"number": "x", "answer": ""}, {"answer": "hen"}, "x" * 20_000]
)
def test_bodies_that_make_no_sense_are_refused(server: PageServer, body: Any) -> None:
    assert ask(server, "answer", body or [1])[0] == 404
    assert state(server)["answered"] == 0


def test_file_broken_by_hand_is_told_on_the_page(server: PageServer, sheet: Sheet) -> None:
    sheet.path.write_text("nonsense\n")
    status, body, _ = ask(server, "state")
    assert status == 400
    assert "expected the columns" in json.loads(body)["error"]


def test_names_are_found_by_their_beginning(server: PageServer) -> None:
    assert json.loads(ask(server, "names?like=h")[1])[:2] == ["hen", "Hawk; red"]
    assert json.loads(ask(server, "names?like=loon")[1]) == ["arctic loon"]


def test_page_and_headers_allow_nothing_from_elsewhere(server: PageServer) -> None:
    _, body, headers = ask(server, "")
    assert b"http" not in body.lower()
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
    for name in ("page.css", "page.js"):
        assert b"http" not in ask(server, name)[1]


def test_page_can_end_the_server(plan: Plan, sheet: Sheet, album: Path) -> None:
    with PageServer(Desk(plan, sheet, album)) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        ask(running, "end", {"x": 1})
        thread.join(20)
        assert not thread.is_alive()
