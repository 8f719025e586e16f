"""`predict --server`: what a server says, as if it had been said here."""

import csv
import io
from pathlib import Path

import pytest

from microclip_deploy.cli.main import main
from tests.server.running import Running, running


def csv_of(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["predict", *map(str, words), "--format", "csv"]) == 0
    return capsys.readouterr().out


def test_predictions_are_those_of_the_export(
    server: Running,
    tiny_export: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file that is no photo is a row there, too, and overlays are drawn here."""
    (tmp_path / "broken.png").write_bytes(b"no photo")
    here = csv_of(capsys, tiny_export, photos, tmp_path / "broken.png")
    there = csv_of(capsys, "--server", server.url, photos, tmp_path / "broken.png")
    rows = [list(csv.reader(io.StringIO(text))) for text in (here, there)]
    assert len(rows[0]) == len(rows[1]) == 26
    assert rows[0][-1][1] in rows[1].pop()[1]  # what is wrong with the file
    for one, other in zip(rows[0][:-1], rows[1], strict=True):
        for left, right in zip(one, other, strict=True):
            # A batch of another size rounds otherwise.
            assert left == right or float(left) == pytest.approx(float(right), abs=1e-4)
    pictures = []
    for name, source in (("here", [tiny_export]), ("there", ["--server", server.url])):
        folder = tmp_path / name
        assert main(["predict", *map(str, source), str(photos), "--overlay", str(folder)]) == 0
        pictures.append({each.name: each.read_bytes() for each in folder.iterdir()})
    assert pictures[0] == pictures[1]


def test_problems_are_told(
    server: Running, tiny_export: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "--server", "ftp://x", str(photos)]) == 2
    assert main(["predict", "--server", server.url, "--model", "other", str(photos)]) == 2
    assert "no model other among tiny" in capsys.readouterr().err
    with running(f"a={tiny_export}", f"b={tiny_export}", MICROCLIP_API_KEY="secret") as closed:
        words = ["predict", "--server", closed.url, str(photos)]
        assert main(words) == 4
        assert "API key" in capsys.readouterr().err
        assert main([*words, "--api-key", "secret"]) == 2
        assert "found several among a, b" in capsys.readouterr().err
        assert main([*words, "--api-key", "secret", "--model", "b"]) == 0
