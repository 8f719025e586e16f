"""A small audit whose truth is known."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from microclip_deploy.audit.clicks import Sheet
from microclip_deploy.audit.plan import Plan
from tests.audit.made import made_plan


@pytest.fixture
def plan() -> Plan:
    return made_plan()


@pytest.fixture
def sheet(plan: Plan, tmp_path: Path) -> Sheet:
    made = Sheet(tmp_path, plan)
    made.begin(again=False)
    return made


@pytest.fixture
def album(plan: Plan, tmp_path: Path) -> Path:
    """Return a folder with the photos of the plan, each of another grey."""
    root = tmp_path / "album"
    root.mkdir()
    names = [row.path for row in plan.drawn] + [p for some in plan.examples.values() for p in some]
    for number, name in enumerate(names):
        Image.fromarray(np.full((60, 80, 3), number, np.uint8)).save(root / name)
    return root
