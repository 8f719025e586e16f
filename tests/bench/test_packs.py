"""The comparison of packs and files runs, and tells what it compared."""

import json
from pathlib import Path

import pytest

from microclip_deploy.bench import packs


def test_both_sizes_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("psutil", reason="needs the extra bench")
    monkeypatch.setattr(packs, "SIZES", {"large": (1600, 1200), "small": (600, 500)})
    packs.main(count=1, side=32, crops=1, out_file=tmp_path / "result.json")
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == json.loads((tmp_path / "result.json").read_text())
    assert told["views"] == 3
    assert told["sizes"]["small"]["test_view_difference"] == {"mean": 0.0, "max": 0}
    assert told["sizes"]["large"]["test_view_difference"]["mean"] < 2
    assert {"file read", "pack views", "Pillow, in full"} <= told["sizes"]["large"]["ms"].keys()
