"""An embedded benchmark, end to end: zero-shot, adapt, evaluate, predict, export, verify.

The images are written as ordinary folders first, so everything below is what a user's photos go
through.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from microclip_deploy.adapt.log import HISTORY, read_history
from microclip_deploy.cli.adapt import Asked, run_adapt
from microclip_deploy.cli.commands import run_evaluate, run_predict
from microclip_deploy.demo.benchmark import Benchmark
from microclip_deploy.demo.folders import write_benchmark
from microclip_deploy.errors import VerificationError
from microclip_deploy.evaluation.evaluate import Evaluation
from microclip_deploy.export.command import run_export
from microclip_deploy.export.proof.judge import require_proven
from microclip_deploy.export.proof.verify import run_verify, table

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Measured:
    """What the benchmark measured."""

    evaluation: Evaluation
    exported: Evaluation
    """The same images through the exported graph and ONNX Runtime."""
    adapt_s: float
    """Seconds of the adaptation, labels and saving included, images and report not."""

    def tables(self) -> list["Table"]:
        """Return both comparisons for a terminal."""
        run, export = self.evaluation.tables()[0], self.exported.tables()[0]
        run.title, export.title = "accuracy: PyTorch", "accuracy: full.onnx in ONNX Runtime"
        return [run, export]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        adapt_s, exported = round(self.adapt_s, 1), self.exported.to_json()["rows"]
        return {"adapt_s": adapt_s, "exported": exported, **self.evaluation.to_json()}


def run(
    benchmark: Benchmark,
    out: Path,
    *,
    seed: int,
    device: str,
    notes: Console,
    printed: Console,
) -> Measured:
    """Run the whole benchmark in a folder; what is already there is not done again.

    Args:
        benchmark: which.
        out: gets images/, the run directory seed-N/, its export, export-N/, and overlays/.
        seed: of the adaptation; the images are always the same.
        device: "auto", "cpu", "cuda" or "cuda:N".
        notes: progress and remarks.
        printed: the predictions and the proof.
    """
    images, directory = out / "images", out / f"seed-{seed}"
    write_benchmark(benchmark, images, notes)
    asked = Asked(
        images=images / "adapt",
        classes=images / "classes.txt",
        descriptions=images / "descriptions.json",
        templates=tuple(benchmark.templates),
        model=benchmark.model,
        recipe=benchmark.recipe,
        overrides=(f"adapt.seed={seed}",),
    )
    run_adapt(directory, asked, notes, device=device, resume=True)
    evaluation = run_evaluate(directory, images / "test", notes, device=device, batch_size=128)
    photos = sorted((images / "test").glob("*/*.png"))
    photos = photos[:: len(photos) // 5][:5]
    run_predict(directory, photos, printed, notes, top_k=3, overlay=out / "overlays", device=device)
    exported = _export(directory, out / f"export-{seed}", images, notes, printed)
    _require_same(evaluation, exported)
    seconds = sum(epoch["seconds"] for epoch in read_history(directory / HISTORY))
    return Measured(evaluation, exported, seconds)


def _export(run: Path, out: Path, images: Path, notes: Console, printed: Console) -> Evaluation:
    """Export the run, prove it again from what is stored, and measure the graph."""
    run_export(run, out, notes, images=images / "val", overwrite=True)
    proof = run_verify(out, notes)
    printed.print(table(proof))
    require_proven(proof, out)
    return run_evaluate(out, images / "test", notes, device="cpu", batch_size=128)


def _require_same(pytorch: Evaluation, exported: Evaluation) -> None:
    """Hold the exported graph's top-1 against PyTorch's.

    Raises:
        VerificationError: they differ.
    """
    for token in ("fused", "cls", "fg"):
        expected, found = (e.row("adapted", token, "adapted") for e in (pytorch, exported))
        assert expected is not None, "PyTorch is always measured"
        assert found is not None, "the export is always measured"
        if found.top1 != expected.top1:
            raise VerificationError(
                f"{token}: expected PyTorch's top-1 {expected.top1:.4f} of the exported graph, "
                f"found {found.top1:.4f}; run `microclip-deploy verify` on the export"
            )
