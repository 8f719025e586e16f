"""An export with engines: they are used where they fit, and nobody is misled where they do not."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from microclip_deploy import artifact
from microclip_deploy.errors import CheckpointError, EnvironmentProblem, UsageError
from microclip_deploy.serving import Session, open_session, opening
from microclip_deploy.serving.engines import ENGINES
from microclip_deploy.serving.onnx_session import OnnxSession


@pytest.fixture
def with_engines(export: Path) -> Path:
    """Return an export that has a folder of engines."""
    (export / ENGINES / "some").mkdir(parents=True)
    (export / ENGINES / "some" / artifact.MANIFEST).write_text("{}")
    return export


Engines = Callable[[BaseException | None], list[str]]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    """Return what installs TensorRT, whose engines open or fail; it returns the devices asked."""

    def install(problem: BaseException | None) -> list[str]:
        asked: list[str] = []

        def opened(path: Path, device: str) -> Session:
            asked.append(device)
            if problem is not None:
                raise problem
            return OnnxSession.open(path)

        monkeypatch.setattr(opening, "_has", lambda package: package == "tensorrt")
        monkeypatch.setattr(opening, "_open_engines", opened)
        return asked

    return install


@pytest.mark.parametrize(
    ("device", "asked"),
    [("auto", ["cuda"]), ("cuda", ["cuda"]), ("cuda:1", ["cuda:1"]), ("tensorrt:1", ["cuda:1"]),
     ("tensorrt", ["cuda"]), ("cpu", [])],
)  # fmt: skip
def test_engines_serve_a_gpu(
    engines: Engines, with_engines: Path, device: str, asked: list[str]
) -> None:
    found = engines(None)
    open_session(with_engines, device).close()
    assert found == asked


def test_foreign_engines_are_left_aside_with_a_warning(
    engines: Engines, with_engines: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = engines(EnvironmentProblem("built for NVIDIA T4; build them here"))
    with caplog.at_level(logging.WARNING), open_session(with_engines, "auto") as session:
        assert session.device == "cpu"
    assert asked == ["cuda"]
    assert "without the TensorRT engines: built for NVIDIA T4" in caplog.text


def test_who_insists_on_engines_gets_them_or_an_error(engines: Engines, with_engines: Path) -> None:
    engines(EnvironmentProblem("built for NVIDIA T4"))
    with pytest.raises(EnvironmentProblem, match="built for NVIDIA T4"):
        open_session(with_engines, "tensorrt")


def test_damaged_engines_are_an_error_unless_auto_may_choose(
    engines: Engines, with_engines: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engines(CheckpointError("bytes are not those that were proven"))
    with pytest.raises(CheckpointError, match="not those that were proven"):
        open_session(with_engines, "cuda")
    with caplog.at_level(logging.WARNING):
        open_session(with_engines, "auto").close()
    assert "not those that were proven" in caplog.text


def test_an_export_without_engines_is_not_asked_for_them(engines: Engines, export: Path) -> None:
    asked = engines(None)
    open_session(export, "auto").close()
    assert asked == []


def test_the_missing_package_is_named(with_engines: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"'tensorrt'.*microclip-deploy\[gpu\]"):
        open_session(with_engines, "tensorrt")


def test_a_run_has_no_engines(finished_run: Path) -> None:
    with pytest.raises(UsageError, match="export the run first"):
        open_session(finished_run, "tensorrt")
