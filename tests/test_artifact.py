"""Artifacts are complete or absent, and nothing damaged is read."""

import os
from pathlib import Path

import pytest

from microclip_deploy import artifact
from microclip_deploy.errors import CheckpointError, EnvironmentProblem


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    artifact.write_bytes(tmp_path / "a.bin", b"12345")
    artifact.write_manifest(tmp_path, "thing/1", {"x": 1}, ["a.bin"])
    return tmp_path


def test_a_written_artifact_is_read(directory: Path) -> None:
    assert artifact.read_manifest(directory, "thing/1")["x"] == 1


def test_other_versions_are_refused(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="expected schema thing/2, found thing/1"):
        artifact.read_manifest(directory, "thing/2")


def test_changed_bytes_are_refused(directory: Path) -> None:
    (directory / "a.bin").write_bytes(b"12346")
    with pytest.raises(CheckpointError, match="bytes are not"):
        artifact.read_manifest(directory, "thing/1")


def test_a_failed_write_leaves_the_old_file_and_no_rest(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentProblem, match="No space left"):
        artifact.write_bytes(directory / "a.bin", b"new")
    assert (directory / "a.bin").read_bytes() == b"12345"
    assert sorted(path.name for path in directory.iterdir()) == ["a.bin", "manifest.json"]


def test_nan_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        artifact.write_json(tmp_path / "x.json", float("nan"))


def test_a_file_name_that_is_no_utf8_survives_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    artifact.write_json(tmp_path / "x.json", {"name": name})
    assert artifact.read_json(tmp_path / "x.json")["name"] == name


def test_a_rewritten_manifest_keeps_what_it_listed(directory: Path) -> None:
    stored = artifact.read_manifest(directory, "thing/1")
    (directory / "b.bin").write_bytes(b"678")
    artifact.rewrite_manifest(directory, {**stored, "x": 2}, ["b.bin"])
    found = artifact.read_manifest(directory, "thing/1")
    assert found["x"] == 2
    assert found["files"]["a.bin"] == stored["files"]["a.bin"]
    assert found["files"]["b.bin"]["bytes"] == 3
    (directory / "a.bin").write_bytes(b"12346")
    with pytest.raises(CheckpointError, match="bytes are not"):
        artifact.read_manifest(directory, "thing/1")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Return a directory that is to be replaced."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").touch()
    return tmp_path / "target"


def test_a_staged_directory_takes_its_place_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with artifact.staged_directory(target) as folder:
        (folder / "new").touch()
        assert folder.parent == target.parent
        assert folder.name.startswith(".")
        assert not target.exists()
    assert names(target) == ["new"]
    assert names(target.parent) == ["target"]


def test_a_staged_directory_replaces_the_old_one_whole(target: Path) -> None:
    with artifact.staged_directory(target) as folder:
        (folder / "new").touch()
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(target.parent) == ["target"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_while_staging_leaves_the_old_directory(
    target: Path, error: type[BaseException]
) -> None:
    def fail() -> None:
        with artifact.staged_directory(target) as folder:
            (folder / "new").touch()
            raise error

    with pytest.raises(error):
        fail()
    assert names(target) == ["old"]
    assert names(target.parent) == ["target"]


def test_what_was_staged_may_go_elsewhere(target: Path) -> None:
    with artifact.staged_directory(target) as folder:
        (folder / "new").touch()
        folder.rename(target.with_name("evidence"))
    assert names(target) == ["old"]
    assert names(target.parent) == ["evidence", "target"]


def test_staging_below_a_file_is_an_environment_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(EnvironmentProblem, match="could not be written"),
        artifact.staged_directory(tmp_path / "file" / "target"),
    ):
        raise AssertionError("nothing may be staged there")


def test_a_rename_that_fails_brings_the_old_directory_back(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def failing(source: Path, destination: Path) -> None:
        if source.name.endswith(".part"):
            raise OSError(5, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    with (
        pytest.raises(EnvironmentProblem, match="Input/output error"),
        artifact.staged_directory(target) as folder,
    ):
        (folder / "new").touch()
    assert names(target) == ["old"]
    assert names(target.parent) == ["target"]


def test_a_link_is_followed_and_a_device_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")  # which is not there yet
    artifact.write_bytes(tmp_path / "link", b"1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"1"
    reading, writing = os.pipe()
    artifact.write_bytes(Path(f"/dev/fd/{writing}"), b"2")
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert pipe.read() == b"2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
