"""A prediction lies in one block without gaps that matter, and no part touches another."""

import numpy as np
import pytest

from microclip_deploy.serving.answer_block import Sizes, block_bytes, block_views

SIZES = Sizes(tokens=49, joint=33, classes=5)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_fields_have_their_shapes_and_keep_what_is_written(batch: int) -> None:
    block = np.zeros(block_bytes(batch, SIZES), np.uint8)
    views = block_views(block, batch, SIZES)
    shapes = [field.shape for field in views]
    assert shapes == [(batch, 33), (batch, 33), (batch, 5), (batch, 49), (batch, 50), (batch,)]
    assert {views.mask.dtype, views.complete.dtype} == {np.dtype(np.bool_)}
    assert {views.cls.dtype, views.fg.dtype, views.logits.dtype} == {np.dtype(np.float32)}
    for number, field in enumerate(views):
        field[...] = number % 2 if field.dtype == np.bool_ else number + 0.5
    for number, field in enumerate(block_views(block, batch, SIZES)):
        assert (field == (number % 2 if field.dtype == np.bool_ else number + 0.5)).all()


def test_fields_are_aligned_for_vector_reads() -> None:
    block = np.zeros(block_bytes(3, SIZES), np.uint8)
    starts = [field.ctypes.data - block.ctypes.data for field in block_views(block, 3, SIZES)]
    assert starts == sorted(set(starts))
    assert not any(start % 256 for start in starts)
