"""The conformance suite over every kind of place that is tested here."""

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from mmc.store.testing import CHECKS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("place", ["local", "file://", "memory://"])
def test_promise_holds(check: Callable[[str], None], place: str, tmp_path: Path) -> None:
    local = f"{tmp_path}/some/where"
    paths = {
        "local": local,
        "file://": f"file://{local}",
        "memory://": f"memory://{uuid.uuid4()}/store",
    }
    check(paths[place])
