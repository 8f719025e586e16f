"""`pack`, and what the other commands make of a pack, a tar and what is damaged."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from microclip_deploy.cli.main import main


@pytest.fixture
def packed(tmp_path: Path, photos: Path) -> Path:
    assert main(["pack", str(photos), "-o", str(tmp_path / "pack")]) == 0
    return tmp_path / "pack"


def test_adaptation_from_a_pack_or_a_tar_is_that_from_the_photos(
    tmp_path: Path, photos: Path, packed: Path, adapt_arguments: list[str]
) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, ".")
    weights = []
    for number, source in enumerate((photos, packed, tmp_path / "photos.tar")):
        run = tmp_path / f"run-{number}"
        adapt_arguments[1] = str(source)
        adapt_arguments[adapt_arguments.index("-o") + 1] = str(run)
        workers = "1" if number == 1 else "0"
        assert main([*adapt_arguments, "--epochs", "1", "--workers", workers]) == 0
        weights.append(load_file(run / "weights.safetensors"))
    for other in weights[1:]:
        assert all((weights[0][name] == other[name]).all() for name in weights[0])


def test_a_run_that_began_on_files_is_resumed_on_their_pack(
    tmp_path: Path, photos: Path, packed: Path, adapt_arguments: list[str]
) -> None:
    own = shutil.copytree(photos, tmp_path / "own")
    adapt_arguments[1] = str(own)
    assert main([*adapt_arguments, "--epochs", "1"]) == 0
    run = tmp_path / "run"
    whole = load_file(run / "weights.safetensors")
    for name in ("manifest.json", "weights.safetensors"):
        (run / name).unlink()
    shutil.rmtree(own)
    assert main(["adapt", "-o", str(run), "--resume", "--images", str(packed)]) == 0
    again = load_file(run / "weights.safetensors")
    assert all((whole[name] == again[name]).all() for name in whole)
    (packed / "photos-00000.tar").rename(tmp_path / "gone.tar")
    (run / "manifest.json").unlink()
    assert main(["adapt", "-o", str(run), "--resume"]) == 3


def test_evaluate_and_predict_take_a_pack(
    photos: Path, packed: Path, tiny_export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for source in (photos, packed):
        assert main(["evaluate", str(tiny_export), str(source), "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"])
    assert told[0] == told[1]
    one = packed / "photos-00000.tar" / "red circle" / "03.png"
    rows = []
    for source in (photos / "red circle" / "03.png", one):
        assert main(["predict", str(tiny_export), str(source), "--format", "csv"]) == 0
        rows.append(next(csv.DictReader(io.StringIO(capsys.readouterr().out))))
    assert rows[1].pop("path") == str(one)
    assert rows[0].pop("path")
    assert rows[0] == rows[1]


def test_pack_tells_what_it_did_and_lists_bad_photos(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(photos, tmp_path / "own")
    (own / "red circle" / "bad.jpg").write_text("text")
    command = ["pack", str(own), "-o", str(tmp_path / "pack"), "--side", "32"]
    assert main(command) == 3
    assert "expected at most 0 bad ones (--max-bad-images 1%)" in capsys.readouterr().err
    assert main(["predict", "x", str(tmp_path / "pack")]) == 3
    capsys.readouterr()
    assert main([*command, "--max-bad-images", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["there_already"] == 25
    assert "(24 images, 0.1 MB; 0 made smaller, 25 there already)" in " ".join(err.split())
    assert "bad.jpg" in (tmp_path / "pack" / "bad-images.txt").read_text()
    assert main([*command, "--side", "40", "--max-bad-images", "1"]) == 0
    assert main(["pack", str(own), "-o", str(own)]) == 2


def test_damaged_sources_are_told_without_a_traceback(
    tmp_path: Path, tiny_export: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes((packed / "photos-00000.tar").read_bytes()[:5000])
    (packed / "photos-00000.tar").unlink()
    expected = {cut: "expected a whole tar file", packed: "expected photos-00000.tar of"}
    for source, message in expected.items():
        assert main(["predict", str(tiny_export), str(source)]) == 3
        assert message in " ".join(capsys.readouterr().err.split())
