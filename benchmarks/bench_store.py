"""The store against plain files and zarr-python: ratios of one run, its rounds interleaved.

    python benchmarks/bench_store.py [--rows 400000] [--dim 512] [--rounds 7] [--folder DIR]

Everything is read from the page cache. Each time is the median over the rounds; a ratio is the
median of the rounds' ratios, so that a slow spell of the machine meets both sides.
"""

import argparse
import hashlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from mmc.store import EmbeddingStore, Feature, FieldSpec

GATHER = 32_768


def make_store(folder: Path, rows: int, dim: int) -> tuple[EmbeddingStore, FieldSpec]:
    """An empty store for ``rows`` samples, and its only field."""
    samples = pa.table({"id": pa.array(np.arange(rows)).cast(pa.string())})
    source = {"spec": "benchmark"}
    store = EmbeddingStore.create(folder, samples, label_set=(), task="unlabelled", source=source)
    return store, FieldSpec(name="image", shape=(dim,), dtype="float16", tower="image")


def write_ours(store: EmbeddingStore, field: FieldSpec, data: Any, threads: int) -> None:
    """Every shard committed: written, synced, renamed, and its status after it.

    With several threads one commit waits for the disk while another computes its checksums.
    """
    with store.writer("a", [field], {}, {}, overwrite=True) as writer:

        def commit(shard: int) -> None:
            start, stop = writer.bounds(shard)
            writer.commit(shard, "image", np.arange(start, stop), {"image": data[start:stop]})

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(commit, range(writer.num_shards)))


def write_zarr(folder: Path, data: Any, shard_rows: int, chunk_rows: int) -> Any:
    """The same shards through zarr-python, whole ones, without any sync."""
    array = zarr.create_array(
        folder,
        shape=data.shape,
        dtype=data.dtype,
        shards=(shard_rows, data.shape[1]),
        chunks=(chunk_rows, data.shape[1]),
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        fill_value=float("nan"),
        config={"write_empty_chunks": True},
        overwrite=True,
    )
    for start in range(0, len(data), shard_rows):
        array[start : start + shard_rows] = data[start : start + shard_rows]
    return array


