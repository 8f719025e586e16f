"""The proof: PyTorch against every written graph, stage by stage, at many batch sizes.

Stages stand in the order in which the model computes them; the first that departs is where to look.
`head.onnx` is fed with PyTorch's tokens and masks, so it answers for itself alone, and is float32
in every precision.

`full.onnx` is held against PyTorch, and against its parts: its mask against the exact cut of the
tokens that `backbone.onnx` gives, everything else against what `head.onnx` makes of those tokens
and that mask. So nothing of it goes unchecked where a mask differs from PyTorch's.
"""

import importlib.util
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.export.proof.answers import Asked, Graphs, ask
from microclip_deploy.export.proof.judge import Judge, Proof, Stage
from microclip_deploy.export.proof.limits import OTHER_CUT, PARTS, Limits, Tolerance
from microclip_deploy.export.proof.probes import Photos, Progress, Reference, silent
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import adjacency, determined, saliency_exact
from microclip_deploy.serving.exported import FULL


def prove(
    graphs: Graphs,
    reference: Reference,
    photos: Photos,
    *,
    tolerance: Tolerance,
    pixels: Stage,
    device: str = "cpu",
    progress: Progress = silent,
) -> Proof:
    """Compare three graphs with PyTorch's answers and with one another.

    Args:
        graphs: what is proven.
        reference: images and answers.
        photos: where the images come from.
        tolerance: what departs.
        pixels: the stage before the graphs, from `compare_pixels`.
        device: as for `OnnxGraph`.
        progress: called with (done, total) batches.

    Raises:
        CheckpointError: a graph cannot be run, or answers in other shapes than PyTorch.
        EnvironmentProblem: the device is missing or out of memory.
    """
    asked = ask(graphs, reference, device, progress)
    spec, precision = graphs.spec, graphs.precision
    judge = Judge(
        reference, photos, asked.backbone, spec=spec, precision=precision, tolerance=tolerance
    )
    full = judge.verdict(asked.full)
    stages = (
        pixels,
        *judge.backbone,
        *judge.head(asked.head, judge.exact),
        _cut_stage(asked, spec),
        full.mask,
        *full.distances,
        _parts_stage(asked, judge.exact),
        judge.classes(asked.served, graphs.classifier, graphs.cls_share),
        full.top1,
    )
    return judge.proof(stages, [full], device=device, reference="PyTorch")


def compare_pixels(
    photos: Iterable[Image.Image], views: NDArray[np.uint8], preprocess: Preprocess
) -> Stage:
    """Compare test views with what Pillow, and torchvision if installed, make of the photos here.

    Returns:
        The largest difference where white is 1; the limit is one of 255 levels.
    """
    makers: list[Callable[[Image.Image], NDArray[np.uint8]]] = [preprocess.test_view]
    # torchvision has no transform for what is filled up.
    if importlib.util.find_spec("torchvision") and preprocess.resize_mode != "longest":
        makers.append(_torchvision_view(preprocess))
    largest = max(
        int(np.abs(make(photo).astype(int) - view).max())
        for photo, view in zip(photos, views, strict=True)
        for make in makers
    )
    return Stage(graph="preprocess", stage="pixels", difference=largest / 255, limit=1 / 255)


def _torchvision_view(preprocess: Preprocess) -> Callable[[Image.Image], NDArray[np.uint8]]:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    size, squash = preprocess.size, preprocess.resize_mode == "squash"
    resize = Resize((size, size) if squash else size, InterpolationMode(preprocess.interpolation))
    transform = Compose([resize, CenterCrop(size)])
    return lambda photo: np.asarray(transform(photo))


def _cut_stage(asked: Asked, spec: NCutSpec) -> Stage:
    """Compare masks with the exact cut of the backbone's tokens, where they are determined."""
    tokens, full = asked.backbone.outputs["patches"], asked.full.outputs
    agreement = asked.backbone.outputs.get("agreement")
    expected = saliency_exact(tokens, spec, agreement)
    other = (full["mask"] != expected.mask).any(axis=1) | (full["complete"] != expected.complete)
    counted = determined(adjacency(tokens, spec), spec, agreement)
    share = other[counted].sum() / max(counted.sum(), 1)
    return Stage(graph=FULL, stage="cut", difference=share, limit=OTHER_CUT)


def _parts_stage(asked: Asked, exact: Limits) -> Stage:
    """Compare what the full graph says with what its parts say to the same batches."""
    made = {**asked.parts.outputs, "cls": asked.backbone.outputs["cls"]}
    largest = exact.largest_share(asked.full.outputs, made)
    return Stage(graph=FULL, stage="parts", difference=largest, limit=PARTS)
