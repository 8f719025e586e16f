"""Providers that are not everywhere, where they are: they answer like the CPU.

Needs neither PyTorch nor the other fixtures: `pytest --confcutdir=tests/serving` runs it beside
onnxruntime-openvino or onnxruntime-gpu alone.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from microclip_deploy.serving.onnx_session import OnnxSession

PROVIDERS = {"cuda": "CUDAExecutionProvider", "openvino": "OpenVINOExecutionProvider"}


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "openvino"])
def test_a_provider_answers_like_the_cpu(make_export: Callable[..., Path], device: str) -> None:
    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has no {PROVIDERS[device]}")
    # Other classes than the graph's own: they must come from the file beside it.
    rows = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1], [0.6, 0, 0.8]], np.float32)
    export = make_export(classifier=rows, classes=("green", "red", "blue", "violet"))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    with OnnxSession.open(export) as cpu, OnnxSession.open(export, device) as session:
        assert session.device.partition(":")[0] == device
        for count in (5, 1):
            found, wanted = session.predict(pixels[:count]), cpu.predict(pixels[:count])
            np.testing.assert_array_equal(found.mask, wanted.mask)
            np.testing.assert_array_equal(found.complete, wanted.complete)
            for name in ("cls", "fg", "logits", "attention"):
                one, other = getattr(found, name), getattr(wanted, name)
                assert one.dtype == np.float32
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4, err_msg=name)
