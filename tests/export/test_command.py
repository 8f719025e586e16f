"""`export`: proven and complete, or nothing changed and evidence beside it."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest
from safetensors.numpy import load_file

from microclip_deploy import artifact
from microclip_deploy.cli.main import main
from microclip_deploy.errors import CheckpointError
from microclip_deploy.export import command
from microclip_deploy.export.proof.limits import LIMITS
from microclip_deploy.export.proof.verify import VERIFIED
from microclip_deploy.serving import open_session
from microclip_deploy.serving.exported import (
    BACKBONE,
    CLASSIFIER,
    FULL,
    HEAD,
    HEAD_WEIGHTS,
    PARITY,
    PROBES,
    read_export,
)

if TYPE_CHECKING:
    from tests.export.conftest import Remember

GRAPHS = (FULL, BACKBONE, HEAD)
FILES = {*GRAPHS, CLASSIFIER, HEAD_WEIGHTS, PROBES, PARITY, artifact.MANIFEST}
IMPOSSIBLE = {name: limits.model_copy(update={"cls": 0.0}) for name, limits in LIMITS.items()}


@pytest.fixture(scope="module", autouse=True)
def _trace_once(remember: "Remember") -> Iterator[None]:
    with remember():
        yield


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """Return a run that may be damaged."""
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture
def out(tiny_export: Path, tmp_path: Path) -> Path:
    """Return an earlier export with a proof in it that tells it from a newer one."""
    directory = shutil.copytree(tiny_export, tmp_path / "exports" / "tiny")
    (directory / VERIFIED).write_text("earlier")
    return directory


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def export(run: Path, out: Path, *options: str) -> int:
    return main(["export", str(run), "-o", str(out), *options])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one error line."""
    found = capsys.readouterr().err
    assert "Traceback" not in found
    (line,) = (line for line in found.splitlines() if line.startswith("error: "))
    return line


def test_the_proof_is_one_line_of_json(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert export(run, tmp_path / "new", "--json") == 0
    told = capfd.readouterr()
    proof = json.loads(told.out)
    assert told.out.count("\n") == 1
    assert proof["departure"] is None
    assert proof == artifact.read_json(tmp_path / "new" / PARITY)


def test_an_export_is_only_replaced_when_asked(
    run: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(out)
    assert export(run, out) == 2
    assert "--overwrite" in error_of(capsys)
    assert content(out) == before
    assert export(run, out, "--overwrite") == 0
    assert {path.name for path in out.iterdir()} == FILES
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]


def test_files_of_the_users_in_an_export_are_never_removed(
    run: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / "thesis.txt").write_text("text")
    before = content(out)
    assert export(run, out, "--overwrite") == 2
    assert "thesis.txt" in error_of(capsys)
    assert content(out) == before


def test_what_appears_during_an_export_is_not_removed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def appear(*_: object) -> None:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "thesis.txt").write_text("text")

    monkeypatch.setattr(command, "_complete", appear)
    assert export(run, tmp_path / "new") == 2
    assert content(tmp_path / "new") == {"thesis.txt": b"text"}
    assert {path.name for path in tmp_path.iterdir()} == {"run", "new"}


@pytest.mark.parametrize(
    "manifest",
    ["{", "[]", "{}", "null", '{"files": {}, "schema": 1}', '{"files": 3, "schema": "x"}'],
)
def test_a_manifest_of_others_is_no_export(run: Path, tmp_path: Path, manifest: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / artifact.MANIFEST).write_text(manifest)
    assert export(run, tmp_path / "mine", "--overwrite") == 2
    assert (tmp_path / "mine" / artifact.MANIFEST).read_text() == manifest


@pytest.mark.parametrize("kind", ["folder", "file", "run", "broken link"])
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_nothing_else_is_ever_replaced(
    run: Path, tmp_path: Path, options: tuple[str, ...], kind: str
) -> None:
    target = run if kind == "run" else tmp_path / "mine"
    if kind == "folder":
        target.mkdir()
        (target / "thesis.txt").write_text("text")
    elif kind == "file":
        target.write_text("text")
    elif kind == "broken link":
        target.symlink_to(target)
    before = target.is_symlink() or (content(target) if target.is_dir() else target.read_bytes())
    assert export(run, target, *options) == 2
    after = target.is_symlink() or (content(target) if target.is_dir() else target.read_bytes())
    assert after == before


