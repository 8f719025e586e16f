"""An endpoint for each test, and a run against it."""

import ssl
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import pytest
from rich.console import Console

from microclip_deploy.describe import endpoint
from microclip_deploy.describe.run import Judge, Outcome, run_describe
from microclip_deploy.describe.settings import Settings
from tests.describe.fake_endpoint import KEY, FakeEndpoint, running


class Describe(Protocol):
    """Describes classes with the test's endpoint."""

    path: Path

    def __call__(self, *names: str, judge: Judge | None = None, **settings: Any) -> Outcome: ...


_tls = cache(ssl.create_default_context)
"""Reading all certificates takes longer than most tests, and no test needs them."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    monkeypatch.setattr(ssl, "create_default_context", _tls)
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("MICROCLIP_LLM_KEY", raising=False)
    with running() as found:
        yield found


@pytest.fixture
def describe(server: FakeEndpoint, tmp_path: Path) -> Describe:
    class _Describe:
        path = tmp_path / "birds.jsonl"

        def __call__(self, *names: str, judge: Judge | None = None, **settings: Any) -> Outcome:
            given = {"model": "m", "endpoint": server.url, "per_class": 2, "concurrency": 1}
            chosen = Settings(**{**given, **settings})
            notes = Console(stderr=True, quiet=True)
            return run_describe(names, self.path, chosen, notes, key=KEY, judge=judge)

    return _Describe()
