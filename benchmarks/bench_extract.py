"""Extraction, files to store, against the bare forward pass and against a loop written by hand.

    python benchmarks/bench_extract.py [--images 256] [--rounds 5] [--workers N] [--precision bf16]

Everything runs interleaved in one process, on pictures and texts made here and a ViT-B-32 with
random weights (no network). Per round: the probe of effective cores, the bare forward rate on
ready tensors with as many threads as workers, `mmc extract` into a new store, and the loop that
one writes first (Pillow, open_clip's transform, float32, batches of 32, torch's own threads).
Reported: medians [min-max], and ratios of the same round. Judge only rounds with a probe near the
number of cores. Writing the weights, loading and compiling are not counted anywhere.
"""

import os

# Before torch is imported: idle threads of one loop must not spin in the time of the next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import json
import logging
import shutil
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

from mmc.extract import pipeline
from mmc.extract.backbones import load_backbone
from mmc.extract.backbones.base import Backbone, default_precision
from mmc.extract.options import ExtractConfig, ExtractReport
from mmc.extract.settings import TEXTS_PER_IMAGE, usable_cores
from mmc.extract.sources import SourceOptions

MODEL = "ViT-B-32"
BATCH = 16
WORDS = (
    *("a", "the", "two", "red", "small", "large", "old", "young", "dog", "cat", "horse", "car"),
    *("tree", "house", "man", "child", "street", "runs", "sits", "stands", "under", "on", "in"),
)


def make_set(folder: Path, count: int, seed: int = 0) -> Path:
    """A table of JPEGs 500 x 375: shapes, gradients and grain, about 50 kB each."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:375, 0:500].astype(np.float32)
    lines = ["id,image"]
    for number in range(count):
        scene = np.zeros((375, 500, 3), np.float32)
        for _ in range(12):
            fx, fy = generator.uniform(0.002, 0.06, 2)
            wave = np.sin(fx * x + fy * y + generator.uniform(0, 6))
            scene += wave[..., None] * generator.uniform(-25, 25, 3).astype(np.float32)
        for _ in range(6):
            cx, cy, r = (
                generator.uniform(0, 500),
                generator.uniform(0, 375),
                generator.uniform(20, 90),
            )
            inside = (x - cx) ** 2 + (y - cy) ** 2 < r * r
            scene[inside] += generator.uniform(-80, 80, 3).astype(np.float32)
        scene += generator.normal(0, 6, scene.shape).astype(np.float32) + 128
        pixels = scene.clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=88)
        lines.append(f"{number},{number}.jpg")
    table = folder / "samples.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def make_captions(table: Path, count: int, seed: int = 0) -> list[str]:
    """A table of captions of 6 to 12 words, and the captions."""
    generator = np.random.default_rng(seed)
    captions = [" ".join(generator.choice(WORDS, generator.integers(6, 13))) for _ in range(count)]
    lines = [f"{number},{caption}" for number, caption in enumerate(captions)]
    table.write_text("\n".join(["id,text", *lines]) + "\n", encoding="utf-8")
    return captions


def save_weights(folder: Path) -> str:
    """A ViT-B-32 with random weights on disk; its spec."""
    torch.manual_seed(0)
    model = open_clip.create_model(MODEL, pretrained=None)
    path = folder / "weights.pt"
    torch.save(model.state_dict(), path)
    return f"open_clip:{MODEL}/{path}"


def probe() -> float:
    """Effective cores: how much faster all cores do the same work in threads than one."""
    cores = usable_cores()
    a = torch.randn(512, 512)

    def work() -> None:
        torch.set_num_threads(1)
        for _ in range(60):
            a @ a

    start = time.perf_counter()
    in_threads(work, 1)
    one = time.perf_counter() - start
    start = time.perf_counter()
    in_threads(work, cores)
    return cores * one / (time.perf_counter() - start)


def in_threads(work: Callable[[], None], count: int) -> None:
    """Run ``work`` in ``count`` threads at once."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def bare(forwards: Sequence[Callable[[], object]], workers: int) -> float:
    """Batches per second of ready forward passes, in threads with one arithmetic thread each."""
    left = deque(forwards)

    def work() -> None:
        torch.set_num_threads(1)
        with torch.no_grad(), suppress(IndexError):
            while True:
                left.pop()()

    start = time.perf_counter()
    in_threads(work, workers)
    return len(forwards) / (time.perf_counter() - start)


def by_hand(model: open_clip.CLIP, transform: Callable, folder: Path, count: int) -> float:
    """Images per second of the loop one writes first."""
    start = time.perf_counter()
    features = []
    with torch.no_grad():
        for first in range(0, count, 32):
            images = [
                transform(Image.open(folder / f"{number}.jpg").convert("RGB"))
                for number in range(first, min(first + 32, count))
            ]
            features.append(model.encode_image(torch.stack(images)).numpy())
    np.save(folder / "by_hand.npy", np.concatenate(features))
    return count / (time.perf_counter() - start)