def test_an_empty_folder_may_be_the_target(run: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    assert export(run, tmp_path / "new") == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == FILES


def test_a_link_is_kept_and_what_it_leads_to_replaced(run: Path, out: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(out)
    assert export(run, link, "--overwrite") == 0
    assert link.is_symlink()
    assert {path.name for path in out.iterdir()} == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"run", "exports", "link"}


@pytest.mark.parametrize("target", [".", "..", "../x/.."])
def test_the_working_directory_is_never_replaced(
    run: Path,
    tmp_path: Path,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert export(run, Path(target)) == 2
    assert "the working directory" in error_of(capsys)


def test_a_failed_proof_leaves_the_earlier_export_and_evidence(
    run: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "LIMITS", IMPOSSIBLE)
    before, evidence = content(out), out.with_name("tiny.failed")
    assert export(run, out, "--overwrite") == 5
    told = error_of(capsys)
    assert told.startswith("error: backbone.onnx: cls: expected at most 0 from PyTorch, found ")
    assert str(evidence / PARITY) in told
    assert content(out) == before
    assert {path.name for path in evidence.iterdir()} == {*GRAPHS, PARITY}
    assert artifact.read_json(evidence / PARITY)["departure"] == "backbone.onnx: cls"
    assert {path.name for path in out.parent.iterdir()} == {"tiny", "tiny.failed"}
    with pytest.raises(CheckpointError):
        open_session(evidence)


def test_newer_evidence_replaces_older(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "LIMITS", IMPOSSIBLE)
    out, evidence = tmp_path / "new", tmp_path / "new.failed"
    for _ in range(2):
        assert export(run, out) == 5
        assert not out.exists()
        assert {path.name for path in evidence.iterdir()} == {*GRAPHS, PARITY}
        (evidence / "older").touch()


def test_evidence_never_replaces_what_is_no_evidence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.failed").mkdir()
    (tmp_path / "new.failed" / "thesis.txt").write_text("text")
    assert export(run, tmp_path / "new", "--atol", "0") == 2
    assert "new.failed" in error_of(capsys)
    assert (tmp_path / "new.failed" / "thesis.txt").read_text() == "text"


def test_limits_of_the_users_replace_ours(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    assert export(run, new, "--atol", "1e-9") == 5
    assert error_of(capsys).startswith("error: full.onnx: logits: expected at most 1e-09 ")
    assert export(run, new, "--dtype", "int8", "--atol", "9", "--min-agreement", "0.99") == 0
    limits = read_export(new).stored["limits"]
    assert limits["top1"] == pytest.approx(0.01)
    assert (limits["logits"], limits["logits_relative"]) == (9, 0)
    assert limits["cls"] == LIMITS["int8"].cls


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--atol", "nan"),
        ("--atol", "inf"),
        ("--atol", "-1"),
        ("--min-agreement", "nan"),
        ("--min-agreement", "1.1"),
        ("--dtype", "fp8"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    run: Path, tmp_path: Path, option: str, value: str
) -> None:
    assert export(run, tmp_path / "new", option, value) == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", ["missing", "export", "truncated", "manifest", "foreign"])
def test_a_run_that_cannot_be_used_is_bad_data(
    run: Path, out: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    subject, weights = run, run / "weights.safetensors"
    if damage == "missing":
        subject = tmp_path / "none"
    elif damage == "export":
        subject = out
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "manifest":
        (run / artifact.MANIFEST).write_text("{")
    else:
        stored = artifact.read_manifest(run, "microclip.checkpoint/1")
        foreign = {**stored, "backbone": {**stored["backbone"], "sha256": "0" * 64}}
        artifact.rewrite_manifest(run, foreign, [])
    assert export(subject, tmp_path / "new") == 3
    assert error_of(capsys)
    assert not list(tmp_path.glob("*new*"))
    assert not list(tmp_path.glob(".*new*"))


def test_a_target_that_cannot_be_made_is_an_environment_problem(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert export(run, tmp_path / "file" / "new") == 4
    assert "could not be written" in error_of(capsys)


def test_a_full_disk_leaves_the_earlier_export(
    run: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(out)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert export(run, out, "--overwrite") == 4
    assert "No space left" in error_of(capsys)
    assert content(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize("moment", ["prove", "write_graphs", "_complete"])
def test_a_killed_export_leaves_the_earlier_one(
    run: Path, out: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = content(out)
    previous = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(command, moment, kill)
    try:
        assert export(run, out, "--overwrite") == 143
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
    assert content(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]


def test_photos_of_the_users_are_proven_too_and_not_stored(
    run: Path, tmp_path: Path, photos: Path
) -> None:
    assert export(run, tmp_path / "new", "--images", str(photos)) == 0
    proof = artifact.read_json(tmp_path / "new" / PARITY)
    assert proof["images"] == 48
    assert proof["source"] == f"made-up images and 24 of {photos}"
    assert list(proof["batches"])[-1] == "48"
    assert len(load_file(tmp_path / "new" / PROBES)["images"]) == 24


@pytest.mark.parametrize("kind", ["empty", "missing", "unreadable"])
def test_no_photo_is_bad_data(run: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "photos"
    if kind != "missing":
        folder.mkdir()
    if kind == "unreadable":
        (folder / "a.jpg").write_bytes(b"")
    assert export(run, tmp_path / "new", "--images", str(folder)) == 3
    assert not (tmp_path / "new").exists()


def test_auto_measures_and_takes_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run, tmp_path / "new", "--dtype", "auto") == 0
    told = capsys.readouterr().err
    for precision in ("fp32", "int8"):
        (line,) = (line for line in told.splitlines() if line.startswith(f"{precision}: "))
        assert "ms for 1, " in line
        assert line.endswith("ms for 8")
    assert {path.name for path in (tmp_path / "new").iterdir()} == FILES


@pytest.mark.parametrize(("times", "expected"), [((1, 2), "fp32"), ((2, 1), "int8")])
def test_auto_takes_the_fastest(
    run: Path,
    tmp_path: Path,
    times: tuple[int, int],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "_times", lambda *_: [[each, each] for each in times])
    assert export(run, tmp_path / "new", "--dtype", "auto") == 0
    found = read_export(tmp_path / "new")
    assert found.manifest.precision == expected
    kinds = {node.op_type for node in onnx.load(tmp_path / "new" / FULL).graph.node}
    assert ("MatMulInteger" in kinds) == (expected == "int8")
    assert artifact.read_json(tmp_path / "new" / PARITY)["precision"] == expected


@pytest.mark.parametrize(("impossible", "code"), [(("int8",), 0), (("fp32", "int8"), 5)])
def test_auto_leaves_out_what_is_not_proven(
    run: Path,
    tmp_path: Path,
    impossible: tuple[str, ...],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = {name: (IMPOSSIBLE if name in impossible else LIMITS)[name] for name in LIMITS}
    monkeypatch.setattr(command, "LIMITS", chosen)
    assert export(run, tmp_path / "new", "--dtype", "auto") == code
    told = capsys.readouterr().err
    if code == 0:
        assert "int8: departs at backbone.onnx: cls; left out" in told
        assert read_export(tmp_path / "new").manifest.precision == "fp32"
    else:
        assert artifact.read_json(tmp_path / "new.failed" / PARITY)["precision"] == "fp32"
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("package", "extra"), [("torch", "adapt"), ("onnxscript", "export"), ("onnxruntime", "cpu")]
)
def test_a_missing_package_comes_with_its_install_line(
    run: Path,
    tmp_path: Path,
    package: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert export(run, tmp_path / "new") == 4
    assert f'pip install "microclip-deploy[{extra}]"' in error_of(capsys)
