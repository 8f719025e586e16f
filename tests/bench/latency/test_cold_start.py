"""A fresh process that opens an export, and what is said when it cannot."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from microclip_deploy.bench.latency.cold_start import cold_start
from microclip_deploy.errors import EnvironmentProblem

STEPS = ("import_s", "open_s", "first_s", "second_s")


def test_the_steps_of_a_fresh_process_fit_into_it(tiny_export: Path) -> None:
    ours = np.ones(600 * 2**20, np.uint8)  # resident here, and not to be counted there
    found = cold_start(tiny_export, "cpu", 2)
    assert set(found) == {*STEPS, "process_s", "peak_rss_bytes"}
    assert all(found[step] > 0 for step in STEPS)
    assert sum(found[step] for step in STEPS) < found["process_s"]
    assert 10 * 2**20 < found["peak_rss_bytes"] < ours.nbytes


def test_what_the_process_met_is_told(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=rf"found exit 3 \({tmp_path}"):
        cold_start(tmp_path, "cpu", 1)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo oops >&2; echo 'last words' >&2; exit 3", r"found exit 3 \(last words\); run "),
        ("echo '{}'; kill -SEGV $$", r"found signal 11 \(no message\)"),
        ("echo '{\"import_s\": 1.0}'; exit 1", r"found exit 1 \(no message\)"),
        ("echo ready", r"found exit 0 \(no message\)"),
        (None, "no process could be started"),
    ],
)
def test_a_process_that_dies_is_a_problem_of_the_environment(
    script: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = tmp_path / "python"
    if script is not None:
        interpreter.write_text(f"#!/bin/sh\n{script}\n")
        interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    with pytest.raises(EnvironmentProblem, match=message):
        cold_start(tmp_path, "cpu", 1)


def test_a_process_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def hang(command: list[str], **_options: object) -> None:
        raise subprocess.TimeoutExpired(command, 600.0)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(EnvironmentProblem, match="none within 600 s"):
        cold_start(tmp_path, "cpu", 1)
