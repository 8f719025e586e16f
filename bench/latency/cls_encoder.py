"""Plain CLIP without a patch token: what microCLIP costs beyond it.

The same folded blocks, traced and run the same way as the product's graphs. "Full" computes every
row of the last block and keeps the class row, as exporters of CLIP do; "pruned" computes the class
row of the last block alone, which is the least that a [CLS] embedding needs.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.export.graphs import BackboneGraph, Block, LastBlock
from microclip_deploy.export.to_onnx import OPSET
from microclip_deploy.head import LOGIT_SCALE
from microclip_deploy.model.microclip import MicroCLIP


class _ClassRowBlock(LastBlock):
    """The last block for the class row alone."""

    def rows(self, x: Tensor, attended: Tensor, value: Tensor) -> Tensor:
        return self.finish(x[:, :1], attended)


class ClsGraph(nn.Module):
    """uint8 images (B, S, S, 3) -> logits float32 (B, C) of the [CLS] embedding."""

    def __init__(self, model: MicroCLIP, preprocess: Preprocess, *, pruned: bool) -> None:
        super().__init__()
        tower = model.backbone.weights()
        self.backbone = BackboneGraph(tower, preprocess, torch.float32)
        last: Any = _ClassRowBlock if pruned else Block
        self.backbone.last = last(tower.blocks[-1], torch.float32)
        matrix = model.class_matrix().detach()
        self.classifier = nn.Parameter(LOGIT_SCALE * matrix, requires_grad=False)

    def forward(self, image: Tensor) -> Tensor:
        """Classify images by their class embedding."""
        cls: Tensor = self.backbone(image).cls
        return cls @ self.classifier.T


def write_cls_graph(model: MicroCLIP, preprocess: Preprocess, path: Path, *, pruned: bool) -> None:
    """Trace a plain encoder with its classifier into an ONNX file."""
    size = preprocess.size
    graph = ClsGraph(model, preprocess, pruned=pruned).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch's exporter
        torch.onnx.export(
            graph,
            (torch.zeros(2, size, size, 3, dtype=torch.uint8),),
            str(path),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
            external_data=False,
            optimize=True,
            verbose=False,
        )
