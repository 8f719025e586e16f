"""`microclip-deploy bench adapt`: both sides, the data pipeline, and what limits an adaptation."""

import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image

from microclip_deploy.adapt.device_views import PhotoBatch
from microclip_deploy.artifact import read_json
from microclip_deploy.bench.geometry import random_geometry
from microclip_deploy.bench.table_text import in_ms
from microclip_deploy.bench.training import step
from microclip_deploy.bench.training.report import (
    BACKWARD,
    CROPS,
    FORWARD,
    OPTIMISER,
    PLAIN,
    PRODUCT,
    WEAK,
    AdaptationReport,
    markdown,
    plain,
)
from microclip_deploy.bench.training.step import Work
from microclip_deploy.cli.main import main
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import EnvironmentProblem, VerificationError

COMMITTED = Path(__file__).parents[3] / "bench" / "results" / "2026-11-27-cpu-adapt-vit-b-32.json"
TINY = ["bench", "adapt", "--geometry", "tiny"]


def made_up(
    decode: float, views: float, model: float, *, workers: int = 4, device: str = "cpu"
) -> AdaptationReport:
    """Return a committed report, changed to these images a second."""
    report = read_json(COMMITTED)
    report["cases"][0] |= {
        "batch": 8,
        "samples_s": {PRODUCT: [7 / model, 8 / model, 10 / model], PLAIN: [16 / model]},
        "parts_s": {
            WEAK: [1 / model],
            CROPS: [5 / model],
            FORWARD: [0.5 / model],
            BACKWARD: [0.5 / model],
            OPTIMISER: [1 / model],
        },
        "decode": {"images": 32, "samples_s": [32 / decode] * 3},
        "views": {"images": 32, "samples_s": [16 / views, 48 / views]},
    }
    return AdaptationReport.model_validate(report | {"workers": workers, "device": device})


def test_a_committed_report_reads_back_the_same() -> None:
    stored = read_json(COMMITTED)
    report = AdaptationReport.model_validate(stored).model_dump(exclude_unset=True)
    later = {"limits": "", "scaling": []}  # the former now in fewer words
    assert report | later == stored | later


def test_both_sides_are_measured_and_compute_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--batch-size", "4", "--crops", "2", "--repeats", "2", "--workers", "1"]
    assert main([*TINY, *options, "--out", str(tmp_path / "new"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (case,) = report["cases"]
    assert {side: len(times) for side, times in case["samples_s"].items()} == {PRODUCT: 2, PLAIN: 2}
    assert case["losses"][PRODUCT] == pytest.approx(case["losses"][PLAIN], rel=1e-3)
    assert sum(case["shares"].values()) == pytest.approx(1)
    assert len(case["upload_s"]) == 2
    # Python and torch alone are more than 50 MiB, and a tiny model is nothing beside them.
    assert all(50 < peak < 4096 for peak in case["peak_mib"].values())
    assert [len(case[name]["samples_s"]) for name in ("decode", "views")] == [2, 2]
    assert (report["device"], report["precision"], case["side"]) == ("cpu", "fp32", 32)
    assert report["photos"]["count"] == 32
    (path,) = (tmp_path / "new").glob("*-cpu-adapt-tiny.json")
    assert json.loads(path.read_text()) == report
    assert path.with_suffix(".md").read_text() == markdown(AdaptationReport.model_validate(report))


def in_this_process(workers: int, mp_context: object) -> ThreadPoolExecutor:
    """Stand in for fresh processes, which take seconds to start."""
    return ThreadPoolExecutor(workers)


def test_the_users_photos_are_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "ProcessPoolExecutor", in_this_process)
    options = ["--images", str(tmp_path), "--batch-size", "2", "--crops", "1", "--repeats", "1"]
    assert main([*TINY, *options]) == 3  # none yet
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "photo.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert main([*TINY, *options, "--no-plain", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cases"][0]["cut_s"] == []
    assert (report["photos"]["count"], report["photos"]["median_short_side_px"]) == (1, 40)
    assert report["cases"][0]["ratio"] is None
    assert "–" in plain(AdaptationReport.model_validate(report)).splitlines()[2]


def test_views_cut_on_the_device_are_measured_there(
    tmp_path: Path,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step, "ProcessPoolExecutor", in_this_process)
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, ".")
    cut: list[int] = []
    views = PhotoBatch.views

    def counted(self: PhotoBatch, preprocess: Preprocess) -> torch.Tensor:
        cut.append(len(self.sizes))
        return views(self, preprocess)

    monkeypatch.setattr(PhotoBatch, "views", counted)
    options = ["--batch-size", "3", "--crops", "2", "--repeats", "2", "--no-plain", "--json"]
    images = ["--images", str(tmp_path / "photos.tar")]
    assert main([*TINY, *options, *images, "--views-there"]) == 0
    report = AdaptationReport.model_validate_json(capsys.readouterr().out)
    (case,) = report.cases
    assert cut == [3, 3, 3]  # a warm-up and two samples; none while loading is measured
    assert (len(case.upload_s), len(case.cut_s), len(case.views.samples_s)) == (2, 2, 2)
    assert case.images_per_s[PRODUCT] > report.scaling[0].images_per_s
    assert report.photos["median_kib"] > 1
    told = plain(report)
    assert f"{in_ms(median(case.cut_s))} ms" in told
    assert "decode + reducing" in told


