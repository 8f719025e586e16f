"""Files of class frequencies, and of a person's answers."""

from pathlib import Path

import pytest

from microclip_deploy.data.answers import Answered, read_answers
from microclip_deploy.data.prior import read_prior
from microclip_deploy.errors import DataError

CLASSES = ("red circle", "green square", "blue stripe")


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", "class,weight\nblue stripe,6\nRed_Circle,3\ngreen square,1\n"),
        ("p.csv", "red circle,3\n\ngreen square,1\nblue stripe,6"),
        ("p.json", '{"red circle": 0.3, "green square": 0.1, "blue stripe": 0.6}'),
    ],
)
def test_a_prior_is_in_the_order_of_the_classes(tmp_path: Path, name: str, text: str) -> None:
    found = read_prior(written(tmp_path, name, text), CLASSES)
    assert found.tolist() == pytest.approx([0.3, 0.1, 0.6])


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.csv", "red circle,3\ngreen square,1\n", "no weight for 1, such as 'blue stripe'"),
        ("p.csv", "red circle,3\nRed Circle,3\n", "'Red Circle' a second time"),
        ("p.csv", "red circle,3\nred cube,3\n", "'red cube' which is none"),
        ("p.csv", "red circle,-3\n", "found '-3'"),
        ("p.csv", "red circle,nan\n", "found 'nan'"),
        ("p.csv", "red circle,many\n", "found 'many'"),
        ("p.csv", "red circle,0\ngreen square,0\nblue stripe,0\n", "found 0"),
        ("p.csv", "red circle,1,2\n", "found 3 cells"),
        ("p.csv", "", "found no line"),
        ("p.csv", "class,weight\n", "found no line"),
        ("p.json", "", "expected JSON"),
        ("p.json", "[1, 2, 3]", "found another"),
        ("p.json", '{"red circle": 1, "red circle": 1}', "a second time"),
        ("p.json", '{"red circle": {"a": 1}}', "expected a number"),
        ("p.json", '{"red circle": true}', "found True"),
    ],
)
def test_what_is_no_prior_is_named(tmp_path: Path, name: str, text: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_prior(written(tmp_path, name, text), CLASSES)


def test_answers_are_read_as_they_were_clicked(tmp_path: Path) -> None:
    text = "path,answer,weight\na.png,Red circle,2.5\nb/c.png,none,\nd.png,,\n"
    assert read_answers(written(tmp_path, "a.csv", text), CLASSES) == (
        Answered(tmp_path / "a.png", 0, False, 2.5),
        Answered(tmp_path / "b/c.png", None, True, 1.0),
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "found none"),
        ("a.png,red circle\nb.png,none\n", "found a.png, red circle"),
        ("path,answer\na.png,red cube\n", "line 2: expected a class"),
        ("path,answer\n,none\n", "line 2: expected a path"),
        ("path,answer,weight\na.png,none,0\n", "weight above 0"),
        ("path,answer,weight\na.png,none,x\n", "weight above 0"),
    ],
)
def test_what_is_no_answer_is_named(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_answers(written(tmp_path, "a.csv", text), CLASSES)
