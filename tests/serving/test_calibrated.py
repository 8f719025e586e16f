"""Every backend reads its logits by the artifact's calibration."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from microclip_deploy import artifact
from microclip_deploy.calibration import Calibration, softmax
from microclip_deploy.data.sources import list_images
from microclip_deploy.errors import CheckpointError, DataError
from microclip_deploy.serving import open_session
from tests.conftest import CALIBRATION

# Two backends' float32: docs/numerics.md section 9; logits of scale 100.
ROUNDING = 1e-3


def changed(source: Path, to: Path, calibration: dict[str, Any] | None) -> Path:
    """Return a copy with another calibration; None for an older artifact, without the key."""
    shutil.copytree(source, to)
    stored = artifact.read_manifest(to, artifact.read_schema(to))
    del stored["calibration"]
    more = {} if calibration is None else {"calibration": calibration}
    artifact.rewrite_manifest(to, {**stored, **more}, [])
    return to


def test_a_run_and_its_export_answer_alike_for_any_prior(
    finished_run: Path, tiny_export: Path, photos: Path, tmp_path: Path
) -> None:
    rare = tmp_path / "rare.csv"
    rare.write_text("red circle,1\ngreen square,1\nblue stripe,98\n")
    paths = list_images(photos).paths[::3]
    shift = Calibration(**CALIBRATION).bias()
    plain: Any = None
    for prior in ("folder", "uniform", rare):
        with (
            open_session(finished_run, prior=prior) as run,
            open_session(tiny_export, prior=prior) as export,
        ):
            assert run.calibration == export.calibration == Calibration(**CALIBRATION)
            images = np.stack([run.preprocess.test_view(run.preprocess.read(p)) for p in paths])
            found, wanted = export.predict(images), run.predict(images)
            results = zip(export.classify(list(paths)), run.classify(list(paths)), strict=True)
            for one, other in results:
                assert (one.class_name, one.unknown) == (other.class_name, other.unknown)
                assert one.probability == pytest.approx(other.probability, abs=ROUNDING)
        np.testing.assert_allclose(found.logits, wanted.logits, atol=ROUNDING)
        if prior == "folder":
            plain = wanted.logits
        elif prior == "uniform":
            added = np.broadcast_to(shift, plain.shape)
            np.testing.assert_allclose(wanted.logits - plain, added, atol=1e-5)
        assert found.logits.dtype == np.float32


def test_a_result_has_the_calibrated_probability(tiny_export: Path, photos: Path) -> None:
    path = list_images(photos).paths[0]
    with open_session(tiny_export) as session:
        found = session.classify(path)
        logits = session.predict_photos([found.photo()]).logits
    shares = softmax(logits, CALIBRATION["temperature"])
    assert found.probability == pytest.approx(shares.max())
    assert found.unknown is bool(shares.max() < CALIBRATION["unknown_below"])
    assert repr(found).startswith("<unknown: ") is found.unknown
    assert ("<caption>unknown" in found._repr_html_()) is found.unknown


@pytest.mark.parametrize("kind", ["run", "export"])
def test_older_artifacts_are_read_at_one_and_know_no_other_prior(
    request: pytest.FixtureRequest, photos: Path, tmp_path: Path, kind: str
) -> None:
    source = request.getfixturevalue("finished_run" if kind == "run" else "tiny_export")
    older = changed(source, tmp_path / "older", None)
    with open_session(older) as session:
        assert session.calibration is None
        found = session.classify(list_images(photos).paths[0])
        logits = session.predict_photos([found.photo()]).logits
    assert found.probability == pytest.approx(softmax(logits).max())
    assert not found.unknown
    with pytest.raises(CheckpointError, match="run `microclip-deploy calibrate`"):
        open_session(older, prior="uniform")


@pytest.mark.parametrize("kind", ["run", "export"])
@pytest.mark.parametrize(
    "wrong", [{"mean_prediction": [0.5, 0.5]}, {"temperature": -1}, {"unknown_below": 7}]
)
def test_a_calibration_that_does_not_fit_is_refused(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, wrong: dict[str, Any]
) -> None:
    source = request.getfixturevalue("finished_run" if kind == "run" else "tiny_export")
    damaged = changed(source, tmp_path / "damaged", {**CALIBRATION, **wrong})
    with pytest.raises(CheckpointError, match="calibration"):
        open_session(damaged)


def test_a_prior_is_told_of_and_refused_without_leaving_the_session_changed(
    tiny_export: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zero = tmp_path / "zero.json"
    zero.write_text('{"red circle": 0, "green square": 1, "blue stripe": 1}')
    with open_session(tiny_export) as session:
        with caplog.at_level(logging.WARNING):
            session.expect(zero)
        assert "1 classes are taken for 0.001 of the even share" in caplog.text
        with pytest.raises(DataError, match="nothing"):
            session.expect(tmp_path / "nothing.csv")
        assert session.prior == str(zero)
