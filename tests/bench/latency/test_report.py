"""The report of `bench TARGET`: numbers from raw samples, and pages that say no more than those."""

import json
import re
from pathlib import Path
from typing import Any

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
    COPY,
    IMAGE_TO_LOGITS,
    JPEG_TO_LOGITS,
    PRODUCT,
    Report,
    Row,
    Stage,
    StageRow,
    read_report,
)
from microclip_deploy.bench.latency.tables import as_json, markdown, plain
from microclip_deploy.errors import DataError, ThresholdError, UsageError

OURS, PEER = "onnx fp32 cpu", "<script>alert(1)</script>"
RESULTS = Path(__file__).parents[3] / "bench" / "results"


def row(name: str = OURS, scale: float = 1.0, **changed: Any) -> Row:
    given = {
        "scope": IMAGE_TO_LOGITS, "batch": 1, "concurrency": 1, "images_per_s": 66.0,
        "samples_s": [scale * 1e-3 * (10 + number) for number in range(11)],
        "stable": True, "spread": 0.02,
    }  # fmt: skip
    return Row(contestant=name, **{**given, **changed})


def stage(name: Stage, ms: float, **changed: Any) -> StageRow:
    return StageRow(**{"stage": name, "batch": 1, "samples_s": [1e-3 * ms] * 3, **changed})


def report(**changed: Any) -> Report:
    given = {
        "target": "birds", "artifact_sha256": "ab" * 32, "precision": "fp32", "device": "cpu",
        "date": "2026-01-02", "subject": OURS,
        "rows": [row(), row(PEER, 3), row(batch=8, scale=5), row(scope=JPEG_TO_LOGITS, scale=2)],
        "stages": [
            stage(Stage.DECODE, 1),
            stage(Stage.BACKBONE, 12, flop=10**9, bytes=10**7, floor_s=0.01),
            stage(Stage.K1, 0.3), stage(Stage.K2, 0.4), stage(Stage.POST, 0.1),
        ],
        "absent": {"openvino": "not <installed>"}, "cold_start": {"open_s": 1.25},
        "memory": {"rss_peak": 3 << 20}, "ceilings": {COPY: 2e9, PRODUCT: 1e11},
        "timed": {OURS: "everything"}, "environment": {"cpu": "Xeon", "gpu": None},
    }  # fmt: skip
    return Report(**{**given, **changed})


# ---- numbers


def test_ratios_are_of_the_same_batch_and_scope() -> None:
    ours, peer, batch_8, jpeg = report().rows
    assert [report().ratio(each) for each in (ours, batch_8, jpeg)] == [1.0, 1.0, 1.0]
    assert report().ratio(peer) == pytest.approx(3.0)
    assert report(subject=PEER).ratio(ours) == pytest.approx(1 / 3)
    assert report(subject=PEER).ratio(batch_8) is None


def test_stages_are_held_against_the_whole() -> None:
    assert report().explained() == {1: pytest.approx(12.7 / 15)}
    assert "batch 1: 85 %" in plain(report())
    assert report(stages=[]).explained() == {}


# ---- files


def test_a_report_is_read_back_as_it_was(tmp_path: Path) -> None:
    path = write_report(report(), tmp_path)
    assert path.name == "2026-01-02-cpu-latency-birds-fp32.json"
    assert read_report(path) == report()
    assert {each.suffix for each in tmp_path.iterdir()} == {".json", ".md", ".html"}
    stored = json.loads(path.read_text())
    assert (stored["benchmark"], stored["schema"]) == ("latency", "microclip.bench/1")
    assert stored["advice"] == advice(report())
    short = as_json(report(), samples=False)
    assert "samples_s" not in json.dumps(short)
    assert short["rows"][0]["percentiles_s"]["p50"] == row().median_s


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*latency*.json")), ids=lambda path: path.stem)
def test_committed_results_are_read(path: Path) -> None:
    stored = json.loads(path.read_text())
    values = as_json(read_report(path))
    for key in ("rows", "stages", "environment", "options", "absent"):
        assert values[key] == stored[key]


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (lambda value: value.pop("rows"), "rows"),
        (lambda value: value.update(schema="other/1"), "schema"),
        (lambda value: value.update(subject="nobody"), "rows"),
        (lambda value: value["rows"][0].update(samples_s=[]), "rows.0.samples_s"),
        (lambda value: value["rows"][0].update(samples_s=["slow"]), "rows.0.samples_s.0"),
        (lambda value: value["rows"][0].update(batch=0), "rows.0.batch"),
        (lambda value: value.update(percentiles=[101.0]), "percentiles.0"),
        (lambda value: value.update(ceilings={COPY: float("nan")}), f"ceilings.{COPY}"),
    ],
)
def test_damaged_results_are_refused(damage: Any, field: str, tmp_path: Path) -> None:
    value, path = as_json(report()), tmp_path / "results.json"
    damage(value)
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match=rf"results\.json: .*{re.escape(field)}.*; give a whole"):
        read_report(path)


@pytest.mark.parametrize("content", [None, b"\xff", b"[]", b"{"])
def test_what_is_no_result_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"none\.json: "):
        read_report(path)


# ---- tables and pages


def test_every_form_shows_who_is_absent_and_what_was_timed() -> None:
    for text in (plain(report()), markdown(report()), page(report())):
        assert "openvino" in text
        assert "15.0 ms" in text
        assert "3.00x" in text
    for text in (markdown(report()), page(report())):
        assert "everything" in text
        assert "Xeon" in text


