"""Memory over a long extraction: does it grow with the samples that have gone through?

    python benchmarks/bench_memory.py [--samples 50000] [--captions 1] [--workers N]

Makes small pictures and texts, all of them different, and embeds them with a backbone that costs
next to nothing, so that everything else is done as often as in a run of days: reading, decoding,
batches, shards, commits, failures (one picture in a thousand is broken), progress. The anonymous
memory of the process is read all the while; reported are the peaks in each tenth of the work, and
the last tenth against the second. With --captions K every picture has K texts, and fused fields are
made from each.
"""

import argparse
import io
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmc.extract.backbones.base import TokenBatch
from mmc.extract.options import ExtractConfig
from mmc.extract.pipeline import extract
from mmc.extract.transforms import ImageTransform
from mmc.store import FieldSpec

WIDTH, LENGTH = 512, 32
BROKEN_EVERY = 1000


class Cheap:
    """A backbone of two means; its arrays have the sizes of a real one's."""

    prompt_template = "a photo of a {label}"
    default_fields = ("image", "text", "fused")

    def __init__(self, *, device: str, precision: str, max_text_tokens: int | None) -> None:
        self.fields = {
            tower: FieldSpec(name=tower, shape=(WIDTH,), dtype="float16", tower=tower)
            for tower in self.default_fields
        }
        self.image_transform = ImageTransform(size=(64, 64))
        self.identity = {"weights": "none", "precision": precision}
        self.context = {"device": device}

    def tokenize(self, texts: list[str]) -> TokenBatch:
        """Character codes."""
        ids = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
        for row, text in enumerate(texts):
            codes = [ord(letter) for letter in text[:LENGTH]]
            ids[row, : len(codes)] = torch.tensor(codes)
        lengths = (ids > 0).sum(1)
        return TokenBatch(ids=ids, lengths=lengths, buckets=torch.full_like(lengths, LENGTH))

    def encode_image(self, pixels: Tensor, fields: Sequence[str]) -> dict[str, Tensor]:
        """The mean of all pixels, D times."""
        mean = pixels.float().mean(dim=(1, 2, 3))[:, None]
        return {name: mean.expand(-1, WIDTH) for name in fields}

    def encode_text(self, tokens: TokenBatch, fields: Sequence[str]) -> dict[str, Tensor]:
        """The mean of all codes, D times."""
        mean = tokens.ids.float().mean(dim=1)[:, None]
        return {name: mean.expand(-1, WIDTH) for name in fields}

    def encode_fused(
        self, pixels: Tensor, tokens: TokenBatch, fields: Sequence[str]
    ) -> dict[str, Tensor]:
        """The mean of both."""
        images = self.encode_image(pixels, fields)
        texts = self.encode_text(tokens, fields)
        return {
            name: images[name] if name == "image" else images[name] + texts[name] for name in fields
        }


def make_set(folder: Path, samples: int, captions: int) -> Path:
    """A table of small pictures, ``captions`` samples for each, every text another."""
    lines = ["id,image,text,labels"]
    for number in range(-(-samples // captions)):
        path = folder / str(number // 1000) / f"{number}.jpg"
        if number % 1000 == 0:
            path.parent.mkdir()
        path.write_bytes(b"no picture" if number % BROKEN_EVERY == 7 else _jpeg(number))
        for caption in range(min(captions, samples - number * captions)):
            name = f"{number}-{caption}"
            label = ("cat", "dog")[number % 2]
            lines.append(f"{name},{path.relative_to(folder)},a text of {name},{label}")
    table = folder / "samples.csv"
    table.write_text("\n".join(lines), encoding="utf-8")
    return table


def _jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


class Watch:
    """Anonymous memory of this process, in MB, beside how far the work is."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []
        self._stages: dict[str, tuple[int, int]] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def progress(self, stage: str, done: int, total: int) -> None:
        """Called by the extraction."""
        if stage != "files":  # before the first embedding
            self._stages[stage] = done, total

    def _look(self) -> None:
        while not self._end.is_set():
            stages = list(self._stages.values())
            total = sum(total for _, total in stages)
            if total:
                self.seen.append((sum(done for done, _ in stages) / total, anonymous_mb()))
            time.sleep(0.02)

    def peaks(self) -> list[float]:
        """The peak in each tenth of the work."""
        self._end.set()
        self._thread.join()
        tenths: list[float] = [0.0] * 10
        for share, size in self.seen:
            tenth = min(int(share * 10), 9)
            tenths[tenth] = max(tenths[tenth], size)
        return tenths


def anonymous_mb() -> float:
    """Memory of this process that no file backs (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this needs Linux: /proc/self/status has no RssAnon")


def main() -> None:
    """Run it and print what was seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--captions", type=int, default=1)
    parser.add_argument("--workers", type=int)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = make_set(Path(folder), given.samples, given.captions)
        watch = Watch()
        config = ExtractConfig(
            backbones=("python:bench_memory:Cheap",),
            names=("cheap",),
            precision="float32",
            device="cpu",
            workers=given.workers,
        )
        store = str(Path(folder) / "store")
        report = extract(str(table), store, config, report=print, progress=watch.progress)
        peaks = watch.peaks()
    print("peak of anonymous memory in each tenth, MB:", ", ".join(f"{mb:.0f}" for mb in peaks))
    result = {
        "samples": report.samples,
        "samples_per_second": round(report.rate, 1),
        "peaks_mb": [round(mb, 1) for mb in peaks],
        "last_tenth_to_second": round(peaks[9] / peaks[1], 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
