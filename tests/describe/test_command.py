"""The command line of `describe`, and of `classes add --describe`."""

import json
import shutil
from pathlib import Path

import pytest

from microclip_deploy.cli.main import main
from microclip_deploy.data.classes import class_texts
from tests.describe import fake_endpoint as fake
from tests.describe.fake_endpoint import KEY, FakeEndpoint


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    path = tmp_path / "classes.txt"
    path.write_text("crane\nheron\n")
    return path


def run(classes: Path, server: FakeEndpoint, *more: str) -> int:
    path = classes.with_name("birds.jsonl")
    line = ["describe", str(classes), "-o", str(path), "--model", "m", "--endpoint", server.url]
    return main([*line, *more])


def test_the_file_is_what_adapt_reads(
    classes: Path, server: FakeEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(classes, server, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["calls"], told["noted"], told["missing"]) == (4, 0, 0)
    assert told["sentences"] + told["dropped"] == 40
    read = class_texts(classes, told["path"])
    assert sum(map(len, read.descriptions)) == told["sentences"]
    assert read.provenance["descriptions.model"] == '"m"'


def test_what_clip_confuses_is_compared_and_filtered(
    classes: Path, server: FakeEndpoint, tiny_model_dir: Path, photos: Path
) -> None:
    classes.write_text("crane\nheron\nstork\n")
    page = classes.with_name("page.html")
    clip = ("--clip", f"local-dir:{tiny_model_dir}", "--images", str(photos))
    assert run(classes, server, *clip, "--report", str(page)) == 0
    lines = [json.loads(line) for line in classes.with_name("birds.jsonl").read_text().splitlines()]
    assert {line["filter"] for line in lines} == {"kept"}
    assert any(line["question"].startswith("compare:") for line in lines)
    assert sum("Other class" in prompt for prompt in server.asked) == 6
    assert "calls made" in page.read_text()
    assert run(classes, server, *clip, "--no-filter") == 0
    assert sum(server.asked.values()) == 12
    assert '"filter": "off"' in classes.with_name("birds.jsonl").read_text()


def test_photos_are_of_no_use_without_clip(classes: Path, server: FakeEndpoint) -> None:
    assert run(classes, server, "--images", "photos") == 2


def test_a_dry_run_shows_prompts_and_an_estimate_and_asks_nothing(
    classes: Path, server: FakeEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = ("--price-in", "2", "--price-out", "8")
    assert run(classes, server, "--dry-run", "--domain", "birds", *prices) == 0
    shown = capsys.readouterr().out
    assert shown.count('Class: "crane"') == 2
    assert 'Domain: "birds"' in shown
    assert "4 calls to make, 0 in the journal" in shown
    assert "USD" in shown
    assert not server.asked
    assert [path.name for path in classes.parent.iterdir()] == ["classes.txt"]
    assert run(classes, server, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["calls"] == 4


@pytest.mark.parametrize(
    ("usual", "more", "code", "told"),
    [
        (fake.well, ["--max-tokens-total", "1"], 6, "0 of 4 calls are kept"),
        (fake.well, ["--max-cost", "1"], 2, "--price-in and --price-out"),
        (fake.status(401, f"wrong key {KEY}"), [], 4, "answers 401: wrong key ***"),
        (fake.text("no"), [], 3, "found none for crane, heron"),
    ],
)
def test_exit_codes_and_what_is_told(
    usual: fake.Answer,
    more: list[str],
    code: int,
    told: str,
    classes: Path,
    server: FakeEndpoint,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.usual = usual
    assert run(classes, server, *more) == code
    shown = "".join(capsys.readouterr())
    assert told in shown
    assert KEY not in shown


def test_other_endings_of_the_file_are_refused(server: FakeEndpoint, classes: Path) -> None:
    path = str(classes.with_suffix(".json"))
    line = ["describe", str(classes), "-o", path, "--model", "m", "--endpoint", server.url]
    assert main(line) == 2


def test_a_traceback_holds_no_key(
    classes: Path,
    server: FakeEndpoint,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MICROCLIP_TRACEBACK", "1")
    server.usual = fake.status(403, f"wrong key {KEY}")
    assert run(classes, server) == 4
    assert KEY not in "".join(capsys.readouterr())


def test_added_classes_are_described(
    tiny_export: Path, tmp_path: Path, server: FakeEndpoint
) -> None:
    export = Path(shutil.copytree(tiny_export, tmp_path / "birds"))
    line = ["classes", "add", str(export), "grey dot", "--describe", "m"]
    line += ["--endpoint", server.url, "--domain", "shapes"]
    assert main(line) == 0
    (written,) = (p for p in tmp_path.glob("birds-????????.jsonl"))
    assert {json.loads(text)["class"] for text in written.read_text().splitlines()} == {"grey dot"}
    assert 'Domain: "shapes"' in server.bodies[0]["messages"][-1]["content"]
    asked = sum(server.asked.values())
    assert main(line) == 2  # it is there already
    assert sum(server.asked.values()) == asked
