"""Photos in, named classes out: one or several, from files and from memory."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import microclip_deploy
from microclip_deploy import Classification, Session, open_session
from microclip_deploy.data.sources import list_images
from microclip_deploy.errors import DataError, UsageError
from microclip_deploy.evaluation.predict import ImagePrediction, predict

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def session(tiny_export: Path) -> Iterator[Session]:
    with open_session(tiny_export, threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def paths(photos: Path) -> list[Path]:
    return list(list_images(photos).paths[:5])


def names_of(results: list[Classification]) -> list[list[tuple[str, float]]]:
    return [[(guess.name, round(guess.probability, 5)) for guess in r.top] for r in results]


def test_a_result_says_what_the_command_says(session: Session, paths: list[Path]) -> None:
    found = session.classify(paths, batch_size=2)
    for one, wanted in zip(found, predict(session, paths), strict=True):
        assert isinstance(wanted, ImagePrediction)
        assert names_of([one])[0] == [(g.name, round(g.probability, 5)) for g in wanted.top]
        np.testing.assert_array_equal(one.tokens, wanted.mask)
        assert (one.class_name, one.probability) == (one.top[0].name, one.top[0].probability)
        assert sum(guess.probability for guess in one.top) == pytest.approx(1)


def test_photos_are_taken_in_every_form(session: Session, paths: list[Path]) -> None:
    wanted = names_of(session.classify(paths, top_k=2))
    arrays = [np.asarray(Image.open(path)) for path in paths]
    forms: list[Any] = [
        list(map(str, paths)), np.array(list(map(str, paths))), iter(paths), tuple(paths),
        [Image.open(path) for path in paths], arrays, np.stack(arrays),
    ]  # fmt: skip
    for form in forms:
        assert names_of(session.classify(form, top_k=2)) == wanted
    one: Any
    for one in (paths[0], str(paths[0]), Image.open(paths[0]), arrays[0]):
        assert names_of([session.classify(one, top_k=2)]) == wanted[:1]
    assert session.classify([]) == []


def test_the_mask_has_the_size_of_the_photo_and_lies_where_the_view_lay(session: Session) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    found = session.classify(photo)
    assert (found.size, found.mask.shape) == ((128, 64), (64, 128))
    assert found.mask.dtype == np.bool_
    np.testing.assert_array_equal(found.mask[::16, 32:96:16].ravel(), found.tokens)
    assert not found.mask[:, :32].any()
    assert not found.mask[:, 96:].any()
    assert found.overlay().size == (128, 64)
    assert found.overlay(max_side=50).size == (50, 25)


def test_a_notebook_shows_picture_and_table(session: Session, paths: list[Path]) -> None:
    found = session.classify(paths[0])
    page = found._repr_html_()
    assert page.count("data:image/png;base64,") == 1
    for guess in found.top:
        assert f"<bdi>{guess.name}</bdi>" in page
        assert f"{guess.name} {guess.probability:.3f}" in repr(found)


def test_a_notebook_shows_the_table_of_a_photo_that_is_gone(
    session: Session, paths: list[Path], tmp_path: Path
) -> None:
    copy = tmp_path / "<b>.png"
    copy.write_bytes(paths[0].read_bytes())
    found = session.classify(copy)
    copy.unlink()
    page = found._repr_html_()
    assert "&lt;b&gt;.png: expected a readable image" in page
    assert f"<bdi>{found.class_name}</bdi>" in page
    with pytest.raises(DataError):
        found.overlay()


def test_a_wrong_picture_among_several_is_named(session: Session, paths: list[Path]) -> None:
    wrong: list[Any] = [*paths[:3], None]
    with pytest.raises(DataError, match=r"pictures\[3\]: expected a path, .*found NoneType"):
        session.classify(wrong, batch_size=2)
    with pytest.raises(DataError, match=r"none\.jpg: .*there is no such file"):
        session.classify([paths[0], "none.jpg"])


@pytest.mark.parametrize("number", [0, -1, 1.5, "3"])
def test_what_is_no_number_is_refused(session: Session, paths: list[Path], number: Any) -> None:
    one: Any = np.int64(1)
    found = session.classify(paths[0], top_k=one)
    for use in (
        lambda: session.classify(paths[0], top_k=number),
        lambda: session.classify(paths[0], batch_size=number),
        lambda: found.overlay(number),
    ):
        with pytest.raises(UsageError, match="expected a whole number from 1 on"):
            use()


def test_one_import_is_enough() -> None:
    assert microclip_deploy.__all__ == sorted(microclip_deploy.__all__)
    assert all(hasattr(microclip_deploy, name) for name in microclip_deploy.__all__)


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_examples_of_the_manual_run(
    page: str,
    paths: list[Path],
    tiny_export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    for folder in ("runs", "new"):
        (tmp_path / folder).mkdir()
    (tmp_path / "runs" / "birds").symlink_to(tiny_export)
    Image.open(paths[0]).save(tmp_path / "new" / "1.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, page, "exec"), {})
    assert capsys.readouterr().out.startswith(("red", "green", "blue"))
