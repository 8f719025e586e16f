"""What the written graphs say to batches of many sizes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.artifact import write_problem
from microclip_deploy.errors import CheckpointError, require
from microclip_deploy.export.proof.probes import Reference
from microclip_deploy.serving.exported import BACKBONE, FULL, HEAD, Precision
from microclip_deploy.serving.onnx_graph import OnnxGraph

Array = NDArray[Any]
Progress = Callable[[int, int], None]

Feeds = dict[str, Array]

HEAD_STAGES = ("attention", "fg", "embedding", "logits")
"""Outputs that head and full graph share."""

_HEAD_INPUTS = ("cls", "patches", "mask")


class Answers(NamedTuple):
    """What a graph said to batches of many sizes; M answers in all."""

    graph: str
    rows: Array
    """(M,): which image."""
    sizes: Array
    """(M,): images in its batch."""
    outputs: dict[str, Array]
    """(M, ...) each."""

    def where(self, kept: Array) -> Self:
        """Return some of the answers."""
        outputs = {name: output[kept] for name, output in self.outputs.items()}
        return self._replace(rows=self.rows[kept], sizes=self.sizes[kept], outputs=outputs)


class Asked(NamedTuple):
    """The answers of all graphs."""

    backbone: Answers
    """To the images, at every batch size."""
    head: Answers
    """To PyTorch's tokens and masks, at three batch sizes."""
    full: Answers
    """To the images, at every batch size, with the class matrix inside the graph."""
    parts: Answers
    """Of the head, to the backbone's tokens and the full graph's masks: what `full` must say."""
    served: Answers
    """Of the full graph to all images, with a class matrix from outside."""


def ask(
    directory: Path,
    reference: Reference,
    precision: Precision,
    device: str,
    classifier: Array,
    progress: Progress,
) -> Asked:
    """Run all graphs.

    Args:
        directory: where they are.
        reference: images, and PyTorch's answers.
        precision: of the graphs.
        device: as for `OnnxGraph`.
        classifier: float32 (C', E), the matrix for `Asked.served`; C' need not be C.
        progress: called with (done, total) batches.

    Raises:
        CheckpointError: a graph cannot be run, or answers in other shapes than PyTorch.
        EnvironmentProblem: the device is missing or out of memory.
    """
    batches = list(windows(len(reference.images)))
    few = [rows for rows in batches if len(rows) in (1, 3, len(reference.images))]
    total = 3 * len(batches) + len(few) + 1
    run = _Runner(directory, reference, precision, device, progress, total)

    def images(rows: Array, _at: slice) -> Feeds:
        return {"image": reference.images[rows]}

    backbone = run(BACKBONE, batches, images, ("cls", "patches"))
    head = run(
        HEAD,
        few,
        lambda rows, _at: {name: getattr(reference, name)[rows] for name in _HEAD_INPUTS},
        HEAD_STAGES,
    )
    full = run(FULL, batches, images, ("cls", "mask", "complete", *HEAD_STAGES))
    made = {**backbone.outputs, "mask": full.outputs["mask"]}
    parts = run(
        HEAD,
        batches,
        lambda _rows, at: {name: made[name][at] for name in _HEAD_INPUTS},
        HEAD_STAGES,
    )
    served = run(
        FULL,
        batches[-1:],
        lambda rows, at: {**images(rows, at), "classifier": classifier},
        ("embedding", "cls", "fg", "logits"),
    )
    return Asked(backbone, head, full, parts, served)


class _Runner:
    """Runs the graphs of a directory, and counts batches."""

    def __init__(
        self,
        directory: Path,
        reference: Reference,
        precision: Precision,
        device: str,
        progress: Progress,
        total: int,
    ) -> None:
        self.directory = directory
        self.reference = reference
        self.precision = precision
        self.device = device
        self.progress = progress
        self.total = total
        self.done = 0

    def __call__(
        self,
        name: str,
        batches: Sequence[Array],
        feeds: Callable[[Array, slice], Feeds],
        wanted: Sequence[str],
    ) -> Answers:
        """Give a graph every batch; `feeds` is told its rows, and where its answers stand."""
        outputs: dict[str, list[Array]] = {output: [] for output in wanted}
        start = 0
        with open_graph(self.directory / name, self.precision, self.device) as graph:
            for rows in batches:
                given = feeds(rows, slice(start, start + len(rows)))
                for output, found in zip(wanted, graph.run(wanted, given), strict=True):
                    self._require_shape(name, output, found, given, len(rows))
                    outputs[output].append(found)
                start, self.done = start + len(rows), self.done + 1
                self.progress(self.done, self.total)
        sizes = np.concatenate([np.full(len(rows), len(rows)) for rows in batches])
        joined = {output: np.concatenate(parts) for output, parts in outputs.items()}
        return Answers(name, np.concatenate(batches), sizes, joined)

    def _require_shape(
        self, name: str, output: str, found: Array, given: Feeds, count: int
    ) -> None:
        expected = (count, *getattr(self.reference, output).shape[1:])
        if output == "logits" and "classifier" in given:
            expected = (count, len(given["classifier"]))
        if found.shape != expected:
            raise CheckpointError(
                f"{self.directory / name}: {output}: expected shape {expected} as PyTorch's, found "
                f"{found.shape}; export again"
            )


def windows(count: int) -> Iterator[Array]:
    """Return rows for batches of 1 to 9 and of all images; neighbours hold different images."""
    start = 0
    for size in (*range(1, 10), count):
        yield (start + np.arange(size)) % count
        start += size


@contextmanager
def open_graph(path: Path, precision: Precision, device: str) -> Iterator[OnnxGraph]:
    """Load a graph; bfloat16 on a CPU is emulated."""
    if precision != "bf16" or device != "cpu":
        yield OnnxGraph(path, device)
        return
    require("onnx", "export")
    import onnx

    from microclip_deploy.export.proof.rounding import in_float32

    try:
        onnx.checker.check_model(path)
        emulated = in_float32(onnx.load(path))
    except (onnx.checker.ValidationError, OSError) as error:
        raise CheckpointError(f"{path}: expected a graph, found: {error}; export again") from error
    with TemporaryDirectory() as folder:
        # Twice as large as it was, it may not fit into one file.
        try:
            onnx.save(emulated, Path(folder) / path.name, save_as_external_data=True)
        except OSError as error:
            raise write_problem(Path(folder), error) from error
        yield OnnxGraph(Path(folder) / path.name, device)
