"""Light entry points stay light, and --help works without any extra."""

import subprocess
import sys

import pytest

HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "open_clip",
    "matplotlib",
    "jinja2",
    "onnx",
    "onnxruntime",
    "cupy",
    "tensorrt",
}
LIGHT = [
    "microclip_deploy",
    "microclip_deploy.cli.main",
    "microclip_deploy.cli.commands",
    "microclip_deploy.evaluation.evaluate",
    "microclip_deploy.serving.exported",
    "microclip_deploy.adapt.log",
    "microclip_deploy.evaluation.predict",
    "microclip_deploy.ncut.spec",
    "microclip_deploy.serving",
    "microclip_deploy.serving.cuda_session",
    "microclip_deploy.data.sources",
    "microclip_deploy.data.classes",
    "microclip_deploy.ncut.steps",
    "microclip_deploy.cli.doctor",
]


def run(code: str) -> str:
    return subprocess.check_output([sys.executable, "-c", code], text=True).strip()


@pytest.mark.parametrize("module", LIGHT)
def test_import_is_light(module: str) -> None:
    assert run(f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))") == ""


@pytest.mark.parametrize("module", ["onnx_graph", "onnx_session"])
def test_an_export_is_served_by_onnxruntime_alone(module: str) -> None:
    name = f"microclip_deploy.serving.{module}"
    assert run(f"import sys, {name}; print(*sorted({HEAVY!r} & set(sys.modules)))") == "onnxruntime"


def test_a_missing_extra_is_named_with_its_install_line() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from microclip_deploy.cli.main import main\n"
        "sys.exit(main(['adapt', 'x', '--classes', 'y', '-o', 'z']))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert found.returncode == 4
    assert 'pip install "microclip-deploy[adapt]"' in found.stderr
