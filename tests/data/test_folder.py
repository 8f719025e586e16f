"""The search of a folder never ends early, and counts what it leaves out."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from microclip_deploy.data.sources import list_images, list_sources

JPEG = b"\xff\xd8\xff\xe0" + bytes(12)


def fill(root: Path, *names: str, content: bytes = JPEG) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


@pytest.mark.parametrize(
    ("names", "summary"),
    [
        (["a.psd", "b.PSD"], "2 .psd (convert to PNG or JPEG)"),
        (["a.cr2", "b/c.nef"], "1 .cr2, 1 .nef (camera raw: develop to JPEG or TIFF)"),
        (["a.mp4", "b.mov"], "1 .mov, 1 .mp4 (video: extract frames)"),
        (["a.zip"], "1 .zip (archive: unpack)"),
        (["a.jpg_large"], "1 .jpg_large (JPEG inside: rename, or name in a list)"),
        (["IMG_1"], "1 without an ending (JPEG inside: rename, or name in a list)"),
        (["a.txt", "b.json"], "2 beside photos, such as texts"),
        ([".a.jpg", "._b.jpg"], "2 hidden"),
        (
            ["@eaDir/a.jpg/T.jpg", ".thumbnails/a.jpg", "b/@eaDir/x.jpg"],
            "3 hidden or system folders (.thumbnails, @eaDir)",
        ),
    ],
)
def test_what_is_left_out_is_counted_by_ending(
    tmp_path: Path, names: list[str], summary: str
) -> None:
    fill(tmp_path, "good.jpg", *names)
    found = list_images(tmp_path)
    assert found.paths == (tmp_path / "good.jpg",)
    assert found.left_out.summary() == summary


def test_twenty_endings_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    fill(tmp_path, "good.jpg")
    fill(tmp_path, *(f"{number}.q{number:02}" for number in range(23)), content=b"?")
    summary = list_images(tmp_path).left_out.summary()
    assert "1 .q19" in summary
    assert summary.endswith("; 3 with other endings")


def test_a_folder_that_cannot_be_entered_is_named_and_passed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "a/1.jpg", "lost+found/2.jpg", "z/3.jpg")
    scandir = os.scandir

    def refuse(folder: Path) -> Iterator[os.DirEntry[str]]:
        if Path(folder).name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    # Replaced rather than chmod, which does not bind the administrator.
    monkeypatch.setattr(os, "scandir", refuse)
    named = list_sources(sorted(tmp_path.iterdir()))
    found = list_images(tmp_path)
    assert [path.name for path in found.paths] == ["1.jpg", "3.jpg"]
    assert (named.paths, named.left_out) == (found.paths, found.left_out)
    assert "1 folders that cannot be read" in found.left_out.summary()
    assert found.left_out.to_json()["unreadable_folders"] == [
        {"path": str(tmp_path / "lost+found"), "reason": "Permission denied"}
    ]


def test_sources_hold_what_shows_something_although_it_is_not_read(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg", "a/2.psd", "a/3.txt", "only/4.nef", "5.heic")
    sources = [tmp_path / name for name in ("a", "only", "gone.jpg", "5.heic")]
    found = list_sources(sources)
    assert [path.name for path in found.paths] == ["1.jpg", "2.psd", "4.nef", "gone.jpg", "5.heic"]
    assert "1 .psd (convert to PNG or JPEG)" in found.left_out.summary()


def test_a_photo_is_known_by_its_content_where_its_ending_needs_a_plugin(tmp_path: Path) -> None:
    fill(tmp_path, "renamed.heic")
    assert list_images(tmp_path).paths == (tmp_path / "renamed.heic",)
