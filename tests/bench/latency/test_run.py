"""`bench TARGET`: whoever is measured gives the same answers, and whoever is absent says why."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from microclip_deploy.bench.latency import contestants, run, stages, subject, windows
from microclip_deploy.bench.latency.contestants import BACKENDS, PEERS, Contestants, contestants_of
from microclip_deploy.bench.latency.report import COPY, PRODUCT, Report, read_report
from microclip_deploy.bench.latency.subject import Subject, subject_of
from microclip_deploy.bench.photos import encoded_photos
from microclip_deploy.cli.main import main
from microclip_deploy.errors import EnvironmentProblem, UsageError, VerificationError
from microclip_deploy.export.proof.probes import made_up_photos
from microclip_deploy.serving import opening

QUIET = Console(quiet=True)
SHORT = windows.Plan(warmup_s=0.0, duration_s=0.0, stable=1e9, most_windows=3)
OPTIONS = ("--batches", "1", "--warmup", "0", "--duration", "0", "--until-stable", "100%",
           "--peers", "none", "--no-stages", "--threads", "1")  # fmt: skip


def measured(target: object, **changed: Any) -> Report:
    plain: dict[str, Any] = {
        "backends": BACKENDS, "peers": (), "batches": (1,), "concurrency": (1,), "plan": SHORT,
        "threads": 1, "with_stages": False,
    }  # fmt: skip
    return run.run_latency_bench(str(target), QUIET, **{**plain, **changed})


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Leave out what takes seconds and has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "PAUSE_S", 0.0)
        patch.setattr(stages, "BUDGET_S", 0.0)
        patch.setattr(run, "PHOTOS", 2)
        patch.setattr(run, "environment", lambda _number: {"cpu": "quick"})
        patch.setattr(run, "cpu_ceilings", lambda _threads: {COPY: 1e9, PRODUCT: 1e9})
        patch.setattr(run, "cold_start", lambda *_: {"open_s": 1.0, "peak_rss_bytes": 100 << 20})
        yield


@pytest.fixture(scope="module")
def target(finished_run: Path, tiny_export: Path) -> Iterator[Subject]:
    """Give the finished run as it is measured; its export is a copy of the one that there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            subject, "write_export", lambda *given: shutil.copytree(tiny_export, given[-1])
        )
        with subject_of(str(finished_run), "fp32") as opened:
            yield opened


@pytest.fixture(scope="module")
def everyone(target: Subject) -> Iterator[Contestants]:
    """Open all but the one that compiles."""
    peers = [name for name in PEERS if name != "compiled"]
    with contestants_of(target, BACKENDS, peers, "cpu", 1) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(target: Subject, everyone: Contestants) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "subject_of", lambda *_: nullcontext(target))
        patch.setattr(run, "contestants_of", lambda *_: nullcontext(everyone))
        return measured("run", batches=(1, 2), concurrency=(1, 3), with_stages=True)


@pytest.fixture(scope="module")
def views(target: Subject) -> NDArray[np.uint8]:
    return made_up_photos(target.preprocess.size).views(target.preprocess)[:3]


def test_a_run_is_measured_with_its_peers(report: Report) -> None:
    assert report.subject == "onnx fp32 cpu"
    assert {(row.contestant, row.case) for row in report.rows} == {
        (name, (scope, batch, clients))
        for batch, clients in product((1, 2), (1, 3))
        for scope, names in {
            "image -> logits": ("onnx fp32 cpu", "torch fp32 cpu", "plain PyTorch", "onnx int8 cpu",
                                "CLIP cls fp32", "CLIP cls pruned fp32"),
            "JPEG -> logits": ("onnx fp32 cpu",),
        }.items()
        for name in names
    }  # fmt: skip
    assert all(len(row.samples_s) >= 3 and row.device_s is None for row in report.rows)
    assert {stage.batch for stage in report.stages} == {1, 2}
    names = {row.contestant for row in report.rows} | {stage.stage for stage in report.stages}
    assert names <= report.timed.keys()
    assert report.cold_start == {"open_s": 1.0}
    assert min(report.memory.values()) > 50 << 20
    assert len(report.memory) == 2


def test_who_is_absent_says_why(report: Report, tiny_export: Path) -> None:
    assert report.absent.keys() == {"trt", "compiled", "openvino"}
    assert "--device cuda" in report.absent["trt"]
    assert "OpenVINO" in report.absent["openvino"]
    assert report.absent["compiled"] == "not asked for; --peers compiled"
    export = measured(tiny_export, peers=("plain", "cls", "int8"))
    assert {row.contestant for row in export.rows} == {"onnx fp32 cpu"}
    for name in ("torch", "plain", "cls", "int8"):
        assert "holds no PyTorch model" in export.absent[name]


