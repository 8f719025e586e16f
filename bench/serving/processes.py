"""Servers as processes of this machine: started, found, watched and stopped."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from microclip_deploy.bench.serving.connection import Endpoint, ask
from microclip_deploy.errors import EnvironmentProblem, printable, require

START_S, STOP_S = 180.0, 20.0
"""So long a server may take to be ready, and to end."""

IDLE_S = 1.0
"""So long it is watched doing nothing."""


class Watched:
    """A process and all that it has started."""

    def __init__(self, pid: int) -> None:
        """Watch a process.

        Raises:
            EnvironmentProblem: there is none.
        """
        self._psutil = require("psutil", "bench")
        try:
            self._root = self._psutil.Process(pid)
        except self._psutil.Error as error:
            raise EnvironmentProblem(
                f"--pid: expected the number of a process of this machine, found {error}"
            ) from error

    def cpu_s(self) -> float:
        """Return the processor seconds of all of them since they were started."""
        return sum(sum(times[:2]) for times in self._each("cpu_times"))

    def resident_bytes(self) -> int:
        """Return what all of them hold in RAM; what they share counts for each."""
        return sum(memory.rss for memory in self._each("memory_info"))

    def idle_cores(self) -> float:
        """Return how many cores all of them keep busy while nobody asks for anything."""
        before = self.cpu_s()
        time.sleep(IDLE_S)
        return (self.cpu_s() - before) / IDLE_S

    def pause(self) -> None:
        """Let none of them run: some wait busily for requests, at the cost of whoever works."""
        self._each("suspend")

    def resume(self) -> None:
        """Let them run again."""
        self._each("resume")

    def stop(self) -> None:
        """Ask the first to end, and kill whoever is left."""
        everyone = self._all()
        self.resume()
        with suppress(self._psutil.NoSuchProcess):
            self._root.terminate()
            self._psutil.wait_procs([self._root], STOP_S)
        for each in everyone:
            with suppress(self._psutil.NoSuchProcess):
                each.kill()

    def _all(self) -> list[Any]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except self._psutil.NoSuchProcess:
            return []

    def _each(self, call: str) -> list[Any]:
        """Return what psutil says or does for each of them."""
        told = []
        for process in self._all():
            with suppress(self._psutil.Error):  # it has just ended
                told.append(getattr(process, call)())
        return told


def listener(endpoint: Endpoint) -> Watched | None:
    """Return who listens on a port of this machine, where that can be told."""
    psutil = require("psutil", "bench")
    try:
        if not socket.gethostbyname(endpoint.host).startswith("127."):
            return None
        found = psutil.net_connections("tcp")
    except (OSError, psutil.Error):
        return None
    for each in found:
        if each.status == psutil.CONN_LISTEN and each.laddr.port == endpoint.port and each.pid:
            return Watched(each.pid)
    return None


def free_port() -> Endpoint:
    """Return an address on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Endpoint(*probe.getsockname())


@contextmanager
def running(
    name: str,
    command: Sequence[str],
    endpoint: Endpoint,
    ready: str,
    log: Path,
) -> Iterator[Watched]:
    """Start a server and wait until it is ready; stop it at the end.

    Args:
        name: for messages.
        command: program and arguments.
        endpoint: where it will listen.
        ready: path that answers 200 once it is ready.
        log: file for what it prints.

    Raises:
        EnvironmentProblem: it ends, or is not ready within `START_S`; holds its last words.
    """
    with log.open("wb") as printed:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed
            )
        except OSError as error:
            raise EnvironmentProblem(f"{name}: expected to start it, found: {error}") from error
    watched = Watched(process.pid)
    try:
        deadline = time.monotonic() + START_S
        while not _is_ready(endpoint, ready):
            if process.poll() is not None or time.monotonic() > deadline:
                raise EnvironmentProblem(
                    f"{name}: expected it to be ready within {START_S:.0f} s, found "
                    f"{'it running' if process.returncode is None else 'that it ended'}: "
                    f"{_last_words(log)}"
                )
            time.sleep(0.1)
        yield watched
    finally:
        watched.stop()
        process.wait()


def module(name: str, *arguments: str) -> list[str]:
    """Return the command of a module of this package, run by this Python."""
    return [sys.executable, "-P", "-m", name, *arguments]


def _is_ready(endpoint: Endpoint, path: str) -> bool:
    try:
        return ask(endpoint, "GET", path).status == 200
    except EnvironmentProblem:
        return False


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return printable(lines[-1][:500]) if lines else "it said nothing"
