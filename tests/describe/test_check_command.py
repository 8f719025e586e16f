"""`microclip-deploy describe check`."""

import json
from pathlib import Path

import pytest

from microclip_deploy.cli.main import main


@pytest.fixture
def classes(tmp_path: Path) -> str:
    path = tmp_path / "classes.txt"
    path.write_text("robin\nblue jay\n")
    return str(path)


def written(tmp_path: Path, robin: list[str], jay: list[str]) -> str:
    path = tmp_path / "descriptions.json"
    path.write_text(json.dumps({"robin": robin, "blue jay": jay}))
    return str(path)


GOOD = (["A robin has a red breast.", "A robin sings."], ["The blue jay has a tall crest."])


def test_json_tells_what_is_kept_and_dropped(
    tmp_path: Path, classes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["describe", "check", written(tmp_path, *GOOD), classes, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["kept"], found["reasons"]) == (2, {"not visible": 1})
    assert found["dropped"][0]["text"] == "A robin sings."
    assert found["similarity"] is None


def test_clip_adds_filter_tokens_and_similarity(
    tmp_path: Path, classes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    file = written(tmp_path, GOOD[0], [*GOOD[1], "The blue jay has a tail" + " and a tail" * 20])
    asked = ["describe", "check", file, classes, "--clip", "demo"]
    assert main([*asked, "--report", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "too long" in shown
    assert "by sentences" in shown
    assert "Most alike" in page.read_text("utf-8")


def test_a_class_without_sentences_ends_with_3(
    tmp_path: Path, classes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    file = written(tmp_path, ["A robin sings."], GOOD[1])
    assert main(["describe", "check", file, classes, "--report", str(page)]) == 3
    assert "found none for 'robin'" in capsys.readouterr().err
    assert "No sentence is left" in page.read_text("utf-8")


def test_nothing_of_a_sentence_reaches_the_terminal_as_a_command(
    tmp_path: Path, classes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "robin <script> [bold]x[/bold] [link=file:///]y[/link] \u202dz"
    file = written(tmp_path, [hostile.replace("\u202d", ""), *GOOD[0]], GOOD[1])
    assert main(["describe", "check", file, classes]) == 0
    shown = capsys.readouterr()
    assert "[bold]x[/bold]" in "".join(shown.out.split("\n")).replace(" ", "").replace("│", "")
    file = written(tmp_path, [hostile], GOOD[1])
    assert main(["describe", "check", file, classes]) == 3  # as `adapt` refuses it
    shown = capsys.readouterr()
    assert "U+202D" in shown.err
    assert "\u202d" not in shown.out + shown.err


def test_names_to_look_at_are_told(
    tmp_path: Path, classes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(classes).write_text("crane\nPasser domesticus\n")
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"crane": ["tall legs"], "Passer domesticus": ["brown cap"]}))
    assert main(["describe", "check", str(path), classes]) == 0
    told = capsys.readouterr().err
    assert "'crane' has several meanings" in told
    assert "'Passer domesticus' looks like a Latin name" in told
    assert main(["describe", "check", str(path), classes, "--domain", "birds"]) == 0
    assert "several meanings" not in capsys.readouterr().err
