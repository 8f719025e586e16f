"""A model and photos for bulk inference."""

import shutil
from pathlib import Path

import pytest

from microclip_deploy.serving import Session, open_session


@pytest.fixture(scope="session")
def session(tiny_export: Path) -> Session:
    return open_session(tiny_export, threads=1)


@pytest.fixture
def mixed(photos: Path, tmp_path: Path) -> Path:
    """Return a folder of seven photos, of which the third is empty and the last is text."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number in range(7):
        shutil.copy(photos / "red circle" / f"{number:02d}.png", folder / f"{number}.png")
    (folder / "2.png").write_bytes(b"")
    (folder / "6.png").write_text("no picture")
    return folder
