import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from safetensors.numpy import save

from microclip_deploy import artifact
from microclip_deploy.cli.main import main
from microclip_deploy.data.classes import ClassTexts
from microclip_deploy.errors import (
    CheckpointError,
    DataError,
    EnvironmentProblem,
    MicroclipError,
    UsageError,
)
from microclip_deploy.export.class_rows import ClassRow, add_classes, list_classes, remove_classes
from microclip_deploy.model.clip import BackboneSpec, load_clip
from microclip_deploy.model.text import text_heads
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.serving.exported import CLASSIFIER, FULL, SCHEMA, read_export

CLASSES = ("red circle", "green square", "blue stripe")
TEMPLATES = ("a photo of a {}.", "a drawing of a {}.")
EMBED_DIM = 32

# A class alone in a batch of texts and among others: different sums in float32.
ROW_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def pristine(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an export whose graph is a few bytes: nothing here reads it."""
    directory = tmp_path_factory.mktemp("export")
    clip = load_clip(BackboneSpec(model=f"local-dir:{tiny_model_dir}"))
    matrix = np.random.default_rng(0).normal(size=(len(CLASSES), EMBED_DIM)).astype(np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    (directory / FULL).write_bytes(b"a graph")
    (directory / CLASSIFIER).write_bytes(save({"classifier": matrix}))
    content = {
        "parent": {
            "checkpoint_sha256": "0" * 64,
            "model": clip.spec.model,
            "pretrained": clip.spec.pretrained,
            "backbone_sha256": clip.sha256,
        },
        "precision": "fp32",
        "opset": 20,
        "preprocess": clip.preprocess.model_dump(),
        "ncut": NCutSpec().stored(),
        "cls_share": 0.5,
        "classes": CLASSES,
        "templates": TEMPLATES,
        "graphs": {FULL: {"inputs": [], "outputs": []}},
        "package": {"name": "microclip-deploy", "version": "0"},
    }
    artifact.write_manifest(directory, SCHEMA, content, [FULL, CLASSIFIER])
    return directory


@pytest.fixture
def export(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "export")


def expected_rows(
    tiny_model_dir: Path, names: tuple[str, ...], sentences: tuple[tuple[str, ...], ...]
) -> np.ndarray:
    clip = load_clip(BackboneSpec(model=f"local-dir:{tiny_model_dir}"))
    return text_heads(clip.text, ClassTexts(names, sentences, TEMPLATES)).initial.numpy()


def filled(name: str) -> tuple[str, ...]:
    return tuple(template.replace("{}", name) for template in TEMPLATES)


def change_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a manifest so that only its content is wrong, not its hashes."""
    stored = artifact.read_manifest(directory, SCHEMA)
    change(stored)
    artifact.rewrite_manifest(directory, stored, [])


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {".lock"}


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    found = capsys.readouterr().err
    assert "Traceback" not in found
    assert found.count("error:") == 1
    return found


def test_added_rows_are_the_learnable_heads_start(export: Path, tiny_model_dir: Path) -> None:
    before = read_export(export)
    rows = add_classes(export, ["grey dot", "  pink\u0020cross "])
    after = read_export(export)
    assert after.manifest.classes == (*CLASSES, "grey dot", "pink cross")
    assert after.manifest.unadapted == ("grey dot", "pink cross")
    assert after.classifier.dtype == np.float32
    np.testing.assert_array_equal(after.classifier[:3], before.classifier)
    names = ("grey dot", "pink cross")
    wanted = expected_rows(tiny_model_dir, names, tuple(map(filled, names)))
    np.testing.assert_allclose(after.classifier[3:], wanted, rtol=0, atol=ROW_TOLERANCE)
    assert [row.adapted for row in rows] == [True, True, True, False, False]
    assert list_classes(export) == rows


def test_descriptions_shape_the_row(export: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    sentences = ("It is grey.", "It is small and round.")
    path = tmp_path / "descriptions.json"
    path.write_text(json.dumps({"grey dot": sentences}))
    add_classes(export, ["grey dot"], path)
    found = read_export(export).classifier[3:]
    wanted = expected_rows(tiny_model_dir, ("grey dot",), (sentences,))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROW_TOLERANCE)
    from_templates = expected_rows(tiny_model_dir, ("grey dot",), (filled("grey dot"),))
    assert np.abs(found - from_templates).max() > 1e-3


def test_only_matrix_and_manifest_change(export: Path) -> None:
    before = read_export(export).stored
    add_classes(export, ["grey dot"])
    after = read_export(export).stored
    changed = {"classes", "unadapted", "classifier", "files"}
    assert {k: v for k, v in after.items() if k not in changed} == {
        k: v for k, v in before.items() if k not in changed
    }
    assert after["files"].keys() == {FULL, after["classifier"]}
    assert after["files"][FULL] == before["files"][FULL]
    entry = after["files"][after["classifier"]]
    assert after["classifier"] == f"classifier-{entry['sha256'][:8]}.safetensors"
    assert files(export) == {"manifest.json", FULL, after["classifier"]}


def test_graphs_are_read_once_and_never_written(
    export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    sha256_file = artifact.sha256_file

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256_file(path)

    before = (export / FULL).stat()
    monkeypatch.setattr(artifact, "sha256_file", counted)
    remove_classes(export, ["red circle"])
    after = (export / FULL).stat()
    assert hashed.count(FULL) == 1
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_removing_keeps_the_other_rows_and_marks(export: Path) -> None:
    before = read_export(export).classifier
    add_classes(export, ["pink cross"])
    add_classes(export, ["grey dot"])
    rows = remove_classes(export, ["green square", "grey dot"])
    after = read_export(export)
    assert rows == list_classes(export)
    assert rows == (
        ClassRow("red circle", True),
        ClassRow("blue stripe", True),
        ClassRow("pink cross", False),
    )
    np.testing.assert_array_equal(after.classifier[:2], before[[0, 2]])
    assert files(export) == {"manifest.json", FULL, after.manifest.classifier}


def test_a_removed_class_comes_back_unadapted(export: Path) -> None:
    remove_classes(export, ["blue stripe"])
    assert add_classes(export, ["blue stripe"])[-1] == ClassRow("blue stripe", False)


@pytest.mark.parametrize(
    ("names", "kind", "part"),
    [
        (["Red Circle"], UsageError, "found 'red circle' in the export"),
        (["grey dot", "Grey Dot "], UsageError, "found 'grey dot' given too"),
        (["grey dot", " \u00a0"], UsageError, "found an empty one"),
        ([], UsageError, "at least one name"),
        (["grey\tdot"], DataError, r"U\+0009"),
        (["grey\ndot"], DataError, r"U\+000A"),
        (["grey \u202edot"], DataError, r"U\+202E"),
    ],
)
def test_names_that_cannot_be_added(
    export: Path, names: list[str], kind: type[MicroclipError], part: str
) -> None:
    with pytest.raises(kind, match=part):
        add_classes(export, names)
    assert list_classes(export) == tuple(ClassRow(name, True) for name in CLASSES)


def test_the_same_name_typed_on_another_system_is_no_new_class(export: Path) -> None:
    add_classes(export, ["caf\u00e9"])
    with pytest.raises(UsageError, match="in the export"):
        add_classes(export, ["cafe\u0301"])
    assert len(remove_classes(export, ["cafe\u0301"])) == 3


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"grey dot": ["It is grey."]}, "found none for pink cross"),
        (
            {"grey dot": ["It is grey."], "pink cros": ["It is pink."]},
            "did you mean 'pink cross'",
        ),
    ],
)
def test_descriptions_must_fit_the_new_names(
    export: Path, tmp_path: Path, content: dict[str, list[str]], part: str
) -> None:
    path = tmp_path / "descriptions.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=part):
        add_classes(export, ["grey dot", "pink cross"], path)


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["red circel"], "did you mean 'red circle'"),
        (["Red Circle"], "did you mean 'red circle'"),
        (["zzz"], "`classes list` shows them"),
        (["red circle", "green square"], "at least 2 classes to remain, found 1"),
    ],
)
def test_names_that_cannot_be_removed(export: Path, names: list[str], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        remove_classes(export, names)
    assert len(list_classes(export)) == 3


def fail(*_: object) -> None:
    raise EnvironmentProblem("the disk is full")


def test_an_interruption_before_the_manifest_leaves_the_old_classes(
    export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_export(export)
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "write_json", fail)
        with pytest.raises(EnvironmentProblem):
            remove_classes(export, ["red circle"])
    after = read_export(export)
    assert after.stored == before.stored
    np.testing.assert_array_equal(after.classifier, before.classifier)
    assert len(files(export)) == 4, "the new matrix lies there unused"
    remove_classes(export, ["blue stripe"])
    assert files(export) == {"manifest.json", FULL, read_export(export).manifest.classifier}


# Matrix and manifest are each flushed, renamed, and the rename flushed; then the old one goes.
@pytest.mark.parametrize(
    ("operation", "classes"), [(1, 3), (2, 3), (3, 3), (4, 3), (5, 3), (6, 2), (7, 2)]
)
def test_a_kill_at_any_file_operation_leaves_a_readable_export(
    export: Path, monkeypatch: pytest.MonkeyPatch, operation: int, classes: int
) -> None:
    done = 0

    def killed_at(real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any, **options: Any) -> None:
            nonlocal done
            done += 1
            if done == operation:
                raise KeyboardInterrupt
            real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
            patch.setattr(owner, name, killed_at(getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            remove_classes(export, ["red circle"])
    assert len(list_classes(export)) == classes
    assert len(add_classes(export, ["grey dot"])) == classes + 1


def test_an_old_matrix_that_cannot_be_deleted_does_no_harm(
    export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def busy(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".safetensors":
            raise PermissionError(13, "in use")
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", busy)
        remove_classes(export, ["red circle"])
    assert [row.name for row in list_classes(export)] == ["green square", "blue stripe"]
    assert CLASSIFIER in files(export)
    add_classes(export, ["grey dot"])
    assert files(export) == {"manifest.json", FULL, read_export(export).manifest.classifier}


def test_two_processes_cannot_change_the_classes_at_once(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FileLock(export / ".lock"):
        assert main(["classes", "remove", str(export), "red circle"]) == 2
        assert "another process" in error_of(capsys)
        assert len(list_classes(export)) == 3
    assert main(["classes", "remove", str(export), "red circle"]) == 0


def test_another_clip_is_refused(export: Path) -> None:
    change_manifest(export, lambda m: m["parent"].update(backbone_sha256="f" * 64))
    with pytest.raises(CheckpointError, match="expected weights with sha256 ffffffffffff, found"):
        add_classes(export, ["grey dot"])
    assert len(list_classes(export)) == 3


@pytest.mark.parametrize("name", [FULL, CLASSIFIER, "manifest.json"])
@pytest.mark.parametrize(
    "command", [["list"], ["add", "grey dot"], ["remove", "red circle"]], ids=lambda c: str(c[0])
)
def test_a_tampered_export_is_refused(
    export: Path, name: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray((export / name).read_bytes())
    content[-5] ^= 1
    (export / name).write_bytes(content)
    assert main(["classes", command[0], str(export), *command[1:]]) == 3
    assert name in error_of(capsys)


@pytest.mark.parametrize("command", [["list"], ["add", "grey dot"], ["remove", "red circle"]])
def test_a_missing_export_is_refused_and_not_made(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing"
    assert main(["classes", command[0], str(missing), *command[1:]]) == 3
    assert str(missing) in error_of(capsys).replace("\n", "")
    assert not missing.exists()


@pytest.mark.parametrize("command", [["list"], ["add", "grey dot"], ["remove", "red circle"]])
def test_what_is_no_export_is_refused_and_left_alone(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    artifact.write_manifest(tmp_path, "microclip.checkpoint/1", {"classes": CLASSES}, [])
    assert main(["classes", command[0], str(tmp_path), *command[1:]]) == 3
    assert "expected schema microclip.export/1" in error_of(capsys).replace("\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["add", "red circle"], 2),
        (["add", "grey\tdot"], 3),
        (["add", "grey dot", "--descriptions", "missing.json"], 3),
        (["add"], 2),
        (["remove", "robin"], 2),
        (["remove", "red circle", "blue stripe"], 2),
    ],
)
def test_mistakes_end_with_the_documented_exit_code(
    export: Path, arguments: list[str], code: int
) -> None:
    assert main(["classes", arguments[0], str(export), *arguments[1:]]) == code
    assert len(list_classes(export)) == 3


def test_the_command_line_tells_what_changed(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classes", "add", str(export), "[red]dot", "pink cross"]) == 0
    told = capsys.readouterr().out
    assert "2 added, 5 classes now" in told
    assert "never adapted to photos, so their accuracy is zero-shot; adapt again" in told
    assert main(["classes", "list", str(export)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *CLASSES,
        "[red]dot  (not adapted)",
        "pink cross  (not adapted)",
    ]
    assert main(["classes", "remove", str(export), "pink cross"]) == 0
    assert "4 classes remain" in capsys.readouterr().out


def test_json_holds_names_and_marks(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [{"class": name, "adapted": True} for name in CLASSES]
    assert main(["classes", "list", str(export), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"classes": before}
    assert main(["classes", "add", str(export), " grey dot", "--json"]) == 0
    after = [*before, {"class": "grey dot", "adapted": False}]
    assert json.loads(capsys.readouterr().out) == {"added": ["grey dot"], "classes": after}
    assert main(["classes", "remove", str(export), "red circle", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"classes": after[1:]}


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["list"], 0, ""),
        (["remove", "red circle"], 0, ""),
        (["add", "grey dot"], 4, 'pip install "microclip-deploy[adapt]"'),
    ],
    ids=lambda x: str(x[0]) if isinstance(x, list) else None,
)
def test_only_adding_needs_torch(export: Path, arguments: list[str], code: int, part: str) -> None:
    command = ["classes", arguments[0], str(export), *arguments[1:]]
    program = (
        "import sys\n"
        "for name in ('torch', 'open_clip', 'timm', 'torchvision'): sys.modules[name] = None\n"
        "from microclip_deploy.cli.main import main\n"
        f"sys.exit(main({command!r}))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert found.returncode == code, found.stderr
    assert part in found.stderr
    assert len(list_classes(export)) == 3 - (arguments[0] == "remove")
