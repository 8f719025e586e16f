"""`describe` with a CLIP model: pairs, filter and page."""

import json
from pathlib import Path

import pytest

from microclip_deploy.cli.main import main
from tests.describe.fake_endpoint import FakeEndpoint


def test_confused_classes_are_compared_and_the_page_tells_all(
    server: FakeEndpoint,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With photos too; what the filter drops lies beside, and a second run asks nothing."""
    classes, path = tmp_path / "classes.txt", tmp_path / "said.jsonl"
    classes.write_text("red circle\ngreen square\nblue stripe\n")
    line = ["describe", str(classes), "-o", str(path), "--model", "m", "--endpoint", server.url]
    line += ["--clip", "demo", "--images", str(photos)]
    line += ["--report", str(tmp_path / "page.html"), "--json"]
    assert main(line) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["calls"] == 3 * 2 + 6
    kept = [json.loads(each) for each in path.read_text().splitlines()]
    dropped = path.with_name("said.dropped.jsonl").read_text().splitlines()
    assert len(kept) == told["sentences"]
    assert len(dropped) == told["dropped"]
    assert len(kept) + len(dropped) == 3 * 20 + 6 * 5
    compared = {each["question"] for each in kept if each["question"].startswith("compare:")}
    assert 1 <= len(compared) <= 6
    assert {each["filter"] for each in kept} == {"kept"}
    page = (tmp_path / "page.html").read_text()
    assert "red circle" in page
    asked = len(server.asked)
    assert main(line) == 0
    assert len(server.asked) == asked


def test_photos_need_a_model(server: FakeEndpoint, tmp_path: Path, photos: Path) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("a\nb\n")
    line = ["describe", str(classes), "-o", str(tmp_path / "x.jsonl"), "--model", "m"]
    assert main([*line, "--endpoint", server.url, "--images", str(photos)]) == 2
