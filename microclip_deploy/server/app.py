"""The HTTP application: routes, and what each of them answers."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from microclip_deploy.server import inference_protocol as protocol
from microclip_deploy.server.access_log import AccessLog
from microclip_deploy.server.batcher import Answer
from microclip_deploy.server.body import Bodies
from microclip_deploy.server.catalog import Catalog, Served
from microclip_deploy.server.classify import Question, answer_to, photo_of
from microclip_deploy.server.gate import Gate, refused
from microclip_deploy.server.intake import Intake, View
from microclip_deploy.server.metrics import CONTENT_TYPE, Metrics
from microclip_deploy.server.openapi import document
from microclip_deploy.server.refusal import Refusal
from microclip_deploy.server.version import Version

_PAGE = Path(__file__).with_name("page")
_PAGE_FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
_PAGE_POLICY = "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'self'"


@dataclass(frozen=True)
class Endpoints:
    """The handlers of all routes, and what they share."""

    catalog: Catalog
    metrics: Metrics
    intake: Intake
    bodies: Bodies

    def routes(self) -> list[Route]:
        """Return every route."""
        model = "/v2/models/{model}"
        found = [Route(path, self.page, name=path) for path in _PAGE_FILES]
        found += [
            Route("/openapi.json", self.openapi),
            Route("/metrics", self.metrics_text),
            Route("/v1/models", self.models),
            Route("/v1/classify", self.classify, methods=["POST"]),
            Route("/v2", self.server),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
            Route("/v2/repository/index", self.index, methods=["POST"]),
        ]
        for path in (model, f"{model}/versions/{{version}}"):
            found += [
                Route(path, self.model),
                Route(f"{path}/ready", self.model_ready),
                Route(f"{path}/config", self.config),
                Route(f"{path}/infer", self.infer, methods=["POST"]),
            ]
        return found

    async def page(self, request: Request) -> Response:
        """Return the page or a part of it."""
        return FileResponse(
            _PAGE / _PAGE_FILES[request.url.path],
            headers={"Content-Security-Policy": _PAGE_POLICY, "Cache-Control": "no-cache"},
        )

    async def openapi(self, request: Request) -> Response:
        """Return the description of this interface."""
        return JSONResponse(document())

    async def metrics_text(self, request: Request) -> Response:
        """Return what was counted."""
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def models(self, request: Request) -> Response:
        """Return what is served."""
        return JSONResponse({"models": [self._described(served) for served in self.catalog]})

    def _described(self, served: Served) -> dict[str, Any]:
        told: dict[str, Any] = {
            "name": served.name,
            "state": served.state(),
            "default": self.catalog.of_name(served.name)[-1] is served,
        }
        if (facts := served.facts) is not None:
            told |= {
                "version": facts.version,
                "classes": facts.classes,
                "unadapted": sorted(facts.unadapted),
                "size": facts.shapes.side,
                "preprocess": facts.preprocess.model_dump(mode="json"),
                "grid": round(facts.shapes.sizes.tokens**0.5),
                "device": facts.device,
                "prior": self.catalog.settings.prior,
                "unknown_below": facts.calibration.unknown_below if facts.calibration else 0.0,
            }
        return told

    async def server(self, request: Request) -> Response:
        """Return the protocol's words about the server."""
        number = package_version("microclip-deploy")
        told = {"name": "microclip-deploy", "version": number, "extensions": protocol.EXTENSIONS}
        return JSONResponse(told)

    async def live(self, request: Request) -> Response:
        """Say that this process answers."""
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """Say whether every model can answer."""
        ready = self.catalog.ready()
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def index(self, request: Request) -> Response:
        """Return the models as Triton's clients list them."""
        async with self.bodies.read(request):  # a filter, which changes nothing
            pass
        return JSONResponse(
            [
                {
                    "name": served.name,
                    "version": served.facts.version if served.facts else "",
                    "state": "READY" if served.state() == "ready" else "UNAVAILABLE",
                    "reason": "" if served.state() == "ready" else served.state(),
                }
                for served in self.catalog
            ]
        )

    def _served(self, request: Request) -> Served:
        return self.catalog.find(request.path_params["model"], request.path_params.get("version"))

    async def model(self, request: Request) -> Response:
        """Return the inputs and outputs of a model."""
        served = self._served(request)
        async with served.used() as loaded:
            named = self.catalog.of_name(served.name)
            versions = [each.facts.version for each in named if each.facts is not None]
            return JSONResponse(protocol.metadata(served.name, versions, loaded.facts))

    async def config(self, request: Request) -> Response:
        """Return a model's configuration."""
        served = self._served(request)
        async with served.used() as loaded:
            return JSONResponse(protocol.configuration(served.name, loaded.facts))

    async def model_ready(self, request: Request) -> Response:
        """Say whether a model can answer."""
        served = self._served(request)
        ready = served.state() in ("ready", "unloaded") and not self.catalog.draining
        return JSONResponse({"name": served.name, "ready": ready}, 200 if ready else 503)

    async def infer(self, request: Request) -> Response:
        """Answer the protocol's inference request."""
        served = self._served(request)
        version = request.path_params.get("version")
        async with self.bodies.read(request) as body, served.used(version) as loaded:
            most = self.catalog.settings.max_queue
            length = request.headers.get(protocol.HEADER_LENGTH)
            inputs = protocol.read(body, length, loaded.facts, most)
            due = self._due(inputs.timeout_s())
            seen, answer = await _unless_gone(
                request, self._answered(inputs.photos, inputs.images, loaded, due)
            )
            self._told(request, served, loaded, seen, answer)
            content, headers = protocol.write(inputs, served.name, loaded.facts, answer.prediction)
            return Response(content, headers=headers)

    async def _answered(
        self,
        photos: list[bytes],
        images: NDArray[np.uint8] | None,
        loaded: Version,
        due: float,
        *,
        shown: bool = False,
    ) -> tuple[list[View], Answer]:
        """Ask the model about images, or photos, of which a bad one refuses all."""
        views: list[View] = []
        if images is None:
            preprocess = loaded.facts.preprocess
            reading = (self.intake.view(each, preprocess, due, shown=shown) for each in photos)
            views = await asyncio.gather(*reading)
            images = np.stack([view.pixels for view in views])
        return views, await loaded.batcher.ask(images, due)

    async def classify(self, request: Request) -> Response:
        """Classify one photo."""
        question = Question.of(request)
        served, version = self.catalog.find(question.model, question.version), question.version
        async with self.bodies.read(request) as body, served.used(version) as loaded:
            due = self._due(None)
            photo = await photo_of(request.headers, body)
            shown = question.saliency == "overlay"
            asked = self._answered([photo], None, loaded, due, shown=shown)
            [view], answer = await _unless_gone(request, asked)
            timing_s = self._told(request, served, loaded, [view], answer)
            prediction = answer.prediction
            if question.saliency == "none":
                told = answer_to(question, loaded.facts, view, prediction)
            else:  # a picture of a large photo takes a while
                told = await asyncio.to_thread(answer_to, question, loaded.facts, view, prediction)
            told |= {"model": served.name, "version": loaded.facts.version}
            told["id"] = request.state.id
            timing_s["total"] = time.perf_counter() - request.state.begun
            told["timing_ms"] = {stage: round(1e3 * s, 3) for stage, s in timing_s.items()}
            return JSONResponse(told)

    async def refuse(self, request: Request, refusal: Exception) -> Response:
        """Answer with an error that was raised on purpose."""
        assert isinstance(refusal, Refusal)
        self.metrics.errors.labels(refusal.kind).inc()
        return refused(refusal)

    async def unknown(self, request: Request, error: Exception) -> Response:
        """Answer what no route takes."""
        assert isinstance(error, HTTPException)
        told = {404: "no such address; see /openapi.json", 405: "expected another method here"}
        message = told.get(error.status_code, error.detail)
        headers = error.headers or {}
        refusal = Refusal(error.status_code, message, "address", headers=headers)
        return await self.refuse(request, refusal)

    async def fail(self, request: Request, error: Exception) -> Response:
        """Answer after a mistake of ours, which the gate logs."""
        return await self.refuse(request, Refusal(500, "internal error; see the log", "internal"))

    def _due(self, timeout_s: float | None) -> float:
        """Return when an answer is too late, in the loop's time."""
        own = self.catalog.settings.timeout_s
        return asyncio.get_running_loop().time() + min(own, timeout_s or own)

    def _told(
        self, request: Request, served: Served, loaded: Version, seen: list[View], answer: Answer
    ) -> dict[str, float]:
        """Count the stages of a request; return the seconds of each."""
        timing_s = {
            "decode": sum(view.decode_s for view in seen),
            "preprocess": sum(view.preprocess_s for view in seen),
            "queue": answer.queue_s,
            "model": answer.model_s,
        }
        timing_s |= {s: share * answer.model_s for s, share in loaded.facts.shares.items()}
        self.metrics.told(served.name, timing_s)
        request.state.log = {
            "model": served.name,
            "version": loaded.facts.version,
            "images": len(answer.prediction.logits),
        }
        return timing_s


