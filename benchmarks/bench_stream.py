"""Training on a store larger than the memory allowed, against the disk and against memory.

    python benchmarks/bench_stream.py [--rows 400000] [--dim 1024] [--max-memory 80M] [--folder DIR]

Epochs of a linear head over a streamed store are measured against

- reading the same files and doing nothing with them, by as many threads;
- an epoch with everything in memory;

once with the files in the page cache and once without (they are dropped from it before every
epoch; what the disk really gave is counted). Rounds are interleaved, ratios are within a round.
A streamed epoch cannot be faster than the slower of the two; `bound` is that one.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import torch
from bench_heads import effective_cores

from mmc.heads import memory
from mmc.heads.batches import READERS, ResidentData, load_prepared
from mmc.heads.devices import pick_device, training_dtype
from mmc.heads.engine import Engine
from mmc.heads.losses.bce import BCE
from mmc.heads.models.linear import Linear, LinearConfig
from mmc.heads.options import OptimConfig, TrainConfig
from mmc.heads.streaming import HELD, StreamedData
from mmc.heads.trainer import train
from mmc.heads.training import default_batch
from mmc.store import EmbeddingStore, FieldSpec

LABELS, VAL_ROWS = 80, 64
FEATURES = {"image": "a/image"}
READ_BYTES = 4 << 20


def make_store(folder: Path, rows: int, dim: int) -> EmbeddingStore:
    """Random float16 rows, written shard by shard, and random labels; one in fifty is for val."""
    generator = np.random.default_rng(0)
    labels = [sorted(set(row)) for row in generator.integers(0, LABELS, (rows, 8)).tolist()]
    samples = pa.table(
        {
            "id": pa.array(np.arange(rows)).cast(pa.string()),
            "labels": pa.array(labels, pa.list_(pa.int32())),
            "split": ["val" if row % 50 == 0 else "train" for row in range(rows)],
        }
    )
    store = EmbeddingStore.create(
        folder,
        samples,
        label_set=tuple(map(str, range(LABELS))),
        task="multilabel",
        source={"spec": "benchmark"},
    )
    field = FieldSpec(name="image", shape=(dim,), dtype="float16", tower="image")
    with store.writer("a", [field], {}, {}) as writer:
        for shard in range(writer.num_shards):
            start, stop = writer.bounds(shard)
            values = generator.standard_normal((stop - start, dim), "float32").astype("float16")
            writer.commit(shard, "image", np.arange(start, stop), {"image": values})
    os.sync()
    return EmbeddingStore.open(folder)


def drop(files: list[Path]) -> None:
    """Out of the page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_files(files: list[Path]) -> None:
    """Read everything, and do nothing with it."""

    def read(path: Path) -> None:
        buffer = bytearray(READ_BYTES)
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, files))


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Bytes by which anonymous memory grew at most since the start."""

    def now() -> int:
        full = psutil.Process().memory_info()
        return full.rss - full.shared

    start = now()
    peak, done = start, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, now())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: peak - start
    finally:
        done.set()
        thread.join()


class Epochs:
    """Epochs of one head over one store, streamed or in memory."""

    def __init__(self, store: EmbeddingStore, device: torch.device, max_memory: int | None) -> None:
        self.store, self.device = store, device
        self.rows, self.dim = len(store), store["a/image"].shape[1]
        self.dtype = training_dtype("auto", device)
        self.head = Linear({"image": (self.dim,)}, LABELS, LinearConfig()).to(device)
        self.everything = np.arange(self.rows)
        self.batch_size = default_batch(self.rows, device)
        self.row_bytes = self.dim * self.dtype.itemsize
        needed = self.rows * (self.row_bytes + LABELS)
        self.plan = memory.plan(
            train=(self.rows, self.row_bytes),
            val=(0, 0),
            targets=LABELS,
            budget=max_memory or self.rows * LABELS + self.rows * self.row_bytes // 10,
            batch_size=self.batch_size,
            windows=HELD,
        )
        self.needed = needed

    def targets(self) -> torch.Tensor:
        """Random ones; drawn piece by piece, since their memory is measured."""
        targets = torch.empty(self.rows, LABELS, dtype=torch.int8, device=self.device)
        for part in targets.split(1024):
            part.random_(0, 10).eq_(0)
        return targets

    def streamed(self, targets: torch.Tensor) -> StreamedData:
        """The rows, a window at a time."""
        return StreamedData(
            self.store,
            FEATURES,
            self.everything,
            targets,
            self.head,
            device=self.device,
            dtype=self.dtype,
            window_rows=self.plan.window_rows,
        )

    def resident(self, targets: torch.Tensor, rows: int) -> ResidentData:
        """The first rows, in memory."""
        taken = self.everything[:rows]
        dtype = self.dtype if rows > VAL_ROWS else torch.float32
        inputs = load_prepared(self.store, FEATURES, taken, self.head, self.device, dtype)
        return ResidentData(inputs=inputs, targets=targets[:rows])

    def run(self, data: StreamedData | ResidentData, val: ResidentData) -> None:
        """One epoch."""
        counts = val.targets.sum(0).double()
        loss = BCE(BCE.Config(), counts, torch.full_like(counts, len(val))).to(self.device)
        Engine(
            self.head,
            loss,
            train=data,
            val=val,
            task="multilabel",
            batch_size=self.batch_size,
            epochs=1,
            lr=1e-4,
            optim=OptimConfig(),
            seed=0,
            dtype=self.dtype,
        ).run()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--max-memory", help="as of train-head (default: targets + a tenth)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    args = parser.parse_args()
    limit = memory.parse_size(args.max_memory) if args.max_memory else None
    folder = Path(tempfile.mkdtemp(prefix="mmc-bench-", dir=args.folder))
    try:
        store = make_store(folder / "store", args.rows, args.dim)
        files = sorted((folder / "store").glob("features/a/image/c.*"))
        print(f"effective cores before: {effective_cores():.2f}")
        epochs = Epochs(store, pick_device(args.device), limit)
        run(epochs, files, args.rounds)
        whole(epochs, folder, args.device)
        print(f"effective cores after: {effective_cores():.2f}")
    finally:
        shutil.rmtree(folder)


def whole(epochs: Epochs, folder: Path, device: str) -> None:
    """Memory of a whole training of one epoch, from opening the store to the saved run."""
    shown, budget = memory.shown, epochs.plan.budget
    for name, limit in (("resident", None), ("streamed", f"{budget}")):
        config = TrainConfig(epochs=1, max_memory=limit, device=device)
        with peak_memory() as peak:
            train(EmbeddingStore.open(epochs.store.path), folder / name, config)
            said = f"train-head, {name}: memory grew by {shown(peak())}"
        print(f"{said} ({shown(epochs.needed if limit is None else budget)} for data)")


def run(epochs: Epochs, files: list[Path], rounds: int) -> None:
    """Memory of each kind of epoch first, then interleaved rounds."""
    rows, size = epochs.rows, sum(path.stat().st_size for path in files)
    shown = memory.shown
    print(
        f"{rows:,} x {epochs.dim} float16, {shown(epochs.needed)} prepared with targets, "
        f"{shown(epochs.plan.budget)} allowed: windows of {epochs.plan.window_rows:,} rows, "
        f"batch {epochs.batch_size}, {epochs.device}, {READERS} reading threads"
    )
    some = epochs.resident(epochs.targets(), VAL_ROWS)
    # What a step of any training takes is not the data's.
    epochs.run(epochs.resident(epochs.targets(), epochs.batch_size), some)
    with peak_memory() as peak:
        targets = epochs.targets()
        streamed = epochs.streamed(targets)
        epochs.run(streamed, some)
        print(f"streamed: memory grew by {shown(peak())} ({shown(epochs.plan.budget)} allowed)")
    del streamed, targets
    with peak_memory() as peak:
        targets = epochs.targets()
        resident = epochs.resident(targets, rows)
        epochs.run(resident, some)
        print(f"resident: memory grew by {shown(peak())} ({shown(epochs.needed)} is data)")
    streamed = epochs.streamed(targets)
    disk = [0.0]

    def cold(work: Callable[[], None]) -> Callable[[], None]:
        def dropped() -> None:
            before = psutil.Process().io_counters().read_bytes
            work()
            disk.append((psutil.Process().io_counters().read_bytes - before) / size)

        return dropped

    works: dict[str, Callable[[], None]] = {
        "read, cold": cold(lambda: read_files(files)),
        "streamed, cold": cold(lambda: epochs.run(streamed, some)),
        "read, cached": lambda: read_files(files),
        "streamed, cached": lambda: epochs.run(streamed, some),
        "resident": lambda: epochs.run(resident, some),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    cpu: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            if name.endswith("cold"):
                drop(files)
            started, used = time.perf_counter(), time.process_time()
            work()
            if number:
                times[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - used)
    for name, values in times.items():
        middle = statistics.median(values)
        print(
            f"{name:18}{rows / middle:14,.0f} rows/s{size / middle / 1e9:8.2f} GB/s"
            f"{statistics.median(cpu[name]):8.2f} s of processors"
        )
    print(f"of the files, cold epochs took from the disk: {min(disk[1:]):.2f} or more")
    times["bound, cold"] = list(map(max, times["read, cold"], times["resident"]))
    times["bound, cached"] = list(map(max, times["read, cached"], times["resident"]))
    for top, bottom in (
        ("streamed, cold", "read, cold"),
        ("streamed, cold", "bound, cold"),
        ("streamed, cached", "read, cached"),
        ("streamed, cached", "resident"),
    ):
        ratios = sorted(b / a for a, b in zip(times[top], times[bottom], strict=True))
        print(
            f"rate of {top} ÷ {bottom}: {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
