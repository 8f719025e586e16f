"""The file of answers, also after it was edited by hand."""

import codecs
from collections.abc import Callable
from pathlib import Path

import pytest

from microclip_deploy.audit.clicks import Click, Sheet, first_open, handled
from microclip_deploy.audit.plan import Plan
from microclip_deploy.errors import DataError
from tests.audit.made import made_plan


def said(sheet: Sheet) -> list[str]:
    return [click.answer for click in sheet.read()]


def test_answers_are_kept_and_taken_back(sheet: Sheet) -> None:
    for number, text in enumerate(["hen", "Chateau".replace("a", "â", 1), "NEITHER", "skip"], 1):
        assert sheet.answer(number, text)
    assert said(sheet)[:5] == ["hen", "château", "neither", "skip", ""]
    sheet.undo()
    assert said(sheet)[2:5] == ["neither", "", ""]
    assert first_open(sheet.read()) == 4


def test_second_answer_to_a_photo_changes_nothing(sheet: Sheet) -> None:
    assert sheet.answer(1, "hen")
    assert not sheet.answer(1, "neither")
    assert said(sheet)[:2] == ["hen", ""]


def test_name_that_looks_like_a_formula_survives(sheet: Sheet) -> None:
    sheet.answer(1, "=1+1")
    assert said(sheet)[0] == "=1+1"
    assert ",=" not in sheet.path.read_text()


def test_unknown_answer_is_refused_with_a_near_name(sheet: Sheet) -> None:
    with pytest.raises(DataError, match="did you mean arctic loon"):
        sheet.answer(1, "artic lon")


def excel(text: str) -> bytes:
    return codecs.BOM_UTF8 + text.replace(",", ";").replace("\n", "\r\n").encode()


def unicode_text(text: str) -> bytes:
    return text.replace(",", "\t").encode("utf-16")


@pytest.mark.parametrize("saved", [str.encode, excel, unicode_text])
def test_spreadsheet_may_save_as_it_likes(sheet: Sheet, saved: Callable[[str], bytes]) -> None:
    text = sheet.path.read_text()
    first, *rest = text.split("\n")
    rest[0] = rest[0][: -len(",,")] + ",arctic loon,"
    sheet.path.write_bytes(saved("\n".join([first, *sorted(rest[:-1], reverse=True), ",,,,,", ""])))
    assert said(sheet)[0] == "arctic loon"
    assert sheet.answer(2, "hen")
    assert said(sheet)[:2] == ["arctic loon", "hen"]


def edit(change: Callable[[list[str]], None]) -> Callable[[str], str]:
    def edited(text: str) -> str:
        lines = text.split("\n")
        change(lines)
        return "\n".join(lines)

    return edited


def changed(line: int, how: Callable[[str], str]) -> Callable[[str], str]:
    return edit(lambda lines: lines.__setitem__(line, how(lines[line])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(2, lambda line: line[:-1]), "line 3: expected 6 cells, found 5"),
        (
            changed(2, lambda line: line[:-1] + "artic loon,"),
            "line 3: .*did you mean 'arctic loon'",
        ),
        (edit(lambda lines: lines.insert(4, lines[3])), "line 5: expected number 3 once.*line 4"),
        (edit(lambda lines: lines.remove(lines[3])), "expected 9 rows, found none with number 3"),
        (
            changed(2, lambda _: "2,other.png,hen,,,"),
            "line 3: expected the path .*, found other.png",
        ),
        (changed(1, lambda line: "10" + line[1:]), "line 2: .* from 1 to 9"),
        (changed(0, lambda _: "path,answer"), "line 1: expected the columns"),
        (lambda text: "", "line 1: expected the columns"),
    ],
)
def test_mistake_is_told_with_its_line_and_nothing_is_written(
    sheet: Sheet, change: Callable[[str], str], message: str
) -> None:
    edited = change(sheet.path.read_text())
    sheet.path.write_text(edited)
    with pytest.raises(DataError, match=message):
        sheet.read()
    with pytest.raises(DataError):
        sheet.answer(1, "hen")
    assert sheet.path.read_text() == edited


def test_file_that_is_no_utf8_is_told(sheet: Sheet) -> None:
    sheet.path.write_bytes(sheet.path.read_text().encode("latin-1"))
    with pytest.raises(DataError, match="saved as UTF-8"):
        sheet.read()


def test_larger_plan_keeps_the_answers(sheet: Sheet, plan: Plan, tmp_path: Path) -> None:
    sheet.answer(1, "hen")
    larger = made_plan(clicks=14).model_copy(update={"planned": (9, 14)})
    grown = Sheet(tmp_path, larger)
    grown.begin(again=True)
    assert said(grown) == ["hen", *[""] * 13]


def test_empty_answers_before_the_last_are_behind_us() -> None:
    clicks = [Click("hen"), Click(), Click("skip"), Click()]
    assert handled(clicks) == 3
    assert first_open(clicks) == 2
