"""The conformance suite over every kind of place that is tested here."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from mmc.store.testing import CHECKS


class Mounted(LocalFileSystem):
    """A folder behind the interface of object stores: other errors, times and listings."""

    protocol = "mounted"

    def __init__(self, **settings: Any) -> None:
        super().__init__(auto_mkdir=True, **settings)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = LocalFileSystem._strip_protocol(path.removeprefix("mounted://"))
        return stripped


fsspec.register_implementation("mounted", Mounted)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("place", ["local", "file://", "mounted://", "memory://"])
def test_promise_holds(check: Callable[[str], None], place: str, tmp_path: Path) -> None:
    local = f"{tmp_path}/some where/größe #1"
    paths = {
        "local": local,
        "file://": f"file://{local}/",
        "mounted://": f"mounted://{local}",
        "memory://": f"memory://{uuid.uuid4()}/the store/",
    }
    check(paths[place])
