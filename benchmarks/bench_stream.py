"""Training on a store larger than the memory allowed, against the disk and against memory.

    python benchmarks/bench_stream.py [--rows 400000] [--dim 1024] [--max-memory 80M] [--folder DIR]
                                      [--disk-rate 200M]

Epochs of a linear head over a streamed store are measured against

- reading the same files and doing nothing with them, by as many threads;
- an epoch with everything in memory;

once with the files in the page cache and once without (they are dropped from it before every
epoch; what the disk really gave is counted). Rounds are interleaved, ratios are within a round.
A streamed epoch cannot be faster than the slower of the two, `bound`; nor, where a step keeps all
processors busy, than the processors can do all that there is to do: `processors` is the time of
reading, of preparing all rows and of an epoch in memory, divided among them.

That is done for a step of the usual cost (80 labels, the default batch) and for a cheap one (20
labels, batches of 4,096). With --disk-rate a slow disk is simulated besides: both contenders wait
before each read until a bucket that fills at that rate holds its bytes (it holds those of a
twentieth of a second).
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
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from bench_heads import effective_cores

from mmc.heads import memory
from mmc.heads.batches import READERS, ResidentData, largest_tile, load_prepared
from mmc.heads.devices import pick_device, training_dtype
from mmc.heads.engine import Engine
from mmc.heads.losses.bce import BCE
from mmc.heads.models.linear import Linear, LinearConfig
from mmc.heads.options import OptimConfig, TrainConfig
from mmc.heads.streaming import StreamedData
from mmc.heads.trainer import train
from mmc.heads.training import default_batch
from mmc.store import EmbeddingStore, FieldSpec
from mmc.store.errors import InputError
from mmc.store.mapped import MappedShard

LABELS, VAL_ROWS = 80, 64
CHEAP_LABELS, CHEAP_BATCH = 20, 4096
FEATURES = {"image": "a/image"}
READ_BYTES = 4 << 20
BURST = 0.05


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


class SlowDisk:
    """What all threads together may read, at ``rate`` bytes a second."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._lock = threading.Lock()
        self._free = 0.0

    def wait(self, size: int) -> None:
        """Until so many bytes more may be read.

        What an idle disk reads ahead is that of BURST seconds.
        """
        with self._lock:
            self._free = max(self._free, time.perf_counter() - BURST) + size / self.rate
            until = self._free
        time.sleep(max(until - time.perf_counter(), 0))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The shards of stores are read from it."""
        copy = MappedShard._copy

        def slow(shard: MappedShard, descriptor: int, buffers: list[Any], offset: int) -> None:
            self.wait(sum(map(len, buffers)))
            copy(shard, descriptor, buffers, offset)

        MappedShard._copy = slow  # type: ignore[method-assign]
        try:
            yield
        finally:
            MappedShard._copy = copy  # type: ignore[method-assign]


def read_files(files: list[Path], disk: SlowDisk | None = None) -> None:
    """Read everything, and do nothing with it."""

    def read(path: Path) -> None:
        buffer = bytearray(READ_BYTES)
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(buffer):
                if disk:
                    disk.wait(size)

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

    def __init__(
        self,
        store: EmbeddingStore,
        device: torch.device,
        max_memory: int | None,
        labels: int = LABELS,
        batch_size: int | None = None,
    ) -> None:
        self.store, self.device, self.labels = store, device, labels
        self.rows, self.dim = len(store), store["a/image"].shape[1]
        self.dtype = training_dtype("auto", device)
        self.head = Linear({"image": (self.dim,)}, labels, LinearConfig()).to(device)
        self.everything = np.arange(self.rows)
        self.batch_size = batch_size or default_batch(self.rows, device)
        row = self.dim * self.dtype.itemsize
        needs = memory.Needs(
            train_rows=self.rows,
            val_rows=0,
            batch_size=self.batch_size,
            stored=self.dim * 2,
            prepared=row,
            val_prepared=self.dim * 4,
            target=labels * 4,
            labels=self.rows * labels,
            score=labels * 4,
            tile=largest_tile(self.head, device),
        )
        self.plan = memory.plan(needs, max_memory or self.rows * (labels + row // 10) + (16 << 20))

    def targets(self) -> torch.Tensor:
        """Random ones; drawn piece by piece, since their memory is measured."""
        targets = torch.empty(self.rows, self.labels, dtype=torch.int8, device=self.device)
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
            buffers=self.plan.buffers,
            block_bytes=self.plan.block,
            tile_bytes=self.plan.tile,
        )

    def resident(self, targets: torch.Tensor, rows: int) -> ResidentData:
        """The first rows, in memory."""
        taken = self.everything[:rows]
        dtype = self.dtype if rows > VAL_ROWS else torch.float32
        inputs = load_prepared(self.store, FEATURES, taken, self.head, self.device, dtype)
        return ResidentData(inputs=inputs, targets=targets[:rows])

    def prepare(self) -> None:
        """Read all rows and prepare them, in this thread, and do nothing with them."""
        data = StreamedData(
            self.store,
            FEATURES,
            self.everything,
            torch.empty(self.rows, 0, device=self.device),
            self.head,
            device=self.device,
            dtype=self.dtype,
        )
        out = data.preparer.room(max(b - a for a, b in data.reader.blocks), data.reader.sample())
        for block in data.reader.blocks:
            data.preparer.put(data.reader.read(block)[0], out, 0)

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
    parser.add_argument(
        "--max-memory", help="as of train-head (default: targets, a tenth and 16 MiB)"
    )
    parser.add_argument("--disk-rate", help="bytes a second of a simulated slow disk, as 200M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    args = parser.parse_args()
    limit = memory.parse_size(args.max_memory) if args.max_memory else None
    disk = SlowDisk(memory.parse_size(args.disk_rate)) if args.disk_rate else None
    device = pick_device(args.device)
    folder = Path(tempfile.mkdtemp(prefix="mmc-bench-", dir=args.folder))
    try:
        store = make_store(folder / "store", args.rows, args.dim)
        files = sorted((folder / "store").glob("features/a/image/c.*"))
        print(f"effective cores before: {effective_cores():.2f}")
        usual = Epochs(store, device, limit)
        cheap = Epochs(store, device, limit, CHEAP_LABELS, CHEAP_BATCH)
        for epochs in (usual, cheap):
            run(epochs, files, args.rounds)
            if disk:
                run_slow(epochs, files, min(args.rounds, 3), disk)
        whole(usual, folder, args.device)
        print(f"effective cores after: {effective_cores():.2f}")
    finally:
        shutil.rmtree(folder)


def whole(epochs: Epochs, folder: Path, device: str) -> None:
    """Memory of a whole training of one epoch, from opening the store to the saved run."""
    shown, plan = memory.shown, epochs.plan
    for name, limit in (("resident", None), ("streamed", f"{plan.budget}")):
        config = TrainConfig(epochs=1, max_memory=limit, device=device)
        with peak_memory() as peak:
            try:
                train(EmbeddingStore.open(epochs.store.path), folder / name, config)
            except InputError as error:  # its labels are not streamed
                print(f"train-head, {name}: refused, {error}")
                continue
            said = f"train-head, {name}: memory grew by {shown(peak())}"
        print(f"{said} ({shown(plan.resident if limit is None else plan.budget)} for data)")


def run(epochs: Epochs, files: list[Path], rounds: int) -> None:
    """Memory of each kind of epoch first, then interleaved rounds."""
    rows, plan, shown = epochs.rows, epochs.plan, memory.shown
    size = sum(path.stat().st_size for path in files)
    print(
        f"\n{epochs.labels} labels, batch {epochs.batch_size:,}: {rows:,} x {epochs.dim} float16, "
        f"{shown(plan.resident)} prepared with targets, {shown(plan.budget)} allowed: windows of "
        f"{plan.window_rows:,} rows, {plan.buffers} batches; {epochs.device}, "
        f"{torch.get_num_threads()} threads, {READERS} more read and {READERS} prepare"
        + ("" if plan.fits else f"; MORE THAN IS ALLOWED: {shown(plan.bytes)}")
    )
    some = epochs.resident(epochs.targets(), VAL_ROWS)
    # What a step of any training takes is not the data's.
    epochs.run(epochs.resident(epochs.targets(), epochs.batch_size), some)
    with peak_memory() as peak:
        targets = epochs.targets()
        streamed = epochs.streamed(targets)
        epochs.run(streamed, some)
        print(f"streamed: memory grew by {shown(peak())} ({shown(plan.budget)} allowed)")
    del streamed, targets
    with peak_memory() as peak:
        targets = epochs.targets()
        resident = epochs.resident(targets, rows)
        epochs.run(resident, some)
        print(f"resident: memory grew by {shown(peak())} ({shown(plan.resident)} is data)")
    streamed = epochs.streamed(targets)
    disk = [0.0]

    def cold(work: Callable[[], None]) -> Callable[[], None]:
        def dropped() -> None:
            before = psutil.Process().io_counters().read_bytes
            work()
            disk.append((psutil.Process().io_counters().read_bytes - before) / size)

        return dropped

    times, cpu = measured(
        {
            "read, cold": cold(lambda: read_files(files)),
            "streamed, cold": cold(lambda: epochs.run(streamed, some)),
            "read, cached": lambda: read_files(files),
            "streamed, cached": lambda: epochs.run(streamed, some),
            "resident": lambda: epochs.run(resident, some),
            "read and prepare": epochs.prepare,
        },
        files,
        rounds,
    )
    table(times, cpu, rows, size)
    print(f"of the files, cold epochs took from the disk: {min(disk[1:]):.2f} or more")
    cores = len(os.sched_getaffinity(0))
    processors = [
        (a + b) / cores for a, b in zip(cpu["resident"], cpu["read and prepare"], strict=True)
    ]
    for kind in ("cold", "cached"):
        bound = list(map(max, times[f"read, {kind}"], times["resident"]))
        times[f"bound, {kind}"] = bound
        times[f"bound and processors, {kind}"] = list(map(max, bound, processors))
    for kind in ("cold", "cached"):
        for other in ("read", "bound", "bound and processors"):
            compare(times, f"streamed, {kind}", f"{other}, {kind}")
    compare(times, "streamed, cached", "resident")


def run_slow(epochs: Epochs, files: list[Path], rounds: int, disk: SlowDisk) -> None:
    """The same from a disk that is made slow."""
    print(f"a slow disk is SIMULATED: {memory.shown(disk.rate)}/s for all threads together")
    targets = epochs.targets()
    some, streamed = epochs.resident(targets, VAL_ROWS), epochs.streamed(targets)

    def from_it() -> None:
        with disk.in_use():
            epochs.run(streamed, some)

    epochs.run(streamed, some)  # compares the checksums, for which parts of chunks are read twice
    times, cpu = measured(
        {"read, slow disk": lambda: read_files(files, disk), "streamed, slow disk": from_it},
        files,
        rounds,
        warm=False,
    )
    table(times, cpu, epochs.rows, sum(path.stat().st_size for path in files))
    compare(times, "streamed, slow disk", "read, slow disk")


Seconds = dict[str, list[float]]


def measured(
    works: dict[str, Callable[[], None]], files: list[Path], rounds: int, *, warm: bool = True
) -> tuple[Seconds, Seconds]:
    """Seconds, and seconds of processors, of each round; the first one is not counted if warm."""
    times: Seconds = {name: [] for name in works}
    cpu: Seconds = {name: [] for name in works}
    for number in range(rounds + warm):
        for name, work in works.items():
            if name.endswith("cold"):
                drop(files)
            started, used = time.perf_counter(), time.process_time()
            work()
            if number >= warm:
                times[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - used)
    return times, cpu


def table(times: Seconds, cpu: Seconds, rows: int, size: int) -> None:
    """Medians."""
    for name, values in times.items():
        middle = statistics.median(values)
        print(
            f"{name:20}{rows / middle:14,.0f} rows/s{size / middle / 1e9:8.2f} GB/s"
            f"{statistics.median(cpu[name]):8.2f} s of processors"
        )


def compare(times: Seconds, top: str, bottom: str) -> None:
    """Rate of one over that of another, within rounds."""
    ratios = sorted(b / a for a, b in zip(times[top], times[bottom], strict=True))
    print(
        f"rate of {top} ÷ {bottom}: {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    main()
