"""A run directory after kills, mistakes and damage: nothing is lost, and resuming goes on."""

import json
import shutil
from pathlib import Path

import pytest

from microclip_deploy import artifact
from microclip_deploy.cli.main import main

SETTINGS = ["--set", "adapt.epochs=2", "--batch-size", "8", "--set", "views.crops=1"]


def command(out: Path, photos: Path, classes: Path, model: Path) -> list[str]:
    """Return a command line that adapts for two epochs of three iterations."""
    return [
        "adapt", str(photos), "--classes", str(classes), "--model", f"local-dir:{model}",
        "-o", str(out), "--device", "cpu", *SETTINGS,
    ]  # fmt: skip


@pytest.fixture
def arguments(tmp_path: Path, photos: Path, classes_file: Path, tiny_model_dir: Path) -> list[str]:
    return command(tmp_path / "run", photos, classes_file, tiny_model_dir)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, photos: Path, classes_file: Path, tiny_model_dir: Path
) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(command(out, photos, classes_file, tiny_model_dir)) == 0
    return out


@pytest.fixture
def run(tmp_path: Path, finished: Path) -> Path:
    """Return a finished run that the test may change."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def bytes_of(run: Path) -> str:
    return artifact.sha256_file(run / "weights.safetensors")


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    found = capsys.readouterr().err
    assert "Traceback" not in found
    assert "internal error" not in found
    return found


@pytest.mark.parametrize(
    "mistake",
    [
        ["--classes", "/nope.txt"], ["--recipe", "nope"], ["--model", "nope"],
        ["--set", "adapt.nope=1"], ["--val-dir", "/nope"], ["--max-bad-images", "x"],
    ],
)  # fmt: skip
def test_overwrite_with_a_mistake_keeps_the_old_run(
    run: Path, arguments: list[str], mistake: list[str]
) -> None:
    before = bytes_of(run)
    assert main([*arguments, "--overwrite", *mistake]) in (2, 3)
    assert bytes_of(run) == before
    artifact.read_manifest(run, "microclip.checkpoint/1")


def test_overwrite_leaves_foreign_files_alone(run: Path, arguments: list[str]) -> None:
    (run / "notes.txt").write_text("mine")
    assert main([*arguments, "--overwrite"]) == 0
    assert (run / "notes.txt").read_text() == "mine"


def test_a_first_save_cut_short_starts_at_zero(run: Path, arguments: list[str]) -> None:
    expected = bytes_of(run)
    (run / "manifest.json").unlink()
    for path in (run / "state").glob("*.json"):
        path.unlink()
    (run / "state" / ".step-000000003.safetensors.1.part").write_bytes(b"cut")
    (run / "history.jsonl").unlink()
    assert main([*arguments, "--resume"]) == 0
    assert bytes_of(run) == expected
    assert not list((run / "state").glob("*.part"))


def test_a_kill_between_history_and_state_repeats_the_epoch(
    run: Path, arguments: list[str]
) -> None:
    expected = bytes_of(run)
    (run / "manifest.json").unlink()
    newest = run / "state" / "step-000000006.json"
    newest.unlink()
    assert main([*arguments, "--resume"]) == 0
    assert bytes_of(run) == expected
    epochs = [
        json.loads(line)["epoch"] for line in (run / "history.jsonl").read_text().splitlines()
    ]
    assert epochs == [1, 2]


def test_a_lost_history_is_told(
    run: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "manifest.json").unlink()
    (run / "history.jsonl").unlink()
    assert main([*arguments, "--resume"]) == 3
    assert "expected 2 finished epochs, found 0" in error_of(capsys)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (["--set", "adapt.gamma=0.25"], "adapt.gamma is 0.5, given 0.25"),
        (["--epochs", "9"], "adapt.epochs is 2, given 9"),
        (["--template", "one {}"], "templates"),
    ],
)
def test_resume_names_what_differs(
    run: Path,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    part: str,
) -> None:
    assert main([*arguments, "--resume", *change]) == 2
    assert part in error_of(capsys)


def test_resume_with_other_classes_or_images_is_refused(
    tmp_path: Path, run: Path, arguments: list[str], photos: Path
) -> None:
    (tmp_path / "classes.txt").write_text("robin\nwren\n")
    assert main([*arguments, "--resume", "--classes", str(tmp_path / "classes.txt")]) == 2
    shutil.copytree(photos, tmp_path / "others")
    arguments[1] = str(tmp_path / "others")
    assert main([*arguments, "--resume"]) == 2


def test_resume_needs_no_more_than_the_directory(run: Path) -> None:
    expected = bytes_of(run)
    (run / "manifest.json").unlink()
    assert main(["adapt", "--resume", "-o", str(run), "--device", "cpu"]) == 0
    assert bytes_of(run) == expected


def test_resume_of_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt", "--resume", "-o", str(tmp_path / "typo")]) == 2
    assert "no started run" in error_of(capsys)
    assert not (tmp_path / "typo").exists()


def test_resume_and_overwrite_exclude_each_other(run: Path, arguments: list[str]) -> None:
    assert main([*arguments, "--resume", "--overwrite"]) == 2


def test_a_damaged_finished_run_is_not_called_finished(run: Path, arguments: list[str]) -> None:
    with open(run / "weights.safetensors", "ab") as file:
        file.write(b"x")
    assert main([*arguments, "--resume"]) == 3


def test_a_moved_model_is_accepted_by_its_weights(
    tmp_path: Path, run: Path, arguments: list[str], tiny_model_dir: Path
) -> None:
    expected = bytes_of(run)
    (run / "manifest.json").unlink()
    shutil.copytree(tiny_model_dir, tmp_path / "moved")
    arguments[arguments.index("--model") + 1] = f"local-dir:{tmp_path / 'moved'}"
    assert main([*arguments, "--resume"]) == 0
    assert bytes_of(run) == expected


def test_images_that_are_gone_are_named(
    tmp_path: Path, photos: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos, tmp_path / "mine")
    arguments[1] = str(tmp_path / "mine")
    assert main(arguments) == 0
    (tmp_path / "run" / "manifest.json").unlink()
    (tmp_path / "mine" / "red circle" / "00.png").unlink()
    capsys.readouterr()
    assert main(["adapt", "--resume", "-o", str(tmp_path / "run")]) == 3
    assert "00.png" in error_of(capsys)


@pytest.mark.parametrize("change", [('"cls_share": 0.5', '"cls_share": 0.1'), ("red circle", "x")])
def test_an_edited_manifest_is_refused(
    run: Path, photos: Path, change: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = run / "manifest.json"
    manifest.write_text(manifest.read_text().replace(*change))
    assert main(["predict", str(run), str(photos)]) == 3
    assert "sha256" in error_of(capsys)


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:x"])
def test_unknown_devices_are_usage_errors(arguments: list[str], device: str) -> None:
    assert main([*arguments, "--device", device]) == 2


def test_a_directory_that_cannot_be_made_is_one_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments[arguments.index("-o") + 1] = "/proc/nope/run"
    assert main(arguments) == 4
    assert "could not be written" in error_of(capsys)


def test_validation_is_logged_and_changes_nothing(
    tmp_path: Path, run: Path, arguments: list[str], photos: Path
) -> None:
    arguments[arguments.index("-o") + 1] = str(tmp_path / "measured")
    assert main([*arguments, "--val-dir", str(photos)]) == 0
    assert bytes_of(tmp_path / "measured") == bytes_of(run)
    lines = (tmp_path / "measured" / "history.jsonl").read_text().splitlines()
    assert all(0 <= json.loads(line)["validation"]["top1"] <= 1 for line in lines)


def test_tensorboard_reads_the_events(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("epoch/loss")] == [3, 6]
