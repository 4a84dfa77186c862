"""docs/python.md and the README's Python: their blocks run as they are printed there."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def my_store(make_store: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``my.store`` in the working directory."""
    make_store(n=240, name="my.store", failed=(), unlabelled=())
    monkeypatch.chdir(tmp_path)


def quick(code: str) -> str:
    """The code, with trainings of five epochs."""
    return code.replace("HeadClassifier(", "HeadClassifier(epochs=5, head=").replace(
        "TrainConfig(", "TrainConfig(epochs=5, "
    )


@pytest.mark.usefixtures("my_store")
@pytest.mark.parametrize("page", ["docs/python.md", "README.md"])
def test_the_blocks_of_a_page_run_in_their_order(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    if page == "README.md":
        text = text.split("## From Python\n")[1].split("\n## ")[0]
    blocks = BLOCK.findall(text)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(quick(block), page, "exec"), names)
    assert Path("sk.run", "run.json").exists()
