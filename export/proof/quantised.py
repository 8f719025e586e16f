"""How far the scales of an int8 graph alone put its answers from PyTorch's."""

from pathlib import Path

import numpy as np

from microclip_deploy.export.proof.limits import TokenErrors
from microclip_deploy.export.proof.probes import Reference

_BATCH = 8


def quantisation_error(backbone: Path, reference: Reference) -> TokenErrors:
    """Run a graph as its operators are defined, without integer kernels, against PyTorch.

    Unoptimised, ONNX Runtime rounds activations to their scales and multiplies in float32, which
    holds products of int8 nearly exactly and cannot saturate.

    Args:
        backbone: backbone.onnx in int8-static.
        reference: images, and PyTorch's answers.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.log_severity_level = 3  # errors
    graph = onnxruntime.InferenceSession(backbone, settings, providers=["CPUExecutionProvider"])
    cls = patches = 0.0
    for start in range(0, len(reference.images), _BATCH):
        part = slice(start, start + _BATCH)
        found = graph.run(["cls", "patches"], {"image": reference.images[part]})
        cls = max(cls, float(np.abs(found[0] - reference.cls[part]).max()))
        patches = max(patches, float(np.abs(found[1] - reference.patches[part]).max()))
    return TokenErrors(cls=cls, patches=patches / float(np.abs(reference.patches).max()))
