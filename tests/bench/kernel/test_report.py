"""Reports of a committed result."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from microclip_deploy.artifact import read_json
from microclip_deploy.bench.kernel.report import (
    SUM,
    Report,
    markdown,
    plain,
    require_right,
    write_report,
)
from microclip_deploy.errors import VerificationError

COMMITTED = Path(__file__).parents[3] / "bench" / "results" / "2026-11-29-nvidia-h200-kernel.json"


@pytest.fixture
def report() -> Report:
    return Report.model_validate(read_json(COMMITTED))


def test_sum_ratio_and_floor_follow_from_the_times(report: Report) -> None:
    for case in report.cases:
        before = case.model_dump()
        total = case.times.pop(SUM)
        case.eigh_over_cut = case.roofline = None
        case.derive(2, report.ceilings or {})
        assert case.times[SUM].median_us == pytest.approx(total.median_us)  # to rounding
        case.times[SUM] = total
        assert case.model_dump() == before


def test_files_carry_date_and_gpu_in_their_names(report: Report, tmp_path: Path) -> None:
    path = write_report(report, tmp_path / "new")
    assert path.name == COMMITTED.name
    assert read_json(path) == read_json(COMMITTED)
    chart = ET.fromstring(path.with_suffix(".svg").read_text())
    assert "N=49, whole" in "".join(chart.itertext())


def test_tables_show_median_and_p95_and_what_was_left_out(report: Report) -> None:
    report.cases[0].skipped["cupy eigh"] = "one call took 4.0 s, longer than 3 s"
    text = markdown(report)
    assert "| 49 | 768 | 1 | 8.67 / 8.69 | 19.3 / 19.3 | 15.3 / 15.4 | 43.3 / 43.4 |" in text
    assert "| 26.8x | 0 % |" in text
    assert "* N 49, B 1, cupy eigh: one call took 4.0 s, longer than 3 s" in text
    assert "14 / 28 / 50" in text
    assert "4.14 TB/s" in text
    assert "8.67 / 8.69" in plain(report)


def test_times_of_wrong_masks_are_refused(report: Report) -> None:
    require_right(report)
    report.tokens[0].wrong["kernels"] = 2
    with pytest.raises(VerificationError, match="kernels 2 of 48 at N 49"):
        require_right(report)
