"""Tests that take a while run where somebody has the time."""

import os

import pytest

SECONDS = float(os.environ.get("MICROCLIP_FAULT_SECONDS", "2"))
"""How long a load lasts."""

lasting = pytest.mark.skipif(
    "MICROCLIP_FAULT_SECONDS" not in os.environ,
    reason="takes a while: set MICROCLIP_FAULT_SECONDS, the seconds of a load, such as 60",
)
