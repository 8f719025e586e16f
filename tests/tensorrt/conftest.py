"""TensorRT's bindings in every version that the product supports, fetched once."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.tensorrt.bindings import VERSIONS, Unavailable, bindings

BindingsOf = Callable[[str], Path]


@pytest.fixture(scope="session")
def bindings_of(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> BindingsOf:
    """Return a function that gives a version's folder, or skips the test and says why."""
    kept = request.config.cache
    name = "tensorrt-bindings"
    directory = tmp_path_factory.mktemp(name) if kept is None else kept.mkdir(name)

    @cache
    def fetched(version: str) -> Path | str:
        try:
            return bindings(version, directory)
        except Unavailable as error:
            return str(error)

    def of(version: str) -> Path:
        folder = fetched(version)
        return folder if isinstance(folder, Path) else pytest.skip(folder)

    return of


@pytest.fixture(scope="session", params=VERSIONS)
def trt_folder(request: pytest.FixtureRequest, bindings_of: BindingsOf) -> Path:
    """Return what to put on PYTHONPATH, for each version."""
    return bindings_of(request.param)
