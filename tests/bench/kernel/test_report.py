"""Reports from made-up measurements."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from microclip_deploy.bench.kernel.report import (
    AFFINITY,
    CUPY_EIGH,
    FUSION,
    SOLVE,
    SUM,
    TORCH_EIGH,
    WHOLE,
    Case,
    Report,
    Timing,
    TokenFacts,
    markdown,
    percentile,
    plain,
    require_right,
    roofline,
    write_report,
)
from microclip_deploy.errors import VerificationError

CEILINGS = {"copy_bytes_per_s": 4e12, "product_flop_per_s": 8e14, "product_dtype": "float16"}


def timing(median_us: float) -> Timing:
    return Timing(median_us, 1.1 * median_us, 0.9 * median_us, 30, 64)


def made_up(wrong: int = 0) -> Report:
    cases = []
    for batch in (1, 32):
        case = Case(49, 768, batch, input_sets=4, input_mib=1.5)
        for name, value in ((AFFINITY, 4.0), (SOLVE, 12.0), (FUSION, 9.0), (WHOLE, 24.0)):
            case.times[name] = timing(value * batch**0.5)
        case.times[TORCH_EIGH] = timing(800.0 * batch)
        case.skipped[CUPY_EIGH] = "one call took 4.0 s, longer than 3 s"
        case.add_sum()
        case.roofline = roofline(case, 2, CEILINGS)
        cases.append(case)
    steps = {"p50": 14, "p90": 18, "max": 31}
    facts = TokenFacts(49, 256, 0.8, 0.2, 0.1, 0.1, steps, 64, 60, {"kernels": wrong})
    return Report("float16", "NVIDIA H200", "2026-01-02", cases, [facts], CEILINGS, 61.5, {})


def test_the_stages_are_added_up() -> None:
    assert made_up().cases[0].times[SUM].median_us == 25.0


def test_the_fastest_eigensolver_is_compared_with_the_first_two_stages() -> None:
    assert made_up().cases[0].eigh_over_cut() == pytest.approx(50.0)


def test_the_floor_counts_each_token_once_and_the_upper_tiles() -> None:
    found = made_up().cases[1].roofline
    assert found is not None
    assert found.bytes == 32 * 49 * (768 * 2 + 2 * 4)
    assert found.flop == 32 * 64 * 64 * 2 * 768
    assert found.memory_us == pytest.approx(found.bytes / 4e6)
    assert found.share == pytest.approx(found.memory_us / (4.0 * 32**0.5))


def test_files_carry_date_and_gpu_in_their_names(tmp_path: Path) -> None:
    path = write_report(made_up(), tmp_path / "results")
    assert path.name == "2026-01-02-nvidia-h200-kernel.json"
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".md", ".svg"]
    stored = json.loads(path.read_text())
    assert stored["cases"][0]["times"][AFFINITY]["median_us"] == 4.0
    assert set(stored["timed"]) == {AFFINITY, SOLVE, FUSION, SUM, WHOLE, TORCH_EIGH}
    chart = ET.fromstring(path.with_suffix(".svg").read_text())
    assert "N=49, whole" in "".join(chart.itertext())


def test_what_was_left_out_is_said() -> None:
    text = markdown(made_up())
    assert "* N 49, B 32, cupy eigh: one call took 4.0 s, longer than 3 s" in text
    assert "14 / 18 / 31" in text
    assert "4.00 TB/s" in text


def test_the_table_shows_median_and_p95() -> None:
    assert "4.00 / 4.40" in plain(made_up())


def test_times_of_wrong_masks_are_refused() -> None:
    require_right(made_up())
    with pytest.raises(VerificationError, match="kernels 2 of 60 at N 49"):
        require_right(made_up(wrong=2))


def test_a_percentile_is_one_of_the_samples() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([3.0, 1.0, 2.0], 95) == 3.0
    assert percentile([5.0], 1) == 5.0
