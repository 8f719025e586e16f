"""A server that speaks /v1/chat/completions, counts what it is asked, and misbehaves on request."""

import json
import random
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PARTS = [
    "shapes",
    "edges",
    "surfaces",
    "outlines",
    "curves",
    "stripes",
    "spots",
    "patches",
    "scales",
    "ridges",
    "legs",
    "wings",
    "tails",
    "necks",
    "beaks",
    "eyes",
    "claws",
    "feathers",
    "crests",
    "tips",
]
LOOKS = [
    "broad",
    "narrow",
    "curved",
    "pointed",
    "round",
    "flat",
    "long",
    "short",
    "thick",
    "thin",
    "smooth",
    "rough",
    "glossy",
]
KEY = "sk-test-0123456789abcdef"


class Request(BaseHTTPRequestHandler):
    """One request; the methods are what it can be answered with."""

    server: "FakeEndpoint"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.prompt = str(self.body["messages"][-1]["content"])
        answer = self.server.note(self)
        try:
            answer(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client had enough

    def sentences(self) -> list[str]:
        asked = next(m["content"] for m in self.body["messages"] if m["role"] == "user")
        name = json.loads(re.findall(r"Class: (.*)", asked)[0])
        count = int(re.findall(r"exactly (\d+)", asked)[0])
        words = PARTS[:10] if "as a whole" in asked else PARTS[10:]
        looks = random.Random(asked).choices(LOOKS, k=2 * count)
        return [
            f"A photo of {name} shows {looks[2 * n]} {words[n % 10]} and {looks[2 * n + 1]} lines."
            for n in range(count)
        ]

    def say(self, text: str, **more: Any) -> None:
        """Reply with a text."""
        used = {"prompt_tokens": len(str(self.body)) // 4, "completion_tokens": len(text) // 4}
        with self.server.lock:
            self.server.tokens += sum(used.values())
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        number = re.sub(r"\W", "", text)[:20]
        self.send(200, {"id": f"chat-{number}", "choices": [choice], "usage": used, **more})

    def send(self, status: int, body: Any, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def _made_up(seed: str) -> str:
    """Return words of its own for each seed, so that no sentence is taken for another one."""
    letters = random.Random(seed)
    return " ".join("".join(letters.choices("aeioklmnprst", k=4)) for _ in range(5))


Answer = Callable[[Request], None]


def well(request: Request) -> None:
    request.say(json.dumps({"sentences": request.sentences()}))


def text(content: str, **more: Any) -> Answer:
    return lambda request: request.say(content, **more)


def status(code: int, message: str = "no", **headers: str) -> Answer:
    return lambda request: request.send(code, {"error": {"message": message}}, **headers)


def raw(body: bytes) -> Answer:
    return lambda request: request.send(200, body)


def hang(request: Request) -> None:
    request.server.ended.wait(10)
    request.close_connection = True


def hang_up(request: Request) -> None:
    request.close_connection = True


def cut(request: Request) -> None:
    """Declare more than is sent."""
    request.send_response(200)
    request.send_header("Content-Length", "100000")
    request.end_headers()
    request.wfile.write(b'{"choices": [')
    request.close_connection = True


def huge(request: Request) -> None:
    """Send 100 MB of a string that does not end."""
    request.send_response(200)
    request.send_header("Connection", "close")
    request.end_headers()
    request.wfile.write(b'{"id": "')
    for _ in range(100):
        request.wfile.write(b"x" * (1 << 20))
    request.close_connection = True


def drip(request: Request) -> None:
    """Send a byte now and then, so that no single read times out."""
    request.send_response(200)
    request.send_header("Connection", "close")
    request.end_headers()
    while not request.server.ended.is_set():
        request.wfile.write(b" ")
        time.sleep(0.05)
    request.close_connection = True


class FakeEndpoint(ThreadingHTTPServer):
    """Answers what is in `script` one by one, then as `usual` does."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.script: deque[Answer] = deque()
        self.usual: Answer = well
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keep_bodies = True
        self.keys: set[str] = set()
        self.tokens = 0
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def note(self, request: Request) -> Answer:
        with self.lock:
            self.asked[request.prompt] += 1
            self.keys.add(request.headers.get("Authorization", ""))
            if self.keep_bodies:
                self.bodies.append(request.body)
            return self.script.popleft() if self.script else self.usual

    def handle_error(self, *_: Any) -> None:
        pass  # clients that hang up


@contextmanager
def running() -> Iterator[FakeEndpoint]:
    with FakeEndpoint() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()
