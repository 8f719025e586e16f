"""The report of `bench TARGET`: numbers from raw samples, and pages that say no more than those."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from microclip_deploy.bench.latency.advice import advice
from microclip_deploy.bench.latency.limits import (
    comparison,
    require_comparable,
    require_no_regression,
    require_slo,
)
from microclip_deploy.bench.latency.page import page, write_report
from microclip_deploy.bench.latency.report import (
    BACKBONE,
    COPY,
    DECODE,
    IMAGE_TO_LOGITS,
    JPEG_TO_LOGITS,
    K1,
    K2,
    POST,
    PRODUCT,
    Report,
    Row,
    StageRow,
    explained,
    floor_s,
    ratios,
    read_report,
)
from microclip_deploy.bench.latency.tables import as_json, markdown, plain
from microclip_deploy.errors import DataError, ThresholdError, UsageError

OURS, PEER = "onnx fp32 cpu", "<script>alert(1)</script>"


def row(name: str = OURS, scale: float = 1.0, **changed: Any) -> Row:
    samples = [scale * 1e-3 * (10 + number) for number in range(11)]
    given = {
        "scope": IMAGE_TO_LOGITS, "batch": 1, "concurrency": 1, "samples_s": samples,
        "images_per_s": 66.0, "stable": True, "spread": 0.02,
    }  # fmt: skip
    return Row(name, **{**given, **changed})


def stage(name: str, ms: float, **changed: Any) -> StageRow:
    return StageRow(**{"stage": name, "batch": 1, "samples_s": [1e-3 * ms] * 3, **changed})


def report(**changed: Any) -> Report:
    plain_report = Report(
        target="birds", artifact_sha256="ab" * 32, precision="fp32", device="cpu",
        date="2026-01-02", subject=OURS,
        rows=[row(), row(PEER, 3), row(batch=8, scale=5), row(scope=JPEG_TO_LOGITS, scale=2)],
        stages=[stage(DECODE, 1), stage(BACKBONE, 12, flop=10**9, bytes=10**7, floor_s=0.01),
                stage(K1, 0.3), stage(K2, 0.4), stage(POST, 0.1)],
        absent={"openvino": "not <installed>"}, cold_start={"open_s": 1.25},
        memory={"rss_peak": 3 << 20}, ceilings={COPY: 2e9, PRODUCT: 1e11},
        timed={OURS: "everything"}, environment={"cpu": "Xeon", "gpu": None},
    )  # fmt: skip
    return replace(plain_report, **changed)


def told(found: Report) -> str:
    return "\n".join(advice(found))


@pytest.mark.parametrize("q", [0, 50, 90, 95, 99, 99.9, 100])
def test_percentiles_are_numpys(q: float) -> None:
    assert row().percentile(q) == np.percentile(row().samples_s, q)


def test_ratios_are_of_the_same_batch_and_scope() -> None:
    assert ratios(report(), 1, IMAGE_TO_LOGITS) == {OURS: 1.0, PEER: pytest.approx(3.0)}
    assert ratios(report(), 8, IMAGE_TO_LOGITS) == {OURS: 1.0}
    assert ratios(report(), 32, IMAGE_TO_LOGITS) == {}
    reverse = ratios(report(subject=PEER), 1, IMAGE_TO_LOGITS)
    assert reverse[OURS] == pytest.approx(1 / 3)


def test_a_floor_is_the_longer_of_arithmetic_and_memory() -> None:
    ceilings = {COPY: 1e9, PRODUCT: 1e12}
    assert floor_s(10**9, 10**6, ceilings) == pytest.approx(1e-3)
    assert floor_s(10**6, 10**7, ceilings) == pytest.approx(1e-2)
    assert floor_s(None, None, ceilings) is None
    assert floor_s(1, 1, None) is None


def test_a_report_is_read_back_as_it_was(tmp_path: Path) -> None:
    path = write_report(report(), tmp_path)
    assert path.name == "2026-01-02-cpu-latency-birds-fp32.json"
    assert read_report(path) == report()
    assert {each.suffix for each in tmp_path.iterdir()} == {".json", ".md", ".html"}


def test_raw_samples_may_stay_out_of_a_line() -> None:
    short = as_json(report(), samples=False)
    assert "samples_s" not in json.dumps(short)
    assert short["rows"][0]["percentiles_s"]["p50"] == row().percentile(50)


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: value.pop("rows"),
        lambda value: value.update(schema="other/1"),
        lambda value: value.update(subject="nobody"),
        lambda value: value["rows"][0].update(samples_s=[]),
        lambda value: value["rows"][0].update(samples_s=["slow"]),
        lambda value: value["rows"][0].update(batch=0),
        lambda value: value.update(percentiles=[101.0]),
    ],
)
def test_damaged_results_are_refused(damage: Any, tmp_path: Path) -> None:
    value = as_json(report())
    damage(value)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match="results"):
        read_report(path)


def test_a_missing_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json"):
        read_report(tmp_path / "none.json")


def test_every_form_shows_who_is_absent_and_what_was_timed() -> None:
    for text in (plain(report()), markdown(report()), page(report())):
        assert "openvino" in text
        assert "15.0 ms" in text
        assert "3.00x" in text
    assert "everything" in markdown(report())


def test_names_cannot_become_markup() -> None:
    shown = page(report())
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown
    assert "not &lt;installed&gt;" in shown
    assert PEER not in markdown(report())


def test_the_page_loads_nothing() -> None:
    found = re.findall(r"(?:https?:)?//[^\s\"'<]+|src=|url\(|@import", page(report()))
    assert set(found) <= {"http://www.w3.org/2000/svg"}
    assert page(report()).count("<svg") >= 3


def test_a_report_of_one_row_still_has_a_page() -> None:
    alone = report(rows=[row()], stages=[], cold_start=None, ceilings=None, memory={})
    assert OURS in page(alone)
    assert OURS in plain(alone)


def test_stages_are_held_against_the_whole() -> None:
    assert explained(report()) == {1: pytest.approx(12.7 / 15)}
    assert "batch 1: 85 %" in plain(report())
    assert explained(report(stages=[])) == {}


def test_advice_names_the_largest_stage_and_how_near_its_floor_it_is() -> None:
    near = told(report())
    assert "backbone takes most, 87 %" in near
    assert "near its arithmetic floor" in near
    assert "--dtype int8" in near
    far = stage(BACKBONE, 12, flop=10**8, bytes=10**6, floor_s=1e-3)
    assert "far from both floors" in told(report(stages=[far]))
    assert "larger batches" in told(report(stages=[far]))


def test_advice_on_what_is_not_to_be_used() -> None:
    assert "unstable" not in told(report())
    shaky = report(rows=[row(), row(PEER, stable=False, spread=0.4)])
    assert "unstable, with a spread of 40 %" in told(shaky)
    assert "no: unstable" in plain(shaky)


def test_advice_on_decoding_that_outweighs_the_model() -> None:
    assert "decode and preprocess take" not in told(report())
    slow = report(stages=[stage(DECODE, 30), stage(BACKBONE, 10)])
    assert "decode and preprocess take 3.00x as long as the model" in told(slow)


def test_advice_on_a_dear_saliency() -> None:
    assert "the saliency" not in told(report())
    dear = report(stages=[stage(BACKBONE, 10), stage(K1, 1), stage(K2, 2)])
    assert "the saliency (K1 and K2) costs 23 %" in told(dear)


@pytest.mark.parametrize(("reason", "shown"), [("software power cap", True), ("idle", False)])
def test_advice_on_clocks(reason: str, shown: bool) -> None:
    card = {"throttled_by": [reason]}
    found = told(report(device="cuda:0", environment_after=card))
    assert ("clocks were held down" in found) == shown
    assert "clocks" not in told(report(environment_after=card)), "of a GPU that is not measured"


def test_advice_without_a_floor_speaks_of_none() -> None:
    integer = stage(BACKBONE, 12, flop=None, bytes=10**9, floor_s=None)
    found = told(report(precision="int8", stages=[integer]))
    assert "floor" not in found
    assert found.endswith("a smaller model")
    assert floor_s(None, 10**9, {COPY: 1e9, PRODUCT: 1e9}) is None


# ---- limits


def test_a_kept_slo_is_silent_and_a_missed_one_names_every_row() -> None:
    require_slo(report(rows=[row(), row(PEER, 100)]), {50.0: 0.016, 99.0: 0.021})
    with pytest.raises(ThresholdError) as error:
        require_slo(report(), {50.0: 0.016, 99.0: 0.001})
    assert error.value.exit_code == 6
    text = str(error.value)
    assert "batch 8, 1 at once: p50 expected at most 16.0 ms, found 75.0 ms" in text
    assert text.count("p99 expected at most 1.00 ms") == 2
    assert JPEG_TO_LOGITS not in text


def test_a_regression_is_found_and_what_is_new_is_told() -> None:
    notes = require_no_regression(report(), report(), 0.0)
    assert notes == []
    faster = report(rows=[row(scale=0.9), row(PEER, 0.1)])
    notes = require_no_regression(report(), faster, 0.12)
    assert len(notes) == 2
    assert any("batch 8" in note for note in notes)
    with pytest.raises(ThresholdError, match=r"at most 14\.2 ms, found 15\.0 ms") as error:
        require_no_regression(report(), faster, 0.05)
    assert error.value.exit_code == 6


def test_a_baseline_of_something_else_is_refused() -> None:
    other = report(subject=PEER, rows=[row(PEER)])
    with pytest.raises(UsageError, match="found none of it; measure the baseline"):
        require_no_regression(report(), other, 0.1)
    with pytest.raises(
        UsageError, match="at batch 4 with 2 at once, found batch 1 with 1 at once, batch 8 with"
    ):
        require_comparable(report(rows=[]), report(), {(4, 2)})
    require_comparable(report(rows=[]), report(), {(4, 2), (8, 1)})


def test_a_miss_of_an_unstable_row_says_so() -> None:
    shaky = replace(row(), stable=False)
    with pytest.raises(ThresholdError, match=r"found 15\.0 ms \(its windows disagree"):
        require_slo(report(rows=[shaky]), {50.0: 0.001})
    with pytest.raises(ThresholdError, match=r"found 15\.0 ms \(its windows disagree"):
        require_no_regression(report(rows=[shaky]), report(rows=[row(scale=0.5)]), 0.1)


def test_a_comparison_shows_machines_first_then_ratios() -> None:
    other = report(rows=[row(scale=2), row("new")], environment={"cpu": "EPYC", "gpu": None})
    text = comparison(report(), other)
    assert text.splitlines()[:2] == ["what differs:", "  cpu: Xeon -> EPYC"]
    (line,) = (line for line in text.splitlines() if OURS in line)
    assert "2.00x" in line
    assert "15.0" in line
    assert "30.0" in line
    assert "new" not in text
    assert comparison(report(), report()).startswith(
        "the same target, options, machine and packages"
    )
    shaky = report(rows=[replace(row(), stable=False)], environment={"cpu": "Xeon", "load": 2.0})
    (line,) = (line for line in comparison(report(), shaky).splitlines() if OURS in line)
    assert f"{OURS} unstable" in line
    assert "load" not in comparison(report(), shaky)
    assert "no row stands in both" in comparison(report(), report(subject="x", rows=[row("x")]))


@pytest.mark.parametrize("changed", [{"target": "cars"}, {"precision": "int8"}])
def test_a_baseline_of_another_model_is_refused(changed: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="expected a report of birds in fp32, found one of"):
        require_no_regression(report(), report(**changed), 0.1)
    assert comparison(report(), report(**changed)).startswith("what differs:")
