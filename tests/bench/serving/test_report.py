"""The report: latencies of right answers, goodput of everything that was due."""

from pathlib import Path

import numpy as np
import pytest

from microclip_deploy.bench.serving import report as reports
from microclip_deploy.bench.serving.load import NO_ANSWER, OK, Closed, Load, Open, Window
from microclip_deploy.bench.serving.report import ALONE, CEILING, SERVER, Report, Row, Slo, row_of
from microclip_deploy.errors import EnvironmentProblem, ThresholdError

SLO = Slo(99.0, 0.1)


def window(latencies_s: list[float], outcomes: list[int] | None = None) -> Window:
    """One request every 10 ms, each so long under way."""
    due = np.arange(len(latencies_s), dtype=np.float64) / 100
    said = np.array(outcomes or [OK] * len(latencies_s))
    ended = due + np.array(latencies_s, np.float64)
    return Window(due, due, ended, said, client_cpu_s=0.02, server_cpu_s=0.5)


def row(name: str, load: Load, latency_s: float, slo: Slo | None = SLO) -> Row:
    return row_of(name, 1, load, [window([latency_s] * 200)] * 3, 0.05, slo)


@pytest.fixture
def report() -> Report:
    loads: dict[str, Load] = {"1": Closed(1), "8": Closed(8)}
    rows = [row(name, load, latency) for load in loads.values()
            for name, latency in ((SERVER, 0.05), (ALONE, 0.04), (CEILING, 0.001))]  # fmt: skip
    rows += [row(SERVER, Open(10.0), 0.06), row(SERVER, Open(20.0), 0.2)]
    return Report(
        target="x", body="pixels", date="2030-01-01", contestants={SERVER: "a|b"}, rows=rows,
        slo=SLO, absent={"triton": "no program"}, resident_bytes={5000: 100 << 20, 9000: 110 << 20},
        environment={"cpu": "c"}, idle_cores={SERVER: 0.5},
    )  # fmt: skip


def test_goodput_counts_all_that_was_due_and_latency_what_was_right() -> None:
    said = [OK, OK, 429, NO_ANSWER]
    made = row_of("x", 8, Open(5.0), [window([0.05, 0.3, 0.001, 0.0], said)], 0.05, SLO)
    assert made.outcomes == {"200": 2, "429": 1, "no answer": 1}
    assert made.within_slo == 0.25
    assert made.percentiles_s["p50"] == pytest.approx(0.175)
    assert made.seconds == pytest.approx(0.31)
    assert made.images_per_s == pytest.approx(8 * 2 / 0.31)
    assert made.good_per_s == pytest.approx(1 / 0.31)
    assert (made.stable, made.offered_per_s, made.concurrency) == (False, 5.0, None)
    assert made.server_cores == pytest.approx(0.5 / 0.31)


def test_nothing_right_is_no_number() -> None:
    made = row_of("x", 1, Closed(1), [window([0.1, 0.1], [500, 500])] * 3, 0.05, SLO)
    assert (made.percentiles_s, made.spread, made.stable, made.within_slo) == ({}, None, False, 0)


def test_only_the_last_windows_count() -> None:
    windows = [window([9.0] * 4)] + [window([0.1] * 4)] * 3
    made = row_of("x", 1, Closed(4), windows, 0.05, None)
    assert (made.windows, made.requests, made.stable) == (4, 12, True)
    assert made.percentiles_s["p100"] == pytest.approx(0.1)


def test_a_missed_limit_names_the_load(report: Report) -> None:
    with pytest.raises(ThresholdError, match=r"--slo: batch 1, 20/s offered: .* found 0.0 %"):
        reports.require_slo(report)
    report.rows.pop()
    reports.require_slo(report)


def test_a_server_that_never_answered_right_is_an_error(report: Report) -> None:
    reports.require_answers(report)
    gone = [window([0.1], [NO_ANSWER])]
    report.rows.append(row_of(SERVER, 1, Closed(4), gone, 0.05, None))
    with pytest.raises(EnvironmentProblem, match=r"none with batch 1, 4 at once: .*no answer"):
        reports.require_answers(report)


def test_what_is_shown(report: Report, tmp_path: Path) -> None:
    shown = reports.plain(report)
    assert "10/s offered" in shown
    assert "triton: no program" in shown
    assert "server, batch 1: 10.0 requests/s (p99=100ms)" in shown
    assert "1.100 times as much" in shown
    [cost] = [line for line in shown.splitlines() if line.startswith("server") and "10.00" in line]
    assert cost.split()[-2:] == ["10.00", "40.0"]
    path = reports.write_report(report, tmp_path)
    assert path.name == "2030-01-01-serving-x-pixels.json"
    assert Report.model_validate_json(path.read_bytes()) == report
    written = path.with_suffix(".md").read_text()
    assert "coordinated omission" in written
    assert "a\\|b" in written
