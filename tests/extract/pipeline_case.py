"""A small source, and extraction into a store beside it; what the tests of the pipeline share."""

import csv
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from counting_backbone import CALLS
from PIL import Image

from mmc.extract import jobs
from mmc.extract.options import ExtractConfig, ExtractReport
from mmc.extract.pipeline import extract
from mmc.extract.sources import SourceOptions

SPEC = "python:counting_backbone:Counting"
HEADER = ("id", "image", "text", "labels", "split")


@dataclass
class Case:
    """A folder with a table, pictures and stores."""

    folder: Path
    rows: list[dict[str, str]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    @property
    def table(self) -> Path:
        return self.folder / "samples.csv"

    def add(self, count: int, **columns: str) -> None:
        """Append samples, each with its own picture and text unless ``columns`` says otherwise."""
        for _ in range(count):
            name = f"s{len(self.rows)}"
            row = {
                "id": name,
                "image": f"{name}.png",
                "text": f"number {name} " + "x" * (len(self.rows) * 5 % 17),
                "labels": ("cat", "dog")[len(self.rows) % 2],
                "split": "train",
            }
            row.update(columns)
            self.rows.append(row)
            path = self.folder / row["image"]
            if row["image"] and not path.exists():
                picture(path, seed=len(self.rows))

    def write(self) -> None:
        with self.table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, HEADER)
            writer.writeheader()
            writer.writerows(self.rows)

    def extract(self, store: str = "store", **settings: object) -> ExtractReport:
        """Extract with small batches and shards; what is said and called is kept for this call."""
        CALLS.clear()
        self.said.clear()
        self.write()
        progress = settings.pop("progress", lambda *_: None)
        return extract(
            str(self.table),
            str(self.folder / store),
            config(**settings),
            report=self.said.append,
            progress=progress,  # type: ignore[arg-type]
        )

    def files(self, store: str = "store") -> dict[str, bytes]:
        """Every file below the features of a store, with its bytes."""
        root = self.folder / store / "features"
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file() and ".lock" not in path.name
        }


def config(**settings: object) -> ExtractConfig:
    """Two threads, batches of 4 images (8 texts), shards of 16 rows, on the CPU."""
    defaults: dict[str, object] = {
        "backbones": (SPEC,),
        "names": ("fake",),
        "batch_size": 4,
        "precision": "float32",
        "device": "cpu",
        "workers": 2,
        "shard_rows": 16,
        "source": SourceOptions(label_column="labels", text_column="text", image_column="image"),
    }
    return ExtractConfig(**{**defaults, **settings})  # type: ignore[arg-type]


def picture(path: Path, seed: int, size: tuple[int, int] = (24, 20)) -> None:
    """Save a picture of two halves in colours of their own."""
    left, right = np.random.default_rng(seed).integers(0, 256, (2, 3))
    pixels = np.empty((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2], pixels[:, size[0] // 2 :] = left, right
    Image.fromarray(pixels).save(path)


def watch_decoding(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[bytes]]:
    """Lists that grow with each row that is read and with each picture that is decoded."""
    reads: list[int] = []
    decodes: list[bytes] = []
    read, decode = jobs.Content.image_bytes, jobs.decode_rgb

    def reading(self: jobs.Content, row: int) -> bytes:
        reads.append(row)
        return read(self, row)

    def decoding(data: bytes, **limits: int) -> object:
        decodes.append(data)
        return decode(data, **limits)

    monkeypatch.setattr(jobs.Content, "image_bytes", reading)
    monkeypatch.setattr(jobs, "decode_rgb", decoding)
    return reads, decodes
