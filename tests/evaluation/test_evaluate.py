import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import DataError, UsageError, VerificationError
from microclip_deploy.evaluation.evaluate import (
    Answer,
    Evaluation,
    LabelledImages,
    Row,
    accuracy,
    accuracy_of_session,
    evaluate,
    score,
)
from microclip_deploy.evaluation.masks import MaskFacts
from microclip_deploy.serving import Prediction, Session, open_session
from microclip_deploy.serving.session import Facts

CLASSES = ("red circle", "green square", "blue stripe")


class ColourSession(Session):
    """Knows the class by the strongest colour channel; [FG] always says the first class."""

    def __init__(self, classes: Sequence[str] = CLASSES, complete: bool = False) -> None:
        preprocess = Preprocess(size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
        facts = Facts(tuple(classes), frozenset(), preprocess, np.eye(3, dtype=np.float32))
        super().__init__(facts, "cpu")
        self.complete = complete

    def _answer(self, pixels: NDArray[np.uint8]) -> Prediction:
        count = len(pixels)
        means = pixels.reshape(count, -1, 3).mean(axis=1).astype(np.float32)
        cls = np.eye(3, dtype=np.float32)[means.argmax(axis=1)]
        fg = np.tile(np.eye(3, dtype=np.float32)[0], (count, 1))
        mask = np.zeros((count, 16), np.bool_)
        mask[:, :4] = True
        attention = np.full((count, 17), 1 / 17, np.float32)
        return Prediction(cls, fg, 100 * cls, mask, attention, np.full(count, self.complete))

    def _release(self) -> None:
        pass


@pytest.fixture(scope="module")
def evaluation(finished_run: Path, photos: Path) -> Evaluation:
    return evaluate(finished_run, photos, batch_size=10)


def test_score_equals_counts_made_by_hand() -> None:
    logits = np.eye(7)[[0, 1, 1, 6, 0]] - np.linspace(0, 0.1, 7)
    found = score(logits, np.array([0, 1, 2, 5, 0]))
    assert (found.images, found.top1, found.top5) == (5, 0.6, 0.8)
    assert found.class_images == (2, 1, 1, 0, 0, 1, 0)
    assert found.class_correct == (2, 1, 0, 0, 0, 0, 0)
    assert found.mean_per_class == pytest.approx((1 + 1 + 0 + 0) / 4)


def test_equal_logits_rank_by_class_index_like_argmax() -> None:
    found = score(np.zeros((2, 3)), np.array([0, 1]))
    assert found.class_correct == (1, 0, 0)


def test_score_refuses_nan() -> None:
    with pytest.raises(VerificationError, match="NaN"):
        score(np.full((1, 3), np.nan), np.array([0]))


@pytest.mark.parametrize("labels", [[3], [-1], [0, 1], []])
def test_score_refuses_labels_that_do_not_fit(labels: list[int]) -> None:
    with pytest.raises(DataError, match="labels below C"):
        score(np.zeros((1, 3)), np.array(labels, np.int64))


def test_a_session_is_measured_by_branch(photos: Path) -> None:
    images = LabelledImages.read(photos, CLASSES)
    found = accuracy_of_session(ColourSession(), images, batch_size=5)
    assert found.rows["fused"].top1 == found.rows["cls"].top1 == 1.0
    assert found.rows["fg"].top1 == pytest.approx(1 / 3)
    assert found.masks.share == 0.25


def test_training_gets_plain_numbers(photos: Path) -> None:
    found = accuracy(ColourSession(), LabelledImages.read(photos, CLASSES))
    assert found == {
        "top1": 1.0,
        "top5": 1.0,
        "mean_per_class": 1.0,
        "cls_top1": 1.0,
        "fg_top1": pytest.approx(1 / 3),
    }


@pytest.mark.parametrize(
    ("folder", "classes", "label"),
    [
        ("Red_Circle", CLASSES, 0),
        ("Red\u00a0\u200bCircle", CLASSES, 0),
        ("Bewick\u2019s  wren", ("robin", "Bewick's wren"), 1),
        ("a_b", ("A b", "a_b"), 1),  # an exact name wins
        ("a b", ("A b", "a_b"), 0),  # and case counts for less than an underscore
    ],
)
def test_labels_match_regardless_of_case_and_underscores(
    photos: Path, tmp_path: Path, folder: str, classes: tuple[str, ...], label: int
) -> None:
    shutil.copytree(photos / "red circle", tmp_path / folder)
    assert LabelledImages.read(tmp_path, classes).labels.tolist() == [label] * 8


@pytest.mark.parametrize(
    ("folder", "classes", "message"),
    [
        ("a b", ("A-b", "a_b"), "'a b'"),
        ("red circel", CLASSES, r"'red circel' \(8 images, near 'red circle'\)"),
        ("0", CLASSES, "give names in place of numbers"),
    ],
)
def test_ambiguous_and_unknown_labels_are_named(
    photos: Path, tmp_path: Path, folder: str, classes: tuple[str, ...], message: str
) -> None:
    shutil.copytree(photos / "red circle", tmp_path / folder)
    with pytest.raises(DataError, match=message):
        LabelledImages.read(tmp_path, classes)


def test_images_without_a_label_are_refused(photos: Path) -> None:
    with pytest.raises(DataError, match="none for 8 of 8"):
        LabelledImages.read(photos / "red circle", CLASSES)


def test_a_csv_gives_labels(photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text(f"path,label\n{photos / 'red circle' / '00.png'},BLUE STRIPE\n")
    assert LabelledImages.read(table, CLASSES).labels.tolist() == [2]


def test_bad_images_are_counted_and_listed(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "data")
    (tmp_path / "data" / "red circle" / "01.png").write_bytes(b"")
    images = LabelledImages.read(tmp_path / "data", CLASSES)
    found = accuracy_of_session(ColourSession(), images, batch_size=4)
    assert found.rows["fused"].images == 23
    assert [(f.path.name, f.reason) for f in found.bad] == [("01.png", "the file is empty")]
    assert found.rows["fused"].class_images == (7, 8, 8)


def test_only_bad_images_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "red circle").mkdir()
    (tmp_path / "red circle" / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match="found none"):
        accuracy_of_session(ColourSession(), LabelledImages.read(tmp_path, CLASSES))


def test_evaluate_compares_eight_rows(evaluation: Evaluation) -> None:
    assert [row[:3] for row in evaluation.rows] == [
        ("adapted", "fused", "adapted"), ("adapted", "cls", "adapted"),
        ("adapted", "fg", "adapted"), ("zero-shot", "cls", "names"), ("zero-shot", "cls", "prior"),
        ("zero-shot", "cls", "descriptions"), ("zero-shot", "fg", "descriptions"),
        ("zero-shot", "fused", "descriptions"),
    ]  # fmt: skip
    assert all(row.scores.images == 24 for row in evaluation.rows)


def test_evaluate_without_zero_shot_equals_the_session(
    finished_run: Path, photos: Path, evaluation: Evaluation
) -> None:
    alone = evaluate(finished_run, photos, batch_size=7, zero_shot=False)
    assert alone.rows == evaluation.rows[:3]
    with open_session(finished_run) as session:
        numbers = accuracy(session, LabelledImages.read(photos, session.classes))
    assert numbers["top1"] == alone.rows[0].scores.top1


def test_progress_reaches_the_end_once(finished_run: Path, photos: Path) -> None:
    told: list[tuple[int, int]] = []
    evaluate(
        finished_run, photos, batch_size=12, zero_shot=False, progress=lambda *x: told.append(x)
    )
    assert told == [(12, 24), (24, 24)]


def test_json_is_plain_and_complete(evaluation: Evaluation) -> None:
    content = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert [line["class"] for line in content["per_class"]] == list(CLASSES)
    assert sum(line["images"] for line in content["per_class"]) == content["images"] == 24
    assert content["rows"][0]["top1"] == evaluation.rows[0].scores.top1


def test_tables_show_every_row_and_class(evaluation: Evaluation) -> None:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(*evaluation.tables(per_class=True))
    text = captured.get()
    assert text.count("zero-shot") >= 5
    assert all(name in text for name in CLASSES)


def made_up(*pairs: tuple[int, int], classes: int = 30) -> Evaluation:
    """Return an evaluation of images with these labels and predictions."""
    labels, predicted = np.array(pairs).T
    fused = score(np.eye(classes)[predicted], labels)
    answers = tuple(Answer(Path(f"{i}.png"), *pair, 0.5) for i, pair in enumerate(pairs))
    return Evaluation(
        classes=tuple(f"class {i}" for i in range(classes)),
        images=len(pairs),
        bad=(),
        rows=(Row("adapted", "fused", "adapted", fused),),
        masks=MaskFacts(share=0.5, whole=0, complete=0, border=0.5, hugging=0, agreement=1),
        answers=answers,
    )


def shown(found: Evaluation) -> str:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(*found.tables(per_class=True))
    return captured.get()


def test_confused_classes_are_told_the_most_images_first() -> None:
    found = made_up((2, 0), (1, 0), (1, 0), (0, 0), (2, 1), (2, 2))
    assert found.confusions == ((1, 0, 2), (2, 0, 1), (2, 1, 1))
    assert found.to_json()["confusions"][0] == {
        "class": "class 1", "predicted": "class 0", "images": 2,
    }  # fmt: skip
    text = shown(found)
    assert "most confused classes" in text
    assert "2 of 2" in text
    assert text.count("1 of 3") == 2


def test_classes_without_images_are_folded() -> None:
    text = shown(made_up((1, 1), (2, 2)))
    assert "and 28 classes without images" in text
    assert "class 3" not in text
    assert "confused" not in text


def test_only_the_most_confused_pairs_are_shown() -> None:
    found = made_up(*((label, label - 1) for label in range(1, 30)))
    assert "and 19 more pairs, in --json" in shown(found)
    assert len(found.to_json()["confusions"]) == 29


@pytest.fixture
def spoilt(photos: Path, tmp_path: Path) -> Path:
    """Return the photos with 2 of 24 unreadable."""
    data = shutil.copytree(photos, tmp_path / "spoilt")
    for number in ("01", "05"):
        (data / "red circle" / f"{number}.png").write_bytes(b"")
    return data


def test_too_many_unreadable_images_are_an_error(finished_run: Path, spoilt: Path) -> None:
    with pytest.raises(DataError, match=r"at most 0 .*--max-bad-images 1%.*found 2 of 24") as found:
        evaluate(finished_run, spoilt, zero_shot=False)
    assert "01.png (the file is empty); " in str(found.value)


def test_allowed_unreadable_images_are_counted_and_named(finished_run: Path, spoilt: Path) -> None:
    found = evaluate(finished_run, spoilt, zero_shot=False, max_bad="2")
    assert [file.path.name for file in found.bad] == ["01.png", "05.png"]
    assert found.images == 22
    assert "images left out because they could not be read: 2" in found.warnings
    console = Console(width=120)
    with console.capture() as captured:
        console.print(found.tables()[0])
    assert "22 images, 2 unreadable" in captured.get()


def test_a_malformed_limit_is_refused(finished_run: Path, photos: Path) -> None:
    with pytest.raises(UsageError, match="--max-bad-images"):
        evaluate(finished_run, photos, max_bad="some")


def test_many_complete_graphs_warn_with_the_remedy(
    finished_run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "microclip_deploy.evaluation.evaluate.open_session",
        lambda *_, **__: ColourSession(complete=True),
    )
    found = evaluate(finished_run, photos, zero_shot=False)
    assert found.masks.complete == 1.0
    assert "--set ncut.affinity=centered_cosine" in found.warnings[0]
