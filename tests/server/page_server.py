"""A stand-in for the server: the page, and what it asks, answered by a session."""

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image, ImageOps
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

import microclip_deploy
from microclip_deploy.serving import Session, open_session
from microclip_deploy.serving.classification import guesses

PAGE = Path(microclip_deploy.__file__).parent / "server" / "page"
VERSION = "3f2a9c1b77e0"


def application(session: Session, name: str) -> Starlette:
    """Return the routes that the page uses."""

    async def file(request: Request) -> Response:
        return FileResponse(PAGE / (request.path_params.get("file") or "index.html"))

    async def models(_: Request) -> Response:
        size = session.preprocess.size
        probe = session.predict(np.zeros((1, size, size, 3), np.uint8))
        facts = {"name": name, "version": VERSION, "default": True, "state": "ready"}
        facts |= {"classes": session.classes, "unadapted": sorted(session.unadapted)}
        facts |= {"size": size, "grid": int(probe.mask.shape[1] ** 0.5), "device": session.device}
        return JSONResponse({"models": [facts]})

    async def classify(request: Request) -> Response:
        began = time.perf_counter()
        try:
            photo = Image.open(io.BytesIO(await request.body()))
            photo = ImageOps.exif_transpose(photo).convert("RGB")
        except OSError:
            error = "photo: expected an image, found something else; send JPEG or PNG"
            return JSONResponse({"error": error}, 400)
        decoded = time.perf_counter()
        view = session.preprocess.test_view(photo)
        seen = time.perf_counter()
        found = session.predict(view[None])
        top_k = int(request.query_params["top_k"])
        heads = {
            head: told(session, 100 * vectors @ session.classifier().T, top_k)
            for head, vectors in (("cls", found.cls), ("fg", found.fg))
        }
        tokens = {
            "grid": int(found.mask.shape[1] ** 0.5),
            "mask": found.mask[0].astype(int).tolist(),
            "attention": found.attention[0, :-1].tolist(),
            "zero": float(found.attention[0, -1]),
        }
        end = time.perf_counter()
        timing = {"decode": decoded - began, "preprocess": seen - decoded, "model": end - seen}
        timing |= {"queue": 0.0, "encoder": 0.8 * (end - seen), "cut": 0.15 * (end - seen)}
        timing |= {"head": 0.05 * (end - seen), "total": end - began}
        answer = {
            "model": name,
            "version": VERSION,
            "photo": {"width": photo.width, "height": photo.height},
            "classes": told(session, found.logits, top_k),
            "heads": heads,
            "saliency": {
                "complete": bool(found.complete[0]),
                "seen": session.preprocess.seen(photo.size),
                "tokens": tokens,
            },
            "timing_ms": {stage: 1000 * seconds for stage, seconds in timing.items()},
        }
        return JSONResponse(answer)

    routes = [Route("/v1/models", models), Route("/v1/classify", classify, methods=["POST"])]
    return Starlette(routes=[*routes, Route("/", file), Route("/{file}", file)])


def told(session: Session, logits: Any, top_k: int) -> list[dict[str, Any]]:
    return [guess._asdict() for guess in next(guesses(session, logits, top_k))]


@contextlib.contextmanager
def running(export: Path, name: str, port: int = 0) -> Iterator[str]:
    """Serve an export; give the address."""
    with open_session(export, device="cpu") as session:
        server = uvicorn.Server(uvicorn.Config(application(session, name), port=port, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        bound = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{bound}/"
        finally:
            server.should_exit = True
            thread.join()
