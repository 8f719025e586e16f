import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from microclip_deploy.errors import DataError
from microclip_deploy.evaluation.predict import (
    FailedImage,
    ImagePrediction,
    Result,
    predict,
)
from microclip_deploy.evaluation.records import (
    CsvWriter,
    JsonLinesWriter,
    JsonWriter,
    open_writer,
    table,
)
from microclip_deploy.serving import open_session
from microclip_deploy.serving.classification import Guess


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
    assert header[-3:] == ["complete_graph", "unknown", "unadapted"]
    assert [row[-1] for row in (one, two, none, failed)] == ["dog", "cat; dog", "", ""]
    assert {len(row) for row in (one, two, none, failed)} == {len(header)}


def test_overlays_get_a_last_column_and_a_key() -> None:
    drawn = replace(made_up(), overlay=Path("overlays/=1.png"))
    stream = io.StringIO(newline="")
    writer = CsvWriter(stream, 2, overlays=True)
    for result in (drawn, FailedImage(0, Path("x"), "empty")):
        writer.write(result)
    header, row, failed = csv.reader(io.StringIO(stream.getvalue(), newline=""))
    assert (header[-1], row[-1], failed[-1]) == ("overlay", "overlays/=1.png", "")
    assert len(header) == len(row) == len(failed)
    assert json_line(drawn)[1]["overlay"] == "overlays/=1.png"
    assert "overlay" not in json_line(made_up())[1]


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


def test_json_is_complete_where_no_image_could_be_read(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    stream = io.StringIO()
    with open_session(finished_run) as session, pytest.raises(DataError):
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


def shown(found: Table) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(found)
    return captured.get()


def test_the_table_marks_disagreement_and_shows_markup_as_text() -> None:
    results: list[Result] = [
        made_up(names=("[red]cat", "dog")),
        FailedImage(4, Path("b\x1b.png"), "empty"),
    ]
    text = shown(table(results))
    assert "[red]cat *" in text
    assert "b\\x1b.png" in text
    assert "†" not in text


@pytest.mark.parametrize(
    ("unadapted", "marks"), [("cat", ["cat† *", "dog 0.50"]), ("dog", ["cat *", "dog† 0.50"])]
)
def test_the_table_marks_and_explains_unadapted_classes(unadapted: str, marks: list[str]) -> None:
    text = shown(table([made_up(unadapted=(unadapted,)), made_up()]))
    assert "† added after the adaptation" in " ".join(text.split())
    assert all(mark in text for mark in marks)
    assert text.count("†") == 2
