"""The commands and their options, pinned: a new setting is a recipe field, not a flag."""

import re
from typing import Any

import pytest
import typer

from microclip_deploy.cli.main import EPILOG, app, main

COMMAND = typer.main.get_command(app)

SURFACE = {
    "adapt": {
        "--out", "--classes", "--descriptions", "--template", "--model", "--pretrained", "--recipe",
        "--set", "--epochs", "--batch-size", "--lr", "--seed", "--val-dir", "--device", "--workers",
        "--max-bad-images", "--save-every", "--resume", "--overwrite", "--json",
    },
    "evaluate": {
        "--device", "--batch-size", "--zero-shot", "--max-bad-images", "--per-class", "--json",
    },
    "predict": {"--top-k", "--format", "--overlay", "--device", "--batch-size"},
    "export": {
        "--out", "--dtype", "--images", "--device", "--atol", "--min-agreement", "--overwrite",
        "--trt", "--batch", "--workspace", "--opt-level", "--timing-cache", "--version-compatible",
        "--hardware-compat", "--print-trtexec", "--json",
    },
    "verify": {"--run", "--images", "--device", "--json"},
    "classes": set(),
    "classes list": {"--json"},
    "classes add": {"--descriptions", "--model", "--pretrained", "--json"},
    "classes remove": {"--json"},
    "bench": set(),
    "bench model": {
        "--backends", "--device", "--batches", "--concurrency", "--warmup", "--duration",
        "--until-stable", "--percentiles", "--dtype", "--peers", "--images", "--threads",
        "--stages", "--out", "--baseline", "--max-regression", "--slo", "--json",
    },
    "bench compare": set(),
    "bench adapt": {
        "--geometry", "--batch-size", "--crops", "--repeats", "--workers", "--device", "--plain",
        "--images", "--out", "--json",
    },
    "bench saliency": {
        "--pretrained", "--cutouts", "--backgrounds", "--photos", "--sizes", "--out", "--json",
    },
    "bench ncut": {"--batches", "--tokens", "--dtype", "--device", "--out", "--json"},
    "demo": {"--out", "--write-images", "--seed", "--device", "--json"},
    "doctor": {"--require", "--json"},
    "recipes": {"--json"},
    "version": {"--json"},
}  # fmt: skip


def commands(group: Any, prefix: str = "") -> dict[str, Any]:
    """Return all commands by their full names, those of groups included."""
    found: dict[str, Any] = {}
    for name, command in getattr(group, "commands", {}).items():
        found |= {prefix + name: command, **commands(command, f"{prefix}{name} ")}
    return found


def options(name: str) -> set[str]:
    params = commands(COMMAND)[name].params
    return {opt for param in params for opt in param.opts if opt.startswith("--")}


def test_commands_are_the_documented_ones() -> None:
    assert set(commands(COMMAND)) == set(SURFACE)


@pytest.mark.parametrize("name", SURFACE)
def test_options_are_the_documented_ones(name: str) -> None:
    assert options(name) == SURFACE[name]


@pytest.mark.parametrize("name", SURFACE)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    assert "Usage:" in capsys.readouterr().out


def test_help_tells_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert EPILOG in shown


def test_unknown_options_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--fast"]) == 2
    assert "--fast" in capsys.readouterr().err


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)
