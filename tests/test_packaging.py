"""The wheel holds one top-level package, and nothing in the tree is forgotten."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
LINKED = ("bench", "export")


def test_every_package_directory_is_listed() -> None:
    found = {"microclip_deploy"}
    for top in ("microclip_deploy", *LINKED):
        prefix = "" if top == "microclip_deploy" else "microclip_deploy."
        for init in (ROOT / top).rglob("__init__.py"):
            if not any(part in LINKED for part in init.parent.relative_to(ROOT).parts[1:]):
                found.add(prefix + ".".join(init.parent.relative_to(ROOT).parts))
    assert sorted(found) == SETUPTOOLS["packages"]


@pytest.mark.parametrize("name", LINKED)
def test_link_points_to_the_mapped_directory(name: str) -> None:
    link = ROOT / "microclip_deploy" / name
    if link.is_file() and not link.is_symlink():
        pytest.skip("this checkout has no symbolic links; the setuptools mapping still works")
    assert link.is_symlink(), f"{link} was replaced by a copy; restore it with git checkout"
    assert link.resolve() == ROOT / SETUPTOOLS["package-dir"][f"microclip_deploy.{name}"]


@pytest.mark.slow
def test_wheel_holds_one_package_with_its_data(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "-q", "--wheel", "-o", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"microclip_deploy"}
    wanted = (
        "py.typed",
        "evaluation/report.html.j2",
        "server/page/index.html",
        "server/page/page.css",
        "server/page/page.js",
        "recipes/microclip.toml",
        "recipes/demo.toml",
        "recipes/demo-objects.toml",
        "demo/letters/model/open_clip_model.safetensors",
        "demo/letters/model/open_clip_config.json",
        "demo/objects/model/open_clip_model.safetensors",
        "demo/objects/drawings/twemoji.png",
        "demo/objects/drawings/ATTRIBUTION.md",
        "ncut/steps.py",
        "cuda/ncut.cu",
        "cuda/affinity.cu",
        "cuda/soap.cu",
        "cuda/product.cu",
        "cuda/token.cuh",
        "bench/latency/page.html.j2",
        "bench/latency/run.py",
        "export/__init__.py",
        "export/triton/README.md",
        "export/triton/kserve.yaml",
        "export/triton/model.py",
        "export/triton/python.pbtxt",
    )
    assert {f"microclip_deploy/{path}" for path in wanted} <= set(names)
