"""Option texts: what they mean, and what is refused."""

from collections.abc import Callable

import pytest
from typer import BadParameter

from microclip_deploy.bench import option_text as options
from microclip_deploy.cli.main import main

NAMES = ("plain", "cls")


def names(text: str) -> tuple[str, ...]:
    return options.parse_names(text, NAMES)


@pytest.mark.parametrize(
    ("parse", "values"),
    [
        (options.parse_seconds, {"2s": 2.0, "500ms": 0.5, "1.5": 1.5, " 2 s ": 2.0, "0": 0.0}),
        (options.parse_share, {"5%": 0.05, "0.05": 0.05, "2.5 %": 0.025, "1": 1.0, "100%": 1.0}),
        (options.parse_percentiles, {"50,90,99.9": (50, 90, 99.9), "99, 50,99.0,0": (0, 50, 99)}),
        (options.parse_numbers, {"32, 1,8,1": (1, 8, 32)}),
        (options.parse_limits, {"p99=10ms, p50 = .2 s": {50.0: 0.2, 99.0: 0.01}}),
        (options.parse_limit, {"100ms": (99.0, 0.1), "p95=.2 s": (95.0, 0.2)}),
        (options.parse_rates, {"20, 0.5,1.2,20": (0.5, 1.2, 20.0)}),
        (options.parse_device, {"cpu": "cpu", "cuda": "cuda", "cuda:1": "cuda:1"}),
        (names, {"cls, plain,cls": ("cls", "plain"), "none": (), "all": NAMES}),
    ],
)
def test_texts_are_read(parse: Callable[[str], object], values: dict[str, object]) -> None:
    assert {text: parse(text) for text in values} == values


@pytest.mark.parametrize(
    ("parse", "expected", "texts"),
    [
        (options.parse_seconds, "a time such as 2s, 500ms or 1.5",
         ["", "s", "-1", "1e3", "nan", "inf", "2 min", "1,5", "١", "2s 1ms", "9" * 400]),
        (options.parse_share, "a share over 0 and up to 1 such as 5% or 0.05",
         ["", "5", "0", "0%", "101%", "-5%", "%", "5 percent", "nan"]),
        (options.parse_percentiles, "percentiles from 0 to 100 such as 50,90,99.9",
         ["", "50,", "p50", "101", "-1", "50;90", "nan"]),
        (options.parse_numbers, "whole numbers such as 1,32", ["", "0", "1,,2", "-1", "1.5", "١"]),
        (options.parse_limits, "limits with a unit such as p99=10ms,p50=5ms",
         ["", "p99", "p99=10", "99=10ms", "p101=1s", "p50=0ms", "p50=-1ms", "p50=5ms,"]),
        (options.parse_limits, "one limit for p50", ["p50=5ms,p50.0=6ms"]),
        (options.parse_limit, "one limit with a unit such as 100ms or p95=100ms",
         ["p50=5ms,p95=6ms", "100", "p0=5ms", "0ms"]),
        (options.parse_rates, "numbers over 0 such as 0.5,0.8,20", ["", "0", "1,,2", "-1", "nan"]),
        (options.parse_device, "cpu, cuda or cuda:N",
         ["", "gpu", "cuda:", "cuda:x", "cuda:١", "cpu:0"]),
        (names, "a comma list of plain, cls, or all or none", ["plane", ""]),
    ],
)  # fmt: skip
def test_other_texts_are_refused(
    parse: Callable[[str], object], expected: str, texts: list[str]
) -> None:
    for text in texts:
        with pytest.raises(BadParameter) as caught:
            parse(text)
        assert str(caught.value.message) == f"expected {expected}, found '{text}'"


def test_the_command_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tiny", "--slo", "p99=10"]) == 2
    assert "'--slo': expected limits with a unit" in capsys.readouterr().err
