"""What a server counts, for Prometheus.

One process counts everything, also what workers do: they report with each answer.
"""

from collections.abc import Mapping
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client.openmetrics.exposition import generate_latest

__all__ = ["CONTENT_TYPE", "Metrics"]

_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0),
)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        ProcessCollector(registry=own)
        self.requests = Counter(
            "microclip_requests", "Answered requests.", ("route", "status"), registry=own
        )
        self.seconds = Histogram(
            "microclip_request_seconds",
            "From the request's headers to the last byte of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=own,
        )
        self.stages = Histogram(
            "microclip_stage_seconds",
            "Of a request by stage: decode, preprocess, queue, model; encoder, cut and head are "
            "the model's time by the shares measured when it was loaded.",
            ("model", "stage"),
            buckets=_SECONDS,
            registry=own,
        )
        # To find a series by its labels takes longer than to count.
        self._request = cache(self.requests.labels)
        self._route = cache(self.seconds.labels)
        self._stage = cache(self.stages.labels)
        self.batches = Histogram(
            "microclip_batch_images",
            "Images that were computed together.",
            ("model",),
            buckets=_IMAGES,
            registry=own,
        )
        self.errors = Counter(
            "microclip_errors", "Refused requests by kind.", ("kind",), registry=own
        )
        self.reloads = Counter(
            "microclip_reloads", "Models loaded again.", ("model", "outcome"), registry=own
        )
        self.queue = Gauge(
            "microclip_queue_images", "Images that wait.", ("model", "version"), registry=own
        )
        self.ready = Gauge(
            "microclip_model_ready", "1: a worker can answer.", ("model", "version"), registry=own
        )
        self.restarts = Gauge(
            "microclip_worker_restarts",
            "Workers that were started again.",
            ("model", "version"),
            registry=own,
        )
        self.log_lost = Counter(
            "microclip_access_log_lost", "Lines that could not be written.", registry=own
        )

    def told(self, model: str, timing_s: Mapping[str, float]) -> None:
        """Count the stages of one request."""
        for stage, seconds in timing_s.items():
            self._stage(model, stage).observe(seconds)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._request(route, str(status)).inc()
        self._route(route).observe(seconds)

    def text(self) -> bytes:
        """Return everything as Prometheus reads it."""
        told: bytes = generate_latest(self.registry)  # type: ignore[no-untyped-call]
        return told
