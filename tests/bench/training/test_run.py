"""`microclip-deploy bench adapt`: both sides, the data pipeline, and what limits an adaptation."""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from microclip_deploy.bench.training import run, step
from microclip_deploy.bench.training.report import (
    AdaptationReport,
    Case,
    Pipeline,
    limited_by,
    markdown,
    plain,
    write_report,
)
from microclip_deploy.bench.training.run import (
    AdaptationRequest,
    measure_pipeline,
    run_adaptation_bench,
)
from microclip_deploy.bench.training.step import Work, measure_steps, peak_memory_mib, require_equal
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import (
    DataError,
    EnvironmentProblem,
    UsageError,
    VerificationError,
)

SMALL = AdaptationRequest(("tiny",), batch=4, crops=2, repeats=2)
QUIET = Console(quiet=True)
NORMAL = Preprocess(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def report() -> Iterator[AdaptationReport]:
    """One run; fresh processes are left to the test that is about them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "peak_memory_mib", lambda _work, side: 10.0 + len(side))
        yield run_adaptation_bench(SMALL, QUIET)


def made_up(
    decode: float, views: float, model: float, *, workers: int = 4, device: str = "cpu"
) -> AdaptationReport:
    """A report of these images a second, at batch 8."""
    case = Case(
        geometry="ViT-B-32",
        side=224,
        batch=8,
        samples_s={"product": [8 / model], "plain": [16 / model]},
        parts_s={"labelling": [6 / model], "strong view": [1 / model], "optimiser": [1 / model]},
        losses={"product": 1.0, "plain": 1.0},
        peak_mib={"product": 900.0, "plain": 800.0},
        decode=Pipeline(32, [32 / decode] * 3),
        views=Pipeline(32, [32 / views] * 3),
    )
    return AdaptationReport(
        date="2026-11-26",
        device=device,
        precision="fp32",
        batch=8,
        crops=4,
        workers=workers,
        threads=2,
        photos={"source": "made-up JPEG photos", "count": 32},
        cases=[case],
        seconds=1.0,
        environment={"cores": 16, "gpu": None},
    )


def test_both_sides_are_measured_and_compute_the_same(report: AdaptationReport) -> None:
    (case,) = report.cases
    assert {side: len(seconds) for side, seconds in case.samples_s.items()} == {
        "product": 2,
        "plain": 2,
    }
    assert case.losses["product"] == pytest.approx(case.losses["plain"], rel=1e-3)
    assert case.peak_mib == {"product": 17.0, "plain": 15.0}
    assert (report.device, report.precision, case.side) == ("cpu", "fp32", 32)


def test_the_parts_add_up_to_the_step(report: AdaptationReport) -> None:
    (case,) = report.cases
    whole = sum(sum(seconds) for seconds in case.parts_s.values())
    assert list(case.parts_s) == ["labelling", "strong view", "optimiser"]
    assert sum(case.shares().values()) == pytest.approx(1)
    # What is left is the calls around the step.
    assert 0.9 * sum(case.samples_s["product"]) < whole <= sum(case.samples_s["product"])


def test_images_per_second_follow_from_the_samples(report: AdaptationReport) -> None:
    (case,) = report.cases
    told = report.to_json()["cases"][0]
    assert told["images_per_s"]["plain"] == 4 / median(case.samples_s["plain"])
    assert told["ratio"] == pytest.approx(
        told["images_per_s"]["product"] / told["images_per_s"]["plain"]
    )
    assert next(iter(told)) == "ratio"
    for pipeline in (case.decode, case.views):
        assert (pipeline.images, len(pipeline.samples_s)) == (4, 2)
        assert pipeline.images_per_s == 8 / sum(pipeline.samples_s)


def test_json_holds_plain_values_and_files_hold_the_report(
    report: AdaptationReport, tmp_path: Path
) -> None:
    path = write_report(report, tmp_path / "new")
    assert path.name == f"{report.date}-cpu-adapt-tiny.json"
    assert json.loads(path.read_text()) == report.to_json()
    assert path.with_suffix(".md").read_text() == markdown(report)


def test_a_report_says_what_was_timed(report: AdaptationReport) -> None:
    for text in (markdown(report), json.dumps(report.to_json(), ensure_ascii=False)):
        assert "AdamW, from normalised tensors on the device on" in text
        assert "the start of processes is outside" in text
        assert "resident size on a CPU" in text
    assert report.photos["count"] == 32
    assert 420 <= report.photos["median_short_side_px"] <= 720


def test_tables_put_the_ratio_first() -> None:
    text = plain(made_up(500, 100, 50))
    assert text.splitlines()[0].endswith("a step a side")
    rows = [line.split() for line in text.splitlines()]
    times = ["160", "(160", "to", "160)", "320", "(320", "to", "320)"]
    assert rows[2] == ["ViT-B-32", "2.00x", "50.0", "25.0", *times, "900", "800"]
    assert "| ViT-B-32 | 2.00x | 50.0 | 25.0 |" in markdown(made_up(500, 100, 50))


@pytest.mark.parametrize(
    ("decode", "views", "model", "workers", "expected"),
    [
        (500, 100, 50, 4, "the model"),
        (500, 100, 400, 4, "augmentation"),
        (120, 100, 400, 4, "decode"),
        # Alone each is faster than the model; with all views loading is slower, and runs beside it.
        (150, 80, 100, 4, "decode"),
        (150, 80, 100, 0, "the model"),
        (500, 100, 400, 0, "augmentation"),
        (100, 101, 400, 4, "decode"),  # noise: views seem to cost nothing
    ],
)
def test_the_slowest_limits(
    decode: float, views: float, model: float, workers: int, expected: str
) -> None:
    report = made_up(decode, views, model, workers=workers)
    assert limited_by(report.cases[0], workers) == expected
    assert report.limits.startswith(
        f"ViT-B-32: {expected} limits an adaptation with --workers {workers}."
    )


def test_limits_compare_and_name_the_lever() -> None:
    model = made_up(500, 100, 50).limits
    assert "decoding 500, decoding with all views 100, the training step 50.0" in model
    assert "both at once reach at most 50.0" in model
    assert "a GPU, a smaller backbone, or fewer crops (labelling takes 75 % of the step)" in model
    assert "adapt.precision=bf16" in made_up(500, 100, 50, device="NVIDIA H200").limits
    assert "one after the other they reach 33.3" in made_up(500, 100, 50, workers=0).limits
    augmentation = made_up(500, 100, 400).limits
    assert "--workers 16, which keeps up with the model if as many cores" in augmentation
    assert "views.crops" in augmentation
    assert "short side of about 448 px" in made_up(120, 100, 400).limits


def test_without_the_plain_algorithm_there_is_no_ratio() -> None:
    report = made_up(500, 100, 50)
    for values in (report.cases[0].samples_s, report.cases[0].losses, report.cases[0].peak_mib):
        del values["plain"]
    assert report.to_json()["cases"][0]["ratio"] is None
    assert "–" in plain(report).splitlines()[2]


def test_loading_uses_the_users_photos_and_processes(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(path)
    request = SMALL._replace(batch=2, repeats=1, workers=2)
    decode, views = measure_pipeline(request, [path], NORMAL)
    assert [(p.images, len(p.samples_s)) for p in (decode, views)] == [(4, 1), (4, 1)]


def test_peak_memory_is_that_of_a_fresh_process() -> None:
    # Python and torch alone are more than 50 MiB, and a tiny model is nothing beside them.
    assert 50 < peak_memory_mib(Work("tiny", 2, 1, "cpu"), "plain") < 4096


def test_a_fresh_process_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_MODULE", "microclip_deploy.bench.nothing")
    with pytest.raises(EnvironmentProblem, match=r"bench\.nothing.*smaller --batch"):
        peak_memory_mib(Work("tiny", 2, 1, "cpu"), "plain")


@pytest.mark.parametrize("plain_loss", [70.2, float("nan")])
def test_other_losses_spoil_the_comparison(plain_loss: float) -> None:
    require_equal({"product": 70.0, "plain": 70.05})
    with pytest.raises(VerificationError, match="same loss"):
        require_equal({"product": 70.0, "plain": plain_loss})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"geometries": ("ViT-B-33",)}, "found ViT-B-33"),
        ({"geometries": ()}, "found none"),
        ({"batch": 0}, "--batch: expected 1 or more"),
        ({"workers": -1}, "--workers: expected 0 or more"),
        ({"crops": 65}, "at most 64"),
        ({"device": "tpu"}, "cpu, cuda or auto"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_adaptation_bench(SMALL._replace(**change), QUIET)  # type: ignore[arg-type]  # parametrised


def test_a_folder_without_photos_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        run_adaptation_bench(SMALL._replace(photos=tmp_path), QUIET)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA device; run `pytest -m gpu` where there is one",
)
def test_steps_are_timed_on_the_device() -> None:
    work = Work("tiny", 4, 2, "cuda")
    times = measure_steps(work, ["product", "plain"], 2)
    product = sum(times.samples_s["product"])
    assert 0 < sum(map(sum, times.parts_s.values())) <= product
    assert peak_memory_mib(work, "product") > 0
