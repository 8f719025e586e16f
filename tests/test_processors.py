"""Threads are no more than the affinity and the quotas of the container allow."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from microclip_deploy import processors
from microclip_deploy.processors import limited_cpus, usable_cpus

V1, V2 = "5:memory:/\n3:cpu,cpuacct:/docker/1\n1:name=systemd:/cpu\n", "0::/pod/a\n"


def v1(quota: str, folder: str = "cpu/docker/1") -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(("groups", "files", "usable"), [
    ("", {}, 8),
    (V2, {}, 8),
    (V2, {"pod/a/cpu.max": "max 100000\n"}, 8),
    (V2, {"pod/a/cpu.max": "200000 100000\n"}, 2),
    (V2, {"pod/a/cpu.max": "250000 100000\n", "pod/cpu.max": "max 100000"}, 3),
    (V2, {"pod/a/cpu.max": "max 100000", "pod/cpu.max": "50000 100000"}, 1),
    (V2, {"cpu.max": "400000 100000"}, 4),  # the container sees its own group as the root
    (V2, {"cpu.max": "9000000 100000"}, 8),
    (V2, {"pod/a/cpu.max": "1000 100000"}, 1),
    (V2, {"pod/a/cpu.max": "broken"}, 8),
    (V1, v1("-1\n"), 8),
    (V1, v1("150000\n"), 2),
    (V1, v1("300000", folder="cpu"), 3),
    (V1, v1("0"), 8),
    ("1:cpuset:/a\n", v1("100000", folder="cpu/a"), 8),
])  # fmt: skip
def test_the_smallest_quota_of_a_group_and_those_above_it_counts(
    groups: str,
    files: Mapping[str, str],
    usable: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "own").write_text(groups)
    monkeypatch.setattr(processors, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(processors, "_GROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert usable_cpus() == usable
    assert limited_cpus() == (None if usable == 8 else usable)


def test_the_affinity_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1})
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert usable_cpus() == limited_cpus() == 1
