"""The command, with models of random weights."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from microclip_deploy.audit.answers import answered
from microclip_deploy.audit.models import model_facts
from microclip_deploy.cli.main import main
from microclip_deploy.errors import UsageError
from microclip_deploy.evaluation.evaluate import evaluate

WAIT_S = 60


@pytest.fixture
def ask(finished_run: Path, photos: Path, tmp_path: Path) -> Any:
    """Return what runs an audit of 8 clicks, into `a`."""

    def asked(*more: str, run: Path = finished_run) -> int:
        fixed = ["--clicks", "8", "--device", "cpu", "--csv", "-o", str(tmp_path / "a")]
        return main(["audit", str(run), str(photos), *fixed, *more])

    return asked


def fill(folder: Path, count: int | None = None) -> list[dict[str, str]]:
    """Answer from the names of the folders."""
    file = folder / "clicks.csv"
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows[:count]:
        row["answer"] = Path(row["path"]).parent.name
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return rows


def test_spreadsheet_is_filled_in_and_read_again(ask: Any, tmp_path: Path, capsys: Any) -> None:
    assert ask() == 0
    assert "fill in the column 'answer'" in capsys.readouterr().err
    fill(tmp_path / "a", 5)
    assert ask() == 0
    assert "5 of 8 photos are answered" in capsys.readouterr().out
    fill(tmp_path / "a")
    assert ask("--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["handled"], told["photos"], len(told["clicks"])) == (8, 24, 8)
    assert told["a"]["low"] <= told["a"]["estimate"] <= told["a"]["high"]


def test_all_photos_give_the_accuracy_of_evaluate(
    ask: Any, tmp_path: Path, finished_run: Path, photos: Path
) -> None:
    for _ in range(2):
        ask("--clicks", "1000")
        fill(tmp_path / "a")
    ask("--clicks", "1000")
    told = json.loads((tmp_path / "a" / "audit.json").read_text())
    rows = {(row.token, row.texts): row.scores.top1 for row in evaluate(finished_run, photos).rows}
    for name, row in (("a", ("fused", "adapted")), ("b", ("cls", "names"))):
        assert told[name]["low"] == pytest.approx(told[name]["high"])
        assert told[name]["estimate"] == pytest.approx(rows[row])


def test_an_audit_calibrates_the_model_it_was_about(
    ask: Any, tmp_path: Path, finished_run: Path, photos: Path, capsys: Any
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    for _ in range(2):
        ask("--clicks", "24", run=run)
        fill(tmp_path / "a")
    ask("--clicks", "24", run=run)
    wanted = ["calibrate", str(run), str(photos), "--clicks", str(tmp_path / "a"), "--json"]
    capsys.readouterr()
    assert main([*wanted, "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["source"], told["images"]) == ("clicks", 24)
    assert all(each.weight == 1 for each in answered(tmp_path / "a", photos, ["x"]))


def test_more_clicks_keep_those_there_are(ask: Any, tmp_path: Path) -> None:
    ask()
    before = fill(tmp_path / "a")
    assert ask("--clicks", "12") == 0
    with (tmp_path / "a" / "clicks.csv").open(newline="") as stream:
        after = list(csv.DictReader(stream))
    assert len(after) == 12
    assert [row["path"] for row in after[:8]] == [row["path"] for row in before]
    assert [row["answer"] for row in after[:8]] == [row["answer"] for row in before]
    assert ask() == 0  # a smaller number takes nothing away


def test_audit_of_something_else_is_refused(
    ask: Any, tmp_path: Path, photos: Path, finished_run: Path, capsys: Any
) -> None:
    ask()
    assert ask("--seed", "1") == 2
    assert "expected --seed 0, found 1" in capsys.readouterr().err
    assert ask("--against", str(finished_run)) == 2
    assert "expected the model adapted" in capsys.readouterr().err
    assert main(["audit", str(finished_run), str(photos / "red circle"), "--csv",
                 "--device", "cpu", "-o", str(tmp_path / "a")]) == 2  # fmt: skip
    assert "expected the same photos" in capsys.readouterr().err


def test_damaged_plan_and_file_are_told(ask: Any, tmp_path: Path, capsys: Any) -> None:
    ask()
    plan = tmp_path / "a" / "plan.json"
    clicks = tmp_path / "a" / "clicks.csv"
    clicks.write_text(clicks.read_text().replace(",,\n", ",wren,\n", 1))
    assert ask() == 3
    assert "line 2" in capsys.readouterr().err.replace("\n", " ")
    plan.write_text('{"format": "microclip.audit-plan/1"}')
    assert ask() == 3
    assert "expected a plan of the format" in capsys.readouterr().err


def test_export_needs_a_rival(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema": "microclip.export/1"}')
    with pytest.raises(UsageError, match="no zero-shot model"):
        model_facts(tmp_path, None)
    first, second = model_facts(tmp_path, finished_run)
    assert first["title"] != second["title"]


def test_two_runs_are_compared_by_their_own_answers(
    ask: Any, tmp_path: Path, finished_run: Path
) -> None:
    assert ask("--against", str(finished_run)) == 0
    told = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert told["verdict"] == "same"
    assert told["kinds"]["differ"]["photos"] == 0


def test_killed_audit_has_lost_nothing(
    ask: Any, finished_run: Path, photos: Path, tmp_path: Path
) -> None:
    ask()
    options = ["--clicks", "8", "--no-browser", "--device", "cpu", "-o", str(tmp_path / "a")]
    models = [str(finished_run), str(photos)]
    command = [sys.executable, "-m", "microclip_deploy.cli", "audit", *models, *options]

    def begin() -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"http://\S+", line):
                return process, found[0]
        raise AssertionError("no page")

    def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return dict(json.load(answer))

    process, url = begin()
    for number in (1, 2, 3):
        post(url + "answer", {"number": number, "answer": "neither"})
    process.kill()
    process.communicate()
    process, url = begin()
    assert post(url + "undo", {"x": 1})["number"] == 3
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=WAIT_S)
    assert process.returncode == 128 + signal.SIGINT
    assert "stopped after 2 of 8 photos" in told.replace("\n", " ")
    assert json.loads((tmp_path / "a" / "audit.json").read_text())["handled"] == 2
