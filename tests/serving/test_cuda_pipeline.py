"""The device's part of a CUDA session, as far as it shows without a device."""

from contextlib import nullcontext
from unittest.mock import Mock, call

import pytest

pytest.importorskip("cupy")

from microclip_deploy.serving.cuda_pipeline import CudaPipeline


def test_the_encoder_goes_only_after_what_is_on_the_stream() -> None:
    """ONNX Runtime's callbacks hold pinned memory; who holds it last frees it, and they may not."""
    device = Mock()
    pipeline = CudaPipeline.__new__(CudaPipeline)
    pipeline.stream, pipeline.encoder = device.stream, device.encoder
    pipeline._kernels = pipeline._fusion = Mock()
    pipeline._pool, pipeline._pinned, pipeline._buckets = Mock(), Mock(), device.buckets
    pipeline.current = nullcontext  # type: ignore[assignment, method-assign]
    pipeline.close()
    assert device.mock_calls == [
        call.stream.synchronize(),
        call.buckets.clear(),
        call.encoder.close(),
    ]
