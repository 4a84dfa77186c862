"""The command line as a user has it: in this process for speed, in its own where that matters."""

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_open_clip

LABELS = ("bright", "dark blue", "red")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a failed command."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def mmc(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Run ``mmc ARGS`` in this process."""
    from mmc.cli import main

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["mmc", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        code = stop.value.code
        return Result(0 if code is None else int(code), out, err)

    return run


def write_table(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def make_set(folder: Path) -> Path:
    """60 + 20 + 20 small pictures, each with up to three labels that picture and caption tell."""
    (folder / "images").mkdir(parents=True)
    draw = np.random.default_rng(0)
    number = 0
    for split, count in (("train", 60), ("val", 20), ("test", 20)):
        rows = [["id", "image", "caption", "labels", "comment"]]
        for _ in range(count):
            red, blue, bright = draw.integers(0, 2, 3)
            pixels = draw.integers(0, 60, (40, 50, 3))
            pixels[..., 0] += 150 * red
            pixels[..., 2] += 60 * blue
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number}.jpg")
            names = [n for n, on in zip(LABELS, (bright, blue, red), strict=True) if on]
            caption = "a bright day, outside" if bright else "a day\nlike others"
            rows.append([f"s{number}", f"{number}.jpg", caption, "|".join(names), "kept"])
            number += 1
        write_table(folder / f"{split}.csv", rows)
    return folder


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Write a table of rows into the test's folder."""
    return lambda name, *rows: write_table(tmp_path / name, [list(row) for row in rows])


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("set") / "set")


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_open_clip(tmp_path_factory.mktemp("backbone") / "tiny")


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, dataset: Path, backbone: str
) -> tuple[Path, Path]:
    """A filled store and a run on it, made by the command line itself; read only."""
    from mmc.cli import app

    folder = tmp_path_factory.mktemp("trained")
    store, run = folder / "a.store", folder / "a.run"
    app(
        ["extract", str(dataset), str(store), "--backbone", backbone, "--name", "clip"],
        standalone_mode=False,
    )
    app(["train-head", str(store), str(run), "--head", "linear"], standalone_mode=False)
    return store, run
