"""Runs that end early and go on: the journal, the budget, signals and kills."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from microclip_deploy.describe.budget import Price, Usage
from microclip_deploy.describe.estimate import estimate
from microclip_deploy.describe.journal import journal_path, open_journal, read_journal
from microclip_deploy.describe.sentence import Sentence, Verdict
from microclip_deploy.describe.settings import Settings
from microclip_deploy.errors import DataError, ThresholdError, UsageError
from tests.describe import fake_endpoint as fake
from tests.describe.conftest import Describe
from tests.describe.fake_endpoint import KEY, FakeEndpoint

NAMES = ("crane", "heron", "stork", "egret", "ibis", "bittern")


def texts(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file without the time, the only thing that two runs differ in."""
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "created_utc"} for line in found]


def test_lines_are_in_the_order_of_the_classes_with_their_origin(
    server: FakeEndpoint, describe: Describe
) -> None:
    def slow_first(request: fake.Request) -> None:
        time.sleep(0.1 if "crane" in request.prompt else 0)
        fake.well(request)

    server.usual = slow_first
    describe(*NAMES, concurrency=6, per_class=4, pairs=[(0, 5)])
    found = texts(describe.path)
    assert list(dict.fromkeys(line["class"] for line in found)) == list(NAMES)
    questions = [line["question"] for line in found if line["class"] == "crane"]
    assert questions == ["visual"] * 2 + ["parts"] * 2 + ["compare:bittern"] * 5
    assert found[0]["endpoint"] == f"127.0.0.1:{server.server_port}"
    assert set(found[0]) == {
        "class", "text", "model", "endpoint", "prompt_sha256", "question", "temperature", "seed",
        "reply_id", "filter",
    }  # fmt: skip


def test_a_second_run_asks_nothing_and_writes_the_same_bytes(
    server: FakeEndpoint, describe: Describe
) -> None:
    describe(*NAMES)
    first = describe.path.read_bytes()
    outcome = describe(*NAMES)
    assert (outcome.calls, outcome.noted) == (0, 12)
    assert describe.path.read_bytes() == first
    assert set(server.asked.values()) == {1}


@pytest.mark.parametrize(
    "changed", [{"model": "n"}, {"seed": 1}, {"temperature": 0.2}, {"domain": "birds"}]
)
def test_another_question_is_asked_again(
    changed: dict[str, Any], server: FakeEndpoint, describe: Describe
) -> None:
    describe("crane", "heron")
    assert describe("crane", "heron", **changed).calls == 4
    assert describe("crane", "heron", "ibis").calls == 2


def test_what_is_judged_unfit_is_written_apart(server: FakeEndpoint, describe: Describe) -> None:
    def judge(sentences: Sequence[Sentence]) -> Any:
        parts = [s for s in sentences if s.provenance["question"] == "parts"]
        kept = [s for s in sentences if s not in parts]
        return SimpleNamespace(
            kept=kept, dropped=[Verdict(s, "a part") for s in parts], filtered=True
        )

    outcome = describe("crane", "heron", judge=judge)
    assert (outcome.sentences, outcome.dropped) == (2, 2)
    assert {line["filter"] for line in texts(describe.path)} == {"kept"}
    dropped = texts(describe.path.with_name("birds.dropped.jsonl"))
    assert [(line["class"], line["reason"]) for line in dropped] == [
        ("crane", "a part"),
        ("heron", "a part"),
    ]


def works_hard(request: fake.Request) -> None:
    """Use all that is allowed."""
    most = request.body["max_tokens"]
    words = len(str(request.body)) // 3
    with request.server.lock:
        request.server.tokens += words + most
    used = {"prompt_tokens": words, "completion_tokens": most}
    choice = {"message": {"content": json.dumps({"sentences": request.sentences()})}}
    request.send(200, {"choices": [choice], "usage": used})


def works_for_nothing(request: fake.Request) -> None:
    """Use tokens, and lose every other reply."""
    if sum(request.server.asked.values()) % 2:
        works_hard(request)
        return
    with request.server.lock:
        request.server.tokens += len(str(request.body)) // 3 + request.body["max_tokens"]
    fake.cut(request)


def keeps_its_bill(request: fake.Request) -> None:
    request.server.tokens += len(str(request.body)) // 4
    request.say(json.dumps({"sentences": request.sentences()}), usage=None)


@pytest.mark.parametrize("usual", [fake.well, works_hard, works_for_nothing, keeps_its_bill])
def test_a_budget_of_tokens_is_never_exceeded(
    usual: fake.Answer, server: FakeEndpoint, describe: Describe
) -> None:
    limit = 20_000
    server.usual = usual
    names = [f"class {n}" for n in range(100)]
    for _ in range(2):  # the second run has nothing left to spend
        with pytest.raises(ThresholdError, match="a larger limit goes on"):
            describe(*names, concurrency=16, most_tokens=limit)
        assert 0 < server.tokens <= limit
    assert texts(describe.path)


def test_a_budget_of_money_is_never_exceeded(server: FakeEndpoint, describe: Describe) -> None:
    server.usual = works_hard
    price = Price(10, 40)
    with pytest.raises(ThresholdError, match=r"within 0\.5 USD"):
        describe(*map(str, range(200)), concurrency=16, most_cost=0.5, price=price)
    with read_journal(journal_path(describe.path)) as journal:
        assert 0.4 < price.of(journal.spent) <= 0.5


