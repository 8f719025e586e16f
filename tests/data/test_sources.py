"""Folders and lists become deterministic image sets; bad files are named, never hidden."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from microclip_deploy.data import sources
from microclip_deploy.data.decode import BadImage, read_photo
from microclip_deploy.data.photo import Photo, PhotoConfig
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.data.sources import bad_image_limit, check_images, list_images, read_batches
from microclip_deploy.errors import DataError, UsageError

TINY = Preprocess(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def save(path: Path, shade: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (shade, shade, shade)).save(path)
    return path


def names(image_set: sources.ImageSet) -> list[str]:
    return [path.relative_to(image_set.root).as_posix() for path in image_set.paths]


@pytest.mark.parametrize(
    ("files", "listed", "labels"),
    [
        (["b.png", "a.JPG", "c.webp"], ["a.JPG", "b.png", "c.webp"], (None, None, None)),
        (
            ["dog/2024/a.png", "cat/b.png", "loose.png"],
            ["cat/b.png", "dog/2024/a.png", "loose.png"],
            ("cat", "dog", None),
        ),
        (["cafe\u0301/a.png"], ["cafe\u0301/a.png"], ("caf\u00e9",)),  # composed as class names are
        (["a.png", ".b.png", ".cache/c.png", "__MACOSX/._a.png"], ["a.png"], (None,)),
        (["a b\t.png", "日本/ü\n.png"], ["a b\t.png", "日本/ü\n.png"], (None, "日本")),
        ([os.fsdecode(b"\xff\xfe.png")], [os.fsdecode(b"\xff\xfe.png")], (None,)),
    ],
    ids=["flat", "labelled", "composed", "hidden", "odd", "undecodable"],
)
def test_folders_are_sorted_and_labelled_by_their_first_level(
    tmp_path: Path, files: list[str], listed: list[str], labels: tuple[str | None, ...]
) -> None:
    for name in files:
        save(tmp_path / name)
    found = list_images(tmp_path)
    assert names(found) == listed
    assert found.labels == labels
    assert check_images(found.paths).good == found.paths


def test_symlink_loops_end_and_no_folder_is_entered_twice(tmp_path: Path) -> None:
    save(tmp_path / "z" / "a.png")
    (tmp_path / "z" / "up").symlink_to(tmp_path)
    (tmp_path / "a").symlink_to(tmp_path / "z")
    found = list_images(tmp_path)
    assert names(found) == ["z/a.png"]
    assert found.labels == ("z",)


def test_links_to_folders_and_files_elsewhere_are_followed(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "a.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "cat").symlink_to(tmp_path / "elsewhere")
    (root / "b.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    assert names(list_images(root)) == ["b.png", "cat/a.png"]


def test_broken_link_and_renamed_text_are_found_then_reported(tmp_path: Path) -> None:
    save(tmp_path / "good.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "text.jpg").write_text("hello")
    checked = check_images(list_images(tmp_path).paths, max_bad=2)
    assert [(file.path.name, file.reason.split(":")[0]) for file in checked.bad] == [
        ("broken.png", "there is no such file"),
        ("text.jpg", "no image of a known format"),
    ]
    assert checked.good == (tmp_path / "good.png",)
    assert checked.good_indices == (1,)


@pytest.mark.parametrize("name", ["missing", "missing.csv", "missing.jpg"])
def test_missing_source_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"found nothing at .*check the path"):
        list_images(tmp_path / name)


def test_empty_folder_and_folder_of_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no files; give another folder"):
        list_images(tmp_path)
    (tmp_path / "a.psd").write_bytes(b"x")
    (tmp_path / "b.PSD").write_bytes(b"x")
    with pytest.raises(DataError, match=r"found 2 \.psd \(convert to PNG or JPEG\); give another"):
        list_images(tmp_path)


def test_unreadable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> Iterator[os.DirEntry[str]]:
        raise PermissionError(13, "Permission denied")

    # Replaced rather than chmod, which does not bind the administrator.
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="Permission denied; change its permissions"):
        list_images(tmp_path)


@pytest.mark.parametrize("name", ["one.png", "one.heic", "one"])
def test_a_single_file_is_a_source_whatever_its_ending(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    assert list_images(path).paths == (path,)


@pytest.mark.parametrize(
    ("name", "text", "paths", "labels"),
    [
        ("a.csv", "path,label\nx/1.png,cat\n2.png,\n", ["x/1.png", "2.png"], ["cat", None]),
        ("a.csv", "label,IMAGE\ncat,1.png\n", ["1.png"], ["cat"]),
        ("a.csv", "photo,year\n1.png,2024\n", ["1.png"], [None]),
        ("a.csv", "1.png,cat\n2.png,dog\n", ["1.png", "2.png"], [None, None]),
        ("a.csv", '\ufeffpath\r\n"a, ""b""\n.png"\r\n\r\n', ['a, "b"\n.png'], [None]),
        ("a.tsv", "filename\tlabel\na,b.png\tcaf\u0065\u0301\n", ["a,b.png"], ["caf\u00e9"]),
        ("a.csv", "path,label\n1.png\n", ["1.png"], [None]),
        ("a.csv", "path;label\n1.png;cat, big\n", ["1.png"], ["cat, big"]),
        ("a.csv", "\n1.png;cat\n", ["1.png"], [None]),
        ("a.csv", "label\tpath\ncat\t1.png\n", ["1.png"], ["cat"]),
        ("a.tsv", "path,label\n1.png,cat\n", ["1.png"], ["cat"]),
        ("a.csv", "path\na;b.png\n", ["a;b.png"], [None]),
        ("a.csv", "a;b.png\n", ["a;b.png"], [None]),
        ("a.txt", "\ufeffé.png\r\n\n  b c.png \n", ["é.png", "b c.png"], [None, None]),
    ],
    ids=range(14),
)
def test_lists_are_read_relative_to_their_folder(
    tmp_path: Path, name: str, text: str, paths: list[str], labels: list[str | None]
) -> None:
    (tmp_path / name).write_bytes(text.encode())
    found = list_images(tmp_path / name)
    assert found.paths == tuple(tmp_path / path for path in paths)
    assert list(found.labels) == labels
    assert found.root == tmp_path


def test_absolute_paths_in_lists_stay_absolute(tmp_path: Path) -> None:
    image = save(tmp_path / "far" / "a.png")
    (tmp_path / "list.txt").write_text(f"{image}\n")
    assert list_images(tmp_path / "list.txt").paths == (image,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at least one image path, found none"),
        (b"path,label\n", "at least one image path, found none"),
        (b"label,path\ncat,1.png\ndog\n", "line 3: expected a path in column 2"),
        (b"path\n\xff\xfe.png\n", "expected a list in UTF-8"),
        ("path\na.png\n".encode("utf-16-le"), "found zero bytes"),
        (b'path\n"' + b"x" * 200_000 + b'"\n', "expected a table"),
    ],
    ids=range(6),
)
def test_unusable_lists_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list_images(tmp_path / "list.csv")


@pytest.mark.parametrize(
    ("text", "total", "limit"),
    [("1%", 100, 1), ("1%", 99, 0), ("0.5 %", 1000, 5), ("29%", 100, 29), ("25", 3, 25), (0, 9, 0)],
)
def test_limit_of_bad_images_is_a_count_or_a_share(text: str | int, total: int, limit: int) -> None:
    assert bad_image_limit(text, total) == limit


@pytest.mark.parametrize("text", ["", "%", "-1", "101%", "-1%", "many", "1.5", "nan%", "1/0%"])
def test_malformed_limit_of_bad_images_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--max-bad-images: expected a count such as 25"):
        bad_image_limit(text, 10)


def test_too_many_bad_images_are_an_error_that_names_the_first_and_the_option(
    tmp_path: Path,
) -> None:
    paths = [save(tmp_path / "good.png"), *(tmp_path / f"{i}\n.png" for i in range(7))]
    with pytest.raises(DataError) as caught:
        check_images(paths, max_bad="50%")
    message = str(caught.value)
    assert "expected at most 4 bad ones (--max-bad-images 50%), found 7 of 8" in message
    assert "0\\n.png (there is no such file)" in message
    assert "and 2 more" in message


def test_no_good_image_is_an_error_even_when_all_may_be_bad(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found none in 1 files"):
        check_images([tmp_path / "none.png"], max_bad="100%")


def test_progress_counts_every_file_once_in_the_calling_thread(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i:02}.png") for i in range(40)]
    seen: list[tuple[int, int, bool]] = []

    def note(done: int, total: int) -> None:
        seen.append((done, total, threading.current_thread() is threading.main_thread()))

    checked = check_images(paths, threads=3, on_progress=note)
    assert seen == [(i + 1, 40, True) for i in range(40)]
    assert checked.good == tuple(paths)


def test_batches_are_the_test_views_in_order(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}.png", shade=10 * i) for i in range(7)]
    batches = list(read_batches(paths, TINY, 3, threads=2))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    images = np.concatenate([batch.images for batch in batches])
    assert images.dtype == np.uint8
    expected = np.stack([TINY.test_view(TINY.read(path)) for path in paths])
    np.testing.assert_array_equal(images, expected)


def test_bad_image_in_batches_is_reported_and_skipped_or_an_error(tmp_path: Path) -> None:
    paths = [save(tmp_path / "0.png"), tmp_path / "none.png", save(tmp_path / "2.png")]
    reported: list[tuple[int, str]] = []
    batches = list(
        read_batches(paths, TINY, 2, on_bad=lambda i, error: reported.append((i, error.reason)))
    )
    assert [batch.indices.tolist() for batch in batches] == [[0, 2]]
    assert reported == [(1, "there is no such file")]
    with pytest.raises(BadImage, match=r"none\.png"):
        list(read_batches(paths, TINY, 2))


def test_reading_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    started: list[Path] = []

    def counted(path: Path, config: PhotoConfig) -> Photo:
        started.append(path)
        return read_photo(path, config)

    monkeypatch.setattr(sources, "read_photo", counted)
    batches = read_batches([path] * 1000, TINY, 2, threads=2)
    next(batches)
    batches.close()  # type: ignore[attr-defined]  # a generator, declared as an iterator
    assert len(started) <= 2 + 4 * 2


def test_the_next_batch_is_decoded_while_one_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, whole = save(tmp_path / "a.png"), threading.Event()
    started: list[Path] = []

    def counted(path: Path, config: PhotoConfig) -> Photo:
        started.append(path)
        if len(started) == 2 * 32 - 1:  # the last is asked for together with the next batch
            whole.set()
        return read_photo(path, config)

    monkeypatch.setattr(sources, "read_photo", counted)
    batches = read_batches([path] * 1000, TINY, 32, threads=1)
    next(batches)
    assert whole.wait(timeout=60)
    batches.close()  # type: ignore[attr-defined]  # a generator, declared as an iterator


def test_batch_size_below_one_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="batch size: expected at least 1"):
        next(read_batches([], TINY, 0))
