"""The environment card, with and without a GPU."""

import json
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from microclip_deploy.bench import card

ANSWERS = {
    "name": "NVIDIA H200",
    "driver_version": "580.1",
    "memory.total": "143771 MiB",
    "clocks.sm": "1980 MHz",
    "mig.mode.current": "[N/A]",
    "clocks_event_reasons.active": "0x0000000000000204",
}


def answering(answers: dict[str, str]) -> Callable[..., str | None]:
    def output(*command: str) -> str | None:
        field = next((part for part in command if part.startswith("--query-gpu=")), "")
        return answers.get(field.removeprefix("--query-gpu="))

    return output


def test_without_a_gpu_the_card_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "_output", answering({}))
    found = card.environment()
    assert found["gpu"] is None
    assert found["packages"]["torch"]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("told", "cpu", "instructions"),
    [
        ("model name\t: EPYC\nflags\t\t: fpu avx2 avx512_vnni\n\nmodel name\t: other\n", "EPYC",
         ["avx2", "avx512_vnni"]),
        ("processor\t: 0\nFeatures\t: fp asimddp sve\n", None, ["asimddp", "sve"]),
        (None, None, []),
    ],
)  # fmt: skip
def test_the_processor_and_its_instructions_are_told(
    monkeypatch: pytest.MonkeyPatch, told: str | None, cpu: str | None, instructions: list[str]
) -> None:
    def read(path: Path, **_: str) -> str:
        if told is None:
            raise FileNotFoundError(path)
        return told

    monkeypatch.setattr(card, "_output", answering({}))
    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(card, "_version", lambda package: None)  # reads files too
    monkeypatch.setattr(platform, "processor", lambda: "generic")
    found = card.environment()
    assert (found["cpu"], found["instructions"]) == (cpu or "generic", instructions)


def test_a_gpu_is_described_and_what_is_unknown_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "_output", answering(ANSWERS))
    monkeypatch.setattr(card, "_cuda_runtime", lambda: "13.0")
    found = card.gpu()
    assert found is not None
    assert found["name"] == "NVIDIA H200"
    assert found["clock_sm"] == "1980 MHz"
    assert found["mig"] is None
    assert found["power"] is None
    assert found["cuda_runtime"] == "13.0"
    assert found["throttled_by"] == ["software power cap", "0x200"]


def test_an_older_driver_names_the_reasons_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"name": "Tesla T4", "clocks_throttle_reasons.active": "0x0000000000000000"}
    monkeypatch.setattr(card, "_output", answering(answers))
    found = card.gpu()
    assert found is not None
    assert found["throttled_by"] == []


def test_unreadable_reasons_are_none() -> None:
    assert card.throttle_reasons(None) is None
    assert card.throttle_reasons("Active") is None


def test_the_gpu_that_is_measured_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(card, "_output", lambda *command: asked.append(command[-1]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8a56")
    card.gpu(0), card.gpu(1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    card.gpu(1)
    assert asked == ["--id=3", "--id=GPU-8a56", "--id=1"]
