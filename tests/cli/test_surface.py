"""The commands and their options, pinned: a new setting is a recipe field, not a flag."""

import re
from typing import Any

import pytest
import typer

from microclip_deploy.cli.main import EPILOG, app, main

COMMAND = typer.main.get_command(app)

PHOTOS = ("--max-pixels", "--bit-depth")  # of every command that reads photos

SURFACE = {
    "adapt": {
        "--out", "--classes", "--descriptions", "--template", "--model", "--pretrained", "--recipe",
        "--set", "--epochs", "--batch-size", "--lr", "--seed", "--val-dir", "--device", "--workers",
        "--max-bad-images", "--save-every", "--resume", "--overwrite", "--json", "--images",
        *PHOTOS,
    },
    "evaluate": {
        "--device", "--batch-size", "--zero-shot", "--controls", "--joint", "--limit", "--masks",
        "--max-bad-images",
        "--per-class", "--out", "--threads", "--json", "--prior", "--unknown", *PHOTOS,
    },
    "calibrate": {"--clicks", "--device", "--batch-size", "--threads", "--json", *PHOTOS},
    "audit": {
        "--against", "--clicks", "--seed", "--out", "--csv", "--browser", "--device",
        "--batch-size", "--threads", "--json", *PHOTOS,
    },
    "describe": set(),
    "describe check": {"--domain", "--clip", "--clip-weights", "--report", "--json"},
    "pack": {
        "--out", "--side", "--quality", "--max-bad-images", "--workers", "--json", *PHOTOS,
    },
    "predict": {
        "--top-k", "--format", "--out", "--overlay", "--joint", "--device", "--batch-size",
        "--threads", *PHOTOS, "--server", "--model", "--api-key", "--prior", "--shard-rows",
        "--part", "--columns",
    },
    "export": {
        "--out", "--dtype", "--calibration", "--images", "--device", "--atol", "--min-agreement",
        "--overwrite", "--trt", "--batch", "--workspace", "--opt-level", "--timing-cache",
        "--version-compatible", "--hardware-compat", "--compute", "--check", "--print-trtexec",
        "--triton", "--json", *PHOTOS,
    },
    "verify": {"--run", "--images", "--device", "--json", *PHOTOS},
    "serve": {
        "--host", "--port", "--api-key", "--device", "--threads", "--max-batch", "--max-delay",
        "--max-queue", "--timeout", "--body-timeout", "--max-body", "--max-pixels",
        "--hang-timeout", "--drain-delay", "--unload-after", "--access-log",
        "--prior",
    },
    "classes": set(),
    "classes list": {"--json"},
    "classes add": {
        "--descriptions", "--model", "--pretrained", "--describe", "--endpoint", "--domain",
        "--json",
    },
    "classes remove": {"--json"},
    "bench": set(),
    "bench model": {
        "--backends", "--device", "--batches", "--concurrency", "--warmup", "--duration",
        "--until-stable", "--percentiles", "--dtype", "--peers", "--images", "--threads",
        "--stages", "--out", "--baseline", "--max-regression", "--slo", "--json", *PHOTOS,
    },
    "bench compare": set(),
    "bench adapt": {
        "--geometry", "--batch-size", "--crops", "--repeats", "--workers", "--device", "--plain",
        "--views-there",
        "--images", "--out", "--json", *PHOTOS,
    },
    "bench saliency": {
        "--pretrained", "--cutouts", "--backgrounds", "--photos", "--sizes", "--out", "--json",
    },
    "bench serve": {
        "--against", "--model", "--api-key", "--pid", "--device", "--dtype", "--threads", "--body",
        "--images", "--batches", "--concurrency", "--rate", "--load", "--peers", "--warmup",
        "--duration", "--until-stable", "--requests", "--slo", "--out", "--json",
    },
    "bench ncut": {"--batches", "--tokens", "--dtype", "--device", "--out", "--json"},
    "describe make": {
        "--out", "--model", "--endpoint", "--domain", "--per-class", "--concurrency",
        "--temperature", "--seed", "--max-tokens-total", "--max-cost", "--price-in", "--price-out",
        "--clip", "--clip-weights", "--images", "--no-filter", "--report", "--dry-run", "--json",
    },
    "demo": {"--benchmark", "--out", "--write-images", "--seed", "--device", "--json"},
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
    shown = capsys.readouterr().out
    assert shown.startswith("Usage: microclip-deploy")
    assert main([*name.split(), "-h"]) == 0
    assert capsys.readouterr().out == shown


def test_help_groups_options_by_what_they_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "Arguments:", "Photos and classes:", "Model:", "Method:", "Machine:", "Output:", "Options:",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("group", "command", "target"),
    [("bench", "model", "TARGET"), ("describe", "make", "CLASSES")],
)
def test_help_of_a_group_shows_what_a_target_takes(
    group: str, command: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([group, "--help"]) == 0
    shown = capsys.readouterr().out
    assert target in shown
    assert all(name in shown for name in SURFACE[f"{group} {command}"])


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("pre", ["predict"]),
        ("predict --fo", ["--format"]),
        ("predict run --format js", ["json", "jsonl"]),
        ("bench n", ["ncut"]),
        ("bench --pe", ["--percentiles", "--peers"]),
        ("bench exports/birds --pe", ["--percentiles", "--peers"]),
        ("describe classes.txt --max", ["--max-tokens-total", "--max-cost"]),
        ("adapt --recipe de", ["default", "demo", "demo-objects"]),
    ],
)
def test_shells_complete(
    line: str, found: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_MICROCLIP_DEPLOY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"microclip-deploy {line}")
    monkeypatch.setenv("COMP_CWORD", str(len(line.split())))
    assert main([]) == 0
    assert capsys.readouterr().out.split() == found


def test_help_tells_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert EPILOG in shown


def test_unknown_options_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--fast"]) == 2
    assert "--fast" in capsys.readouterr().err


@pytest.mark.parametrize("asked", ["version", "--version"])
def test_version_is_printed(asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([asked]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_every_option_of_serve_is_a_variable() -> None:
    """As docs/serving.md promises."""
    found = {param.name: param.envvar for param in commands(COMMAND)["serve"].params}
    assert found == {name: f"MICROCLIP_{name.upper()}" for name in found}
