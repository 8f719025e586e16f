"""The recipes of docs/bulk.md, run as they are there, with a worker killed on the way."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pa = pytest.importorskip("pyarrow", reason="needs the extra parquet")

import pyarrow.parquet as pq  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "bulk.md").read_text("utf-8"), re.S)
CLUSTER = "import ray\nray.init(num_cpus=3, include_dashboard=False)\n"
ALIVE = "from microclip_deploy.bulk import Classifier\n"
DYING = """
import os, signal
from microclip_deploy.bulk import Classifier as Lasting

class Classifier(Lasting):
    calls = 0

    def __call__(self, table):
        self.calls += 1
        if self.calls == 2 and os.environ["KILL"]:
            try:
                os.close(os.open(os.environ["KILL"], os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                pass  # it died before
        return super().__call__(table)
"""


def recipe(engine: str) -> str:
    """Return the code of an engine, with tables of three photos."""
    code: str
    [code] = [block for block in BLOCKS if f"import {engine}\n" in block]
    return code.replace("batch_size=512", "batch_size=3")


def run(code: str, folder: Path, export: Path, photos: Path, kill: str) -> list[dict[str, object]]:
    """Run a recipe in a folder of its own; return the rows that it wrote."""
    (folder / "exports").mkdir()
    (folder / "exports" / "birds").symlink_to(export)
    (folder / "photos").mkdir()
    names = [str(path) for path in sorted(photos.rglob("*.png"))]
    for first in range(0, 24, 3):
        table = pa.table({"key": range(first, first + 3), "path": names[first : first + 3]})
        pq.write_table(table, folder / "photos" / f"{first}.parquet")
    (folder / "dying.py").write_text(DYING)
    settings = {
        "KILL": kill,
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "RAY_AUTH_MODE": "disabled",
        "RAY_local_fs_capacity_threshold": "0.999",  # a test needs none of it
    }
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **settings},
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return list(pq.read_table(folder / "answers").to_pylist()) if "answers/" in code else []


def assert_each_once(rows: list[dict[str, object]]) -> None:
    assert sorted(row["key"] for row in rows) == list(range(24))  # type: ignore[type-var]
    assert all(row["error"] is None and row["classes"] for row in rows)


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def test_one_function(tiny_export: Path, photos: Path, tmp_path: Path) -> None:
    run(recipe("pyarrow.parquet as pq"), tmp_path, tiny_export, photos, "")
    assert_each_once(pq.read_table(tmp_path / "answers.parquet").to_pylist())


@pytest.mark.slow
@needs("ray", "pandas")
def test_ray_data_survives_a_killed_worker(tiny_export: Path, photos: Path, tmp_path: Path) -> None:
    code = CLUSTER + recipe("ray").replace(ALIVE, "from dying import Classifier\n")
    assert_each_once(run(code, tmp_path, tiny_export, photos, str(tmp_path / "killed")))
    assert (tmp_path / "killed").exists()


@pytest.mark.slow
@needs("daft", "ray")
def test_daft_on_ray_survives_a_killed_worker(
    tiny_export: Path, photos: Path, tmp_path: Path
) -> None:
    code = CLUSTER + recipe("daft").replace(ALIVE, "from dying import Classifier\n")
    assert_each_once(run(code, tmp_path, tiny_export, photos, str(tmp_path / "killed")))
    assert (tmp_path / "killed").exists()


@pytest.mark.slow
@needs("daft")
def test_daft_alone(tiny_export: Path, photos: Path, tmp_path: Path) -> None:
    code = re.sub(r"daft\.set_runner_ray\(\).*\n", "", recipe("daft"))
    assert_each_once(run(code, tmp_path, tiny_export, photos, ""))
