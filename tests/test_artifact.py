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
