"""One folder of compiled kernels for all workers of a test run."""

import os

import pytest

from tests.cuda import kernels_on_cpu


@pytest.fixture(scope="session", autouse=True)
def _one_folder_of_builds(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of the run
    kernels_on_cpu.builds = folder / "kernels"
    kernels_on_cpu.builds.mkdir(exist_ok=True)
