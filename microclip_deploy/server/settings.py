"""What a server can be told."""

from dataclasses import dataclass
from pathlib import Path

from microclip_deploy.calibration import FOLDER


@dataclass(frozen=True)
class Settings:
    """All limits and habits of a server, with the defaults of the command line."""

    host: str = "127.0.0.1"
    port: int = 8000
    devices: tuple[str, ...] = ("auto",)
    """One worker each, for every model."""
    threads: int | None = None
    """Of a worker on a CPU."""
    prior: str = FOLDER
    """The class frequencies that every model expects, as for `Session.expect`."""
    max_batch: int = 32
    """Images a batch."""
    max_delay_s: float = 0.0
    """How long an idle worker waits for a fuller batch."""
    max_queue: int = 256
    """Images a model may have waiting; beyond it 429."""
    timeout_s: float = 30.0
    """Of a request, from its last byte to its answer; beyond it 504."""
    body_timeout_s: float = 30.0
    """For a request's body to arrive; beyond it 408."""
    max_body: int = 20_000_000
    """Bytes, also after decompression; beyond it 413."""
    max_pixels: int = 50_000_000
    """Width x height of a photo."""
    hang_timeout_s: float | None = None
    """A batch that takes longer restarts its worker; None for 10 times what it usually takes."""
    unload_after_s: float = 0.0
    """An idle model leaves the memory after this; 0: never."""
    drain_delay_s: float = 0.5
    """After SIGTERM, not ready but still answering, so that clients and balancers turn away."""
    api_key: str | None = None
    access_log: Path | None = None
    """JSON lines; None for stdout."""
