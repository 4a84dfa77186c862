"""Shared fixtures. Nothing here imports mmc: tests do, by that name only."""

import os
import sys
from pathlib import Path

import pytest

# Tests never reach a hub; set before any library reads it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real sets beside the project; tests that use it skip where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of real sets is not there")
    return folder


@pytest.fixture(autouse=True)
def skip_gpu(request: pytest.FixtureRequest) -> None:
    """Skip what is marked ``gpu`` on a machine without one."""
    if request.node.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The root is a package: one module under two names would make two classes of each class."""
    twice = {"store", "extract", "heads", "cli"} & set(sys.modules)
    if twice:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nimported without the mmc prefix: {sorted(twice)}", file=sys.stderr)
