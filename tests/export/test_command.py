"""`export`: proven and complete, or nothing changed and evidence beside it."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest
from safetensors.numpy import load_file

from microclip_deploy import artifact
from microclip_deploy.cli.main import main
from microclip_deploy.errors import CheckpointError
from microclip_deploy.export import command
from microclip_deploy.export.proof.limits import Limits, Tolerance
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
    Precision,
    read_export,
)
from tests.export.damage import declare

if TYPE_CHECKING:
    from tests.export.conftest import ErrorLine

GRAPHS = (FULL, BACKBONE, HEAD)
FILES = {*GRAPHS, CLASSIFIER, HEAD_WEIGHTS, PROBES, PARITY, artifact.MANIFEST}


def allow_nothing(monkeypatch: pytest.MonkeyPatch, *precisions: str) -> None:
    """Let no [CLS] of these precisions be right."""
    limits = Tolerance.limits

    def without(tolerance: Tolerance, precision: Precision) -> Limits:
        ours = limits(tolerance, precision)
        return ours.model_copy(update={"cls": 0.0}) if precision in precisions else ours

    monkeypatch.setattr(Tolerance, "limits", without)


@pytest.fixture
def out(tiny_export: Path, tmp_path: Path) -> Path:
    """Return an earlier export with a proof in it that tells it from a newer one."""
    directory = shutil.copytree(tiny_export, tmp_path / "exports" / "tiny")
    (directory / VERIFIED).write_text("earlier")
    return directory


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def export(run: Path, out: Path, *options: str) -> int:
    return main(["export", str(run), "-o", str(out), *options])


def test_the_proof_is_one_line_of_json(
    finished_run: Path, tmp_path: Path, photos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    new.mkdir()  # an empty folder may be the target
    assert export(finished_run, new, "--json", "--images", str(photos)) == 0
    printed = capfd.readouterr().out
    proof = json.loads(printed)
    assert printed.count("\n") == 1
    assert proof["departure"] is None
    assert proof == artifact.read_json(new / PARITY)
    assert proof["images"] == 48
    assert proof["source"] == f"made-up images and 24 of {photos}"
    assert list(proof["batches"])[-1] == "48"
    assert len(load_file(new / PROBES)["images"]) == 24, "photos of the user's are never stored"


def test_an_export_is_only_replaced_when_asked(
    finished_run: Path, out: Path, tmp_path: Path, error_line: "ErrorLine"
) -> None:
    link, before = tmp_path / "link", content(out)
    link.symlink_to(out)
    assert export(finished_run, link) == 2
    assert "--overwrite" in error_line()
    assert content(out) == before
    assert export(finished_run, link, "--overwrite") == 0
    assert names(out) == FILES
    assert names(out.parent) == {"tiny"}
    assert link.is_symlink()
    assert names(tmp_path) == {"exports", "link"}


def test_files_of_the_users_in_an_export_are_never_removed(
    finished_run: Path, out: Path, error_line: "ErrorLine"
) -> None:
    (out / "thesis.txt").write_text("text")
    before = content(out)
    assert export(finished_run, out, "--overwrite") == 2
    assert "thesis.txt" in error_line()
    assert content(out) == before


def test_what_appears_during_an_export_is_not_removed(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def appear(*_: object) -> None:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "thesis.txt").write_text("text")

    monkeypatch.setattr(artifact, "write_manifest", appear)
    assert export(finished_run, tmp_path / "new") == 2
    assert content(tmp_path / "new") == {"thesis.txt": b"text"}
    assert names(tmp_path) == {"new"}


@pytest.mark.parametrize(
    "manifest",
    ["{", "[]", "{}", "null", '{"files": {}, "schema": 1}', '{"files": 3, "schema": "x"}'],
)
def test_a_manifest_of_others_is_no_export(
    finished_run: Path, tmp_path: Path, manifest: str
) -> None:
    (tmp_path / artifact.MANIFEST).write_text(manifest)
    assert export(finished_run, tmp_path, "--overwrite") == 2
    assert content(tmp_path) == {artifact.MANIFEST: manifest.encode()}


@pytest.mark.parametrize("kind", ["folder", "file", "run", "broken link"])
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_nothing_else_is_ever_replaced(
    finished_run: Path, tmp_path: Path, options: tuple[str, ...], kind: str
) -> None:
    target = tmp_path / "mine"
    if kind == "folder":
        target.mkdir()
        (target / "thesis.txt").write_text("text")
    elif kind == "file":
        target.write_text("text")
    elif kind == "broken link":
        target.symlink_to(target)
    else:
        shutil.copytree(finished_run, target)

    def state() -> object:
        return target.is_symlink() or (content(target) if target.is_dir() else target.read_bytes())

    before = state()
    assert export(target if kind == "run" else finished_run, target, *options) == 2
    assert state() == before


@pytest.mark.parametrize("target", [".", "..", "../x/.."])
def test_the_working_directory_is_never_replaced(
    finished_run: Path,
    tmp_path: Path,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
    error_line: "ErrorLine",
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert export(finished_run, Path(target)) == 2
    assert "the working directory" in error_line()


def test_a_failed_proof_leaves_the_earlier_export_and_the_newest_evidence(
    finished_run: Path, out: Path, monkeypatch: pytest.MonkeyPatch, error_line: "ErrorLine"
) -> None:
    allow_nothing(monkeypatch, "fp32")
    before, evidence = content(out), out.with_name("tiny.failed")
    for _ in range(2):
        assert export(finished_run, out, "--overwrite") == 5
        line = error_line()
        assert line.startswith("error: backbone.onnx: cls: expected at most 0 from PyTorch, found ")
        assert str(evidence / PARITY) in line
        assert content(out) == before
        assert names(evidence) == {*GRAPHS, PARITY}
        assert artifact.read_json(evidence / PARITY)["departure"] == "backbone.onnx: cls"
        assert names(out.parent) == {"tiny", "tiny.failed"}
        with pytest.raises(CheckpointError):
            open_session(evidence)
        (evidence / "older").touch()


def test_evidence_never_replaces_what_is_no_evidence(
    finished_run: Path, tmp_path: Path, error_line: "ErrorLine"
) -> None:
    (tmp_path / "new.failed").mkdir()
    (tmp_path / "new.failed" / "thesis.txt").write_text("text")
    assert export(finished_run, tmp_path / "new", "--atol", "0") == 2
    assert "new.failed" in error_line()
    assert (tmp_path / "new.failed" / "thesis.txt").read_text() == "text"


def test_limits_of_the_users_replace_ours(
    finished_run: Path, tmp_path: Path, error_line: "ErrorLine"
) -> None:
    new = tmp_path / "new"
    assert export(finished_run, new, "--atol", "1e-9") == 5
    line = error_line()
    assert line.startswith("error: full.onnx: logits: expected at most 1e-09 ")
    assert "fp32 is the most exact --dtype; if this is near enough, export with --atol " in line
    assert export(finished_run, new, "--atol", line.rpartition(" ")[2]) == 0
    options = ("--dtype", "int8", "--overwrite", "--atol", "9", "--min-agreement", "0.99")
    assert export(finished_run, new, *options) == 0
    tolerance = Tolerance.model_validate(read_export(new).stored["tolerance"])
    assert (tolerance.atol, tolerance.min_agreement) == (9, 0.99)
    limits = tolerance.limits("int8")
    assert (limits.logits, limits.cls) == (9, Tolerance().limits("int8").cls)
    assert limits.top1 == pytest.approx(0.01)


@pytest.mark.parametrize(
    "option",
    ["--atol=nan", "--atol=inf", "--atol=-1", "--min-agreement=nan", "--min-agreement=1.1",
     "--dtype=fp8", "--device=auto", "--calibration=static"],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(
    finished_run: Path, tmp_path: Path, option: str
) -> None:
    assert export(finished_run, tmp_path / "new", option) == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", ["export", "foreign", "no photo"])
def test_what_cannot_be_used_is_bad_data(
    finished_run: Path, out: Path, tmp_path: Path, damage: str, error_line: "ErrorLine"
) -> None:
    run = out if damage == "export" else shutil.copytree(finished_run, tmp_path / "run")
    options = ("--images", str(tmp_path / "none")) if damage == "no photo" else ()
    if damage == "foreign":
        stored = artifact.read_json(run / artifact.MANIFEST)
        declare(run, backbone={**stored["backbone"], "sha256": "0" * 64})
    assert export(run, tmp_path / "new", *options) == 3
    assert error_line()
    assert not list(tmp_path.glob("*new*"))
    assert not list(tmp_path.glob(".*new*"))


def test_a_full_disk_leaves_the_earlier_export(
    finished_run: Path, out: Path, monkeypatch: pytest.MonkeyPatch, error_line: "ErrorLine"
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = content(out)
    monkeypatch.setattr(os, "fsync", full)
    assert export(finished_run, out, "--overwrite") == 4
    assert "No space left" in error_line()
    assert content(out) == before
    assert names(out.parent) == {"tiny"}


@pytest.mark.parametrize("moment", ["write_graphs", "prove", "ExportManifest"])
def test_a_killed_export_leaves_the_earlier_one(
    finished_run: Path, out: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = content(out)
    previous = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(command, moment, kill)
    try:
        assert export(finished_run, out, "--overwrite") == 143
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
    assert content(out) == before
    assert names(out.parent) == {"tiny"}


def test_auto_measures_and_takes_one(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(finished_run, tmp_path / "new", "--dtype", "auto") == 0
    printed = capsys.readouterr().err.splitlines()
    for precision in ("fp32", "int8"):
        (line,) = (line for line in printed if line.startswith(f"{precision}: "))
        assert "ms for 1, " in line
        assert line.endswith("ms for 8")


@pytest.mark.parametrize(("times", "expected"), [((1, 2), "fp32"), ((2, 1), "int8")])
def test_auto_takes_the_fastest(
    finished_run: Path,
    tmp_path: Path,
    times: tuple[int, int],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "_times", lambda *_: [[each, each] for each in times])
    new = tmp_path / "new"
    assert export(finished_run, new, "--dtype", "auto") == 0
    assert names(new) == FILES
    assert read_export(new).manifest.precision == expected
    kinds = {node.op_type for node in onnx.load(new / FULL).graph.node}
    assert ("MatMulInteger" in kinds) == (expected == "int8")
    assert artifact.read_json(new / PARITY)["precision"] == expected


@pytest.mark.parametrize(("impossible", "code"), [(("int8",), 0), (("fp32", "int8"), 5)])
def test_auto_leaves_out_what_is_not_proven(
    finished_run: Path,
    tmp_path: Path,
    impossible: tuple[str, ...],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    allow_nothing(monkeypatch, *impossible)
    assert export(finished_run, tmp_path / "new", "--dtype", "auto") == code
    if code == 0:
        assert "int8: departs at backbone.onnx: cls; left out" in capsys.readouterr().err
        assert read_export(tmp_path / "new").manifest.precision == "fp32"
    else:
        assert artifact.read_json(tmp_path / "new.failed" / PARITY)["precision"] == "fp32"
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("package", "extra"), [("torch", "adapt"), ("onnxscript", "export"), ("onnxruntime", "cpu")]
)
def test_a_missing_package_comes_with_its_install_line(
    finished_run: Path,
    tmp_path: Path,
    package: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    error_line: "ErrorLine",
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert export(finished_run, tmp_path / "new") == 4
    assert f'pip install "microclip-deploy[{extra}]"' in error_line()
