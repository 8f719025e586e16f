"""`bench TARGET`: whoever is measured gives the same answers, and whoever is absent says why."""

import io
import json
import shutil
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from rich.console import Console

from microclip_deploy.bench.latency import contestants, run, stages
from microclip_deploy.bench.latency import subject as subject_module
from microclip_deploy.bench.latency.cls_encoder import write_cls_graph
from microclip_deploy.bench.latency.contestants import BACKENDS, PEERS, Contestants, contestants_of
from microclip_deploy.bench.latency.report import IMAGE_TO_LOGITS, JPEG_TO_LOGITS, Report
from microclip_deploy.bench.latency.run import LatencyRequest, run_latency_bench
from microclip_deploy.bench.latency.subject import subject_of
from microclip_deploy.bench.latency.tables import as_json
from microclip_deploy.bench.latency.windows import Plan, measure
from microclip_deploy.bench.option_text import parse_names
from microclip_deploy.cli.main import main
from microclip_deploy.errors import EnvironmentProblem, UsageError, VerificationError
from microclip_deploy.export.proof.probes import made_up_photos
from microclip_deploy.head import LOGIT_SCALE
from microclip_deploy.model.checkpoint import load_model, read_checkpoint
from microclip_deploy.serving import opening
from microclip_deploy.serving.exported import read_export
from microclip_deploy.serving.onnx_graph import OnnxGraph
from microclip_deploy.serving.onnx_session import OnnxSession

QUIET = Console(quiet=True)
SHORT = Plan(warmup_s=0.01, duration_s=0.05, stable=1.0, most_windows=3)


