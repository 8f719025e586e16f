"""The product against both TensorRT versions: it passes, and every planted mistake is caught."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.tensorrt.api import Api
from tests.tensorrt.bindings import VERSIONS, run, run_cases
from tests.tensorrt.conftest import BindingsOf
from tests.tensorrt.mistakes import BUILD, ENCODER, MISTAKES, ROOT, RUN, Mistake, source_of
from tests.tensorrt.usage import check

HERE = Path(__file__).parent


def test_the_product_runs_on_every_version(trt_folder: Path) -> None:
    run_cases(trt_folder, HERE / "engine_cases.py")


def test_the_product_uses_names_that_every_version_has(apis: list[Api]) -> None:
    assert check([ROOT / name for name in (BUILD, RUN, ENCODER)], apis) == []


@pytest.mark.slow
def test_planted_mistakes_are_caught(
    bindings_of: BindingsOf, apis: list[Api], tmp_path: Path
) -> None:
    folders = [bindings_of(version) for version in VERSIONS]
    with ThreadPoolExecutor(len(folders)) as pool:
        told = pool.map(lambda folder: run(folder, "-m", "tests.tensorrt.mistakes"), folders)
        unnoticed = [set(json.loads(text.splitlines()[-1])) for text in told]
    # A slip that one version takes for right is caught by the other.
    left = [MISTAKES[number] for number in sorted(set.intersection(*unnoticed))]
    assert [mistake for mistake in left if not _is_seen(mistake, apis, tmp_path)] == []


def _is_seen(mistake: Mistake, apis: Iterable[Api], folder: Path) -> bool:
    """Say whether the static check sees a mistake."""
    path = folder / "mistaken.py"
    path.write_text(source_of(mistake))
    return bool(check([path], list(apis)))
