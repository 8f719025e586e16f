"""Folders as phones, cameras and a NAS leave them, through the command line."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from microclip_deploy.cli.main import main


@pytest.fixture
def odd(tmp_path: Path, photos: Path) -> Path:
    """Return a labelled folder with a shallow photo, a copy, and what is no photo."""
    root = shutil.copytree(photos, tmp_path / "odd")
    folder = next(path for path in sorted(root.iterdir()))
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32)).save(folder / "shallow.png")
    shutil.copy(folder / "00.png", folder / "again.png")
    (folder / "drawing.psd").write_bytes(b"8BPS\0\x01")
    (folder / "film.mp4").write_bytes(b"\0")
    (folder / "@eaDir").mkdir()
    shutil.copy(folder / "00.png", folder / "@eaDir" / "SYNOPHOTO_THUMB_M.png")
    return root


LEFT_OUT = (
    "left out: 1 .mp4 (video: extract frames); 1 .psd (convert to PNG or JPEG); "
    "1 hidden or system folders (@eaDir)"
)
SHALLOW = "warning: 16-bit photos with no value above 1023, read as nearly black: 1, such as"


def test_adapt_says_and_keeps_what_it_noticed(
    tmp_path: Path, odd: Path, adapt_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    adapt_arguments[1] = str(odd)
    assert main([*adapt_arguments, "--epochs", "1", "--set", "photos.background=black"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    for part in (LEFT_OUT, SHALLOW, "1 images are copies of others, such as", "26 images, 0 skip"):
        assert part in told
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["images"]["copies"] == 1
    assert manifest["images"]["left_out"]["endings"] == {".mp4": 1, ".psd": 1}
    assert "--bit-depth 10" in manifest["images"]["remarks"][0]
    assert manifest["preprocess"]["photos"]["background"] == "black"


def test_predict_has_a_row_with_the_reason(
    odd: Path, tiny_export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(tiny_export), str(odd), str(odd / "gone.jpg"), "--format", "csv"]
    assert main([*command, "--max-pixels", "1900"]) == 0
    out, err = capsys.readouterr()
    assert LEFT_OUT in " ".join(err.split())
    assert SHALLOW in " ".join(err.split())
    reasons = {Path(row["path"]).name: row["error"] for row in csv.DictReader(io.StringIO(out))}
    assert len(out.splitlines()) == 1 + 26 + 2
    assert reasons["drawing.psd"] == "a Photoshop file"
    assert reasons["gone.jpg"] == "there is no such file"
    assert "48x40 pixels exceed the limit of 1900 pixels (--max-pixels)" in reasons["00.png"]
    assert reasons["shallow.png"] == ""


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_bit_depth_is_taken_for_one_call(
    odd: Path, tiny_export: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tiny_export), str(odd), "--bit-depth", "10"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert LEFT_OUT in told
    assert "nearly black" not in told


@pytest.mark.parametrize("option", [["--bit-depth", "7"], ["--max-pixels", "0"]])
def test_settings_out_of_range(odd: Path, tiny_export: Path, option: list[str]) -> None:
    assert main(["predict", str(tiny_export), str(odd), *option]) == 2
