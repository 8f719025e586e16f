"""A server in a process of its own, as a user starts it."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

Found = TypeVar("Found")

START_S = 60.0
"""A server that is not there by then will not come."""


@dataclass
class Running:
    """A server that answers."""

    process: subprocess.Popen[bytes]
    url: str
    output: Path
    """What it wrote to stderr."""
    log: Path
    """Its access log."""

    @property
    def address(self) -> str:
        """Return host:port."""
        return self.url.removeprefix("http://")

    @property
    def port(self) -> int:
        """Return the port."""
        return int(self.url.rpartition(":")[2])

    def workers(self) -> list[psutil.Process]:
        """Return its worker processes."""
        found: list[psutil.Process] = psutil.Process(self.process.pid).children()
        return found

    def get(self, path: str, **more: Any) -> httpx.Response:
        """Return the answer to a GET."""
        return httpx.get(self.url + path, timeout=30, **more)

    def classify(self, body: bytes, **parameters: Any) -> httpx.Response:
        """Return the answer to a photo."""
        address = f"{self.url}/v1/classify"
        return httpx.post(address, content=body, params=parameters, timeout=30)

    def is_ready(self) -> bool:
        """Say what readiness says."""
        return self.get("/v2/health/ready").status_code == 200

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over all series that have these labels."""
        found = 0.0
        for line in self.get("/metrics").text.splitlines():
            match = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if match and all(
                f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()
            ):
                found += float(match[2])
        return found

    def logged(self) -> list[dict[str, Any]]:
        """Return the entries of the access log."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """End it and return its exit code."""
        self.process.send_signal(signum)
        return self.process.wait(30)


@contextmanager
def running(*arguments: str | Path, wait: bool = True, **environment: str) -> Iterator[Running]:
    """Run `microclip-deploy serve` on a free port until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder) / "stderr", Path(folder) / "access.jsonl"
        command = [sys.executable, "-m", "microclip_deploy.cli", "serve", *map(str, arguments)]
        command += ["--port", "0"] if "--port" not in command else []
        command += ["--access-log", str(log)] if "--access-log" not in command else []
        with output.open("wb") as stderr:
            process = subprocess.Popen(
                command, stderr=stderr, stdout=stderr, env={**os.environ, **environment}
            )
        try:
            yield Running(process, _url(process, output) if wait else "", output, log)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _url(process: subprocess.Popen[bytes], output: Path) -> str:
    """Return the address that a server tells when it answers."""

    def told() -> str | None:
        match = re.search(r"serving on (http://\S+)", output.read_text())
        assert match or process.poll() is None, output.read_text()
        return match and match[1]

    found = within(START_S, told)
    assert found is not None
    return found


def within(seconds: float, ask: Callable[[], Found]) -> Found:
    """Return the first answer that is true; it must come in time."""
    end = time.monotonic() + seconds
    while not (found := ask()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)
    return found
