"""What ships: the package list equals the tree, and no fetched host or pickle slips in."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages_in_tree() -> set[str]:
    found = {"mmc"}
    for top in ("extract", "heads", "store"):
        for folder in [ROOT / top, *(ROOT / top).rglob("*")]:
            if folder.is_dir() and any(folder.glob("*.py")):
                found.add("mmc." + ".".join(folder.relative_to(ROOT).parts))
    return found


def test_package_list_equals_the_tree():
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_in_tree()


def test_every_package_has_an_init():
    for package in packages_in_tree() - {"mmc"}:
        assert (ROOT.joinpath(*package.split(".")[1:]) / "__init__.py").is_file(), package


def test_only_the_command_line_lies_at_the_root():
    assert {path.name for path in ROOT.glob("*.py")} == {"cli.py"}


def test_requirements_that_the_constraints_pin():
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    names = {re.split(r"[><=!; \[]", item)[0].lower().replace("_", "-") for item in wanted}
    assert names - pinned <= {"faiss-cpu"}  # the other half of a platform choice


def test_constraints_hold_no_addresses():
    assert "://" not in (ROOT / "constraints.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "module",
    [
        "mmc.cli",
        "mmc.store",
        "mmc.extract.backbones",
        "mmc.extract.sources",
        "mmc.extract.pretraining.options",
        "mmc.extract.pretraining.reading",
        "mmc.extract.tuning.options",
    ],
)
def test_light_modules_import_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("module", ["mmc.heads.models", "mmc.heads.losses"])
def test_head_and_loss_tables_import_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_pickle_in_the_code():
    """Nothing that a user may receive from someone else is unpickled."""
    for top in ("extract", "heads", "store"):
        for path in (ROOT / top).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"^\s*(import|from) (c?[pP]ickle|dill|joblib)\b", text, re.M), path
            for call in re.findall(r"torch\.load\([^)]*\)", text, re.S):
                assert "weights_only=True" in call, path
