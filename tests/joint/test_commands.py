"""`--joint` of `predict` and `evaluate`, on runs and exports."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from microclip_deploy.calibration import softmax
from microclip_deploy.cli.main import main
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.evaluation.evaluate import evaluate
from microclip_deploy.evaluation.evaluation import JOINT_REMARK
from microclip_deploy.evaluation.predict import FailedImage, ImagePrediction, predict_jointly
from microclip_deploy.joint import joint_probabilities
from microclip_deploy.serving import open_session


@pytest.fixture
def spoilt(photos: Path, tmp_path: Path) -> Path:
    """Return the photos with one unreadable among them."""
    data = shutil.copytree(photos, tmp_path / "spoilt")
    (data / "red circle" / "01.png").write_bytes(b"")
    return data


def test_results_are_the_joint_reading_of_what_the_session_says(
    finished_run: Path, spoilt: Path
) -> None:
    with open_session(finished_run) as session:
        found = list(predict_jointly(session, [spoilt], 2, batch_size=5))
        good = [each for each in found if isinstance(each, ImagePrediction)]
        said = session.predict(np.stack([view(session.preprocess, each.path) for each in good]))
        expected = joint_probabilities(
            said.cls, softmax(said.logits).astype(np.float32), session.classifier()
        )
        names = session.classes
    assert [each.index for each in found] == list(range(24))
    assert [i for i, each in enumerate(found) if isinstance(each, FailedImage)] == [
        i for i, each in enumerate(found) if each.path == spoilt / "red circle" / "01.png"
    ]
    for each, shares, logits in zip(good, expected, said.logits, strict=True):
        assert each.top[0].name == names[shares.argmax()]
        assert each.top[0].probability == pytest.approx(shares.max(), abs=1e-3)
        assert each.top[0].logit == pytest.approx(logits[shares.argmax()], abs=1e-3)
        assert each.alone == names[logits.argmax()]
        assert len(each.top) == 2


def view(preprocess: Preprocess, path: Path) -> np.ndarray:
    return preprocess.test_view(preprocess.read(path))


@pytest.mark.parametrize("source", ["finished_run", "tiny_export"])
def test_every_format_says_joint(
    source: str, spoilt: Path, tmp_path: Path, request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model, out = str(request.getfixturevalue(source)), tmp_path / "out"
    asked = ["predict", model, str(spoilt), "--joint", "--device", "cpu", "--out"]
    for ending in ("csv", "jsonl", "txt"):
        assert main([*asked, str(out.with_suffix(f".{ending}"))]) == 0
    assert "joint: classes are read from all photos together" in capsys.readouterr().err
    with out.with_suffix(".csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert len(rows) == len(lines) == 24
    for row, line in zip(rows, lines, strict=True):
        assert row["joint_alone_class"] == line.get("joint", {}).get("alone_class", "")
        assert bool(row["joint_alone_class"]) != bool(row["error"])
    assert out.with_suffix(".txt").read_text().count("joint: read from all photos together") == 1


def test_unreadable_files_alone_are_told_before_the_error(
    finished_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    out = tmp_path / "out.csv"
    asked = ["predict", str(finished_run), str(tmp_path), "--joint", "--device", "cpu"]
    assert main([*asked, "--out", str(out)]) == 3
    assert (tmp_path / "out.bad-files.csv").read_text().count("x.png") == 1


def test_one_photo_is_read_alone(
    finished_run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = str(photos / "red circle" / "00.png")
    asked = ["predict", str(finished_run), photo, "--device", "cpu", "--format", "jsonl"]
    assert main([*asked, "--joint"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["joint"]["alone_class"] == line["top"][0]["class"]


def test_a_server_answers_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "photos", "--server", "http://127.0.0.1:1", "--joint"]) == 2
    assert "answers each photo alone; leave one of them out" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize("source", ["finished_run", "tiny_export"])
def test_an_evaluation_has_a_row_of_its_own(
    source: str, spoilt: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(source)
    alone = evaluate(model, spoilt, max_bad="1")
    found = evaluate(model, spoilt, max_bad="1", joint=True)
    assert [row[:3] for row in found.rows[:4]] == [
        ("adapted", token, "adapted") for token in ("fused", "cls", "fg", "joint")
    ]
    assert (*found.rows[:3], *found.rows[4:]) == alone.rows
    joint = found.row("adapted", "joint", "adapted")
    assert joint is not None
    assert joint.images == 23
    assert found.to_json()["remarks"] == [JOINT_REMARK]
    assert alone.remarks == ()


def test_the_report_says_what_joint_rows_are(
    finished_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    assert main(["evaluate", str(run), str(photos), "--joint", "--device", "cpu"]) == 0
    assert "not comparable with accuracies" in " ".join(capsys.readouterr().out.split())
    assert JOINT_REMARK in (run / "report.html").read_text()
    kept = (run / "evaluation.json").read_bytes()
    assert main(["evaluate", str(run), str(photos), "--device", "cpu"]) == 0
    assert (run / "evaluation.json").read_bytes() == kept  # without the joint row it tells less
