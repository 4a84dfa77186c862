"""Training on a store ten times larger than the memory allowed, against reading it.

    python benchmarks/bench_stream.py [--rows 400000] [--dim 1024] [--share 0.1] [--folder DIR]

One epoch of a linear head over a streamed store, against the time to read the same rows from the
same store and do nothing with them, and against a resident epoch. Rounds are interleaved, files
are in the page cache unless the set is larger than it (then both are the disk's).
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from mmc.heads import memory
from mmc.heads.batches import Reader, ResidentData, load_prepared
from mmc.heads.devices import pick_device, training_dtype
from mmc.heads.engine import Engine
from mmc.heads.losses.bce import BCE
from mmc.heads.models.linear import Linear, LinearConfig
from mmc.heads.options import OptimConfig
from mmc.heads.streaming import WINDOWS, StreamedData
from mmc.heads.training import default_batch
from mmc.store import EmbeddingStore, FieldSpec

LABELS, ROUNDS = 80, 5
FEATURES = {"image": "a/image"}


def make_store(folder: Path, rows: int, dim: int) -> EmbeddingStore:
    """Random float16 rows, written shard by shard."""
    samples = pa.table({"id": pa.array(np.arange(rows)).cast(pa.string())})
    store = EmbeddingStore.create(
        folder, samples, label_set=(), task="unlabelled", source={"spec": "benchmark"}
    )
    field = FieldSpec(name="image", shape=(dim,), dtype="float16", tower="image")
    generator = np.random.default_rng(0)
    with store.writer("a", [field], {}, {}) as writer:
        for shard in range(writer.num_shards):
            start, stop = writer.bounds(shard)
            values = generator.standard_normal((stop - start, dim), "float32").astype("float16")
            writer.commit(shard, "image", np.arange(start, stop), {"image": values})
    return EmbeddingStore.open(folder)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--share", type=float, default=0.1, help="memory allowed / memory needed")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = training_dtype("auto", device)
    folder = Path(tempfile.mkdtemp(prefix="mmc-bench-", dir=args.folder))
    try:
        run(make_store(folder / "store", args.rows, args.dim), args.share, device, dtype)
    finally:
        shutil.rmtree(folder)


def run(store: EmbeddingStore, share: float, device: torch.device, dtype: torch.dtype) -> None:
    """Interleaved rounds over ``store``."""
    rows, dim = len(store), store["a/image"].shape[1]
    everything = np.arange(rows)
    head = Linear({"image": (dim,)}, LABELS, LinearConfig()).to(device)
    targets = (torch.rand(rows, LABELS, device=device) < 0.1).to(torch.int8)
    counts = targets.sum(0).double()
    loss = BCE(BCE.Config(), counts, torch.full_like(counts, rows)).to(device)
    needed = rows * dim * dtype.itemsize
    batch_size = default_batch(rows, device)
    window_rows = int(needed * share) // (WINDOWS * dim * dtype.itemsize)
    streamed = StreamedData(
        store,
        FEATURES,
        everything,
        targets,
        head,
        device=device,
        dtype=dtype,
        window_rows=window_rows,
    )
    inputs = load_prepared(store, FEATURES, everything, head, device, dtype)
    resident = ResidentData(inputs=inputs, targets=targets)
    few = ResidentData(
        inputs={key: values[:64].float() for key, values in inputs.items()}, targets=targets[:64]
    )

    def epoch(data: StreamedData | ResidentData) -> float:
        position = Engine(
            head,
            loss,
            train=data,
            val=few,
            task="multilabel",
            batch_size=batch_size,
            epochs=1,
            lr=1e-4,
            optim=OptimConfig(),
            seed=0,
            dtype=dtype,
        ).run()
        return position.train_seconds

    def read() -> float:
        reader = Reader(store, FEATURES, everything, torch.device("cpu"))
        feature = store["a/image"]
        started = time.perf_counter()
        for first, last in reader.blocks:
            feature.take(slice(first, last))
        return time.perf_counter() - started

    works = {
        "read": read,
        "streamed": lambda: epoch(streamed),
        "resident": lambda: epoch(resident),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(ROUNDS + 1):
        for name, work in works.items():
            seconds = work()
            if number:
                times[name].append(seconds)
    print(
        f"{rows:,} x {dim} {store['a/image'].dtype} ({memory.shown(needed)} prepared), "
        f"{share:.0%} of it allowed: windows of {window_rows:,} rows, batch {batch_size}, {device}"
    )
    for name, values in times.items():
        middle = statistics.median(values)
        print(f"{name:10}{rows / middle:14,.0f} rows/s{needed / middle / 1e9:8.2f} GB/s")
    for name in ("read", "resident"):
        ratios = sorted(b / a for a, b in zip(times["streamed"], times[name], strict=True))
        print(
            f"streamed epoch ÷ {name}: {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
