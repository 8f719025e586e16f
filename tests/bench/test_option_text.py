"""Option texts: what they mean, and what is refused."""

import re
from collections.abc import Callable

import pytest

from microclip_deploy.bench.option_text import (
    parse_device,
    parse_limits,
    parse_numbers,
    parse_percentiles,
    parse_seconds,
    parse_share,
)
from microclip_deploy.errors import UsageError


def refused(parse: Callable[[str, str], object], text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        parse("--option", text)
    assert str(caught.value).startswith("--option: expected ")
    assert f"'{text}'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2s", 2.0), ("500ms", 0.5), ("1.5", 1.5), (" 2 s ", 2.0), (".5s", 0.5), ("0", 0.0)],
)
def test_times_are_seconds(text: str, seconds: float) -> None:
    assert parse_seconds("--warmup", text) == seconds


@pytest.mark.parametrize(
    "text", ["", "s", "-1", "1e3", "nan", "inf", "2 min", "1,5", "١", "2s 1ms", "9" * 400]
)
def test_other_times_are_refused(text: str) -> None:
    refused(parse_seconds, text, "a time such as 2s, 500ms or 1.5, found")


@pytest.mark.parametrize(
    ("text", "share"), [("5%", 0.05), ("0.05", 0.05), ("2.5 %", 0.025), ("1", 1.0), ("100%", 1.0)]
)
def test_shares_are_written_either_way(text: str, share: float) -> None:
    assert parse_share("--until-stable", text) == share


@pytest.mark.parametrize("text", ["", "5", "0", "0%", "101%", "-5%", "%", "5 percent", "nan"])
def test_other_shares_are_refused(text: str) -> None:
    refused(parse_share, text, "a share over 0 and up to 1 such as 5% or 0.05, found")


@pytest.mark.parametrize(
    ("text", "percentiles"),
    [("50,90,99.9", (50.0, 90.0, 99.9)), ("99, 50,99.0", (50.0, 99.0)), ("0,100", (0.0, 100.0))],
)
def test_percentiles_rise(text: str, percentiles: tuple[float, ...]) -> None:
    assert parse_percentiles("--percentiles", text) == percentiles


@pytest.mark.parametrize("text", ["", "50,", "p50", "101", "-1", "50;90", "nan"])
def test_other_percentiles_are_refused(text: str) -> None:
    refused(parse_percentiles, text, "percentiles from 0 to 100 such as 50,90,99.9, found")


def test_limits_are_seconds_by_percentile() -> None:
    found = parse_limits("--slo", "p99=10ms, p50 = 5 ms,p99.9=0.2s")
    assert list(found.items()) == [(50.0, 0.005), (99.0, 0.01), (99.9, 0.2)]


@pytest.mark.parametrize(
    "text",
    ["", "p99", "p99=10", "99=10ms", "p101=1s", "p50=0ms", "p50=-1ms", "p50<5ms", "p50=5ms,"],
)
def test_other_limits_are_refused(text: str) -> None:
    refused(parse_limits, text, "limits with a unit such as p99=10ms,p50=5ms, found")


def test_a_second_limit_for_a_percentile_is_refused() -> None:
    refused(parse_limits, "p50=5ms,p50.0=6ms", "one limit for p50, found two in")


@pytest.mark.parametrize("text", ["cpu", "cuda", "cuda:1"])
def test_a_device_is_named(text: str) -> None:
    assert parse_device("--device", text) == text


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:x", "cuda:١", "cpu:0"])
def test_other_devices_are_refused(text: str) -> None:
    refused(parse_device, text, "cpu, cuda or cuda:N, found")


def test_whole_numbers_rise() -> None:
    assert parse_numbers("--batches", "32, 1,8,1") == (1, 8, 32)


@pytest.mark.parametrize("text", ["", "0", "1,,2", "-1", "1.5", "١"])
def test_other_numbers_are_refused(text: str) -> None:
    refused(parse_numbers, text, "whole numbers such as 1,32, found")
