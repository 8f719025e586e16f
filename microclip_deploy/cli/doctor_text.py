"""A diagnosis as a terminal shows it."""

from rich.table import Table
from rich.text import Text

from microclip_deploy.cli.doctor import Diagnosis, lacks_driver
from microclip_deploy.environment import PACKAGES


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
