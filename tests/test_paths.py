"""Every public function takes a path as text, Path or os.PathLike, and explains what is none."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from microclip_deploy import open_session, read_image
from microclip_deploy.data.sources import list_images
from microclip_deploy.errors import UsageError
from microclip_deploy.evaluation.evaluate import LabelledImages, evaluate
from microclip_deploy.paths import as_path
from microclip_deploy.serving import is_export, open_graphs, open_run


class Pathlike:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


@pytest.mark.parametrize("kind", [str, Path, Pathlike])
def test_paths_of_every_kind_are_taken(
    kind: Callable[[Path], Any], finished_run: Path, tiny_export: Path, photos: Path
) -> None:
    run, export, data = map(kind, (finished_run, tiny_export, photos))
    assert (is_export(run), is_export(export)) == (False, True)
    for session in (open_session(run), open_session(export), open_graphs(export)):
        session.close()
    with open_run(run) as sessions:
        found = evaluate(run, data, sessions=sessions)
    assert found.images == 24
    image = kind(list_images(data).paths[0])
    assert read_image(image).size == (48, 40)
    assert len(list_images(image).paths) == 1


TAKERS: list[Callable[[Any], object]] = [
    open_session, open_run, open_graphs, is_export, read_image, list_images,
    lambda path: evaluate(path, "labelled"), lambda path: LabelledImages.read(path, ("a", "b")),
]  # fmt: skip


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize(("wrong", "found"), [
    (None, "NoneType"), (3, "int"), (b"photos", "bytes"), ("", "an empty text"), (["a"], "list"),
    (Path, "type"),
])  # fmt: skip
def test_what_is_no_path_is_explained(
    taker: Callable[[Any], object], wrong: object, found: str
) -> None:
    with pytest.raises(UsageError, match=rf"expected a path .*, found {found}; give one"):
        taker(wrong)


def test_a_tilde_is_the_home_folder_unless_there_is_such_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert as_path("~/run", "run") == tmp_path / "run"
    assert as_path("~", "run") == tmp_path
    assert as_path(os.path.join("a", "~"), "run") == Path("a", "~")
    assert as_path("~nobody-of-that-name", "run") == Path("~nobody-of-that-name")
    (tmp_path / "~").mkdir()
    assert as_path("~", "run") == Path("~")
