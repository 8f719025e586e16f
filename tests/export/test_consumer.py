"""The example of docs/export.md: predictions from full.onnx alone, without this package."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from microclip_deploy.data.decode import read_image
from microclip_deploy.serving import open_session

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text("utf-8")
(EXAMPLE,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
MODEL, PHOTO = (Path(path) for path in re.findall(r'"([\w/]+\.(?:onnx|jpg))"', EXAMPLE))

ONLY = ("onnxruntime", "numpy", "PIL", "flatbuffers", "google", "packaging")
"""What the example may import; the last three are ONNX Runtime's own."""

HARNESS = """\
import contextlib, io, json, shutil, sys

class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, *ONLY}:
            raise ModuleNotFoundError(f"refused: {name}", name=name)

ONLY, code, target, *photos = json.loads(sys.argv[1])
sys.meta_path.insert(0, Refusal())
for photo in photos:
    shutil.copy(photo, target)
    space, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, space)
    print(json.dumps([printed.getvalue(), space["logits"][0].tolist()]))
for name in ("torch", "onnx", "microclip_deploy", "pydantic", "safetensors"):
    with contextlib.suppress(ModuleNotFoundError):
        __import__(name)
        print("imported", name)
"""
"""Runs the example for several photos where nothing else can be imported."""


@pytest.fixture(scope="module")
def portraits(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return photos of awkward sizes and modes."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("portraits")
    paths = []
    for width, height in ((33, 32), (32, 33), (101, 67), (67, 101), (640, 97), (31, 31), (40, 48)):
        corners = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        photo = Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)
        paths.append(folder / f"{width}x{height}.png")
        photo.save(paths[-1])
    grey = np.asarray(photo.convert("L"))
    clear = photo.copy()
    clear.putalpha(Image.fromarray(grey))
    for name, odd in (
        ("grey", photo.convert("L")),
        ("deep", Image.fromarray(grey.astype(np.uint16) * 257)),
        ("clear", clear),
    ):
        paths.append(folder / f"{name}.png")
        odd.save(paths[-1])
    return paths


SETTINGS: tuple[dict[str, object], ...] = (
    {},
    {"resize_mode": "squash", "interpolation": "bilinear"},
    {"resize_mode": "longest", "fill_color": 90},
)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_example_makes_our_predictions_without_this_package(
    settings: dict[str, object], tiny_export: Path, portraits: list[Path], tmp_path: Path
) -> None:
    for path in (MODEL, PHOTO):
        (tmp_path / path).parent.mkdir(parents=True)
    graph = onnx.load(tiny_export / MODEL.name)
    (stored,) = (each for each in graph.metadata_props if each.key == "preprocess")
    stored.value = json.dumps({**json.loads(stored.value), **settings})
    onnx.save(graph, tmp_path / MODEL)
    arguments = json.dumps([ONLY, EXAMPLE, str(PHOTO), *map(str, portraits)])
    call = [sys.executable, "-I", "-W", "error", "-c", HARNESS, arguments]
    told = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    found = [json.loads(line) for line in told.stdout.splitlines()]
    assert len(found) == len(portraits)
    with open_session(tiny_export) as session:
        preprocess = session.preprocess.model_copy(update=settings)
        views = [preprocess.test_view(read_image(path)) for path in portraits]
        expected = session.predict(np.stack(views)).logits
        names = [session.classes[best] for best in expected.argmax(axis=1)]
    assert [name for name, _ in found] == [f"{name}\n" for name in names]
    np.testing.assert_allclose([logits for _, logits in found], expected, atol=2e-5)
    assert len(set(names)) > 1
