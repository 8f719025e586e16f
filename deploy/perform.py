"""Perform the Dockerfile's steps without Docker, in a new folder and virtual environment.

    python deploy/perform.py EXPORT

installs this checkout as the image would, starts the entry point with EXPORT, waits until the
health check of the image passes, classifies a photo, and ends it as Docker does. What a container
adds (the base image, its user, its network) is not checked.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).resolve().parent.parent
PHOTO = b"P6 8 8 255 " + bytes(range(192))
IGNORED = ("FROM", "USER", "EXPOSE", "STOPSIGNAL")


class Image(NamedTuple):
    """What the steps lead to."""

    environment: dict[str, str]
    health: list[str]
    entry: list[str]


def instructions(text: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, without comments."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def build(root: Path) -> Image:
    """Perform every step below `root`."""
    venv.create(root / "venv", with_pip=True)
    path = f"{root / 'venv/bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(root), "PIP_ROOT_USER_ACTION": "ignore"}
    environment |= {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "SSL_"))}
    where, entry, health = root, [], []
    for word, rest in instructions((CHECKOUT / "deploy/Dockerfile").read_text("utf-8")):
        print(f"{word} {rest}", flush=True)
        if word in ("ARG", "ENV"):
            name, _, value = rest.partition("=")
            environment[name] = value
        elif word == "WORKDIR":
            where = root / rest.lstrip("/")
            where.mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            archive = subprocess.run(
                ["git", "archive", "HEAD"], cwd=CHECKOUT, check=True, capture_output=True
            )
            subprocess.run(["tar", "x"], cwd=where, check=True, input=archive.stdout)
        elif word == "RUN":
            line = re.sub(r"(?<= )/(?=\w)", f"{root}/", rest)
            subprocess.run(["bash", "-c", line], cwd=where, env=environment, check=True)
        elif word == "HEALTHCHECK":
            health = json.loads(rest.partition("CMD ")[2])
        elif word == "ENTRYPOINT":
            entry = json.loads(rest)
        elif word not in IGNORED:
            raise SystemExit(f"perform.py: {word} is not known here; teach it what {word} does")
    return Image(environment, health, entry)


def try_out(image: Image, export: Path, root: Path) -> None:
    """Start the entry point, wait for its health, ask it something, and end it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**image.environment, "MICROCLIP_PORT": port}
    health = [word.replace("8000", port) for word in image.health]
    print(f"$ {shlex.join([*image.entry, f'model={export}'])}", flush=True)
    server = subprocess.Popen([*image.entry, f"model={export}"], cwd=root, env=environment)
    try:
        end = time.monotonic() + 120
        while subprocess.run(health, env=environment, stderr=subprocess.DEVNULL).returncode:
            assert time.monotonic() < end, "it never became healthy"
            assert server.poll() is None, "it ended"
            time.sleep(0.5)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
            print("healthy:", [m["state"] for m in json.load(answer)["models"]], flush=True)
        address = f"http://127.0.0.1:{port}/v1/classify"
        with urllib.request.urlopen(address, data=PHOTO) as answer:
            print("classified:", json.load(answer)["classes"][0], flush=True)
    finally:
        server.terminate()
    code = server.wait(60)
    assert code == 143, f"expected exit code 143, found {code}"
    heavy = subprocess.run(
        ["python", "-c", "import torch"], env=environment, capture_output=True
    ).returncode
    assert heavy, "the image holds PyTorch, which a server of exports does not need"
    print("ended with 143; no PyTorch inside")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        try_out(build(Path(folder)), Path(sys.argv[1]).resolve(), Path(folder))
