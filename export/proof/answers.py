"""What the written graphs say to batches of many sizes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.artifact import write_problem
from microclip_deploy.errors import CheckpointError, require
from microclip_deploy.export.proof.probes import Array, Progress, Reference
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.serving.exported import BACKBONE, FULL, HEAD, Precision
from microclip_deploy.serving.onnx_graph import OnnxGraph

HEAD_STAGES = ("attention", "fg", "embedding", "logits")
"""Outputs that head and full graph share."""

_SERVED = ("embedding", "cls", "fg", "logits")
"""Outputs that say whether a class matrix from outside is used."""


class Graphs(NamedTuple):
    """The graphs in a directory, and what decides beside them."""

    directory: Path
    precision: Precision
    spec: NCutSpec
    """Constants of the cut."""
    classifier: NDArray[np.float32]
    """(C', E): a class matrix to give to the full graph; not necessarily the one inside it."""
    cls_share: float
    """How the two embeddings are fused."""


class Answers(NamedTuple):
    """What a graph said to batches of many sizes; M answers in all."""

    graph: str
    rows: Array
    """(M,): which image."""
    sizes: Array
    """(M,): images in its batch."""
    outputs: dict[str, Array]
    """(M, ...) each."""

    @classmethod
    def of(
        cls, graph: str, batches: Sequence[Array], outputs: Sequence[Mapping[str, Array]]
    ) -> Self:
        """Join the outputs of each batch; the batches say which images were in it."""
        sizes = [len(rows) for rows in batches]
        joined = {name: np.concatenate([part[name] for part in outputs]) for name in outputs[0]}
        return cls(graph, np.concatenate(batches), np.repeat(sizes, sizes), joined)

    def where(self, kept: Array) -> Self:
        """Return some of the answers."""
        outputs = {name: output[kept] for name, output in self.outputs.items()}
        return self._replace(rows=self.rows[kept], sizes=self.sizes[kept], outputs=outputs)

    def by_image(self, name: str) -> Array:
        """Return an output for each image, from the last answer to it."""
        _, newest = np.unique(self.rows[::-1], return_index=True)
        output: Array = self.outputs[name][::-1][newest]
        return output


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


class _Question(NamedTuple):
    """What a graph is asked."""

    batches: Sequence[Array]
    """Rows of the subject."""
    wanted: Sequence[str]
    subject: Mapping[str, Array]
    """Inputs for all rows; a class matrix is given to every batch as a whole."""


def ask(graphs: Graphs, reference: Reference, device: str, progress: Progress) -> Asked:
    """Run all graphs.

    Args:
        graphs: where they are, and the class matrix for `Asked.served`.
        reference: images, and PyTorch's answers.
        device: as for `OnnxGraph`.
        progress: called with (done, total) batches.

    Raises:
        CheckpointError: a graph cannot be run, or answers in other shapes than PyTorch.
        EnvironmentProblem: the device is missing or out of memory.
    """
    images = len(reference.images)
    batches = list(rotating((*range(1, 10), images), images))
    few = [rows for rows in batches if len(rows) in (1, 3, images)]
    done, total = count(1), 3 * len(batches) + len(few) + 1

    def run(name: str, *questions: _Question) -> Iterator[Answers]:
        path = graphs.directory / name
        with open_graph(path, graphs.precision, device) as graph:
            for batches, wanted, subject in questions:
                outputs = []
                for rows in batches:
                    feeds = {n: x if n == "classifier" else x[rows] for n, x in subject.items()}
                    outputs.append(dict(zip(wanted, graph.run(wanted, feeds), strict=True)))
                    _require_shapes(path, outputs[-1], feeds, reference)
                    progress(next(done), total)
                yield Answers.of(name, batches, outputs)

    photos = {"image": reference.images}
    tokens = ("cls", "patches", *["agreement"] * graphs.spec.asks_cls)
    (backbone,) = run(BACKBONE, _Question(batches, tokens, photos))
    full, served = run(
        FULL,
        _Question(batches, ("cls", "mask", "complete", *HEAD_STAGES), photos),
        _Question(batches[-1:], _SERVED, {**photos, "classifier": graphs.classifier}),
    )
    pytorch = {name: getattr(reference, name) for name in ("cls", "patches", "mask")}
    made = {n: backbone.outputs[n] for n in ("cls", "patches")} | {"mask": full.outputs["mask"]}
    # The same batches, of what the graphs made instead of images.
    answers = list(rotating(map(len, batches), len(full.rows)))
    head, parts = run(
        HEAD, _Question(few, HEAD_STAGES, pytorch), _Question(answers, HEAD_STAGES, made)
    )
    return Asked(backbone, head, full, parts._replace(rows=full.rows), served)


def _require_shapes(
    path: Path, outputs: Mapping[str, Array], feeds: Mapping[str, Array], reference: Reference
) -> None:
    """Refuse answers in other shapes than PyTorch's; a matrix that is fed has its own classes."""
    batch = len(next(iter(feeds.values())))
    for name, output in outputs.items():
        like = "mask" if name == "agreement" else name
        expected = (batch, *getattr(reference, like).shape[1:])
        if name == "logits" and "classifier" in feeds:
            expected = (batch, len(feeds["classifier"]))
        if output.shape != expected:
            raise CheckpointError(
                f"{path}: {name}: expected shape {expected} as PyTorch's, found {output.shape}; "
                "export again"
            )


def rotating(sizes: Iterable[int], images: int) -> Iterator[Array]:
    """Return the rows of batches of these sizes: each begins where the one before ended."""
    start = 0
    for size in sizes:
        yield (start + np.arange(size)) % images
        start += size


@contextmanager
def open_graph(path: Path, precision: Precision, device: str) -> Iterator[OnnxGraph]:
    """Load a graph; bfloat16 on a CPU is emulated."""
    if precision != "bf16" or device != "cpu":
        yield OnnxGraph(path, device)
        return
    require("onnx", "export")
    import onnx

    from microclip_deploy.export.proof.bfloat16 import in_float32

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