async def _unless_gone(
    request: Request, asked: Coroutine[Any, Any, tuple[list[View], Answer]]
) -> tuple[list[View], Answer]:
    """Wait for an answer; leave the queue when the client goes.

    Raises:
        Refusal: as `Batcher.ask`; 499, the client is gone.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer = asyncio.ensure_future(asked)
    leaving = asyncio.ensure_future(gone())
    try:
        await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise Refusal(499, "the client is gone", "gone")
    finally:
        answer.cancel()
        leaving.cancel()


def make_app(
    catalog: Catalog, on_failure: Callable[[BaseException], None] = lambda error: None
) -> ASGIApp:
    """Return the application of a server; its lifespan loads and unloads the models.

    Args:
        catalog: the models.
        on_failure: told why a model cannot be loaded, before the lifespan fails.
    """
    settings, metrics = catalog.settings, catalog.metrics
    intake = Intake(settings.max_queue, settings.max_pixels)
    bodies = Bodies(settings.max_body, settings.body_timeout_s)
    access_log = AccessLog(settings.access_log, metrics.log_lost.inc)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            await catalog.open()
            yield
        except BaseException as error:
            on_failure(error)
            raise
        finally:
            await catalog.close()
            intake.close()
            access_log.close()

    endpoints = Endpoints(catalog, metrics, intake, bodies)
    app = Starlette(
        routes=endpoints.routes(),
        lifespan=lifespan,
        exception_handlers={
            HTTPException: endpoints.unknown,
            Refusal: endpoints.refuse,
            Exception: endpoints.fail,
        },
    )
    return Gate(app, catalog, metrics, access_log)
