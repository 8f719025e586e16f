"""`microclip-deploy doctor`: a diagnosis as a terminal shows it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from microclip_deploy.cli import next_steps
from microclip_deploy.cli.doctor import Diagnosis, diagnose, lacks_driver, require
from microclip_deploy.cli.options import AsJson
from microclip_deploy.console import bar, notes, out, print_json
from microclip_deploy.environment import PACKAGES


def doctor(
    needs: Annotated[
        list[str] | None,
        typer.Option("--require", metavar="NEED", help="gpu, trt or cupy; exit 4 when missing."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show versions and devices, what will be used for what, and how to fix what is wrong."""
    with bar(notes, "looking at packages") as progress:
        found = diagnose(progress=progress.update)
    if as_json:
        print_json(found.to_json())
    else:
        out.print(*tables(found), sep="\n")
        out.print(*problem_lines(found), sep="\n", soft_wrap=True)
    require(found, {part for need in needs or () for part in need.split(",")})
    possible = {use.task for use in found.uses if use.possible}
    if {"adapt", "export"} <= possible:
        next_steps.tell(notes, next_steps.DEMO, next_steps.adapt())
    elif "adapt" in possible:
        next_steps.tell(notes, next_steps.adapt())
    elif "exported graphs" in possible:
        next_steps.tell(notes, next_steps.predict(Path("EXPORT")))


def tables(found: Diagnosis) -> list[Table]:
    """Return packages, devices and uses."""
    return [_package_table(found), _machine_table(found), _use_table(found)]


def problem_lines(found: Diagnosis) -> list[Text]:
    """Return each problem and, on a line of its own that can be copied, what mends it."""
    lines = [Text("problems", style="italic")]
    for severity, what, fix in found.problems:
        style = "red" if severity == "error" else "yellow"
        lines.append(Text.assemble((f"{severity}: ", style), what, "\n    ", (fix, "bold")))
    return lines if found.problems else [*lines, Text("none found")]


def _package_table(found: Diagnosis) -> Table:
    table = _table("packages", "package", "version", "CUDA", "state")
    for name in PACKAGES:
        package = found.packages[name]
        state = "works" if package.works else package.error or "not installed"
        style = "green" if package.works else "red" if package.error else "dim"
        if lacks_driver(package) and not found.machine.gpus:
            state, style = "no NVIDIA driver", "dim"
        providers = package.details.get("in_use")
        if package.works and providers:
            state += f" ({', '.join(p.removesuffix('ExecutionProvider') for p in providers)})"
        major = str(package.cuda_major) if package.cuda_major is not None else "-"
        table.add_row(name, package.version or "-", major, Text(state, style=style))
    return table


def _machine_table(found: Diagnosis) -> Table:
    machine = found.machine
    table = _table("machine", "part", "found")
    table.add_row("Python", f"{machine.python} on {machine.system}")
    table.add_row("processors", str(machine.cpus))
    for gpu in machine.gpus:
        table.add_row("GPU", f"{gpu.name}, {gpu.memory_mib} MiB, driver {gpu.driver}")
    if not machine.gpus:
        table.add_row("GPU", "none visible")
    if machine.driver_cuda:
        table.add_row("driver", f"supports up to CUDA {machine.driver_cuda}")
    return table


def _use_table(found: Diagnosis) -> Table:
    table = _table("what will be used", "task", "by")
    for use in found.uses:
        table.add_row(use.task, use.by)
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
