"""What to try after a command: lines that can be copied, on stderr."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

Step = tuple[Sequence[str | Path], str]
"""Words after `microclip-deploy`, and what the command is for."""

DEMO: Step = (("demo",), "all of it on drawn animals, in three minutes and without a download")
DOCTOR: Step = (("doctor",), "what is installed here, and what will be used")


def adapt(*more: str, photos: str | Path = "PHOTOS") -> Step:
    """Return the adaptation to photos of the user's own."""
    words = ("adapt", photos, "--classes", "CLASSES.txt", "-o", "runs/NAME", *more)
    return words, "adapt to your photos, without labels"


def predict(directory: Path, *more: str) -> Step:
    """Return the use of a run or an export."""
    return ("predict", directory, "PHOTOS", *more), "what it says about photos"


def overlay(directory: Path) -> Step:
    """Return the use of a run or an export with pictures."""
    return ("predict", directory, "PHOTOS", "--overlay", "overlays"), "where it looks, as pictures"


def audit(directory: Path) -> Step:
    """Return the measurement of a run on photos without labels."""
    target = Path("audits") / directory.absolute().name
    return ("audit", directory, "PHOTOS", "-o", target), "its accuracy, from a hundred answers"


def evaluate(directory: Path) -> Step:
    """Return the measurement of a run or an export."""
    return ("evaluate", directory, "LABELLED"), "its accuracy, if you have CLASS/image folders"


def export(run: Path) -> Step:
    """Return the export of a run."""
    target = Path("exports") / run.absolute().name
    return ("export", run, "-o", target), "one ONNX file for a server"


def verify(export: Path) -> Step:
    """Return the proof of an export."""
    return ("verify", export), "prove it again on the machine that will serve"


def bench(target: str | Path, *more: str | Path) -> Step:
    """Return the measurement of how fast a target is."""
    return ("bench", target, *more), "how fast it is on this machine"


def deployment(directory: Path) -> Step:
    """Return what brings a run, or an export, nearer to a server."""
    from microclip_deploy.serving import is_export

    return verify(directory) if is_export(directory) else export(directory)


def tell(notes: Console, *steps: Step) -> None:
    """Show command lines, each after what it is for; paths are quoted for the shell."""
    notes.print("next:")
    for words, purpose in steps:
        line = " ".join(["microclip-deploy", *map(_quoted, words)])
        notes.print(f"  # {purpose}\n  {line}", markup=False)


def _quoted(word: str | Path) -> str:
    """Return a word as a shell reads it back, also bytes that no terminal shows."""
    text = str(word)
    if text.isprintable():
        return shlex.quote(text)
    shown = (
        chr(b) if 32 <= b < 127 and b not in b"\\'" else f"\\x{b:02x}" for b in os.fsencode(text)
    )
    return f"$'{''.join(shown)}'"
