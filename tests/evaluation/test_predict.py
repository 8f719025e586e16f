import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

from microclip_deploy.errors import DataError, EnvironmentProblem, UsageError
from microclip_deploy.evaluation.predict import (
    CsvWriter,
    FailedImage,
    ImagePrediction,
    JsonLinesWriter,
    JsonWriter,
    OverlayWriter,
    Result,
    open_writer,
    overlay_name,
    predict,
    table,
)
from microclip_deploy.serving import Session, open_session
from microclip_deploy.serving.classification import Guess, softmax


@pytest.fixture(scope="module")
def session(finished_run: Path) -> Session:
    return open_session(finished_run)


def made_up(
    path: str = "a.png",
    names: tuple[str, ...] = ("cat", "dog"),
    unadapted: tuple[str, ...] = (),
) -> ImagePrediction:
    return ImagePrediction(
        index=3,
        path=Path(path),
        top=tuple(Guess(name, 0.5, 10.0, name not in unadapted) for name in names),
        cls_top1=names[0],
        fg_top1=names[-1],
        mask=np.array([True, False, False, False]),
        attention=np.full(5, 0.2, np.float32),
        complete=False,
        view=np.full((8, 8, 3), 100, np.uint8),
    )


def csv_rows(*results: ImagePrediction | FailedImage, top_k: int = 2) -> list[list[str]]:
    stream = io.StringIO(newline="")
    writer = CsvWriter(stream, top_k)
    for result in results:
        writer.write(result)
    return list(csv.reader(io.StringIO(stream.getvalue(), newline="")))


def json_line(result: ImagePrediction | FailedImage) -> tuple[bytes, dict[str, object]]:
    stream = io.StringIO()
    JsonLinesWriter(stream).write(result)
    written = stream.getvalue().encode("utf-8")
    return written, json.loads(written)


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


def test_csv_round_trips_difficult_names() -> None:
    header, row = csv_rows(made_up('a,"b"\nç.png', ('q"u,o', "日本")))
    assert header[:6] == ["path", "error", "class_1", "probability_1", "class_2", "probability_2"]
    assert row[0] == 'a,"b"\nç.png'
    assert (row[2], row[4], row[6], row[7]) == ('q"u,o', "日本", 'q"u,o', "日本")
    assert len(row) == len(header)


@pytest.mark.parametrize(
    "name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "=cmd|' /C calc'!A0"]
)
def test_csv_defuses_formulas(name: str) -> None:
    _, good, bad = csv_rows(made_up(name, (name, "dog"), (name,)), FailedImage(0, Path("x"), name))
    assert good[0] == good[2] == good[6] == good[-1] == bad[1] == f"'{name}"


def test_csv_names_the_unadapted_classes_in_the_last_column() -> None:
    header, one, two, none, failed = csv_rows(
        made_up(unadapted=("dog",)),
        made_up(unadapted=("dog", "cat")),
        made_up(),
        FailedImage(0, Path("x"), "empty"),
    )
    assert header[-2:] == ["complete_graph", "unadapted"]
    assert [row[-1] for row in (one, two, none, failed)] == ["dog", "cat; dog", "", ""]
    assert {len(row) for row in (one, two, none, failed)} == {len(header)}


def test_csv_pads_fewer_classes_than_asked_for() -> None:
    header, row = csv_rows(made_up(), top_k=4)
    assert len(row) == len(header)
    assert row[6:10] == [""] * 4


def test_undecodable_file_names_can_be_written() -> None:
    path = os.fsdecode(b"bad\xff.png")
    _, row = csv_rows(made_up(path))
    assert row[0] == "bad\\xff.png"
    written, content = json_line(made_up(path))
    assert content["path"] == path
    assert written.count(b"\n") == 1


