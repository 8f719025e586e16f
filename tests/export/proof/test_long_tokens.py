"""Tokens as long as those of real ViTs, |x|^2 = 5 D: SOAP's scores are near 100, softmax is sharp.

Exports of such models are proven, and damage to them is still found out.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import pytest
import torch

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.export.proof.answers import Graphs
from microclip_deploy.export.proof.forward_error import forward_error
from microclip_deploy.export.proof.judge import Proof, Stage
from microclip_deploy.export.proof.limits import Tolerance
from microclip_deploy.export.proof.parity import prove
from microclip_deploy.export.proof.probes import Reference, made_up_photos
from microclip_deploy.export.to_onnx import write_graphs
from microclip_deploy.model.backbone import VisionBackbone
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.model.text import TextHeads
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.serving.exported import BACKBONE, FULL, HEAD, Precision
from tests.export.damage import Change, change, inverted, noisy, of_first_row, scaled, weight

WIDTH = 384
VIT = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": WIDTH, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1},
}
PHOTOS = made_up_photos(64)
INTACT = Stage(graph="preprocess", stage="pixels", difference=0, limit=1 / 255)


class Written(NamedTuple):
    """A model with long tokens, its answers, and its graphs in some precisions."""

    model: MicroCLIP
    reference: Reference
    tolerance: Tolerance
    directories: dict[Precision, Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.model.CLIP(**VIT)
        classes = torch.randn(5, 64)
    torch.nn.init.constant_(clip.visual.ln_post.weight, 5**0.5)
    heads = TextHeads(classes, classes, classes)
    model = MicroCLIP(VisionBackbone(clip.visual), heads, ncut=NCutSpec()).eval()
    preprocess = Preprocess(size=64, mean=(0.5, 0.5, 0.5), std=(0.3, 0.3, 0.3))
    reference = Reference.of(model, preprocess, PHOTOS.views(preprocess))
    tolerance = Tolerance(error=forward_error(model, preprocess, reference))
    directories: dict[Precision, Path] = {}
    for precision in ("fp32", "fp16"):
        directories[precision] = tmp_path_factory.mktemp("long") / precision
        directories[precision].mkdir()
        write_graphs(model, preprocess, precision, directories[precision], {})
    return Written(model, reference, tolerance, directories)


def proof_of(written: Written, precision: Precision, directory: Path | None = None) -> Proof:
    model = written.model
    matrix = model.class_matrix().detach().numpy()
    return prove(
        Graphs(
            directory or written.directories[precision], precision, model.ncut, matrix,
            model.cls_share,
        ),
        written.reference,
        PHOTOS,
        tolerance=written.tolerance,
        pixels=INTACT,
    )  # fmt: skip


def test_tokens_are_as_long_as_those_of_real_models(written: Written) -> None:
    reference = written.reference
    squares = (reference.patches**2).sum(axis=2)
    assert 4.5 * WIDTH < squares.mean() < 5.5 * WIDTH
    tokens = reference.patches.astype(np.float64)
    query = (tokens * reference.mask[..., None]).sum(axis=1) / reference.mask.sum(axis=1)[:, None]
    scores = np.einsum("bnd,bd->bn", tokens, query) / WIDTH**0.5
    assert scores.max() > 60


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_exports_are_proven(written: Written, precision: Precision) -> None:
    assert proof_of(written, precision).departure is None


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        (BACKBONE, weight("backbone.patch", noisy), "cls"),
        (BACKBONE, scaled("patches", 1.0001), "patches"),
        (HEAD, weight("head.match", noisy), "attention"),
        (HEAD, weight("head.project", noisy), "fg"),
        (HEAD, scaled("logits", 1.0001), "logits"),
        (FULL, inverted("mask"), "cut"),
        (FULL, of_first_row("attention"), "attention"),
        (FULL, scaled("fg", 1.0001), "fg"),
        (FULL, weight("classifier", noisy), "logits"),
        (FULL, scaled("embedding", 1.0001), "parts"),
    ],
)
def test_the_damaged_stage_is_named(
    written: Written, tmp_path: Path, name: str, damage: Change, expected: str
) -> None:
    export = shutil.copytree(written.directories["fp32"], tmp_path / "export")
    change(export / name, damage)
    assert proof_of(written, "fp32", export).departure == f"{name}: {expected}"