def test_names_cannot_become_markup() -> None:
    shown = page(report())
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown
    assert "not &lt;installed&gt;" in shown
    assert PEER not in markdown(report())


def test_the_page_loads_nothing() -> None:
    shown = page(report())
    assert not re.findall(r"https?:|url\(|@import", shown)
    sources = re.findall(r'src="([^"]{10})', shown)
    assert sources == ["data:image"] * 3, "two curves and the stages of a batch"


def test_a_report_of_one_row_still_has_a_page() -> None:
    alone = report(rows=[row()], stages=[], cold_start=None, ceilings=None, memory={})
    assert OURS in page(alone)
    assert OURS in plain(alone)


# ---- advice


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, ["backbone takes most, 87 %", "83 % of which is its floor", "--dtype int8"]),
        ({"stages": [stage(Stage.BACKBONE, 12, floor_s=1e-3)]}, ["8.3 % of", "larger batches"]),
        ({"stages": [stage(Stage.BACKBONE, 12)], "precision": "int8"}, ["ms): a smaller model"]),
        ({"rows": [row(), row(PEER, stable=False, spread=0.4)]},
         ["unstable, with a spread of 40 %"]),
        ({"stages": [stage(Stage.DECODE, 30), stage(Stage.BACKBONE, 10)]},
         ["decode takes most", "decode and preprocess take 3.00x as long as the model"]),
        ({"stages": [stage(Stage.BACKBONE, 10), stage(Stage.K1, 1), stage(Stage.K2, 2)]},
         ["the saliency (K1 and K2) costs 23 %"]),
        ({"device": "cuda:0", "environment_after": {"throttled_by": ["software power cap"]}},
         ["clocks were held down (software power cap)"]),
    ],
)  # fmt: skip
def test_advice_names_what_limits(changed: dict[str, Any], told: list[str]) -> None:
    text = "\n".join(advice(report(**changed)))
    for part in told:
        assert part in text


def test_there_is_no_advice_without_a_reason() -> None:
    (only,) = advice(report(environment_after={"throttled_by": ["software power cap"]}))
    assert only.startswith("batch 1: backbone takes most"), "a GPU that is not measured"
    idle = report(device="cuda:0", environment_after={"throttled_by": ["idle"]}, stages=[])
    assert advice(idle) == []


# ---- limits


def test_a_kept_slo_is_silent_and_a_missed_one_names_every_row() -> None:
    require_slo(report(rows=[row(), row(PEER, 100)]), {50.0: 0.016, 99.0: 0.021})
    with pytest.raises(ThresholdError) as error:
        require_slo(report(), {50.0: 0.016, 99.0: 0.001})
    text = str(error.value)
    assert "batch 8, 1 at once: p50 expected at most 16.0 ms, found 75.0 ms" in text
    assert text.count("p99 expected at most 1.00 ms") == 2
    assert JPEG_TO_LOGITS not in text


def test_a_regression_is_found_and_what_is_new_is_told() -> None:
    assert require_no_regression(report(), report(), 0.0) == []
    faster = report(rows=[row(scale=0.9), row(PEER, 0.1)])
    notes = require_no_regression(report(), faster, 0.12)
    assert len(notes) == 2
    assert any("batch 8" in note for note in notes)
    with pytest.raises(ThresholdError, match=r"at most 14\.2 ms, found 15\.0 ms"):
        require_no_regression(report(), faster, 0.05)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target": "cars"}, "expected a report of birds in fp32, found one of cars in fp32"),
        ({"precision": "int8"}, "expected a report of birds in fp32, found one of birds in int8"),
        ({"subject": PEER, "rows": [row(PEER)]}, "found none of it; measure the baseline"),
    ],
)
def test_a_baseline_of_something_else_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        require_no_regression(report(), report(**changed), 0.1)


def test_a_baseline_must_hold_one_of_the_cases() -> None:
    require_comparable(report(), "birds", "fp32", OURS, {(4, 2), (8, 1)})
    with pytest.raises(
        UsageError, match="at batch 4 with 2 at once, found batch 1 with 1 at once, batch 8 with"
    ):
        require_comparable(report(), "birds", "fp32", OURS, {(4, 2)})


def test_a_miss_of_an_unstable_row_says_so() -> None:
    shaky = report(rows=[row(stable=False)])
    with pytest.raises(ThresholdError, match=r"found 15\.0 ms \(its windows disagree"):
        require_slo(shaky, {50.0: 0.001})
    with pytest.raises(ThresholdError, match=r"found 15\.0 ms \(its windows disagree"):
        require_no_regression(shaky, report(rows=[row(scale=0.5)]), 0.1)
    assert "no: unstable" in plain(shaky)


def test_a_comparison_shows_machines_first_then_ratios() -> None:
    other = report(rows=[row(scale=2), row("new")], environment={"cpu": "EPYC", "gpu": None})
    text = comparison(report(), other)
    assert text.splitlines()[:2] == ["what differs:", "  cpu: Xeon -> EPYC"]
    (line,) = (line for line in text.splitlines() if OURS in line)
    assert line.split()[-6:] == ["2.00x", "2.00x", "15.0", "30.0", "19.9", "39.8"]
    assert "new" not in text
    assert "no row stands in both" in comparison(report(), report(subject="x", rows=[row("x")]))


def test_a_comparison_leaves_out_what_never_agrees() -> None:
    assert comparison(report(), report()).startswith("the same target, options, machine and")
    shaky = report(rows=[row(stable=False)], environment={"cpu": "Xeon", "load": 2.0})
    text = comparison(report(), shaky)
    assert f"{OURS} unstable" in text
    assert "load" not in text
