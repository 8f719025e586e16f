"""What goes wrong around a command: packages, stdout, signals. One line, the right exit code."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest
from rich.console import Console

from microclip_deploy import console
from microclip_deploy.cli import main as command_line
from microclip_deploy.cli import predict as predict_command
from microclip_deploy.cli.main import main
from microclip_deploy.config import read_recipe, recipe_text, shipped_recipes
from microclip_deploy.console import checked_stdout
from microclip_deploy.errors import DataError, EnvironmentProblem
from microclip_deploy.serving import open_session

FULL = Path("/dev/full")
needs_full_device = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
INSTALL = 'pip install "microclip-deploy[adapt]"'


def shell(line: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a shell line in which $0 is the command."""
    call = ["bash", "-c", f"set -o pipefail; {line}", f"{sys.executable}", *arguments]
    everything = {**os.environ, "MICROCLIP_TRACEBACK": "", **environment}
    return subprocess.run(call, capture_output=True, text=True, check=False, env=everything)


@contextmanager
def unread() -> Iterator[TextIO]:
    """Open a pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as pipe:
        yield pipe


COMMAND = '"$0" -m microclip_deploy.cli "$@"'


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("open_clip", 4, INSTALL),
        ("jinja2", 4, INSTALL),
        ("tensorboard.compat", 4, INSTALL),
        ("microclip_deploy.nothing", 1, "internal error"),
    ],
)
def test_a_missing_package_comes_with_its_install_line(
    name: str,
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def missing(**_: object) -> None:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(command_line, "app", missing)
    assert main([]) == code
    found = capsys.readouterr().err
    assert told in found
    assert name.partition(".")[0] in found


def test_a_session_of_nothing_is_bad_data(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        open_session(tmp_path)


# By Rich, by a plain write, by click.
printing = pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [(["version"], ""), (["version"], "1"), (["version", "--json"], ""), (["--help"], "")],
)


@needs_full_device
@printing
def test_a_full_stdout_is_an_environment_problem(arguments: list[str], unbuffered: str) -> None:
    found = shell(f"{COMMAND} > /dev/full", *arguments, PYTHONUNBUFFERED=unbuffered)
    assert found.returncode == 4
    assert found.stderr.startswith("error: stdout could not be written: No space left on device")
    assert found.stderr.count("\n") == 1


@printing
def test_a_reader_that_is_gone_is_no_error(arguments: list[str], unbuffered: str) -> None:
    # The reader has ended before the first byte is written.
    found = shell(f"(sleep 0.3; {COMMAND}) | true", *arguments, PYTHONUNBUFFERED=unbuffered)
    assert (found.returncode, found.stderr) == (141, "")


def test_notes_nobody_reads_end_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with unread() as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        assert main(["predict", "nothing", "photos"]) == 3  # as it would with a reader


@needs_full_device
def test_notes_that_fill_the_disk_end_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with FULL.open("w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert main(["predict", "nothing", "photos"]) == 3


def test_a_closed_stdout_is_an_environment_problem() -> None:
    found = shell(f"{COMMAND} >&-", "version", "--json")
    assert found.returncode == 4
    assert "stdout could not be written" in found.stderr


@needs_full_device
@pytest.mark.parametrize("output_format", ["csv", "json", "jsonl", "table"])
def test_predictions_that_cannot_be_written_end_in_one_error(
    finished_run: Path,
    photos: Path,
    output_format: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["predict", str(finished_run), str(photos), "--device", "cpu"]
    monkeypatch.setattr(command_line, "out", Console())  # it keeps what could not be written
    with FULL.open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main([*arguments, "--format", output_format]) == 4
    found = capsys.readouterr().err
    assert found.count("error:") == 1
    assert "stdout could not be written" in found


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("output_format", ["csv", "json", "jsonl", "table"])
def test_predictions_survive_any_encoding(
    finished_run: Path,
    photos: Path,
    tmp_path: Path,
    encoding: str,
    output_format: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "日本 – 🐦.png"
    shutil.copy(photos / "red circle" / "00.png", tmp_path / name)
    (tmp_path / os.fsdecode(b"bad\xff.png")).touch()
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    monkeypatch.setattr(predict_command, "out", Console(width=200))
    arguments = ["predict", str(finished_run), str(tmp_path), "--device", "cpu"]
    assert main([*arguments, "--format", output_format]) == 0
    # What programs read is UTF-8; a terminal gets escapes in place of what it cannot show.
    text = written.getvalue().decode(encoding if output_format == "table" else "utf-8")
    shown = name if output_format != "table" or encoding == "utf-8" else r"\u65e5\u672c "
    assert shown in text
    assert "empty" in text


def test_json_is_utf_8_whatever_the_locale_says(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    with checked_stdout():
        console.print_json({"path": "日本" + os.fsdecode(b"\xff")})
    assert json.loads(written.getvalue().decode("utf-8"))["path"] == "日本\udcff"


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("-Xdev", r"recipe '\u65e5\u672c': expected"),
        ("-Xutf8=0", "recipe '"),  # wins over the environment; must not start again for ever
    ],
)
def test_names_on_the_command_line_are_utf_8_in_any_locale(option: str, told: str) -> None:
    legacy = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = shell('"$0" "$1" -m microclip_deploy recipes 日本', option, **legacy)
    assert done.returncode == 2
    assert told in done.stderr


def test_predictions_nobody_reads_end_quietly(
    finished_run: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["predict", str(finished_run), str(photos), "--device", "cpu", "--format", "csv"]
    with unread() as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(arguments) == 141
    assert "rror" not in capsys.readouterr().err


def test_an_error_of_ours_is_not_hidden_by_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_after_writing() -> None:
        with checked_stdout():
            sys.stdout.write("half a line")
            raise DataError("data")

    with unread() as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(DataError):
            fail_after_writing()


def test_stdout_is_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    with checked_stdout():
        print("seen")
    assert sys.stdout is before
    assert capsys.readouterr().out == "seen\n"


def test_a_stdout_that_takes_nothing_is_an_environment_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with open(tmp_path / "file") as read_only:
        monkeypatch.setattr(sys, "stdout", read_only)
        with pytest.raises(EnvironmentProblem, match="stdout"), checked_stdout():
            sys.stdout.write("line\n")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_promises_only_what_is_true(
    signum: signal.Signals,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command_line, "app", lambda **_: os.kill(os.getpid(), signum))
    previous = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert main([]) == code
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
    assert capsys.readouterr().err == "error: interrupted; what was saved before is complete\n"


def test_recipes_are_listed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    assert "default" in json.loads(capsys.readouterr().out)


def test_recipes_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    told = capsys.readouterr()
    shown = " ".join(told.out.split())
    assert "microclip-deploy recipes microclip" in told.err
    assert "The method as published" in shown
    assert 'changes demo (values there in brackets): adapt.pooling = "mean" ("soap")' in shown


def test_a_recipe_is_printed_to_be_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes", "demo"]) == 0
    (tmp_path / "mine.toml").write_text(capsys.readouterr().out)
    assert read_recipe(str(tmp_path / "mine.toml")) == read_recipe("demo")
    assert main(["recipes", "demmo"]) == 2
    assert "did you mean demo?" in capsys.readouterr().err


def test_what_recipes_bring_is_what_the_documentation_says() -> None:
    table = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text("utf-8")
    measured = set(re.findall(r"^\| [^|]+ \| ([0-9.]+)", table, re.MULTILINE))
    for name in shipped_recipes():
        claims = re.findall(r"([0-9.]+) % top-1", recipe_text(name))
        assert set(claims) <= measured, name