def test_json_lines_hold_one_line_an_image() -> None:
    written, content = json_line(made_up("a\nb.png"))
    assert written.count(b"\n") == 1
    assert content["top"] == [
        {"class": "cat", "probability": 0.5, "logit": 10.0, "adapted": True},
        {"class": "dog", "probability": 0.5, "logit": 10.0, "adapted": True},
    ]
    shares = {"mask_share": 0.25, "cls_class": "cat", "fg_class": "dog"}
    assert {name: content[name] for name in shares} == shares
    _, marked = json_line(made_up(unadapted=("dog",)))
    assert isinstance(marked["top"], list)
    assert [guess["adapted"] for guess in marked["top"]] == [True, False]
    _, failed = json_line(FailedImage(0, Path("x"), "empty"))
    assert failed == {"path": "x", "error": "empty"}


def write_array(stream: io.StringIO, results: Iterable[Result]) -> None:
    with JsonWriter(stream) as writer:
        for result in results:
            writer.write(result)


def json_array(*results: Result) -> str:
    stream = io.StringIO()
    write_array(stream, results)
    return stream.getvalue()


def test_json_is_one_array_of_what_json_lines_hold() -> None:
    results = (made_up(os.fsdecode(b"bad\xff.png")), FailedImage(0, Path("x"), "empty"))
    assert json.loads(json_array(*results)) == [json_line(result)[1] for result in results]
    assert json.loads(json_array()) == []
    json_array(*results).encode("utf-8")


def test_json_is_complete_where_no_image_could_be_read(session: Session, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    stream = io.StringIO()
    with pytest.raises(DataError):
        write_array(stream, predict(session, [tmp_path]))
    assert json.loads(stream.getvalue())[0]["error"] == "the file is empty"


def test_json_stays_open_after_any_other_error() -> None:
    def interrupted() -> Iterator[Result]:
        yield made_up()
        raise KeyboardInterrupt

    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        write_array(stream, interrupted())
    with pytest.raises(json.JSONDecodeError):
        json.loads(stream.getvalue())


@pytest.mark.parametrize(
    ("output_format", "start"), [("csv", "path,error,"), ("json", "[\n{"), ("jsonl", '{"path"')]
)
def test_formats_have_their_writers(
    output_format: Literal["csv", "json", "jsonl"], start: str
) -> None:
    stream = io.StringIO()
    with open_writer(output_format, stream, 2) as writer:
        writer.write(made_up())
    assert stream.getvalue().startswith(start)


def test_overlays_are_written_for_good_images_only(tmp_path: Path) -> None:
    writer = OverlayWriter(tmp_path / "deep" / "down")
    writer.write(made_up("../x/../../naïve name?.png"))
    writer.write(FailedImage(0, Path("x"), "empty"))
    (written,) = (tmp_path / "deep" / "down").iterdir()
    assert written.name == "000003-na-ve-name.png"
    with Image.open(written) as picture:
        assert picture.size == (16, 16)


def test_an_overlay_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="could not be written"):
        OverlayWriter(tmp_path / "file")


def test_overlay_names_never_leave_the_folder() -> None:
    assert overlay_name(made_up("/etc/..")) == "000003-image.png"


def shown(found: Table) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(found)
    return captured.get()


def test_the_table_marks_disagreement_and_shows_markup_as_text() -> None:
    told: list[int] = []
    results: list[Result] = [
        made_up(names=("[red]cat", "dog")),
        FailedImage(4, Path("b\x1b.png"), "empty"),
    ]
    text = shown(table(results, on_result=lambda result: told.append(result.index)))
    assert "[red]cat *" in text
    assert "b\\x1b.png" in text
    assert told == [3, 4]
    assert "†" not in text


@pytest.mark.parametrize(
    ("unadapted", "marks"), [("cat", ["cat† *", "dog 0.50"]), ("dog", ["cat *", "dog† 0.50"])]
)
def test_the_table_marks_and_explains_unadapted_classes(unadapted: str, marks: list[str]) -> None:
    text = shown(table([made_up(unadapted=(unadapted,)), made_up()]))
    assert "† added after the adaptation" in " ".join(text.split())
    assert all(mark in text for mark in marks)
    assert text.count("†") == 2
