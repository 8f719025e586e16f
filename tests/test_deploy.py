"""What deploy/ installs is what the README says."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_image_and_the_unit_install_the_readmes_line() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    [extras] = re.findall(r'pip install "\.\[([a-z,]*serve)\]"', readme)
    dockerfile = (ROOT / "deploy/Dockerfile").read_text("utf-8")
    assert f"ARG EXTRAS={extras}\n" in dockerfile
    assert 'RUN pip install ".[${EXTRAS}]"\n' in dockerfile
    assert f'pip install ".[{extras}]"' in (ROOT / "deploy/microclip-serve.service").read_text(
        "utf-8"
    )
