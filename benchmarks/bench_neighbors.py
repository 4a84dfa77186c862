"""Nearest neighbours against brute force: build, queries/s, recall, as ratios of one run.

    python benchmarks/bench_neighbors.py [--rows 200000] [--dim 512] [--queries 1000] [--rounds 3]

The vectors lie in clusters with a common part, as embeddings do; queries are other draws of the
same clusters. Rounds are interleaved; a ratio is the median of the rounds' ratios. Recall is the
share of the true ten nearest (FAISS flat in float32) that were found.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psutil
import pyarrow as pa
import torch
from sklearn.neighbors import NearestNeighbors

from mmc.heads.labels.exact import ExactSearch
from mmc.store import EmbeddingStore, FieldSpec
from mmc.store.neighbors import open_index

K = 10
CLUSTERS = 1000


def clustered(count: int, dim: int, seed: int) -> Any:
    """float16 (count, dim): clusters around a common part, the same for every seed."""
    centres = np.random.default_rng(0).normal(size=(CLUSTERS, dim)).astype(np.float32) + 1
    draw, found = np.random.default_rng(seed), clusters_of(count, seed)
    out = np.empty((count, dim), np.float16)
    for i in range(0, count, 1 << 16):
        part = found[i : i + (1 << 16)]
        out[i : i + len(part)] = centres[part] + draw.standard_normal((len(part), dim), np.float32)
    return out


def clusters_of(count: int, seed: int) -> Any:
    """(count,) the cluster that each of these vectors lies in."""
    return np.random.default_rng([seed, 1]).integers(0, CLUSTERS, count)


def make_store(folder: Path, vectors: Any) -> EmbeddingStore:
    rows = len(vectors)
    samples = pa.table({"id": pa.array(np.arange(rows)).cast(pa.string())})
    store = EmbeddingStore.create(
        folder, samples, label_set=(), task="unlabelled", source={"spec": "benchmark"}
    )
    field = FieldSpec(name="image", shape=vectors.shape[1:], dtype="float16", tower="image")
    with store.writer("a", [field], {}, {}) as writer:
        for shard in range(writer.num_shards):
            start, stop = writer.bounds(shard)
            writer.commit(shard, "image", np.arange(start, stop), {"image": vectors[start:stop]})
    return EmbeddingStore.open(folder)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def recall(found: Any, truth: Any) -> float:
    pairs = zip(np.asarray(found), truth, strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) for a, b in pairs]) / K)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default="ivf", help="ivf,hnsw")
    parser.add_argument("--sklearn-queries", type=int, default=100)
    args = parser.parse_args()
    queries = clustered(args.queries, args.dim, 2).astype(np.float32)
    faiss.normalize_L2(queries)
    few = queries[:80]
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "a.store", clustered(args.rows, args.dim, 1))
        searches: dict[str, Callable[[Any], Any]] = {}
        for kind in args.kinds.split(","):
            before = process.memory_info().rss
            took, index = seconds(lambda kind=kind: open_index(store, "a/image", kind=kind))
            again, _ = seconds(lambda kind=kind: open_index(store, "a/image", kind=kind))
            grown = (process.memory_info().rss - before) / 2**20
            print(
                f"{index}: built in {took:.1f} s, opened in {again:.2f} s, effort "
                f"{index.record.effort}, resident {grown:,.0f} MiB more"
            )
            searches[kind] = lambda q, index=index: index.search(q, K)[0]
        took, whole = seconds(lambda: open_index(store, "a/image", kind="flat"))
        print(f"flat: read and normalised in {took:.1f} s")
        searches["faiss flat"] = lambda q: whole.search(q, K)[0]
        base = torch.from_numpy(store["a/image"].take(slice(None)).astype(np.float32))
        exact = ExactSearch(base)
        searches["torch, exact"] = lambda q: exact.search(torch.from_numpy(q), K)[0].numpy()
        plain = exact.base
        searches["torch, brute force float32"] = lambda q: (
            (torch.from_numpy(q) @ plain.T).topk(K).indices.numpy()
        )
        truth = {len(q): whole.search(q, K)[0] for q in (queries, few)}
        for some in (queries, few):
            times: dict[str, list[float]] = {name: [] for name in searches}
            for _ in range(args.rounds):
                for name, search in searches.items():
                    times[name].append(seconds(lambda s=search, q=some: s(q))[0])
            flat = times["faiss flat"]
            print(f"\n{len(some):,} queries of {args.rows:,} x {args.dim}, {K} nearest")
            for name, took_each in times.items():
                ratio = statistics.median(f / t for f, t in zip(flat, took_each, strict=True))
                rate = len(some) / statistics.median(took_each)
                hit = recall(searches[name](some), truth[len(some)])
                print(
                    f"  {name:<27} {rate:>10,.0f} queries/s  {ratio:6.2f} x flat  recall {hit:.4f}"
                )
        brute = NearestNeighbors(n_neighbors=K, metric="cosine", algorithm="brute").fit(
            plain.numpy()
        )
        part = queries[: args.sklearn_queries]
        took, (_, places) = seconds(lambda: brute.kneighbors(part))
        print(
            f"  {'scikit-learn brute':<27} {len(part) / took:>10,.0f} queries/s  "
            f"on {len(part)} queries, recall {recall(places, truth[len(queries)][: len(part)]):.4f}"
        )


if __name__ == "__main__":
    main()
