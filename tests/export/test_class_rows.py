"""Classes of an export come and go; its graphs stay, and a kill leaves the old ones or the new."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from filelock import FileLock

from microclip_deploy import artifact
from microclip_deploy.cli.main import main
from microclip_deploy.data.classes import ClassTexts
from microclip_deploy.errors import (
    CheckpointError,
    DataError,
    UsageError,
)
from microclip_deploy.export.class_rows import ClassRow, add_classes, list_classes, remove_classes
from microclip_deploy.model.clip import BackboneSpec, load_clip
from microclip_deploy.model.text import text_heads
from microclip_deploy.serving.exported import CLASSIFIER, FULL, read_export
from tests.export.damage import declare

if TYPE_CHECKING:
    from tests.export.conftest import ErrorLine

CLASSES = ("red circle", "green square", "blue stripe")
ADDED = ("grey dot", "pink cross")
TEMPLATES = ("a photo of a {}.", "a drawing of a {}.")
COMMANDS = (["list"], ["add", "grey dot"], ["remove", "red circle"])

# A class alone in a batch of texts and among others: different sums in float32.
ROW_TOLERANCE = 1e-6


def expected_rows(tiny_model_dir: Path, texts: dict[str, tuple[str, ...]]) -> np.ndarray:
    clip = load_clip(BackboneSpec(model=f"local-dir:{tiny_model_dir}"))
    all_texts = ClassTexts(tuple(texts), tuple(texts.values()), TEMPLATES)
    return text_heads(clip.text, all_texts).initial.numpy()


def filled(name: str) -> tuple[str, ...]:
    return tuple(template.replace("{}", name) for template in TEMPLATES)


def classes(command: list[str], export: Path, *options: str) -> int:
    return main(["classes", command[0], str(export), *command[1:], *options])


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {".lock"}


def test_added_rows_are_the_learnable_heads_start(export: Path, tiny_model_dir: Path) -> None:
    declare(export, templates=TEMPLATES)
    before = read_export(export)
    rows = add_classes(export, ["grey dot", "  pink\u0020cross "])
    after = read_export(export)
    assert after.manifest.classes == (*CLASSES, *ADDED)
    assert after.manifest.unadapted == ADDED
    assert after.classifier.dtype == np.float32
    np.testing.assert_array_equal(after.classifier[:3], before.classifier)
    wanted = expected_rows(tiny_model_dir, {name: filled(name) for name in ADDED})
    np.testing.assert_allclose(after.classifier[3:], wanted, rtol=0, atol=ROW_TOLERANCE)
    assert [row.adapted for row in rows] == [True, True, True, False, False]
    assert list_classes(export) == rows


def test_descriptions_shape_the_row(export: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    sentences = ("It is grey.", "It is small and round.")
    declare(export, templates=TEMPLATES)
    path = tmp_path / "descriptions.json"
    path.write_text(json.dumps({"grey dot": sentences}))
    add_classes(export, ["grey dot"], path)
    found = read_export(export).classifier[3:]
    wanted = expected_rows(tiny_model_dir, {"grey dot": sentences})
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROW_TOLERANCE)
    from_templates = expected_rows(tiny_model_dir, {"grey dot": filled("grey dot")})
    assert np.abs(found - from_templates).max() > 1e-3


def test_only_matrix_and_manifest_change(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    sha256_file = artifact.sha256_file

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256_file(path)

    before, graph, present = read_export(export).stored, (export / FULL).stat(), files(export)
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "sha256_file", counted)
        remove_classes(export, ["red circle"])
    after = read_export(export).stored
    matrix = after.pop("classifier")
    entry = after["files"].pop(matrix)
    assert matrix == f"classifier-{entry['sha256'][:8]}.safetensors"
    before["files"].pop(before.pop("classifier"))
    assert after.pop("calibration")["mean_prediction"] == [0.75, 0.25]
    del before["calibration"]
    assert after == {**before, "classes": [*CLASSES[1:]], "unadapted": []}
    assert files(export) == present - {CLASSIFIER} | {matrix}
    assert hashed.count(FULL) == 1, "graphs are read once and never written"
    same = (export / FULL).stat()
    assert (graph.st_ino, graph.st_mtime_ns) == (same.st_ino, same.st_mtime_ns)


def test_removing_keeps_the_other_rows_and_marks(export: Path) -> None:
    before, present = read_export(export).classifier, files(export)
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
    assert files(export) == present - {CLASSIFIER} | {after.manifest.classifier}
    remove_classes(export, ["blue stripe"])
    assert add_classes(export, ["blue stripe"])[-1] == ClassRow("blue stripe", False)


@pytest.mark.parametrize(
    ("command", "code", "part"),
    [
        (["add", "Red Circle"], 2, "found 'red circle' in the export"),
        (["add", "grey dot", "Grey Dot "], 2, "found 'grey dot' given too"),
        (["add", "grey dot", " \u00a0"], 2, "found an empty one"),
        (["add"], 2, "Missing argument"),
        (["add", "grey\tdot"], 3, "U+0009"),
        (["add", "grey\ndot"], 3, "U+000A"),
        (["add", "grey \u202edot"], 3, "U+202E"),
        (["add", "grey dot", "--descriptions", "missing.json"], 3, "missing.json"),
        (["add", "red &#99;ircle"], 3, "found the same as for 'red circle' in the export"),
        (["add", "gre\u0443 dot"], 3, "which looks like 'y'"),
        (["add", "&amp;", "&"], 3, "the tokenizer reads their sentences alike"),
        (["remove", "red circel"], 2, "did you mean 'red circle'"),
        (["remove", "Red Circle"], 2, "did you mean 'red circle'"),
        (["remove", "zzz"], 2, "`classes list` shows them"),
        (["remove", "red circle", "blue stripe"], 2, "at least 2 classes to remain, found 1"),
    ],
)
def test_mistakes_are_named_and_change_nothing(
    export: Path, command: list[str], code: int, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert classes(command, export) == code
    assert part in capsys.readouterr().err
    assert list_classes(export) == tuple(ClassRow(name, True) for name in CLASSES)


def test_at_least_one_class_is_added(export: Path) -> None:
    with pytest.raises(UsageError, match="at least one name"):
        add_classes(export, [])


def test_the_same_name_typed_on_another_system_is_no_new_class(export: Path) -> None:
    add_classes(export, ["caf\u00e9"])
    with pytest.raises(UsageError, match="in the export"):
        add_classes(export, ["cafe\u0301"])
    assert len(remove_classes(export, ["cafe\u0301"])) == 3


def test_a_class_with_the_row_of_another_is_refused(export: Path, tmp_path: Path) -> None:
    path = tmp_path / "descriptions.json"
    path.write_text(json.dumps({"grey dot": "It is grey."}))
    add_classes(export, ["grey dot"], path)
    path.write_text(json.dumps({"silver dot": "It is grey."}))
    with pytest.raises(DataError, match=r"'silver dot': .* same as for 'grey dot' in the export"):
        add_classes(export, ["silver dot"], path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"grey dot": "It is grey."}, "found none for pink cross"),
        ({"grey dot": "It is grey.", "pink cros": "It is pink."}, "did you mean 'pink cross'"),
    ],
)
def test_descriptions_must_fit_the_new_names(
    export: Path, tmp_path: Path, content: dict[str, str], part: str
) -> None:
    path = tmp_path / "descriptions.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=part):
        add_classes(export, ["grey dot", "pink cross"], path)


# Matrix and manifest are each flushed, renamed, and the rename flushed; then the old one goes.
@pytest.mark.parametrize(
    ("operation", "count"), [(1, 3), (2, 3), (3, 3), (4, 3), (5, 3), (6, 2), (7, 2)]
)
def test_a_kill_at_any_file_operation_leaves_a_readable_export(
    export: Path, monkeypatch: pytest.MonkeyPatch, operation: int, count: int
) -> None:
    present, done = files(export), 0

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
    assert len(list_classes(export)) == count
    assert len(add_classes(export, ["grey dot"])) == count + 1
    left = {name for name in files(export) if not name.startswith(".")}  # of what was being written
    assert left == present - {CLASSIFIER} | {read_export(export).manifest.classifier}


def test_an_old_matrix_that_cannot_be_deleted_does_no_harm(
    export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, present = Path.unlink, files(export)

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
    assert files(export) == present - {CLASSIFIER} | {read_export(export).manifest.classifier}


def test_two_processes_cannot_change_the_classes_at_once(
    export: Path, error_line: "ErrorLine"
) -> None:
    with FileLock(export / ".lock"):
        assert classes(["remove", "red circle"], export) == 2
        assert "another process" in error_line()
        assert len(list_classes(export)) == 3
    assert classes(["remove", "red circle"], export) == 0


def test_another_clip_is_refused(export: Path) -> None:
    parent = {**read_export(export).stored["parent"], "backbone_sha256": "f" * 64}
    declare(export, parent=parent)
    with pytest.raises(CheckpointError, match="expected weights with sha256 ffffffffffff, found"):
        add_classes(export, ["grey dot"])
    assert len(list_classes(export)) == 3


def test_the_same_weights_with_another_activation_are_refused(
    export: Path, tiny_model_dir: Path, tmp_path: Path, error_line: "ErrorLine"
) -> None:
    directory = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = directory / "open_clip_config.json"
    config.write_text(config.read_text().replace('"embed_dim"', '"quick_gelu": true, "embed_dim"'))
    assert classes(["add", "grey dot"], export, "--model", f"local-dir:{directory}") == 3
    assert "text activations ['GELU'], found ['QuickGELU']" in error_line()
    assert len(list_classes(export)) == 3


def test_an_export_of_an_older_version_names_its_weights_alone(
    export: Path, tiny_model_dir: Path
) -> None:
    clip = load_clip(BackboneSpec(model=f"local-dir:{tiny_model_dir}"))
    parent = {**read_export(export).stored["parent"], "backbone_sha256": clip.weights_sha256}
    del parent["architecture"]
    declare(export, parent=parent)
    assert len(add_classes(export, ["grey dot"])) == 4


@pytest.mark.parametrize("name", [FULL, CLASSIFIER, artifact.MANIFEST])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command[0]))
def test_a_tampered_export_is_refused(
    export: Path, name: str, command: list[str], error_line: "ErrorLine"
) -> None:
    content = bytearray((export / name).read_bytes())
    content[-5] ^= 1
    (export / name).write_bytes(content)
    assert classes(command, export) == 3
    assert name in error_line()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command[0]))
def test_what_is_no_export_is_refused_and_left_alone(
    tmp_path: Path, command: list[str], error_line: "ErrorLine"
) -> None:
    missing = tmp_path / "missing"
    assert classes(command, missing) == 3
    assert str(missing) in error_line()
    assert not missing.exists()
    artifact.write_manifest(tmp_path, "microclip.checkpoint/1", {"classes": CLASSES}, [])
    assert classes(command, tmp_path) == 3
    assert "expected schema microclip.export/1" in error_line()
    assert files(tmp_path) == {artifact.MANIFEST}


def test_the_command_line_tells_what_changed(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert classes(["add", "[red]dot", "pink cross"], export) == 0
    printed = capsys.readouterr().out
    assert "2 added, 5 classes now" in printed
    assert "never adapted to photos, so their accuracy is zero-shot; adapt again" in printed
    assert classes(["list"], export) == 0
    added = ["[red]dot  (not adapted)", "pink cross  (not adapted)"]
    assert capsys.readouterr().out.splitlines() == [*CLASSES, *added]
    assert classes(["remove", "pink cross"], export) == 0
    assert "4 classes remain" in capsys.readouterr().out


def test_json_holds_names_and_marks(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [{"class": name, "adapted": True} for name in CLASSES]
    after = [*before, {"class": "grey dot", "adapted": False}]
    for command, wanted in (
        (["list"], {"classes": before}),
        (["add", " grey dot"], {"added": ["grey dot"], "classes": after}),
        (["remove", "red circle"], {"classes": after[1:]}),
    ):
        assert classes(command, export, "--json") == 0
        assert json.loads(capsys.readouterr().out) == wanted


def test_only_adding_needs_torch(export: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'open_clip', 'timm', 'torchvision'): sys.modules[name] = None\n"
        "from microclip_deploy.cli.main import main\n"
        f"export, commands = {str(export)!r}, {COMMANDS!r}\n"
        "print([main(['classes', name, export, *rest]) for name, *rest in commands])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == "[0, 4, 0]", done.stderr
    assert 'pip install "microclip-deploy[adapt]"' in done.stderr
    assert len(list_classes(export)) == 2