def test_a_part_that_fails_costs_only_itself(
    tiny_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> dict[str, float]:
        raise EnvironmentProblem("no luck")

    for part in ("cold_start", "peak_rss_bytes", "cpu_ceilings"):
        monkeypatch.setattr(run, part, fails)
    found = measured(tiny_export, with_stages=True)
    assert found.rows
    assert (found.cold_start, found.memory, found.stages) == (None, {}, [])
    lost = {name for name, why in found.absent.items() if why == "no luck"}
    assert lost == {"cold start", "memory", "stages"}


def test_a_target_is_named_and_its_folder_goes(
    finished_run: Path, target: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "int8"  # as the folder of a peer
    link.symlink_to(finished_run, target_is_directory=True)
    with subject_of(str(link), "fp32") as linked:
        assert not (linked.folder / "int8").exists()
    assert not linked.folder.exists()
    monkeypatch.chdir(finished_run)
    with subject_of(".", "fp32") as here:
        assert here.name == finished_run.name
    with subject_of("tiny", "fp32") as made:
        assert made.model is not None
    with pytest.raises(UsageError, match="ViT-B-99: expected the directory"):
        subject_of("ViT-B-99", "fp32").__enter__()


def test_plain_clip_is_the_class_token_alone(
    everyone: Contestants, target: Subject, views: NDArray[np.uint8]
) -> None:
    wanted = contestants._cls_logits(target, views)
    for name in ("CLIP cls fp32", "CLIP cls pruned fp32"):
        np.testing.assert_allclose(everyone.answers[name](views), wanted, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plain PyTorch", r"plain PyTorch: expected logits within 0\.01 of those of the target"),
        ("CLIP cls fp32", r"CLIP cls fp32: .* of \[CLS\] alone, found 7"),
    ],
)
def test_nobody_is_timed_who_answers_something_else(
    name: str, message: str, everyone: Contestants, views: NDArray[np.uint8]
) -> None:
    contestants.require_alike(everyone, views)
    right = everyone.answers[name]
    wrong = replace(everyone, answers={**everyone.answers, name: lambda x: right(x) + 7})
    with pytest.raises(VerificationError, match=message):
        contestants.require_alike(wrong, views)


@pytest.mark.parametrize(
    ("backends", "device", "message"),
    [
        (("torch", "trt"), "cpu", "torch: an export holds.*trt: TensorRT needs"),
        (("onnx",), "cuda:77", "cuda"),  # the engines would be opened by the default
    ],
)
def test_no_backend_that_works_is_an_error(
    backends: tuple[str, ...],
    device: str,
    message: str,
    target: Subject,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def engines(*_: object) -> None:
        raise AssertionError("the engines were opened")

    monkeypatch.setattr(opening, "has_engines", lambda path: True)
    monkeypatch.setattr(opening, "_has", lambda package: True)
    monkeypatch.setattr(opening, "_open_engines", engines)
    with pytest.raises(EnvironmentProblem, match=message):
        contestants_of(target._replace(model=None), backends, (), device, None).__enter__()


def test_the_photos_of_the_users_are_decoded(
    target: Subject, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reading = target.preprocess.photos
    encoded, _ = encoded_photos(photos, 32, 2, 32, reading, QUIET)
    assert encoded[0] == min(photos.rglob("*.png")).read_bytes()
    assert run._views(target, encoded, 40).shape == (40, 32, 32, 3)
    (tmp_path / "bad.jpg").write_text("no photo")
    next(iter(made_up_photos(32).read())).save(tmp_path / "good.png")
    (tmp_path / "a.heic2").touch()
    read, source = encoded_photos(tmp_path, 32, 2, 32, reading, Console(width=200))
    assert (len(read), source) == (1, "the user's (left out: 1 .heic2)")
    assert "bad.jpg: no image of a known format" in capsys.readouterr().out


# ---- the command


def test_what_cannot_end_well_ends_before_the_measuring(
    tiny_export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def code(*options: object) -> int:
        return main(["bench", str(tiny_export), *OPTIONS, *map(str, options)])

    (tmp_path / "file").touch()
    assert code("--out", tmp_path / "file") == 4
    assert code("--baseline", tmp_path / "none.json") == 3
    assert code("--backends", "none") == code("--backends", "") == 2
    for package in ("psutil", "matplotlib"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert code("--out", tmp_path) == 4
    shown = capsys.readouterr().err
    assert shown.count("microclip-deploy[bench]") == 2
    assert "batch 1:" not in shown


def test_the_command_writes_compares_and_limits(
    tiny_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", str(tiny_export), *OPTIONS]
    assert main([*command, "--json", "--out", str(tmp_path), "--percentiles", "75"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["rows"][0]["percentiles_s"].keys() == {"p75"}
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".html"}
    (path,) = tmp_path.glob("*.json")
    assert read_report(path).percentiles == [75.0]

    assert main(["bench", "compare", str(path), str(path)]) == 0
    assert "onnx fp32 cpu" in capsys.readouterr().out

    assert main(["bench", *OPTIONS, str(tiny_export), "--slo", "p50=0.0001ms"]) == 6
    assert "p50 expected at most" in capsys.readouterr().err
    assert main([*command, "--slo", "p99=100s"]) == 0

    slow = json.loads(path.read_text())
    for row in slow["rows"]:
        row["samples_s"] = [sample / 100 for sample in row["samples_s"]]
    path.write_text(json.dumps(slow))
    assert main([*command, "--baseline", str(path), "--max-regression", "10%"]) == 6
    capsys.readouterr()
    assert main([*command, "--baseline", str(path), "--concurrency", "3"]) == 2
    refused = capsys.readouterr().err
    assert "with 3 at once" in refused
    assert "batch 1:" not in refused, "measured before it was refused"


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("cupy") is None,
    reason="no CUDA device, or no cupy; run `pytest -m gpu` where there are both",
)
@pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.compile, PyTorch 2.11
def test_a_run_is_measured_on_a_device(finished_run: Path) -> None:
    found = measured(finished_run, device="cuda", peers=PEERS, batches=(1, 2), with_stages=True)
    rows = {row.contestant: row for row in found.rows if row.scope == "image -> logits"}
    ours = rows["torch fp32 cuda:0"]
    assert None not in (ours.host_s, ours.device_s)
    assert ours.warnings == []
    peers = {"torch fp32 cuda:0, no CUDA graph", "plain PyTorch", "torch compiled fp32 cuda:0"}
    assert peers <= rows.keys()
    assert found.environment_after is not None
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():  # stages are an export's
        assert found.ceilings is not None
        assert {"H2D", "K1", "K2", "D2H"} <= {stage.stage for stage in found.stages}
    else:
        assert "stages" in found.absent