def test_a_larger_budget_goes_on(server: FakeEndpoint, describe: Describe) -> None:
    with pytest.raises(ThresholdError):
        describe(*NAMES, most_tokens=3000)
    describe(*NAMES, most_tokens=500_000)
    assert set(server.asked.values()) == {1}


def test_requests_that_a_kill_left_open_count_with_their_worst_case(describe: Describe) -> None:
    path = journal_path(describe.path)
    with open_journal(path) as journal:
        journal.begin("a", Usage(100, 20))
    for _ in range(2):
        with open_journal(path) as journal:
            assert journal.spent == Usage(100, 20)


@pytest.mark.parametrize("torn", [b'{"key": "abc', b'{"key"\n', b"\0\0\0\n"])
def test_a_torn_last_line_is_cut_off(torn: bytes, server: FakeEndpoint, describe: Describe) -> None:
    describe("crane", "heron")
    path = journal_path(describe.path)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert describe("crane", "heron").calls == 0
    assert path.read_bytes() == whole


def test_a_damaged_line_is_named(server: FakeEndpoint, describe: Describe) -> None:
    describe("crane", "heron")
    path = journal_path(describe.path)
    path.write_bytes(b"[]\n" + path.read_bytes())
    with pytest.raises(DataError, match="line 1"):
        describe("crane", "heron")


def test_one_run_writes_a_file_at_a_time(server: FakeEndpoint, describe: Describe) -> None:
    path = journal_path(describe.path)
    with open_journal(path), pytest.raises(UsageError, match="one run at a time"):
        describe("crane", "heron")


def test_an_estimate_counts_what_is_missing(server: FakeEndpoint, describe: Describe) -> None:
    settings = Settings(model="m", endpoint=server.url, per_class=2, price=Price(1, 2))
    before = estimate(NAMES, describe.path, settings)
    assert not list(describe.path.parent.iterdir())
    describe(*NAMES[:3])
    after = estimate(NAMES, describe.path, settings)
    assert (before.calls, after.calls, after.noted) == (12, 6, 6)
    used = server.tokens * 2
    assert before.worst.total > used > before.worst.total / 20
    assert before.cost is not None


def test_many_classes_take_little_memory(server: FakeEndpoint, describe: Describe) -> None:
    server.keep_bodies = False
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    describe(*(f"class {n}" for n in range(100)), concurrency=8)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 40
    assert len(texts(describe.path)) == 200


CHILD = """
import sys
from pathlib import Path
from rich.console import Console
from microclip_deploy.describe.run import run_describe
from microclip_deploy.describe.settings import Settings
url, path, *names = sys.argv[1:]
settings = Settings(model="m", endpoint=url, per_class=2, concurrency=3)
run_describe(names, Path(path), settings, Console(stderr=True, quiet=True))
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what a run writes that nobody interrupts."""
    path = tmp_path_factory.mktemp("reference") / "birds.jsonl"
    with fake.running() as server:
        child = [sys.executable, "-c", CHILD, server.url, str(path), *NAMES]
        subprocess.run(child, check=True)
    return path


def test_killed_runs_go_on_where_they_were(
    server: FakeEndpoint, describe: Describe, reference: Path
) -> None:
    plan = Settings(model="m", per_class=2).plan(NAMES)
    prompts = {call.prompt_sha256: call.messages[-1]["content"] for call in plan}
    finished: dict[str, int] = {}
    for point in (1, 4, 4):
        child = subprocess.Popen([sys.executable, "-c", CHILD, server.url, describe.path, *NAMES])
        asked = sum(server.asked.values()) + point

        def kill(request: fake.Request, child: Any = child, asked: int = asked) -> None:
            if sum(server.asked.values()) >= asked:
                os.kill(child.pid, signal.SIGKILL)
            fake.well(request)

        server.usual = kill
        assert child.wait(timeout=60) == -signal.SIGKILL
        for line in journal_path(describe.path).read_bytes().splitlines():
            if (record := json.loads(line)).get("sentences"):
                prompt = prompts[record["prompt_sha256"]]
                finished.setdefault(prompt, server.asked[prompt])
    server.usual = fake.well
    describe(*NAMES)
    expected = [line | {"endpoint": ""} for line in texts(reference)]
    assert [line | {"endpoint": ""} for line in texts(describe.path)] == expected
    assert finished
    assert all(server.asked[prompt] == times for prompt, times in finished.items())
    assert sum(server.asked.values()) <= len(prompts) + 3 * 3  # what was under way at a kill


def test_a_signal_ends_a_run_and_keeps_what_is_finished(
    server: FakeEndpoint, tmp_path: Path
) -> None:
    server.script.extend([fake.well, fake.well])
    server.usual = fake.hang
    classes = tmp_path / "c.txt"
    classes.write_text("\n".join(NAMES))
    path = tmp_path / "birds.jsonl"
    line = [sys.executable, "-m", "microclip_deploy.cli", "describe", str(classes)]
    line += [
        "-o",
        str(path),
        "--model",
        "m",
        "--per-class",
        "2",
        "--concurrency",
        "1",
        "--endpoint",
        server.url,
    ]
    child = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    while sum(server.asked.values()) < 3:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    told = child.communicate(timeout=60)[1]
    assert child.returncode == 130
    assert "2 of 12 calls are kept" in told
    assert KEY not in told
    assert not path.exists()
