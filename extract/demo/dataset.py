"""The demo's set: labels that only picture and caption together tell, in Kaggle's form."""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from mmc.extract.demo import pictures, words

SIZES: Mapping[str, int] = {"train": 2000, "val": 400, "test": 600}
"""Samples of each split."""
HEADER = ("ImageID", "Labels", "Caption")
_MOST_NAMED = 3
_BLOCK = 200  # pictures drawn at once


def make_dataset(directory: Path, *, seed: int, sizes: Mapping[str, int] = SIZES) -> None:
    """Write ``train.csv``, ``val.csv``, ``test.csv`` and the pictures under ``data/``.

    A picture shows one to three digits, its caption names one to three others, and the labels are
    all of them, as number words in the order of their value. A split's pictures are drawn from its
    own scans. The same seed gives the same files.
    """
    (directory / "data").mkdir(parents=True, exist_ok=True)
    scans = pictures.load_scans()
    pools = pictures.split_scans(scans, seed)
    number = 0
    for salt, (split, size) in enumerate(sizes.items()):
        rng = np.random.default_rng([seed, 2, salt])
        rows = []
        for start in range(0, size, _BLOCK):
            shown, named = _digits(min(_BLOCK, size - start), rng)
            chosen = pictures.choose_scans(pools[split], shown, rng)
            for picture, seen, told in zip(
                pictures.draw(scans, chosen, rng), shown, named, strict=True
            ):
                name = f"{number:04d}.jpg"
                number += 1
                image = Image.fromarray(picture.permute(1, 2, 0).numpy())
                image.save(directory / "data" / name, quality=92)
                told = told[told >= 0]
                labels = sorted({*seen[seen >= 0].tolist(), *told.tolist()})
                text = words.caption(told, words.NOTES, rng)
                rows.append((name, " ".join(words.NUMBER_WORDS[d] for d in labels), text))
        with (directory / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([HEADER, *rows])


def _digits(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Digits shown and digits named, (count, 3) int64 each, -1 = none; none is in both."""
    order = rng.random((count, 10)).argsort(1)
    parts = []
    for first, most in ((0, pictures.MAX_DIGITS), (pictures.MAX_DIGITS, _MOST_NAMED)):
        used = np.arange(most) < rng.integers(1, most + 1, (count, 1))
        parts.append(np.where(used, order[:, first : first + most], -1))
    return parts[0], parts[1]
