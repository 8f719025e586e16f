import shutil
from pathlib import Path

import numpy as np
import pytest

from microclip_deploy.calibration import softmax
from microclip_deploy.errors import DataError, UsageError
from microclip_deploy.evaluation.predict import FailedImage, ImagePrediction, predict
from microclip_deploy.serving import Session, open_session


@pytest.fixture(scope="module")
def session(finished_run: Path) -> Session:
    return open_session(finished_run)


def test_results_equal_the_session_in_order(session: Session, photos: Path) -> None:
    results = list(predict(session, [photos], top_k=9, batch_size=7))
    assert [result.index for result in results] == list(range(24))
    first = results[0]
    assert isinstance(first, ImagePrediction)
    assert len(first.top) == 3
    assert sum(guess.probability for guess in first.top) == pytest.approx(1)
    logits = session.predict(first.view[None]).logits[0]
    assert [guess.name for guess in first.top] == [session.classes[i] for i in np.argsort(-logits)]


def test_bad_images_come_in_their_place(session: Session, photos: Path, tmp_path: Path) -> None:
    for number in range(6):
        shutil.copy(photos / "red circle" / "00.png", tmp_path / f"{number}.png")
    for number in (0, 2, 5):
        (tmp_path / f"{number}.png").write_bytes(b"")
    results = list(predict(session, [tmp_path], batch_size=2))
    assert [isinstance(r, FailedImage) for r in results] == [True, False, True, False, False, True]
    assert [r.path.name for r in results] == [f"{number}.png" for number in range(6)]


def test_only_bad_images_are_an_error_after_all_are_told(session: Session, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    results = predict(session, [tmp_path])
    assert isinstance(next(results), FailedImage)
    with pytest.raises(DataError, match=r"x\.png \(the file is empty\)"):
        next(results)


def test_a_missing_source_is_an_error_at_once(session: Session, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found nothing"):
        predict(session, [tmp_path / "nothing"])


def test_no_class_to_show_is_refused(session: Session, photos: Path) -> None:
    with pytest.raises(UsageError, match="--top-k"):
        predict(session, [photos], top_k=0)


def test_guesses_of_unadapted_classes_are_marked(finished_run: Path, photos: Path) -> None:
    with open_session(finished_run) as session:
        session.unadapted = frozenset({"green square"})
        results = list(predict(session, [photos], top_k=3))
    for result in results:
        assert isinstance(result, ImagePrediction)
        marked = [guess.name for guess in result.top if not guess.adapted]
        assert marked == ["green square"]


def test_softmax_survives_large_logits() -> None:
    found = softmax(np.array([[1e4, 0.0], [-1e4, -1e4]], np.float32))
    assert found.tolist() == [[1.0, 0.0], [0.5, 0.5]]


def test_progress_reaches_the_end_also_where_the_last_are_bad(
    session: Session, photos: Path, tmp_path: Path
) -> None:
    shutil.copy(photos / "red circle" / "00.png", tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"")
    told: list[tuple[int, int]] = []
    list(predict(session, [tmp_path], progress=lambda *done: told.append(done)))
    assert told == [(1, 2), (2, 2)]