def seconds(work: Callable[[], Any]) -> float:
    """How long ``work`` takes; what it gives is dropped before the next measurement."""
    start = time.perf_counter()
    result = work()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def rounds(count: int, works: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Times of each work, interleaved, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(count + 1):
        for name, work in works.items():
            elapsed = seconds(work)
            if number:
                times[name].append(elapsed)
    return times


def ratio(times: dict[str, list[float]], ours: str, theirs: str) -> float:
    """How many times as fast ``ours`` is."""
    pairs = zip(times[ours], times[theirs], strict=True)
    return statistics.median(other / own for own, other in pairs)


def effective_cores() -> float:
    """How many threads really run at once just now: others may use the machine too."""
    block = bytes(32 << 20)

    def work(threads: int) -> float:
        with ThreadPoolExecutor(threads) as pool:
            return seconds(lambda: list(pool.map(hashlib.sha256, [block] * threads)))

    return statistics.median(2 * work(1) / work(2) for _ in range(5))


def show(title: str, value: float, goal: float | None, cores: float = 2) -> None:
    """One line of the table; what needs two threads is judged only where they had two cores."""
    verdict = ""
    if goal is not None:
        missed = "NO" if cores >= 1.8 else f"not judged, {cores:.1f} effective cores"
        verdict = f"  goal {goal:g}: {'yes' if value >= goal else missed}"
    print(f"{title:<66}{value:8.2f}{verdict}")


def bench_gather(feature: Feature, flat: Any, array: Any, count: int) -> None:
    """Rows in random order, with and without an output that is used again."""
    generator = np.random.default_rng(0)
    out = np.zeros((GATHER, feature.shape[1]), feature.dtype)
    state: dict[str, Any] = {}

    def draw() -> None:
        state["rows"] = generator.integers(0, len(feature), GATHER)

    works = {
        "draw": draw,
        "ours": lambda: feature.take(state["rows"]),
        "ours, out=": lambda: feature.take(state["rows"], out=out),
        "fancy memmap": lambda: flat[state["rows"]],
        "np.take, out=": lambda: np.take(flat, state["rows"], axis=0, out=out, mode="clip"),
    }
    times = rounds(3 * count, works)
    slow = rounds(max(1, count // 3), {**works, "zarr": lambda: array.oindex[state["rows"]]})
    name = f"gather {GATHER:,} rows"
    show(f"{name} ÷ fancy memmap, both allocate", ratio(times, "ours", "fancy memmap"), None)
    show(f"{name} into out ÷ fancy memmap", ratio(times, "ours, out=", "fancy memmap"), 0.8)
    show(
        f"{name} into out ÷ np.take(memmap) into out",
        ratio(times, "ours, out=", "np.take, out="),
        None,
    )
    show(f"{name} into out ÷ zarr-python", ratio(slow, "ours, out=", "zarr"), 50)
    for key in ("ours", "ours, out=", "fancy memmap", "np.take, out="):
        print(f"    {key:<16}{statistics.median(times[key]) * 1e3:9.2f} ms")
    print(f"    {'zarr-python':<16}{statistics.median(slow['zarr']) * 1e3:9.2f} ms")


def bench_read(store: EmbeddingStore, path: Path, array: Any, count: int) -> None:
    """All rows in order; ours opens the feature each time, so every checksum is compared."""
    size = len(store) * array.shape[1]
    out = np.zeros(array.shape, array.dtype)

    def into() -> None:
        with open(path, "rb", buffering=0) as file:
            file.readinto(out)  # type: ignore[arg-type]  # an array is a buffer

    works = {
        "ours": lambda: store["a/image"][:],
        "ours, out=": lambda: store["a/image"].take(slice(None), out=out),
        "np.fromfile": lambda: np.fromfile(path, array.dtype, size),
        "readinto": into,
        "zarr": lambda: array[:],
    }
    before = effective_cores()
    times = rounds(count, works)
    cores = min(before, effective_cores())
    title = "read all, checked ÷ np.fromfile, both allocate"
    show(title, ratio(times, "ours", "np.fromfile"), 0.8, cores)
    show("read all, checked, into out ÷ readinto", ratio(times, "ours, out=", "readinto"), None)
    show("read all, checked ÷ zarr-python", ratio(times, "ours", "zarr"), None)
    for key, values in times.items():
        print(f"    {key:<16}{out.nbytes / statistics.median(values) / 1e9:9.2f} GB/s")


def main() -> None:
    """Write, read and gather."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-store-", dir=args.folder))
    try:
        data = np.random.default_rng(0).standard_normal((args.rows, args.dim), dtype="float32")
        data = data.astype("float16")
        data.tofile(folder / "flat")
        store, field = make_store(folder / "store", args.rows, args.dim)
        write_ours(store, field, data, threads=4)
        layout = store["a/image"]._layout
        print(
            f"{args.rows:,} x {args.dim} float16 ({data.nbytes / 1e6:.0f} MB), shards of "
            f"{layout.shard_rows} rows, chunks of {layout.chunk_rows}, {args.rounds} rounds\n"
        )
        works = {
            "ours, 4 threads": lambda: write_ours(store, field, data, threads=4),
            "ours, 1 thread": lambda: write_ours(store, field, data, threads=1),
            "zarr": lambda: write_zarr(folder / "zarr", data, layout.shard_rows, layout.chunk_rows),
        }
        times = rounds(args.rounds, works)
        title = "write, commit and sync included"
        show(f"{title}, 4 threads ÷ zarr-python", ratio(times, "ours, 4 threads", "zarr"), 1)
        show(f"{title}, 1 thread ÷ zarr-python", ratio(times, "ours, 1 thread", "zarr"), None)
        for key, values in times.items():
            print(f"    {key:<16}{data.nbytes / statistics.median(values) / 1e9:9.2f} GB/s")
        array = write_zarr(folder / "zarr", data, layout.shard_rows, layout.chunk_rows)
        bench_read(store, folder / "flat", array, args.rounds)
        flat = np.memmap(folder / "flat", "float16", "r", shape=data.shape)
        bench_gather(store["a/image"], flat, array, args.rounds)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
