"""Speed and memory of `mmc tune` against a plain open_clip training loop of the same model.

    python benchmarks/bench_tune.py [--model ViT-B-32] [--pairs 512] [--batch-size 128]

Random weights and made-up JPEGs. Each variant runs in a process of its own, one after another:
``plain`` trains every weight as open_clip's own script does (DataLoader, its transform, its loss,
AdamW, bf16 autocast), ``locked`` with all but the output projections frozen; the others are
`mmc tune`: with the whole batch at once, with it in parts, with checkpointed blocks, and with both.
Reported are pairs per second without the first steps, and the peak of memory above what the
process had before the first step (on CUDA: the peak that was allocated).
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import psutil
import safetensors.torch
import torch
from open_clip.loss import ClipLoss
from PIL import Image

from mmc.extract.tuning.options import OptimConfig, TuneConfig
from mmc.extract.tuning.tune import tune

VARIANTS = ("plain", "locked", "whole", "parts", "blocks", "both")
SKIPPED = 1
"""Steps that warm up."""


class Peak:
    """The most memory of this process from now on, in MiB."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._process = psutil.Process()
        self._start = self._most = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._most = max(self._most, self._process.memory_info().rss)

    def stop(self) -> float:
        self._done.set()
        self._thread.join()
        used = torch.cuda.max_memory_allocated() if self._cuda else self._most - self._start
        return used / 2**20


def make_set(folder: Path, pairs: int) -> Path:
    """Pictures of 400 x 300 pixels, with captions."""
    random = np.random.default_rng(0)
    rows = [["id", "image", "text", "split"]]
    for number in range(pairs + 16):
        blocks = random.integers(0, 256, (15, 20, 3)).astype(np.uint8)
        Image.fromarray(blocks).resize((400, 300)).save(folder / f"{number}.jpg")
        words = " ".join(f"word{k}" for k in random.integers(0, 999, 8))
        rows.append([str(number), f"{number}.jpg", words, "train" if number < pairs else "val"])
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder / "pairs.csv"


def save_model(model: open_clip.CLIP, folder: Path, config: dict[str, Any]) -> None:
    """As open_clip's own directories are."""
    folder.mkdir()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(text, encoding="utf-8")


def plain(args: argparse.Namespace, table: Path, folder: str, *, locked: bool) -> dict[str, Any]:
    """open_clip's training step, as its script has it."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(args.model)
    model.to(args.device).train()
    if locked:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("out_proj" in name)
    with table.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]

    def load(row: dict[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
        with Image.open(table.parent / row["image"]) as picture:
            return transform(picture), tokenizer([row["text"]])[0]

    loader = torch.utils.data.DataLoader(
        [*rows],
        batch_size=args.batch_size,
        num_workers=args.workers,
        drop_last=True,
        collate_fn=lambda some: [torch.stack(side) for side in zip(*map(load, some), strict=True)],
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, loss = torch.optim.AdamW(parameters, lr=1e-4), ClipLoss()
    peak, moments = Peak(args.device), [time.perf_counter()]
    for images, texts in loader:
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            image, text, scale = model(images.to(args.device), texts.to(args.device))
            value = loss(image, text, scale)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(value.detach())
        moments.append(time.perf_counter())
    return outcome(args, moments, peak.stop())


def tuned(args: argparse.Namespace, table: Path, folder: str, out: str) -> dict[str, Any]:
    """`mmc tune` for one epoch; steps begin after the first measurement on val."""
    moments: list[float] = []
    peak: list[Peak] = []

    def progress(stage: str, done: int, total: int) -> None:
        moments.append(time.perf_counter())

    def report(line: str) -> None:
        if line.startswith("before"):
            peak.append(Peak(args.device))
            moments.append(time.perf_counter())
        if line.startswith("epoch"):
            peak.append(peak[0].stop())  # type: ignore[arg-type]

    in_parts = args.variant in ("parts", "both")
    optim = OptimConfig(
        micro_batch=max(1, args.batch_size // 8) if in_parts else args.batch_size,
        gradient_checkpointing=args.variant in ("blocks", "both"),
    )
    config = TuneConfig(
        backbone=f"open_clip:{folder}",
        epochs=1,
        batch_size=args.batch_size,
        optim=optim,
        precision="bf16",
        device=args.device,
        workers=args.workers,
    )
    tune(str(table), out, config, report=report, progress=progress)
    return outcome(args, moments, peak[1])  # type: ignore[arg-type]


def outcome(args: argparse.Namespace, moments: list[float], mib: float) -> dict[str, Any]:
    steps = len(moments) - 1 - SKIPPED
    rate = steps * args.batch_size / (moments[-1] - moments[SKIPPED])
    return {"variant": args.variant, "pairs/s": round(rate, 2), "peak MiB": round(mib)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--variant", choices=VARIANTS)
    parser.add_argument("--folder")
    args = parser.parse_args()
    if args.variant:
        folder = Path(args.folder)
        table, model = folder / "pairs.csv", str(folder / "model")
        if args.variant in ("plain", "locked"):
            result = plain(args, table, model, locked=args.variant == "locked")
        else:
            result = tuned(args, table, model, str(folder / args.variant))
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as scratch:
        make_set(Path(scratch), args.pairs)
        torch.manual_seed(0)
        config = open_clip.get_model_config(args.model)
        save_model(open_clip.CLIP(**config), Path(scratch) / "model", config)
        for variant in VARIANTS:
            command = [sys.executable, __file__, *sys.argv[1:]]
            command += ["--variant", variant, "--folder", scratch]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            print(done.stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