def test_what_is_done_on_the_device_before_a_step_counts() -> None:
    stored = made_up(500, 100, 50).model_dump()
    stored["cases"][0] |= {"upload_s": [0.02], "cut_s": [0.06, 0.08, 0.1]}
    report = AdaptationReport.model_validate(stored)
    assert "at most 30.8 images a second" in report.limits  # 8 in 0.16 + 0.02 + 0.08
    assert report.scaling[0].images_per_s == pytest.approx(8 / 0.26)
    stored["cases"][0]["views"] = {"images": 32, "samples_s": [32 / 20]}
    report = AdaptationReport.model_validate(stored)
    assert "or a pack, whose photos are reduced once" in report.limits


def test_numbers_follow_from_the_samples_and_the_ratio_comes_first() -> None:
    report = made_up(500, 100, 50)
    (case,) = report.cases
    strong = {FORWARD: 0.0625, BACKWARD: 0.0625}
    assert case.shares == pytest.approx({WEAK: 0.125, CROPS: 0.625, **strong, OPTIMISER: 0.125})
    assert case.views.images_per_s == pytest.approx(100)
    lines = plain(report).splitlines()
    assert lines[0].endswith("3 steps a side")
    times = ["160", "(140", "to", "200)", "320", "(320", "to", "320)"]
    assert lines[2].split() == ["ViT-B-32", "2.00x", "50.0", "25.0", *times, "1960", "1917"]
    assert "| ViT-B-32 | 2.00x | 50.0 | 25.0 |" in markdown(report)


@pytest.mark.parametrize(
    ("decode", "views", "model", "workers", "expected", "lever"),
    [
        (500, 100, 50, 4, "the model", "50.0 images a second. Lever: a GPU, a smaller backbone"),
        (500, 100, 50, 0, "the model", "at most 33.3 images a second"),
        (500, 100, 400, 4, "augmentation", "--workers 16, which keeps up with the model if as"),
        (120, 100, 400, 4, "decode", "short side of about 448 px"),
        # Alone each is faster than the model; with all views loading is slower, and runs beside it.
        (150, 80, 100, 4, "decode", "at most 80.0"),
        (150, 80, 100, 0, "the model", "fewer crops (labelling takes 75 % of the step)"),
        (500, 100, 400, 0, "augmentation", "fewer crops (--set views.crops=N)"),
        (100, 101, 400, 4, "decode", "at most 101"),  # noise: views seem to cost nothing
    ],
)
def test_the_slowest_limits(
    decode: float, views: float, model: float, workers: int, expected: str, lever: str
) -> None:
    limit = made_up(decode, views, model, workers=workers).limits
    assert limit.startswith(f"ViT-B-32: {expected} limits an adaptation with --workers {workers}, ")
    assert lever in limit


def test_more_gpus_shrink_all_but_the_optimiser_and_need_more_loading() -> None:
    report = made_up(500, 100, 50)  # 4 processes load 25 images a second each
    report.environment["cores"] = 8
    report = AdaptationReport.model_validate(report.model_dump())
    one, four, eight = report.scaling
    assert one.images_per_s == pytest.approx(50)
    assert (one.workers, one.limited_by) == (2, "the model")
    assert four.images_per_s == pytest.approx(8 / (0.02 + 0.14 / 4))
    assert (four.workers, four.limited_by) == (2, "the model")
    assert eight.images_per_s == pytest.approx(8 / (0.02 + 0.14 / 8))
    assert (eight.reached, eight.limited_by) == (200, "loading")


def test_a_gpu_is_no_lever_on_a_gpu() -> None:
    assert "adapt.precision=bf16" in made_up(500, 100, 50, device="NVIDIA H200").limits


def test_a_fresh_process_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "ProcessPoolExecutor", in_this_process)
    with pytest.raises(EnvironmentProblem, match=r"nothing.*smaller --batch"):
        step.peak_memory_mib(Work("nothing", 2, 1, "cpu"), PLAIN)


def test_other_losses_spoil_the_comparison() -> None:
    step.require_equal({PRODUCT: 70.0, PLAIN: 70.05})
    for loss in (70.2, float("nan")):
        with pytest.raises(VerificationError, match="same loss"):
            step.require_equal({PRODUCT: 70.0, PLAIN: loss})


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--geometry", "ViT-B-33", "found ViT-B-33"),
        ("--geometry", "", "expected open_clip model names"),
        ("--batch-size", "1", "--batch-size"),
        ("--workers", "-1", "--workers"),
        ("--crops", "65", "--crops"),
        ("--device", "tpu", "cpu, cuda or auto"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "adapt", option, value]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_steps_are_timed_on_the_device() -> None:
    work = Work("tiny", 4, 2, "cuda")
    steps = step.measure_steps(random_geometry("tiny"), work, [PRODUCT, PLAIN], 2)
    assert all(seconds > 0 for part in steps.parts_s.values() for seconds in part)
    assert step.peak_memory_mib(work, PRODUCT) > 0