def texts_by_hand(model: open_clip.CLIP, captions: list[str]) -> float:
    """Texts per second of the loop one writes first."""
    tokenizer = open_clip.get_tokenizer(MODEL)
    start = time.perf_counter()
    with torch.no_grad():
        for first in range(0, len(captions), 32):
            model.encode_text(tokenizer(captions[first : first + 32]))
    return len(captions) / (time.perf_counter() - start)


class Bench:
    """What the rounds share."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.table = make_set(folder, args.images)
        self.spec = save_weights(folder)
        self.backbone: Backbone = load_backbone(
            self.spec, device="cpu", precision=args.precision, max_text_tokens=None
        )
        # Loading and hashing the weights is not what is measured: every run gets this one.
        pipeline.load_backbone = lambda *_, **__: self.backbone
        self.captions = make_captions(folder / "captions.csv", 4 * args.images)
        tokens = self.backbone.tokenize(self.captions)
        size, by_length = TEXTS_PER_IMAGE * BATCH, tokens.buckets.argsort(stable=True)
        self.ready = [tokens.take(rows) for rows in by_length.split(size) if len(rows) == size]
        self.pixels = torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8)
        self.model, _, self.transform = open_clip.create_model_and_transforms(MODEL)
        self.model.eval()

    def extract(self, table: Path, field: str) -> ExtractReport:
        """One extraction into a new store."""
        store = self.folder / "store"
        shutil.rmtree(store, ignore_errors=True)
        return pipeline.extract(
            str(table),
            str(store),
            ExtractConfig(
                backbones=(self.spec,),
                names=("clip",),
                fields=(field,),
                batch_size=BATCH,
                precision=self.args.precision,
                device="cpu",
                workers=self.args.workers,
                source=SourceOptions(label_column="-"),
            ),
            report=lambda line: None,
        )

    def image_round(self) -> dict[str, float]:
        batches = -(-self.args.images // BATCH)
        rates = {"probe before": probe()}
        work = [partial(self.backbone.encode_image, self.pixels, ["image"])] * batches
        rates["bare"] = BATCH * bare(work, self.args.workers)
        rates["extract"] = self._rate(self.table, "image", self.args.images)
        rates["bare again"] = BATCH * bare(work, self.args.workers)
        torch.set_num_threads(self.args.workers)
        rates["by hand"] = by_hand(self.model, self.transform, self.folder, self.args.images)
        rates["probe after"] = probe()
        return rates

    def text_round(self) -> dict[str, float]:
        rates = {"probe before": probe()}
        work = [partial(self.backbone.encode_text, tokens, ["text"]) for tokens in self.ready]
        size = TEXTS_PER_IMAGE * BATCH
        rates["bare"] = size * bare(work, self.args.workers)
        rates["extract"] = self._rate(self.folder / "captions.csv", "text", len(self.captions))
        rates["bare again"] = size * bare(work, self.args.workers)
        torch.set_num_threads(self.args.workers)
        rates["by hand"] = texts_by_hand(self.model, self.captions)
        rates["probe after"] = probe()
        return rates

    def _rate(self, table: Path, field: str, count: int) -> float:
        """Samples per second of a whole call: reading the table, hashing, decoding, committing."""
        outcome = self.extract(table, field)
        assert outcome.embedded == count
        return count / (outcome.seconds - outcome.load_seconds)


def summary(rounds: list[dict[str, float]]) -> dict[str, list[float]]:
    """Median, least and most of each rate and of the ratios within a round."""
    for rates in rounds:
        ceiling = (rates["bare"] + rates["bare again"]) / 2
        rates["extract / bare"] = rates["extract"] / ceiling
        rates["extract / by hand"] = rates["extract"] / rates["by hand"]
    return {
        name: [statistics.median(column), min(column), max(column)]
        for name in rounds[0]
        for column in [[rates[name] for rates in rounds]]
    }


def main() -> None:
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns that weights are random
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--precision", default=default_precision("cpu"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmc-bench-") as folder:
        bench = Bench(args, Path(folder))
        bench.extract(bench.table, "image")  # first calls pay for lazy imports and page faults
        results = {
            name: summary([one() for _ in range(args.rounds)])
            for name, one in (("images", bench.image_round), ("texts", bench.text_round))
        }
    if args.json:
        print(json.dumps(results, indent=2))
        return
    print(f"{MODEL} {args.precision}, {args.images} samples, {args.workers} workers, batch {BATCH}")
    for name, rows in results.items():
        print(f"\n{name}: median [min-max] of {args.rounds} rounds")
        for what, (median, least, most) in rows.items():
            print(f"  {what:18} {median:8.2f} [{least:.2f}-{most:.2f}]")


if __name__ == "__main__":
    main()
