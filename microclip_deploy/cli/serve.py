"""`serve`: options of a server."""

from pathlib import Path
from typing import Annotated, Any

import typer

from microclip_deploy.cli.options import MACHINE, OUTPUT, PRIOR_HELP, option
from microclip_deploy.errors import UsageError, require
from microclip_deploy.server.settings import Settings

ADDRESS, LIMITS, MODELS = "Address", "Limits", "Models"
"""Sections of --help."""


def _option(section: str, metavar: str, name: str, text: str, **more: Any) -> Any:
    """Return an option that the environment can set, too."""
    variable = "MICROCLIP_" + name.removeprefix("--").upper().replace("-", "_")
    return option(section, metavar, text, name, envvar=variable, **more)


def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]DIR",
            help="What `export` or `adapt` wrote; several, and several versions of a name.",
            envvar="MICROCLIP_MODELS",
            show_default=False,
        ),
    ],
    host: Annotated[
        str, _option(ADDRESS, "HOST", "--host", "Listen here; 0.0.0.0 lets other machines in.")
    ] = Settings.host,
    port: Annotated[
        int, _option(ADDRESS, "N", "--port", "Listen here; 0 finds a free one.", min=0, max=65535)
    ] = Settings.port,
    api_key: Annotated[
        str | None,
        _option(ADDRESS, "KEY", "--api-key", "Ask clients for it; safer in the variable."),
    ] = None,
    device: Annotated[
        list[str] | None,
        _option(
            MACHINE,
            "DEVICE",
            "--device",
            "auto, cpu, cuda, cuda:N; of an export also tensorrt, openvino. Repeat for a worker on "
            "each. [default: auto]",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        _option(MACHINE, "N", "--threads", "Of a model on a CPU. [default: one a core]"),
    ] = None,
    prior: Annotated[
        str,
        _option(MODELS, "folder|uniform|FILE", "--prior", PRIOR_HELP),
    ] = Settings.prior,
    max_batch: Annotated[
        int, _option(LIMITS, "N", "--max-batch", "Images a batch.", min=1, max=4096)
    ] = Settings.max_batch,
    max_delay: Annotated[
        float,
        _option(LIMITS, "MS", "--max-delay", "An idle worker waits for a fuller batch.", min=0),
    ] = 1e3 * Settings.max_delay_s,
    max_queue: Annotated[
        int, _option(LIMITS, "N", "--max-queue", "Images that wait; then 429.", min=1)
    ] = Settings.max_queue,
    timeout: Annotated[
        float, _option(LIMITS, "S", "--timeout", "For an answer; then 504.", min=0.001)
    ] = Settings.timeout_s,
    body_timeout: Annotated[
        float, _option(LIMITS, "S", "--body-timeout", "For a body to arrive; then 408.", min=0.001)
    ] = Settings.body_timeout_s,
    max_body: Annotated[
        int, _option(LIMITS, "BYTES", "--max-body", "Of a request; then 413.", min=1)
    ] = Settings.max_body,
    max_pixels: Annotated[
        int, _option(LIMITS, "N", "--max-pixels", "Of a photo, width x height.", min=4)
    ] = Settings.max_pixels,
    hang_timeout: Annotated[
        float | None,
        _option(
            LIMITS,
            "S",
            "--hang-timeout",
            "A batch that takes longer restarts its worker. [default: 10 times what is usual]",
            min=0.01,
        ),
    ] = None,
    drain_delay: Annotated[
        float,
        _option(LIMITS, "S", "--drain-delay", "Still answers after SIGTERM, not ready.", min=0),
    ] = Settings.drain_delay_s,
    unload_after: Annotated[
        float,
        _option(MODELS, "S", "--unload-after", "Idle models leave the memory; 0: never.", min=0),
    ] = Settings.unload_after_s,
    access_log: Annotated[
        Path | None,
        _option(OUTPUT, "FILE", "--access-log", "A JSON line a request. [default: stdout]"),
    ] = None,
) -> None:
    """Serve exports and runs over HTTP: photos, the Open Inference Protocol, a page, metrics.

    Example: microclip-deploy serve exports/birds --port 8000
    """
    require("uvicorn", "serve")
    require("starlette", "serve")
    from microclip_deploy.server.catalog import places
    from microclip_deploy.server.run import serve as run

    if hang_timeout is not None and hang_timeout > timeout:
        raise UsageError(
            f"--hang-timeout: expected at most --timeout ({timeout:g} s), found {hang_timeout:g}; "
            "lower it"
        )
    if api_key == "":
        raise UsageError("--api-key: expected a key, found nothing; leave it out to ask for none")
    run(
        places(models),
        Settings(
            host=host,
            port=port,
            devices=tuple(device or Settings.devices),
            threads=threads,
            prior=prior,
            max_batch=max_batch,
            max_delay_s=max_delay / 1e3,
            max_queue=max_queue,
            timeout_s=timeout,
            body_timeout_s=body_timeout,
            max_body=max_body,
            max_pixels=max_pixels,
            hang_timeout_s=hang_timeout,
            unload_after_s=unload_after,
            drain_delay_s=drain_delay,
            api_key=api_key,
            access_log=access_log,
        ),
    )
