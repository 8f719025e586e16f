"""Paths into tars are photos like any other, and damaged tars say so."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from microclip_deploy.data.archive import INDEX_ENDING, index_of
from microclip_deploy.data.contents import contents
from microclip_deploy.data.decode import BadImage, read_photo
from microclip_deploy.data.index import Entry, Index
from microclip_deploy.data.photo import USUAL
from microclip_deploy.data.sources import NoImages, check_images, list_images, list_sources
from microclip_deploy.errors import DataError


def photo(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((10, 12, 3), shade, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, files: dict[str, bytes], *others: tarfile.TarInfo) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in others:
            tar.addfile(member)
    return path


def names(source: Path) -> list[str]:
    return [path.relative_to(source).as_posix() for path in list_images(source).paths]


def test_a_tar_reads_as_the_folder_it_was_made_of(tmp_path: Path) -> None:
    files = {"cat/1.png": photo(1), "a-b/3.png": photo(3), "a/2.png": photo(2), "4.png": photo(4)}
    for name, content in files.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    tar = write_tar(tmp_path / "photos.tar", files)
    inside, outside = list_images(tar), list_images(tmp_path / "folder")
    assert names(tar) == names(tmp_path / "folder")
    assert inside.labels == outside.labels
    assert contents(inside.paths) == contents(outside.paths)
    assert check_images(inside.paths).good == inside.paths
    pixels = [np.asarray(read_photo(path, USUAL).image)[0, 0, 0] for path in inside.paths]
    assert pixels == [4, 2, 3, 1]


def test_a_folder_inside_a_tar_and_a_single_member_are_sources(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "x.tar", {"./set/cat/1.png": photo(1), "other/2.png": photo(2), "set.txt": b""}
    )
    found = list_images(tar / "set")
    assert (names(tar / "set"), found.labels) == (["cat/1.png"], ("cat",))
    assert list_images(tar / "other" / "2.png").paths == (tar / "other" / "2.png",)
    assert len(list_sources([tar, tar / "set"]).paths) == 3
    (tmp_path / "list.csv").write_text("path,label\nx.tar/other/2.png,dog\n")
    listed = list_images(tmp_path / "list.csv")
    assert (check_images(listed.paths).good, listed.labels) == (listed.paths, ("dog",))


def test_archives_of_a_folder_are_read_where_nothing_else_is(tmp_path: Path) -> None:
    write_tar(tmp_path / "b" / "1.tar", {"cat/1.png": photo(1)})
    write_tar(tmp_path / "a.tar", {"cat/1.png": photo(2), "0.png": photo(3)})
    found = list_images(tmp_path)
    assert names(tmp_path) == ["a.tar/0.png", "a.tar/cat/1.png", "b/1.tar/cat/1.png"]
    assert found.labels == (None, "cat", "b")
    (tmp_path / "loose.png").write_bytes(photo(4))
    found = list_images(tmp_path)
    assert found.paths == (tmp_path / "loose.png",)
    assert found.left_out.summary() == "2 .tar (archive: give it by itself)"


def test_what_is_no_photo_is_left_out_and_counted(tmp_path: Path) -> None:
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    pipe = tarfile.TarInfo("pipe.png")
    pipe.type = tarfile.FIFOTYPE
    files = {"1.png": photo(1), "1.json": b"{}", "1.cls": b"3", "../up.png": photo(2)}
    files |= {"/etc/root.png": photo(3), "__MACOSX/._1.png": b"", "in.tar": b"", "a/../b.png": b""}
    tar = write_tar(tmp_path / "x.tar", files, link, pipe)
    found = list_images(tar)
    assert names(tar) == ["1.png"]
    assert found.left_out.summary() == (
        "1 .cls; 1 .tar (archive: give it by itself); 1 beside photos, such as texts; 1 hidden; "
        "1 links in archives; 1 special files in archives; 3 unsafe names in archives"
    )
    with pytest.raises(BadImage, match="no such file"):
        read_photo(tar / "../x.png", USUAL)


def test_of_files_of_one_name_the_last_counts(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", {"a.png": photo(1), "./a.png": photo(2)})
    found = list_images(tar)
    assert len(found.paths) == 1
    assert "1 files of a name that comes again in archives" in found.left_out.summary()
    assert np.asarray(read_photo(found.paths[0], USUAL).image).max() == 2


@pytest.mark.parametrize("kept", [0, 300, 700, 1500, 2048])
def test_a_cut_tar_is_refused(tmp_path: Path, kept: int) -> None:
    tar = write_tar(tmp_path / "x.tar", {"a.png": photo(1), "b.png": photo(2)})
    tar.write_bytes(tar.read_bytes()[:kept])
    with pytest.raises(DataError, match="expected a whole tar file, found"):
        list_images(tar)


def test_a_tar_whose_header_is_damaged_is_refused(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", {"a.png": photo(1), "b.png": photo(2)})
    content = bytearray(tar.read_bytes())
    content[1024 + 3] ^= 255
    tar.write_bytes(content)
    with pytest.raises(DataError, match="after 1 files"):
        list_images(tar)


def test_an_empty_tar_holds_no_images(tmp_path: Path) -> None:
    with pytest.raises(NoImages, match="found no files"):
        list_images(write_tar(tmp_path / "x.tar", {}))


def test_the_index_is_kept_beside_the_tar_and_made_again_for_another(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", {"a.png": photo(1)})
    list_images(tar)
    index = tar.with_name(f"x.tar{INDEX_ENDING}")
    assert index.is_file()
    os.replace(write_tar(tmp_path / "y.tar", {"b.png": photo(2)}), tar)
    assert names(tar) == ["b.png"]  # of the same size, made in the same moment
    for damaged in (b"", b"no index", index.read_bytes()[:-9]):
        index.write_bytes(damaged)
        os.utime(tar, ns=(0, len(damaged)))
        assert names(tar) == ["b.png"]


def test_a_read_only_folder_keeps_its_index_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tar = write_tar(tmp_path / "x.tar", {"a.png": photo(1)})
    (tmp_path / f"x.tar{INDEX_ENDING}").mkdir()  # nothing can be written there, even by root
    list_images(tar)
    assert len(list((tmp_path / "cache" / "microclip-deploy").iterdir())) == 1


def test_a_tar_that_changes_under_a_run_gives_no_other_photo(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", {"a.png": photo(1), "b.png": photo(2)})
    place = list_images(tar).paths[0]
    status = tar.stat()
    content = bytearray(tar.read_bytes())
    content[:100] = b"z.png".ljust(100, b"\0")
    tar.write_bytes(content)
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BadImage, match="the archive was changed"):
        read_photo(place, USUAL)


def test_a_million_names_are_found_by_halving() -> None:
    entries = {f"class{i % 7}/{i:06d}.jpg": Entry(i, 1, -1) for i in range(5000)}
    index = Index.of(entries)
    assert index.find("class3/000010.jpg") == (10, 1, -1)
    assert index.find("class3/00001") is None
    assert next(iter(index)) == "class0/000000.jpg"
    again = Index.from_bytes(index.to_bytes())
    assert again is not None
    assert list(again) == list(index)


def test_a_folder_may_be_named_like_a_tar(tmp_path: Path) -> None:
    (tmp_path / "old.tar").mkdir()
    (tmp_path / "old.tar" / "a.png").write_bytes(photo(1))
    found = list_images(tmp_path)
    assert check_images(found.paths).good == (tmp_path / "old.tar" / "a.png",)
    assert index_of(str(write_tar(tmp_path / "new.tar", {}))).names == b""
