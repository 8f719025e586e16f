"""What commands do around the library: errors of the GPU, and what they leave in a directory."""

import shutil
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from rich.console import Console

from microclip_deploy.cli.commands import gpu_memory, run_evaluate
from microclip_deploy.cli.main import main
from microclip_deploy.errors import EnvironmentProblem


def test_a_full_gpu_is_an_environment_problem() -> None:
    with pytest.raises(EnvironmentProblem, match="lower --batch-size"), gpu_memory():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("loaded", [True, False])
def test_other_errors_stay_what_they_are(loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not loaded:
        monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeError, match="no memory of it"), gpu_memory():
        raise RuntimeError("no memory of it")


def test_a_command_loads_clip_once(
    adapt_arguments: list[str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    create = open_clip.create_model

    def counted(name: str, **options: Any) -> Any:
        loaded.append(name)
        return create(name, **options)

    monkeypatch.setattr(open_clip, "create_model", counted)
    run = tmp_path / "run"
    assert main([*adapt_arguments, "--epochs", "1", "--batch-size", "24"]) == 0
    assert (run / "report.html").is_file()
    for command in (["evaluate", str(run), str(photos)], ["predict", str(run), str(photos)]):
        assert len(loaded) == 1, command
        loaded.clear()
        assert main(command) == 0
    assert len(loaded) == 1


def test_a_run_keeps_its_evaluation(finished_run: Path, photos: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    notes = Console(quiet=True)
    found = run_evaluate(run, photos, notes, device="cpu", zero_shot=False)
    assert (run / "evaluation.json").is_file()
    assert (run / "report.html").is_file()
    assert found.images == 24
