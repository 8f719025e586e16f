"""Light entry points stay light, and --help works without any extra."""

import json
import subprocess
import sys

HEAVY = (
    "torch torchvision timm open_clip matplotlib jinja2 onnx onnxruntime cupy tensorrt "
    "openai httpx2"
)
LIGHT = [
    "microclip_deploy",
    "microclip_deploy.cli.main",
    "microclip_deploy.cli.commands",
    "microclip_deploy.cli.doctor",
    "microclip_deploy.adapt.log",
    "microclip_deploy.data.classes",
    "microclip_deploy.data.sources",
    "microclip_deploy.evaluation.evaluate",
    "microclip_deploy.evaluation.predict",
    "microclip_deploy.ncut.spec",
    "microclip_deploy.ncut.steps",
    "microclip_deploy.serving",
    "microclip_deploy.serving.cuda_session",
    "microclip_deploy.serving.exported",
]
LOADED = """
import importlib, json, sys
heavy, *modules = map(str.split, sys.argv[1:])
found = {}
for (name,) in modules:
    importlib.import_module(name)
    found[name] = sorted(set(heavy) & set(sys.modules))
print(json.dumps(found))
"""


def loaded_by(*modules: str) -> dict[str, list[str]]:
    """Return the heavy libraries that are loaded after each import, all made in one process."""
    call = [sys.executable, "-c", LOADED, HEAVY, *modules]
    return dict(json.loads(subprocess.check_output(call, text=True)))


def test_imports_are_light() -> None:
    assert loaded_by(*LIGHT) == {name: [] for name in LIGHT}


def test_an_export_is_served_by_onnxruntime_alone() -> None:
    names = [f"microclip_deploy.serving.{name}" for name in ("onnx_graph", "onnx_session")]
    assert loaded_by(*names) == {name: ["onnxruntime"] for name in names}


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
