"""A run directory after kills, mistakes and damage: nothing is lost, and resuming goes on."""

import json
import os
import random
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from microclip_deploy import artifact
from microclip_deploy.adapt.reference import VECTORS
from microclip_deploy.adapt.run_directory import locked
from microclip_deploy.cli.main import main
from microclip_deploy.model.clip import BackboneSpec, load_clip
from tests.adapt.processes import begin


def signalled(signum: int, names: str) -> None:
    """Let this process get a signal once it has touched files of some names, in that order."""
    waiting = names.split(",")

    def stop(event: str, touched: tuple[object, ...]) -> None:
        if waiting and event in ("open", "os.rename") and waiting[0] in str(touched):
            waiting.pop(0)
            if not waiting:
                os.kill(os.getpid(), signum)

    sys.addaudithook(stop)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, adapt_into: Callable[[Path], list[str]]
) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(adapt_into(out)) == 0
    return out


@pytest.fixture
def run(tmp_path: Path, finished: Path) -> Path:
    """Return a finished run that the test may change."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def unfinished(run: Path) -> Path:
    """Return a run that was killed between its last state and its checkpoint."""
    (run / "manifest.json").unlink()
    return run


def bytes_of(run: Path) -> list[str]:
    files = ("weights.safetensors", "state/step-000000006.safetensors")
    return [artifact.sha256_file(run / name) for name in files]


def history(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    found = capsys.readouterr().err
    assert "Traceback" not in found
    assert "internal error" not in found
    return found


# ------------------------------------------------------------------------------ kills


def stopped(told: Path, signum: int, names: str, arguments: list[str]) -> int | None:
    """Adapt until files were touched and the signal had its way; return the exit code."""
    process = begin(arguments, told, partial(signalled, signum, names))
    process.join(400)
    return process.exitcode


BOUNDARY = [
    argument
    for setting in ("boundary=true", "fairness_prior=estimated", "joint_share=0.1", "rollback=true")
    for argument in ("--set", f"adapt.{setting}")
]
"""What is cached of the time before training is part of the state."""


DEVICE_VIEWS = ["--set", "views.device=model"]


@pytest.mark.parametrize(
    "settings", [[], BOUNDARY, DEVICE_VIEWS], ids=["method", "boundary", "device views"]
)
def test_a_run_stopped_and_killed_ends_with_the_bytes_of_one_that_was_not(
    tmp_path: Path,
    adapt_arguments: list[str],
    adapt_into: Callable[[Path], list[str]],
    finished: Path,
    settings: list[str],
) -> None:
    if settings:
        adapt_arguments, finished = [*adapt_arguments, *settings], tmp_path / "finished"
        assert main([*adapt_into(finished), *settings]) == 0
    run, resume = tmp_path / "run", [*adapt_arguments, "--resume"]
    told = tmp_path / "told.txt"
    in_the_first_batch = (signal.SIGTERM, "history.jsonl,.png", resume)
    assert stopped(told, *in_the_first_batch) == 128 + signal.SIGTERM
    assert "stopped at iteration 1 of 6; the state is saved" in told.read_text()
    while_saving = (signal.SIGKILL, "step-000000005.safetensors", [*resume, "--save-every", "1"])
    assert stopped(told, *while_saving) == -signal.SIGKILL
    if settings == BOUNDARY:
        (run / VECTORS).write_bytes(b"damaged")  # made again
    assert max((run / "state").glob("*.json")).stem == "step-000000004"
    assert not (run / "manifest.json").exists()
    assert main(resume) == 0
    assert bytes_of(run) == bytes_of(finished)
    assert len(history(run)) == 2
    assert not list((run / "state").glob("*.part"))


def lines_of(run: Path) -> list[dict[str, object]]:
    """Return metrics and history without times."""
    text = (run / "metrics.jsonl").read_text() + (run / "history.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "images_per_s")} for line in lines
    ]


def saved(run: Path) -> int:
    """Return the newest iteration whose state is on disk."""
    return max((int(path.stem[5:]) for path in (run / "state").glob("step-*.json")), default=0)


@pytest.mark.large
def test_fifty_kills_on_tars_end_with_the_bytes_of_a_run_without(
    tmp_path: Path, photos: Path, adapt_into: Callable[[Path], list[str]]
) -> None:
    shards, rng = tmp_path / "shards", random.Random(0)
    shards.mkdir()
    for number, folder in enumerate(sorted(photos.iterdir())):
        with tarfile.open(shards / f"train-{number:05d}.tar", "w") as tar:
            tar.add(folder, folder.name)

    def arguments(run: Path) -> list[str]:
        own = ["--epochs", "25", "--batch-size", "5", "--save-every", "2", "--resume"]
        return [*adapt_into(run)[:1], str(shards), *adapt_into(run)[2:], *own]

    assert main(arguments(tmp_path / "0")) == 0
    newest = f"state/step-{saved(tmp_path / '0'):09d}.safetensors"
    kills = job = 0
    while kills < 50:
        job += 1
        run = tmp_path / str(job)
        while not (run / "manifest.json").exists():
            some, process = rng.choice((0, 2, 8, 20)), begin(arguments(run), tmp_path / "told.txt")
            wanted, deadline = saved(run) + some, time.monotonic() + 300
            while process.is_alive() and saved(run) < wanted and time.monotonic() < deadline:
                time.sleep(0.001)
            process.join(rng.random() * (0.1 if some else 3))  # while it trains; while it starts
            kills += process.is_alive()
            process.kill()
            process.join()
        assert lines_of(run) == lines_of(tmp_path / "0")
        for name in ("weights.safetensors", "pseudo-labels.csv", newest):
            assert (run / name).read_bytes() == (tmp_path / "0" / name).read_bytes()
        assert not list(run.rglob("*.part"))


@pytest.mark.parametrize("lost", ["bytes of the newest", "newest", "all"])
def test_resuming_falls_back_to_the_newest_intact_state(
    unfinished: Path, adapt_arguments: list[str], lost: str
) -> None:
    expected, state = bytes_of(unfinished), unfinished / "state"
    newest = state / "step-000000006.safetensors"
    if lost == "bytes of the newest":
        newest.write_bytes(newest.read_bytes()[:-1] + b"\x01")
    elif lost == "newest":  # killed between history and state: the epoch comes again
        newest.with_suffix(".json").unlink()
    else:  # the first save was cut short
        (unfinished / "history.jsonl").unlink()
        shutil.rmtree(state)
        state.mkdir()
        (state / ".step-000000003.safetensors.1.part").write_bytes(b"cut")
    assert main([*adapt_arguments, "--resume"]) == 0
    assert bytes_of(unfinished) == expected
    assert [line["epoch"] for line in history(unfinished)] == [1, 2]
    assert not list(state.glob("*.part"))


def test_only_damaged_states_are_refused(
    unfinished: Path, adapt_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (unfinished / "state").glob("*.safetensors"):
        path.write_bytes(b"broken")
    assert main([*adapt_arguments, "--resume"]) == 3
    assert "only damaged ones" in error_of(capsys)


def test_a_lost_history_is_told(
    unfinished: Path, adapt_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (unfinished / "history.jsonl").unlink()
    assert main([*adapt_arguments, "--resume"]) == 3
    assert "expected 2 finished epochs, found 0" in error_of(capsys)


# ------------------------------------------------------------------------------ resuming


@pytest.mark.usefixtures("run")
def test_resume_of_a_finished_run_does_nothing(
    adapt_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*adapt_arguments, "--resume"]) == 0
    assert "already finished" in error_of(capsys)


def test_a_damaged_finished_run_is_not_called_finished(
    run: Path, adapt_arguments: list[str]
) -> None:
    with open(run / "weights.safetensors", "ab") as file:
        file.write(b"x")
    assert main([*adapt_arguments, "--resume"]) == 3


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (["--set", "adapt.gamma=0.25"], "adapt.gamma is 0.5, given 0.25"),
        (["--epochs", "9"], "adapt.epochs is 2, given 9"),
        (["--template", "one {}"], "templates"),
        (["--classes", "OTHER"], "other inputs: class names"),
        (["--overwrite"], "--overwrite"),
    ],
)
def test_resume_names_what_differs(
    run: Path,
    adapt_arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    part: str,
) -> None:
    other = run.parent / "classes.txt"
    other.write_text("robin\nwren\n")
    given = [str(other) if argument == "OTHER" else argument for argument in change]
    assert main([*adapt_arguments, "--resume", *given]) == 2
    assert part in error_of(capsys)


def test_resume_needs_no_more_than_the_directory(unfinished: Path) -> None:
    expected = bytes_of(unfinished)
    assert main(["adapt", "--resume", "-o", str(unfinished), "--device", "cpu"]) == 0
    assert bytes_of(unfinished) == expected


def test_a_run_that_began_before_a_setting_was_there_is_resumed(unfinished: Path) -> None:
    expected = bytes_of(unfinished)
    rewrite_inputs(unfinished, ',\n      "device": "cpu"', "")
    assert "device" not in json.loads((unfinished / "inputs.json").read_text())["recipe"]["views"]
    assert resume(unfinished) == 0
    assert bytes_of(unfinished) == expected


def test_resume_of_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt", "--resume", "-o", str(tmp_path / "typo")]) == 2
    assert "no started run" in error_of(capsys)
    assert not (tmp_path / "typo").exists()


def test_a_moved_model_is_accepted_by_its_weights(
    unfinished: Path, adapt_arguments: list[str], tiny_model_dir: Path
) -> None:
    expected = bytes_of(unfinished)
    moved = shutil.copytree(tiny_model_dir, unfinished.parent / "moved")
    assert main([*adapt_arguments, "--resume", "--model", f"local-dir:{moved}"]) == 0
    assert bytes_of(unfinished) == expected


# ------------------------------------------------------------------------------ images


@pytest.fixture
def moved(unfinished: Path, photos: Path, tmp_path: Path) -> Path:
    """Return where the images of `unfinished` are now; at their old place is nothing."""
    rewrite_inputs(unfinished, str(photos), str(tmp_path / "gone"))
    return shutil.copytree(photos, tmp_path / "moved")


def rewrite_inputs(run: Path, old: str, new: str) -> None:
    inputs = run / "inputs.json"
    inputs.write_text(inputs.read_text().replace(old, new))


def resume(run: Path, *options: str) -> int:
    return main(["adapt", "--resume", "-o", str(run), "--device", "cpu", *options])


def test_images_that_are_gone_are_named(
    unfinished: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite_inputs(unfinished, f"{photos}/red circle/00.png", "/gone/00.png")
    assert resume(unfinished) == 3
    assert "/gone/00.png; put them back, say with --images" in error_of(capsys)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        flip_a_bit,
        lambda path: shutil.copyfile(path.with_name("01.png"), path),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: path.write_bytes(b""),
    ],
    ids=["bit", "another image", "longer", "empty"],
)
@pytest.mark.parametrize("given", [True, False])
def test_an_image_that_was_changed_is_named(
    unfinished: Path,
    moved: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], object],
    *,
    given: bool,
) -> None:
    rewrite_inputs(unfinished, str(moved.with_name("gone")), str(moved))
    path = moved / "red circle" / "00.png"
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert resume(unfinished, *(["--images", str(moved)] if given else [])) == 3
    told = error_of(capsys)
    assert "1 of 24 images of this run were changed since it began" in told
    assert str(path) in told


def test_images_are_found_at_another_place_under_other_names(unfinished: Path, moved: Path) -> None:
    expected = bytes_of(unfinished)
    (moved / "red circle").rename(moved / "flat")
    (moved / "blue stripe" / "03.png").rename(moved / "photo 3.PNG")
    shutil.copyfile(moved / "flat" / "00.png", moved / "a copy.png")
    (moved / "broken.png").write_bytes(b"no image")
    assert resume(unfinished, "--images", str(moved)) == 0
    assert bytes_of(unfinished) == expected
    listed = json.loads((unfinished / "inputs.json").read_text())["images"]
    assert len(set(listed)) == 24
    assert str(moved / "photo 3.PNG") in listed
    assert str(moved / "photo 3.PNG") in (unfinished / "pseudo-labels.csv").read_text()


@pytest.mark.parametrize("how", ["--images", "IMAGES"])
def test_a_place_without_one_of_the_images_is_refused(
    unfinished: Path, moved: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    before = (unfinished / "inputs.json").read_text()
    flip_a_bit(moved / "red circle" / "00.png")
    place = [how, str(moved)] if how == "--images" else [str(moved)]
    assert resume(unfinished, *place) == 2
    assert "found all but 1, the first was" in error_of(capsys)
    assert (unfinished / "inputs.json").read_text() == before


def test_a_place_given_twice_is_refused(unfinished: Path, photos: Path) -> None:
    assert resume(unfinished, str(photos), "--images", str(photos)) == 2


def test_inputs_of_an_older_version_go_on_where_they_were(
    unfinished: Path, photos: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    expected, path = bytes_of(unfinished), unfinished / "inputs.json"
    inputs = json.loads(path.read_text())
    for name in ("architecture", "backbone_preprocess", "images_sha256"):
        del inputs[name]
    clip = load_clip(BackboneSpec(model=f"local-dir:{tiny_model_dir}"))
    path.write_text(json.dumps({**inputs, "backbone_sha256": clip.weights_sha256}))
    others = shutil.copytree(photos, tmp_path / "moved")
    assert resume(unfinished, "--images", str(others)) == 2
    assert resume(unfinished) == 0
    assert bytes_of(unfinished) == expected


def test_a_finished_run_needs_no_images(
    run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite_inputs(run, str(photos), "/gone")
    assert resume(run) == 0
    assert "already finished" in error_of(capsys)


# ------------------------------------------------------------------------------ the directory


def test_a_second_run_in_the_directory_is_refused(
    run: Path, adapt_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(run):
        assert main([*adapt_arguments, "--resume"]) == 2
    assert "another adaptation is running" in error_of(capsys)
    assert main([*adapt_arguments, "--resume"]) == 0


@pytest.mark.usefixtures("run")
def test_a_used_directory_is_only_replaced_on_request(
    tmp_path: Path, adapt_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(adapt_arguments) == 2
    assert "--overwrite" in error_of(capsys)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("irreplaceable")
    assert main([*adapt_arguments, "-o", str(foreign), "--overwrite"]) == 2
    assert (foreign / "thesis.tex").read_text() == "irreplaceable"


def test_overwrite_leaves_foreign_files_alone(run: Path, adapt_arguments: list[str]) -> None:
    (run / "notes.txt").write_text("mine")
    assert main([*adapt_arguments, "--overwrite"]) == 0
    assert (run / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "mistake",
    [
        ["--classes", "/nope.txt"], ["--recipe", "nope"], ["--model", "nope"],
        ["--set", "adapt.nope=1"], ["--val-dir", "/nope"], ["--max-bad-images", "x"],
    ],
)  # fmt: skip
def test_overwrite_with_a_mistake_keeps_the_old_run(
    run: Path, adapt_arguments: list[str], mistake: list[str]
) -> None:
    before = bytes_of(run)
    assert main([*adapt_arguments, "--overwrite", *mistake]) in (2, 3)
    assert bytes_of(run) == before
    artifact.read_manifest(run, "microclip.checkpoint/1")


@pytest.mark.parametrize("change", [('"cls_share": 0.5', '"cls_share": 0.1'), ("red circle", "x")])
def test_an_edited_manifest_is_refused(
    run: Path, photos: Path, change: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = run / "manifest.json"
    manifest.write_text(manifest.read_text().replace(*change))
    assert main(["predict", str(run), str(photos)]) == 3
    assert "sha256" in error_of(capsys)


def test_validation_is_logged_and_changes_nothing(
    tmp_path: Path, finished: Path, adapt_arguments: list[str], photos: Path
) -> None:
    assert main([*adapt_arguments, "--val-dir", str(photos)]) == 0
    assert bytes_of(tmp_path / "run") == bytes_of(finished)
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert all(0 <= json.loads(line)["validation"]["top1"] <= 1 for line in lines)


def test_tensorboard_reads_the_events(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("epoch/loss")] == [3, 6]