def request(target: object, **changed: object) -> LatencyRequest:
    plain = {"batches": (1, 2), "plan": SHORT, "peers": (), "threads": 1, "with_stages": False}
    return LatencyRequest(str(target), **{**plain, **changed})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def report(finished_run: Path) -> Report:
    """Return what is measured of a run with everyone but the one that compiles."""
    peers = tuple(name for name in PEERS if name != "compiled")
    asked = request(
        finished_run, peers=peers, with_stages=True, backends=BACKENDS, concurrency=(1, 3)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_BUDGET_S", 0.05)
        return run_latency_bench(asked, QUIET)


def test_a_run_is_measured_with_its_peers(report: Report) -> None:
    assert report.subject == "onnx fp32 cpu"
    rows = {(row.contestant, row.scope, row.batch, row.concurrency) for row in report.rows}
    wanted = ("onnx fp32 cpu", "torch fp32 cpu", "plain PyTorch", "onnx int8 cpu", "CLIP cls fp32",
              "CLIP cls pruned fp32")  # fmt: skip
    for batch, clients in product((1, 2), (1, 3)):
        assert {(name, IMAGE_TO_LOGITS, batch, clients) for name in wanted} <= rows
        assert (report.subject, JPEG_TO_LOGITS, batch, clients) in rows
    assert all(len(row.samples_s) >= 3 for row in report.rows)
    assert all(row.device_s is None for row in report.rows)


def test_who_is_absent_says_why(report: Report) -> None:
    assert "--device cuda" in report.absent["trt"]
    assert "--peers compiled" in report.absent["compiled"]
    assert "OpenVINO" in report.absent["openvino"]


def test_the_rest_of_a_report_is_there(report: Report) -> None:
    assert report.cold_start is not None
    assert {"import_s", "open_s", "first_s", "second_s"} <= report.cold_start.keys()
    assert min(report.memory.values()) > 50 << 20
    assert len(report.memory) == 2
    assert {stage.batch for stage in report.stages} == {1, 2}
    assert report.ceilings is not None
    measured = {row.contestant for row in report.rows} | {stage.stage for stage in report.stages}
    assert measured <= report.timed.keys()
    assert Report.from_json(json.loads(json.dumps(as_json(report)))) == report


def test_the_same_target_agrees_with_itself_within_its_spread(tiny_export: Path) -> None:
    views = made_up_photos(32).views(read_export(tiny_export).manifest.preprocess)[:4]
    sessions = {name: OnnxSession.open(tiny_export, "cpu", threads=1) for name in ("one", "other")}
    plan = Plan(warmup_s=0.2, duration_s=0.9, stable=0.1, most_windows=10)
    found = measure({name: partial(each.predict, views) for name, each in sessions.items()}, plan)
    one, other = found["one"], found["other"]
    tolerance = 0.1 + one.spread + other.spread
    assert np.median(one.samples_s) == pytest.approx(np.median(other.samples_s), rel=tolerance)


def test_an_export_is_measured_without_pytorch_peers(tiny_export: Path) -> None:
    found = run_latency_bench(request(tiny_export, peers=("plain", "cls", "int8")), QUIET)
    assert {row.contestant for row in found.rows} == {"onnx fp32 cpu"}
    for name in ("plain", "cls", "int8"):
        assert "holds no PyTorch model" in found.absent[name]


def test_a_model_name_stands_for_random_weights() -> None:
    with subject_of("tiny", "fp32") as subject:
        assert subject.model is not None
        assert (subject.export / "full.onnx").is_file()
        folder = subject.folder
    assert not folder.exists()
    with (
        pytest.raises(UsageError, match="ViT-B-99: expected the directory"),
        subject_of("ViT-B-99", "fp32"),
    ):
        pass


@pytest.mark.parametrize("pruned", [False, True])
def test_the_cls_encoder_is_clips(pruned: bool, finished_run: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(finished_run)
    model, preprocess = load_model(checkpoint), checkpoint.manifest.preprocess
    write_cls_graph(model, preprocess, tmp_path / "cls.onnx", pruned=pruned)
    views = made_up_photos(preprocess.size).views(preprocess)[:3]
    (found,) = OnnxGraph(tmp_path / "cls.onnx").run(["logits"], {"image": views})
    with torch.inference_mode():
        cls = model.encode_cls(preprocess.normalize(torch.from_numpy(views)))
        wanted = LOGIT_SCALE * cls @ model.class_matrix().T
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=5e-5)


def test_nobody_is_timed_who_answers_something_else(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = contestants._plain
    monkeypatch.setattr(
        contestants, "_plain", lambda *args, **kw: lambda images: plain(*args, **kw)(images) + 1
    )
    with pytest.raises(VerificationError, match=r"plain PyTorch: expected logits within 0\.01 of"):
        run_latency_bench(request(finished_run, peers=("plain",)), QUIET)


def test_plain_clip_must_be_clips(tiny_export: Path, finished_run: Path) -> None:
    model = load_model(read_checkpoint(finished_run))
    with subject_of(str(tiny_export), "fp32") as export:
        subject = export._replace(model=model)
        views = made_up_photos(subject.preprocess.size).views(subject.preprocess)[:3]
        cls = run._cls_logits(subject, views)
        found = Contestants({"onnx": lambda _: cls + 7, "CLIP cls fp32": lambda _: cls})
        run._require_alike(found, views, subject)
        found.answers["CLIP cls fp32"] = found.answers["onnx"]
        with pytest.raises(VerificationError, match=r"CLIP cls fp32: .* of \[CLS\] alone, found 7"):
            run._require_alike(found, views, subject)


def test_a_run_is_named_by_its_directory(
    finished_run: Path, tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments: object) -> None:
        shutil.copytree(tiny_export, str(arguments[-1]))

    monkeypatch.setattr(subject_module, "write_export", write)
    run = tmp_path / "int8"  # as the folder of a peer
    run.symlink_to(finished_run, target_is_directory=True)
    with subject_of(str(run), "fp32") as subject:
        assert not (subject.folder / "int8").exists()
    monkeypatch.chdir(finished_run)
    with subject_of(".", "fp32") as subject:
        assert subject.name == finished_run.name


def test_onnx_is_measured_with_onnx_runtime_whatever_engines_there_are(
    tiny_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engines(*_: object) -> None:
        raise AssertionError("the engines were opened")

    monkeypatch.setattr(opening, "has_engines", lambda path: True)
    monkeypatch.setattr(opening, "_has", lambda package: True)
    monkeypatch.setattr(opening, "_open_engines", engines)
    with (
        subject_of(str(tiny_export), "fp32") as subject,
        pytest.raises(EnvironmentProblem, match="cuda"),
        contestants_of(subject, ("onnx",), (), "cuda:77", None),
    ):
        pass


def test_a_part_that_fails_costs_only_itself(
    tiny_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> dict[str, float]:
        raise EnvironmentProblem("no process could be started")

    monkeypatch.setattr(run, "cold_start", fails)
    monkeypatch.setattr(run, "_memory", fails)
    found = run_latency_bench(request(tiny_export, batches=(1,)), QUIET)
    assert found.rows
    assert found.cold_start is None
    assert found.absent["cold start"] == found.absent["memory"] == "no process could be started"


def test_an_output_that_cannot_be_is_named_at_once(
    tiny_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    command = ["bench", str(tiny_export), *OPTIONS, "--out", str(tmp_path / "file")]
    assert main(command) == 4
    assert "opening" not in capsys.readouterr().err


def test_no_backend_at_all_is_an_error(tiny_export: Path) -> None:
    with (
        subject_of(str(tiny_export), "fp32") as subject,
        pytest.raises(EnvironmentProblem, match=r"torch: an export holds.*trt: TensorRT needs"),
        contestants_of(subject, ("torch", "trt"), (), "cpu", None),
    ):
        pass


@pytest.mark.parametrize("backends", ["none", ""])
def test_no_backend_asked_for_is_a_mistake(backends: str, tiny_export: Path) -> None:
    assert main(["bench", str(tiny_export), *OPTIONS, "--backends", backends]) == 2


def test_names_are_checked() -> None:
    assert parse_names("--peers", "cls, plain,cls", PEERS) == ("cls", "plain")
    assert parse_names("--peers", "none", PEERS) == ()
    assert parse_names("--peers", "all", PEERS) == PEERS
    with pytest.raises(UsageError, match=r"--peers: expected .* found plane"):
        parse_names("--peers", "plane", PEERS)


def test_the_photos_of_the_users_are_decoded(tiny_export: Path, photos: Path) -> None:
    asked = request(tiny_export, images=photos, batches=(1,))
    with subject_of(str(tiny_export), "fp32") as subject:
        encoded = run._photos(asked, subject, QUIET)
        assert encoded[0] == min(photos.rglob("*.png")).read_bytes()
        assert run._views(subject, encoded, 40).shape == (40, 32, 32, 3)


def test_a_photo_that_cannot_be_used_is_named(tiny_export: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("no photo")
    next(iter(made_up_photos(32).read())).save(tmp_path / "good.png")
    shown = Console(record=True, quiet=False, file=io.StringIO(), width=200)
    with subject_of(str(tiny_export), "fp32") as subject:
        asked = request(tiny_export, images=tmp_path)
        assert len(run._photos(asked, subject, shown)) == 1
    assert "bad.jpg: no image of a known format" in shown.export_text()


OPTIONS = ("--batches", "1", "--warmup", "10ms", "--duration", "30ms", "--until-stable", "100%",
           "--peers", "none", "--no-stages", "--threads", "1")  # fmt: skip


def test_the_command_ends_with_one_line_of_json(
    tiny_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["bench", str(tiny_export), *OPTIONS, "--json", "--out", str(tmp_path)])
    (line,) = capsys.readouterr().out.splitlines()
    assert code == 0
    assert json.loads(line)["benchmark"] == "latency"
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".html"}


def test_a_missed_limit_exits_with_6(tiny_export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *OPTIONS, str(tiny_export), "--slo", "p50=0.0001ms"]) == 6
    assert main(["bench", str(tiny_export), *OPTIONS, "--slo", "p50=0.0001ms"]) == 6
    assert "p50" in capsys.readouterr().err
    assert main(["bench", str(tiny_export), *OPTIONS, "--slo", "p99=100s"]) == 0


def test_two_results_can_be_compared(
    tiny_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tiny_export), *OPTIONS, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    capsys.readouterr()
    assert main(["bench", "compare", str(path), str(path)]) == 0
    assert "onnx fp32 cpu" in capsys.readouterr().out
    slow = json.loads(path.read_text())
    for row in slow["rows"]:
        row["samples_s"] = [sample / 100 for sample in row["samples_s"]]
    path.write_text(json.dumps(slow))
    command = ["bench", str(tiny_export), *OPTIONS, "--baseline", str(path)]
    assert main([*command, "--max-regression", "10%"]) == 6
    capsys.readouterr()
    assert main([*command, "--concurrency", "3"]) == 2
    refused = capsys.readouterr().err
    assert "with 3 at once" in refused
    assert "batch 1:" not in refused, "measured before it was refused"
    assert main(["bench", str(tiny_export), "--baseline", str(tmp_path / "none.json")]) == 3


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("cupy") is None,
    reason="no CUDA device, or no cupy; run `pytest -m gpu` where there are both",
)
def test_a_run_is_measured_on_a_device(finished_run: Path) -> None:
    asked = request(finished_run, device="cuda", backends=BACKENDS, peers=PEERS, with_stages=True)
    found = run_latency_bench(asked, QUIET)
    rows = {row.contestant: row for row in found.rows if row.scope == IMAGE_TO_LOGITS}
    session = rows["torch fp32 cuda:0"]
    assert session.host_s is not None
    assert session.device_s is not None
    assert session.warnings == []
    assert {"torch fp32 cuda:0, no CUDA graph", "plain PyTorch", "torch compiled fp32 cuda:0"} <= {
        *rows
    }
    assert found.environment_after is not None
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():  # stages are an export's
        assert found.ceilings is not None
        assert {"H2D", "K1", "K2", "D2H"} <= {stage.stage for stage in found.stages}
    else:
        assert "stages" in found.absent
