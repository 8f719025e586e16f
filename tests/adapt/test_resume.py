"""A killed run, resumed, ends with the same bytes as one that was never killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from microclip_deploy import artifact
from microclip_deploy.cli.main import main

SETTINGS = ["--set", "adapt.epochs=6", "--set", "adapt.batch_size=5", "--set", "views.crops=2"]
ITERATIONS = 6 * 5  # 24 images in batches of 5


def command(out: Path, photos: Path, classes: Path, model: Path) -> list[str]:
    return [
        "adapt",
        str(photos),
        "--classes",
        str(classes),
        "--model",
        f"local-dir:{model}",
        "-o",
        str(out),
        "--device",
        "cpu",
        "--save-every",
        "1",
        "--lr",
        "0.001",
        *SETTINGS,
    ]


def started(arguments: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "microclip_deploy.cli", *arguments]
    return subprocess.Popen(call, env=environment, stderr=subprocess.PIPE)


def wait_for_states(out: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    """Return once the run has saved `count` states, or fail after a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if list((out / "state").glob(f"step-{count:09d}.json")):
            return
        time.sleep(0.001)
    raise AssertionError(f"the run never reached iteration {count}: {process.poll()}")


def finished(arguments: list[str]) -> None:
    process = started(arguments)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


@pytest.mark.slow
def test_sigkill_and_resume_give_identical_bytes(
    tmp_path: Path, photos: Path, classes_file: Path, tiny_model_dir: Path
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finished(command(straight, photos, classes_file, tiny_model_dir))
    arguments = command(killed, photos, classes_file, tiny_model_dir)
    for iteration in (3, 17):
        process = started([*arguments, "--resume"])
        wait_for_states(killed, iteration, process)
        process.kill()
        process.communicate()
        assert not (killed / "manifest.json").exists()
    finished([*arguments, "--resume"])
    for name in ("weights.safetensors", f"state/step-{ITERATIONS:09d}.safetensors"):
        assert artifact.sha256_file(killed / name) == artifact.sha256_file(straight / name)
    lines = [len((run / "history.jsonl").read_text().splitlines()) for run in (straight, killed)]
    assert lines == [6, 6]


@pytest.mark.slow
def test_sigterm_saves_before_it_leaves(
    tmp_path: Path, photos: Path, classes_file: Path, tiny_model_dir: Path
) -> None:
    out = tmp_path / "run"
    arguments = command(out, photos, classes_file, tiny_model_dir)
    arguments[arguments.index("--save-every") + 1] = "1000"
    process = started(arguments)
    wait_for_states(out, 5, process)  # the end of the first epoch
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert b"--resume" in errors
    newest = sorted((out / "state").glob("*.safetensors"))[-1]
    assert int(newest.stem.removeprefix("step-")) >= 5


@pytest.fixture
def run(tmp_path: Path, photos: Path, classes_file: Path, tiny_model_dir: Path) -> list[str]:
    return command(tmp_path / "run", photos, classes_file, tiny_model_dir)


def test_a_damaged_newest_state_falls_back_to_the_one_before(
    tmp_path: Path, run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(run) == 0
    state = tmp_path / "run" / "state"
    newest = state / f"step-{ITERATIONS:09d}.safetensors"
    expected = artifact.sha256_file(newest)
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x01")
    (tmp_path / "run" / "manifest.json").unlink()
    assert main([*run, "--resume"]) == 0
    assert artifact.sha256_file(newest) == expected


def test_only_damaged_states_are_refused(
    tmp_path: Path, run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run) == 0
    for path in (tmp_path / "run" / "state").glob("*.safetensors"):
        path.write_bytes(b"broken")
    (tmp_path / "run" / "manifest.json").unlink()
    assert main([*run, "--resume"]) == 3
    assert "only damaged ones" in capsys.readouterr().err


def test_resume_of_a_finished_run_does_nothing(
    run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run) == 0
    assert main([*run, "--resume"]) == 0
    assert "already finished" in capsys.readouterr().err


def test_resume_with_other_settings_is_refused(
    tmp_path: Path, run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run) == 0
    (tmp_path / "run" / "manifest.json").unlink()
    assert main([*run, "--resume", "--set", "adapt.gamma=0.25"]) == 2
    assert "adapt.gamma is 0.5, given 0.25" in capsys.readouterr().err


def test_a_second_run_in_the_directory_is_refused(
    tmp_path: Path, run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from microclip_deploy.adapt.run_directory import locked

    with locked(tmp_path / "run"):
        assert main(run) == 2
    assert "another adaptation is running" in capsys.readouterr().err
    assert main(run) == 0


def test_a_used_directory_is_only_replaced_on_request(
    tmp_path: Path, run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run) == 0
    assert main(run) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*run, "--overwrite"]) == 0
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("irreplaceable")
    run[run.index("-o") + 1] = str(foreign)
    assert main([*run, "--overwrite"]) == 2
    assert (foreign / "thesis.tex").read_text() == "irreplaceable"
