"""`microclip-deploy bench serve`: added to the other measurements."""

from pathlib import Path
from typing import Annotated, Any

import typer

from microclip_deploy.artifact import make_directory
from microclip_deploy.bench import option_text
from microclip_deploy.cli import next_steps
from microclip_deploy.cli.bench import (
    HOW_LONG,
    LIMITS,
    TIMED,
    Batches,
    Concurrency,
    Device,
    Duration,
    MadeDtype,
    Photos,
    UntilStable,
    Warmup,
    app,
    command,
)
from microclip_deploy.cli.options import OUTPUT, AsJson, ExportDtype, Threads, option
from microclip_deploy.console import notes, out, print_json
from microclip_deploy.errors import require

__all__ = ["app"]

SERVER = "The server"
"""Section of --help."""


def _body(text: str) -> str:
    from microclip_deploy.bench.serving.bodies import BODIES

    return option_text.parse_choice(text, BODIES)


def _peers(text: str) -> tuple[str, ...]:
    from microclip_deploy.bench.serving.peers import PEERS

    return option_text.parse_names(text, tuple(PEERS))


def _slo(text: str) -> Any:
    from microclip_deploy.bench.serving.report import Slo

    return Slo(*option_text.parse_limit(text))


@command("serve")
def bench_serve(
    target: Annotated[
        str,
        typer.Argument(
            metavar="URL|TARGET",
            help="Address of a server; or a run, an export or a model name, to start one with.",
            show_default=False,
        ),
    ],
    against: Annotated[
        Path | None, option(SERVER, "EXPORT", "What URL serves: to tell what serving costs.")
    ] = None,
    model: Annotated[
        str | None, option(SERVER, "NAME", "Of a URL that serves several models.")
    ] = None,
    api_key: Annotated[
        str | None,
        option(SERVER, "KEY", "If the server asks for one.", envvar="MICROCLIP_API_KEY"),
    ] = None,
    pid: Annotated[
        int | None, option(SERVER, "N", "Process of URL. [default: who listens there]", min=1)
    ] = None,
    device: Device = "cpu",
    dtype: MadeDtype = ExportDtype.fp32,
    threads: Threads = None,
    body: Annotated[
        Any, option(TIMED, "KIND", "photo: files; pixels: binary tensors.", parser=_body)
    ] = "photo",
    images: Photos = None,
    batches: Batches = "1",
    concurrency: Concurrency = "1,4,16",
    rate: Annotated[
        Any,
        option(
            TIMED,
            "NUMBERS",
            "Open loops too: requests a second, Poisson arrivals.",
            parser=option_text.parse_rates,
        ),
    ] = None,
    load: Annotated[
        Any,
        option(
            TIMED,
            "NUMBERS",
            "The same, as times the best closed loop: 0.5,0.8,1.2.",
            parser=option_text.parse_rates,
        ),
    ] = None,
    peers: Annotated[
        Any, option(TIMED, "NAMES", "Of litserve, triton; or all, none.", parser=_peers)
    ] = "none",
    warmup: Warmup = "2s",
    duration: Duration = "10s",
    until_stable: UntilStable = "5%",
    requests: Annotated[
        int | None,
        option(HOW_LONG, "N", "Instead: a long closed loop, and the server's memory.", min=2),
    ] = None,
    slo: Annotated[
        Any,
        option(
            LIMITS,
            "LIMIT",
            "100ms: for 99 % of requests; or such as p95=100ms.",
            parser=_slo,
        ),
    ] = None,
    out_dir: Annotated[
        Path | None, option(OUTPUT, "DIR", "Write a .json and .md report here.", "--out")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Load a server with closed and open loops, beside the session alone and other servers.

    Exit 5 where answers are not the session's, 6 where --slo is missed. A server that is started
    here takes its other options from MICROCLIP_*.

    Example: microclip-deploy bench serve http://127.0.0.1:8000 --load 0.5,0.8 --slo 100ms
    """
    for package in ("cpuinfo", "psutil", "pynvml", "httptools"):
        require(package, "bench")
    if out_dir is not None:  # before minutes of measuring
        make_directory(out_dir)
    from microclip_deploy.bench.latency.windows import Plan
    from microclip_deploy.bench.serving import report
    from microclip_deploy.bench.serving.run import Loads, Where, run_serving_bench

    measured = run_serving_bench(
        Where(target, against, model, api_key, pid, device, dtype.value, threads),
        notes,
        body=body,
        batches=batches,
        loads=Loads(concurrency, rate or (), load or ()),
        plan=Plan(warmup, duration, until_stable),
        peers=peers,
        images=images,
        slo=slo,
        requests=requests,
    )
    shown = notes if as_json else out
    shown.print(report.plain(measured), markup=False, highlight=False, soft_wrap=True)
    if out_dir is not None:
        notes.print(f"wrote {report.write_report(measured, out_dir)}", markup=False)
    if as_json:
        print_json(measured.model_dump())
    report.require_answers(measured)
    report.require_slo(measured)
    next_steps.tell(notes, (("bench", "serve", target, "--load", "0.5,0.8"), "at steady loads"))
