"""Time and memory of `mmc labels` on many samples, step by step.

    python benchmarks/bench_labels.py [--rows 1000000] [--dim 512] [--labels 80]

The vectors are those of bench_neighbors.py; a sample has the labels of its cluster, 1 to 5 of
them, and one sample in twenty is unlabelled. The peak is that of anonymous memory: what is mapped
from the store's files can be taken back by the system at any time.
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from bench_neighbors import CLUSTERS, clustered, clusters_of

from mmc.heads.labels.analysis import analyse_labels
from mmc.heads.labels.options import LabelsConfig
from mmc.store import EmbeddingStore, FieldSpec

UNLABELLED = 0.05


def make_store(folder: Path, rows: int, dim: int, labels: int) -> EmbeddingStore:
    random = np.random.default_rng(3)
    of_cluster = [
        random.choice(labels, random.integers(1, 6), replace=False).tolist()
        for _ in range(CLUSTERS)
    ]
    found = clusters_of(rows, 1)
    without = random.random(rows) < UNLABELLED
    lists = [
        None if none else sorted(of_cluster[c]) for c, none in zip(found, without, strict=True)
    ]
    splits = np.array(["train", "val", "test"])[random.choice(3, rows, p=(0.8, 0.1, 0.1))]
    samples = pa.table(
        {
            "id": pa.array(np.arange(rows)).cast(pa.string()),
            "split": pa.array(splits),
            "labels": pa.array(lists, pa.list_(pa.int32())),
        }
    )
    names = tuple(f"label {i}" for i in range(labels))
    store = EmbeddingStore.create(
        folder, samples, label_set=names, task="multilabel", source={"spec": "benchmark"}
    )
    vectors = clustered(rows, dim, 1)
    field = FieldSpec(name="image", shape=(dim,), dtype="float16", tower="image")
    with store.writer("a", [field], {}, {}) as writer:
        for shard in range(writer.num_shards):
            start, stop = writer.bounds(shard)
            writer.commit(shard, "image", np.arange(start, stop), {"image": vectors[start:stop]})
    return EmbeddingStore.open(folder)


class Peak:
    """The most anonymous memory of this process so far, in MiB (Linux)."""

    def __init__(self) -> None:
        self.most = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            with open("/proc/self/status", encoding="ascii") as status:
                kib = next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
            self.most = max(self.most, kib / 1024)
            time.sleep(0.1)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--labels", type=int, default=80)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "a.store", args.rows, args.dim, args.labels)
        started, used, peak = time.perf_counter(), time.process_time(), Peak()
        steps: dict[str, float] = {}

        def progress(step: str, *_: Any) -> None:
            steps.setdefault(step, time.perf_counter() - started)

        found = analyse_labels(
            store, Path(folder) / "out", LabelsConfig(), report=print, progress=progress
        )
        wall, used = time.perf_counter() - started, time.process_time() - used
        for step, at in steps.items():
            print(f"{step:<40} from {at:7.1f} s on")
        print(f"\n{found}\n")
        print(
            f"{args.rows:,} x {args.dim}, {args.labels} labels: {wall:.0f} s, {used:.0f} s of "
            f"processors, peak of anonymous memory {peak.most:,.0f} MiB"
        )


if __name__ == "__main__":
    main()
