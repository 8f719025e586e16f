"""TensorRT where it has a GPU, otherwise TensorRT for RTX."""

import importlib.util

import pytest

from microclip_deploy.serving import flavour
from microclip_deploy.serving.flavour import MODULES, RTX, TENSORRT, Flavour, flavour_here


@pytest.mark.parametrize(
    ("installed", "devices", "used"),
    [
        ([], 1, None),
        ([TENSORRT], 0, TENSORRT),  # who builds says that the GPU is missing
        ([TENSORRT], 1, TENSORRT),
        ([RTX], 0, RTX),
        ([RTX], 1, RTX),
        ([TENSORRT, RTX], 0, RTX),
        ([TENSORRT, RTX], 2, TENSORRT),
    ],
)
def test_a_process_has_one_library(
    monkeypatch: pytest.MonkeyPatch, installed: list[Flavour], devices: int, used: Flavour | None
) -> None:
    found = [MODULES[each] for each in installed]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in found else None)
    monkeypatch.setattr(flavour, "devices", lambda: devices)
    assert flavour_here() == used
