"""Where calibrations come from: adaptations, and the command, on runs and on exports."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from microclip_deploy import artifact
from microclip_deploy.calibration import Calibration
from microclip_deploy.cli.main import main
from microclip_deploy.data.sources import list_images
from microclip_deploy.errors import Interrupted
from microclip_deploy.export.class_rows import add_classes, remove_classes
from microclip_deploy.serving import open_session
from tests.conftest import CALIBRATION, CLASSES

Capture = pytest.CaptureFixture[str]


@pytest.fixture(params=["finished_run", "tiny_export"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a run, and an export, that may be changed."""
    return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "copy"))


def stored(directory: Path) -> Calibration:
    return Calibration(**artifact.read_json(directory / artifact.MANIFEST)["calibration"])


def calibrate(directory: Path, photos: Path, *more: str) -> int:
    return main(["calibrate", str(directory), str(photos), "--device", "cpu", *more])


def test_a_folder_calibrates_a_run_and_an_export(
    directory: Path, photos: Path, capsys: Capture
) -> None:
    assert calibrate(directory, photos, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    with open_session(directory) as session:
        assert session.calibration == stored(directory) == Calibration(**told)
    assert (told["source"], told["images"]) == ("folder", 24)
    assert told["mean_prediction"] != CALIBRATION["mean_prediction"]


def test_answers_calibrate_too(
    directory: Path, photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    paths = list_images(photos).paths
    with (tmp_path / "clicks.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(("path", "answer"))
        rows.writerows((path, path.parent.name) for path in paths)
    assert calibrate(directory, photos, "--clicks", str(tmp_path / "clicks.csv")) == 0
    assert "24 answers" in capsys.readouterr().out
    assert stored(directory).source == "clicks"
    (tmp_path / "few.csv").write_text(f"path,answer\n{paths[0]},none\n")
    before = (directory / artifact.MANIFEST).read_bytes()
    assert calibrate(directory, photos, "--clicks", str(tmp_path / "few.csv")) == 3
    assert "at least 20" in capsys.readouterr().err
    assert (directory / artifact.MANIFEST).read_bytes() == before


def test_bad_photos_are_told_and_left_out(
    directory: Path, photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    mixed = shutil.copytree(photos, tmp_path / "mixed")
    (mixed / "broken.png").write_bytes(b"no picture")
    assert calibrate(directory, mixed) == 0
    assert "skipped" in capsys.readouterr().err
    assert stored(directory).images == 24


def test_a_calibration_follows_the_classes_of_an_export(tiny_export: Path, tmp_path: Path) -> None:
    export = shutil.copytree(tiny_export, tmp_path / "export")
    add_classes(export, ["grey dot"])
    with open_session(export, prior="uniform") as session:
        assert session.calibration == stored(export)
        assert session.calibration.bias()[-1] == pytest.approx(0, abs=1e-4)
    remove_classes(export, [CLASSES[1]])
    with open_session(export, prior="uniform") as session:
        assert session.calibration is not None
        shares = session.calibration.mean_prediction
        assert shares[0] / shares[1] == pytest.approx(6, rel=1e-4)


def test_predict_and_evaluate_expect_what_they_are_told(
    tiny_export: Path, photos: Path, capsys: Capture
) -> None:
    def told(command: str, *more: str) -> Any:
        options = ["--format", "json"] if command == "predict" else ["--json"]
        assert main([command, str(tiny_export), str(photos), *options, *more]) == 0
        return json.loads(capsys.readouterr().out)

    plain, even = told("predict"), told("predict", "--prior", "uniform")
    logits = [{g["class"]: g["logit"] for g in each[0]["top"]} for each in (plain, even)]
    shift = [logits[1][name] - logits[0][name] for name in CLASSES]
    np.testing.assert_allclose(shift, Calibration(**CALIBRATION).bias(), atol=1e-3)
    assert {each["unknown"] for each in plain} <= {True, False}
    assert told("evaluate", "--prior", "uniform")["prior"] == "uniform"
    wrong = ["--prior", "even"]
    assert main(["predict", str(tiny_export), str(photos), *wrong]) == 3
    assert main(["predict", "--server", "http://127.0.0.1:9", str(photos), *wrong]) == 2


def test_an_adaptation_is_calibrated_also_when_it_was_stopped_then(
    adapt_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise Interrupted("stopped")

    run = tmp_path / "run"
    monkeypatch.setattr("microclip_deploy.adapt.run.judge", stopped)
    assert main(adapt_arguments) == 130
    assert not (run / artifact.MANIFEST).exists()
    monkeypatch.undo()
    history = (run / "history.jsonl").read_bytes()
    assert main(["adapt", "--resume", "-o", str(run), "--device", "cpu"]) == 0
    assert (run / "history.jsonl").read_bytes() == history
    content = artifact.read_json(run / artifact.MANIFEST)
    assert content["verdict"]["decision"] == "cannot tell"  # of 24 photos
    assert content["rolled_back"] == []
    assert len(content["frequencies"]["estimated"]) == len(content["classes"])
    found = stored(run)
    assert (found.source, found.images) == ("folder", 24)
    with open_session(run, prior="uniform") as session:
        assert session.calibration == found
