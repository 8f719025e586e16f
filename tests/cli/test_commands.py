"""What commands do around the library: errors of the GPU, and what they leave in a directory."""

import csv
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from rich.console import Console

from microclip_deploy.cli import next_steps
from microclip_deploy.cli.commands import gpu_memory, result_file, run_evaluate
from microclip_deploy.cli.main import main
from microclip_deploy.errors import EnvironmentProblem
from microclip_deploy.evaluation.evaluate import evaluate


def test_a_full_gpu_is_an_environment_problem() -> None:
    with pytest.raises(EnvironmentProblem, match="lower --batch-size"), gpu_memory():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("loaded", [True, False])
def test_other_errors_stay_what_they_are(loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not loaded:
        monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeError, match="no memory of it"), gpu_memory():
        raise RuntimeError("no memory of it")


def test_a_command_loads_clip_once(
    adapt_arguments: list[str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    create = open_clip.create_model

    def counted(name: str, **options: Any) -> Any:
        loaded.append(name)
        return create(name, **options)

    monkeypatch.setattr(open_clip, "create_model", counted)
    run = tmp_path / "run"
    assert main([*adapt_arguments, "--epochs", "1", "--batch-size", "24"]) == 0
    assert (run / "report.html").is_file()
    for command in (["evaluate", str(run), str(photos)], ["predict", str(run), str(photos)]):
        assert len(loaded) == 1, command
        loaded.clear()
        assert main(command) == 0
    assert len(loaded) == 1


def test_a_run_keeps_its_evaluation(finished_run: Path, photos: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    notes = Console(quiet=True)
    found = run_evaluate(run, photos, notes, device="cpu", zero_shot=False)
    assert (run / "evaluation.json").is_file()
    assert (run / "report.html").is_file()
    assert found.images == 24


QUIET = Console(quiet=True)


def test_a_lesser_evaluation_does_not_replace_the_kept_one(
    finished_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    run_evaluate(run, photos, QUIET, device="cpu", masks=photos)
    kept = (run / "evaluation.json").read_bytes()
    part = shutil.copytree(photos / "red circle", tmp_path / "part" / "red circle").parent
    masks = [photos, "--no-zero-shot", "--masks", photos]
    for arguments in ([photos, "--limit", 6], [part], masks, [photos]):
        assert main(["evaluate", str(run), *map(str, arguments), "--device", "cpu"]) == 0
        assert "evaluation.json stays as it is: " in capsys.readouterr().err
        assert (run / "evaluation.json").read_bytes() == kept


@pytest.mark.parametrize("content", ["{", '{"images": 9, "rows": []}'])
def test_an_evaluation_replaces_what_tells_no_more(
    finished_run: Path, photos: Path, tmp_path: Path, content: str
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "evaluation.json").write_text(content)
    found = run_evaluate(run, photos, QUIET, device="cpu", zero_shot=False)
    assert json.loads((run / "evaluation.json").read_text("utf-8")) == found.to_json()


def test_a_limit_is_spread_over_all_classes(finished_run: Path, photos: Path) -> None:
    found = evaluate(finished_run, photos, zero_shot=False, limit=6)
    assert found.rows[0].scores.class_images == (2, 2, 2)


def csv_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def spoilt(photos: Path, tmp_path: Path) -> Path:
    """Return labelled photos of which seven are no images, one with a name that is no UTF-8."""
    data = shutil.copytree(photos, tmp_path / "data")
    for number in range(6):
        (data / "red circle" / f"{number:02d}.png").write_bytes(b"")
    (data / "blue stripe" / os.fsdecode(b"b\xff.png")).touch()
    return data


def test_evaluate_writes_what_it_said_of_each_image(
    finished_run: Path, spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new folder" / "answers.csv"
    run = shutil.copytree(finished_run, tmp_path / "run")  # it keeps the evaluation
    arguments = ["evaluate", str(run), str(spoilt), "--json", "--device", "cpu"]
    assert main([*arguments, "--no-zero-shot", "--max-bad-images", "7", "--out", str(file)]) == 0
    told = capsys.readouterr()
    rows = csv_of(file)
    assert [row["error"] for row in rows] == [""] * 18 + ["the file is empty"] * 7
    result = json.loads(told.out)
    right = sum(row["correct"] == "1" for row in rows)
    assert right == sum(line["correct"] for line in result["per_class"])
    for line in result["confusions"]:
        pair = (line["class"], line["predicted"])
        assert sum((r["label"], r["prediction"]) == pair for r in rows) == line["images"]
    assert f"skipped: 7 files in all, listed in {file}" in told.err
    assert f"answers: {file}" in told.err


def test_too_many_bad_images_are_all_listed(
    finished_run: Path,
    adapt_arguments: list[str],
    spoilt: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapt_arguments[1] = str(spoilt)
    evaluation = ["evaluate", str(finished_run), str(spoilt), "--out", str(tmp_path / "a.csv")]
    for arguments, listed in ((evaluation, "a"), (adapt_arguments, "run")):
        assert main([*arguments, "--device", "cpu"]) == 3
        assert f"unusable files: 7, listed in {tmp_path / listed}" in capsys.readouterr().err
        rows = csv_of(tmp_path / f"{listed}.bad-files.csv")
        assert [row["reason"] for row in rows] == ["the file is empty"] * 7
        assert rows[0]["path"].endswith(r"b\xff.png")
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.txt"])
def test_predict_writes_a_file_in_place_of_printing(
    finished_run: Path,
    spoilt: Path,
    tmp_path: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, overlays = tmp_path / "results" / name, tmp_path / "overlays"
    arguments = ["predict", str(finished_run), str(spoilt), "--device", "cpu"]
    assert main([*arguments, "--overlay", str(overlays), "--out", str(file)]) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert f"predictions: {file} (25 images, 7 skipped)\noverlays: {overlays} (18 pictures)" in (
        told.err
    )
    text = file.read_text("utf-8")
    assert text.count("the file is empty") == 7
    assert text.count(f"{overlays}/") == (0 if name == "p.txt" else 18)
    assert len(list(overlays.iterdir())) == 18
    listed = tmp_path / "results" / "p.bad-files.csv"
    assert f"skipped: 7 files in all, listed in {listed}" in told.err
    assert len(csv_of(listed)) == 7
    good = str(spoilt / "green square")
    assert main([*arguments[:2], good, "--device", "cpu", "--out", str(file)]) == 0
    assert not listed.exists()  # it told of another result
    assert "next:" in capsys.readouterr().err


def test_an_interrupted_result_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("old")
    with suppress(KeyboardInterrupt), result_file(file, ()) as stream:
        stream.write("new")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]
    assert file.read_text() == "old"


@pytest.mark.parametrize("command", ["predict", "evaluate"])
@pytest.mark.parametrize("name", ["list.csv", "link.csv", "photo.jpg", "answers", "answers.xlsx"])
def test_no_result_takes_the_place_of_what_is_read(
    finished_run: Path, photos: Path, tmp_path: Path, command: str, name: str
) -> None:
    photo = photos / "red circle" / "00.png"
    (tmp_path / "list.csv").write_text(f"path,label\n{photo},red circle\n")
    (tmp_path / "link.csv").symlink_to("list.csv")
    before = (tmp_path / "list.csv").read_bytes()
    arguments = [command, str(finished_run), str(tmp_path / "list.csv"), "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / name)]) == 2
    assert (tmp_path / "list.csv").read_bytes() == before
    assert not (tmp_path / "photo.jpg").exists()


def test_paths_in_the_next_command_can_be_copied(capfd: pytest.CaptureFixture[str]) -> None:
    path = Path(os.fsdecode(b"my runs/it's \xff\n"))
    notes = Console(stderr=True, soft_wrap=True, highlight=False)
    next_steps.tell(notes, next_steps.predict(path, "--out", "p.csv"))
    line = capfd.readouterr().err.splitlines()[-1]
    script = line.replace("microclip-deploy", "printf '%s\\0'")
    words = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    assert words.split(b"\0")[1] == os.fsencode(path)
