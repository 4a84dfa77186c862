"""Nearest samples by the cosine of their embeddings, with FAISS.

Small sets are searched whole. Larger ones get an index that is kept in the store under ``index/``
with what it was made from, and is made anew when that has changed. How much of the truth an
approximate index finds is measured when it is made, on queries from the set itself.

Legend: n vectors in an index, D values of each, q queries, k neighbours.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import faiss
import google_crc32c
import numpy as np
import numpy.typing as npt
from faiss.contrib.exhaustive_search import knn_ground_truth

from mmc.store.compaction import INDEX
from mmc.store.errors import InputError, MmcError
from mmc.store.feature import Feature
from mmc.store.files import Files
from mmc.store.reader import EmbeddingStore
from mmc.store.schema import TOWER_CONTENT

Kind = Literal["auto", "flat", "ivf", "hnsw"]
Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]

FLAT_ROWS = 50_000
"""Up to here every vector is compared: building an index would take longer than some searches."""
GOAL = 0.98
"""Share of the true ten nearest that an approximate index has to find."""
SAMPLE, MEASURED_K = 500, 10
"""Queries that recall is measured with, and how many neighbours of each."""
TRAIN_PER_LIST = 40
"""Vectors per list that clustering is trained on; FAISS asks for 39."""
HNSW_LINKS, HNSW_BUILD = 32, 80
MOST_ON_GPU = 2048
"""Neighbours, and lists that are visited: FAISS selects no more of either on a GPU."""
WIDE_K = 64
"""For more neighbours a search looks farther than for the ten that recall is measured with."""
BLOCK_BYTES = 64 << 20
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class IndexRecord:
    """What an index was made from, and how good it is."""

    format: int = _FORMAT
    feature: str
    fingerprint: str
    rows: int
    """n."""
    content: str
    """Hash of which rows are in it and of what they hold."""
    kind: str
    effort: int
    """Lists that a search visits (ivf), or candidates that it follows (hnsw); 0: all of them."""
    recall: float
    """Share of the true ten nearest that were found, measured on queries from the set."""
    crc32c: int = 0
    """Of the index's file."""


class NeighborIndex:
    """Searches the samples of one feature; `open_index` makes it.

    Similarities are cosines. On a machine with a GPU flat and ivf indexes are searched there.
    """

    def __init__(self, feature: Feature, rows: Rows, index: Any, record: IndexRecord) -> None:
        self.rows, self.record = rows, record
        """Rows of the store that can be found, ascending int64 (n,)."""
        self._feature = feature
        _set_effort(index, record.kind, record.effort)  # which a copy on a GPU takes over
        self._here, self._index = index, _on_gpu(index, record)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        found = f", recall@{MEASURED_K} {self.record.recall:.3f}" if self.record.effort else ""
        return f"{self.record.kind} index of {len(self):,} x {self._feature.name}{found}"

    def search(self, queries: npt.ArrayLike, k: int) -> tuple[Rows, Vectors]:
        """The nearest samples of ``queries``, any float (q, D) of any length.

        Returns:
            Rows of the store int64 (q, k), the nearest first, -1 where there are fewer; and their
            cosines float32 (q, k), NaN there.

        Raises:
            InputError: another width, or values that are not finite.
        """
        wanted = _unit(np.asarray(queries))
        if wanted.ndim != 2 or wanted.shape[1] != self._index.d:
            raise InputError(
                f"queries of shape {wanted.shape} do not go with {self._feature.name}, whose "
                f"vectors have {self._index.d} values"
            )
        if not np.isfinite(wanted).all():
            raise InputError("a query holds values that are not finite")
        if k < 1:
            raise InputError(f"k must be 1 or more, got {k}")
        cosines, places = self._found(wanted, min(k, len(self.rows)))
        missing = places < 0
        rows = np.where(missing, -1, self.rows[np.maximum(places, 0)])
        cosines = np.where(missing, np.float32(np.nan), cosines.clip(-1, 1))
        short = k - rows.shape[1]
        if short > 0:
            rows = np.pad(rows, ((0, 0), (0, short)), constant_values=-1)
            cosines = np.pad(cosines, ((0, 0), (0, short)), constant_values=np.nan)
        return rows, cosines

    def _found(self, wanted: Vectors, k: int) -> tuple[Vectors, Rows]:
        """Cosines and places (q, k) from the index; many neighbours are sought in more places."""
        kind, effort = self.record.kind, self.record.effort
        most = _most_effort(self._here, kind)
        if not effort or k <= WIDE_K:
            searched = self._index if k <= MOST_ON_GPU else self._here
            cosines, places = searched.search(wanted, k)
        else:
            wider = effort * -(-k // WIDE_K)
            effort = min(wider if kind == "ivf" else max(wider, 2 * k), most)
            cosines, places = self._here.search(wanted, k, params=_params(kind, effort))
        while 0 < effort < most and (short := (places < 0).any(1)).any():
            effort = min(2 * effort, most)
            cosines[short], places[short] = self._here.search(
                wanted[short], k, params=_params(kind, effort)
            )
        return cosines, places

    def of_rows(self, rows: npt.ArrayLike, k: int) -> tuple[Rows, Vectors]:
        """The nearest *other* samples of rows of the store; see :meth:`search`.

        Raises:
            RowsNotDoneError: a row has no embedding.
        """
        wanted = np.asarray(rows, np.int64)
        found, cosines = self.search(self._feature.take(wanted), k + 1)
        # The row itself goes; where copies of it are so many that it was not found, the last does.
        own = found == wanted[:, None]
        own[~own.any(1), -1] = True
        own &= np.cumsum(own, axis=1) == 1
        shape = (len(wanted), k)
        return found[~own].reshape(shape), cosines[~own].reshape(shape)


def open_index(
    store: EmbeddingStore,
    feature: str,
    *,
    kind: Kind = "auto",
    report: Say = lambda line: None,
    progress: Progress = lambda stage, done, total: None,
) -> NeighborIndex:
    """The index of ``feature``: the one in the store if it is of today's samples, or a new one.

    Args:
        feature: ``alias/field``, one vector per sample.
        kind: ``flat`` compares with all; ``ivf`` looks into the nearest of many lists; ``hnsw``
            follows a graph: quickest for single queries, slowest to make. ``auto``: flat up to
            50,000 samples, then ivf.
        report: told a line where an index is made.
        progress: told (stage, samples done, all of them) then.

    Raises:
        InputError: no such feature, not one vector per sample, or no sample has it.
    """
    stored = store[feature]
    if len(stored.shape) != 2 or stored.dtype.kind != "f":
        raise InputError(
            f"{feature} is not one vector per sample; neighbours are searched among "
            f"{', '.join(vector_features(store)) or 'pooled fields, and there are none'}"
        )
    if kind not in ("auto", "flat", "ivf", "hnsw"):
        raise InputError(f"no index {kind!r}; choose from auto, flat, ivf, hnsw")
    rows = np.flatnonzero(stored.done & store.live)
    if not len(rows):
        raise InputError(f"no sample of {store.path} has {feature} yet; run `mmc extract`")
    if kind == "auto":
        kind = "flat" if len(rows) <= FLAT_ROWS else "ivf"
    asked = IndexRecord(
        feature=feature,
        fingerprint=stored.fingerprint,
        rows=len(rows),
        content=_content(store, stored, rows),
        kind=kind,
        effort=0,
        recall=1.0,
    )
    if kind == "flat":  # the store holds the vectors already
        index = faiss.IndexFlatIP(stored.shape[1])
        for block in _blocks(stored, rows):
            index.add(block)
            progress("read embeddings", index.ntotal, len(rows))
        return NeighborIndex(stored, rows, index, asked)
    kept = _read(store.files, asked)
    if kept is not None:
        return NeighborIndex(stored, rows, *kept)
    report(f"making an {kind} index of {len(rows):,} x {feature} (once; it is kept in the store)")
    index = _build(stored, rows, kind, progress)
    effort, recall = _tune(index, kind, stored, rows, progress)
    record = replace(asked, effort=effort, recall=round(recall, 4))
    try:
        _write(store.files, index, record)
    except MmcError as error:  # a store that is not ours to write can be searched all the same
        report(f"the index is not kept: {error}")
    found = NeighborIndex(stored, rows, index, record)
    report(str(found))
    return found


def vector_features(store: EmbeddingStore) -> list[str]:
    """Features of one float vector per sample: those that can be searched."""
    stored = [store[name] for name in store.features]
    return [f.name for f in stored if len(f.shape) == 2 and f.dtype.kind == "f" and f.shape[1] > 1]


def _content(store: EmbeddingStore, feature: Feature, rows: Rows) -> str:
    """Changes when a sample comes, goes, or is embedded anew because its content changed."""
    state = hashlib.blake2b(rows.tobytes(), digest_size=16)
    for content in TOWER_CONTENT[feature.tower]:
        keys = store.column(f"{content}_key").take(rows).combine_chunks()
        for buffer in keys.buffers():
            state.update(buffer or b"")
    return state.hexdigest()


def _blocks(feature: Feature, rows: Rows) -> Iterator[Vectors]:
    """The vectors of ``rows`` as float32 of length 1, some megabytes at a time.

    Those that are not finite are zeros, whose cosine to anything is 0.
    """
    step = max(1, BLOCK_BYTES // (4 * feature.shape[1]))
    for start in range(0, len(rows), step):
        block = _unit(feature.take(rows[start : start + step]))
        # One embedding that is not finite must not keep all others from being searched.
        block[~np.isfinite(block).all(1)] = 0
        yield block


def _unit(vectors: npt.NDArray[Any]) -> Vectors:
    """float32 of length 1; zeros stay zeros."""
    exact = np.ascontiguousarray(vectors, np.float32)
    if exact is vectors:
        exact = exact.copy()
    if exact.ndim == 2:
        faiss.normalize_L2(exact)
    return exact


def _build(feature: Feature, rows: Rows, kind: str, progress: Progress) -> Any:
    """An index that holds the vectors in float16, which costs no recall to speak of."""
    width = feature.shape[1]
    index: Any
    if kind == "hnsw":
        index = faiss.index_factory(width, f"HNSW{HNSW_LINKS},SQfp16", faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = HNSW_BUILD
        lists = 0
    else:
        # The power of two next to four roots: lists of some hundred vectors.
        lists = 2 ** round(math.log2(4 * math.sqrt(len(rows))))
        lists = max(1, min(lists, len(rows) // TRAIN_PER_LIST))
        index = faiss.index_factory(width, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
        # Of a small set there may be fewer samples per list than FAISS likes, and it says so.
        faiss.extract_index_ivf(index).cp.min_points_per_centroid = 1
    some = _spread(rows, max(1, lists) * TRAIN_PER_LIST)
    index.train(np.concatenate(list(_blocks(feature, some))))
    for block in _blocks(feature, rows):
        index.add(block)
        progress("index", index.ntotal, len(rows))
    return index


def _tune(
    index: Any, kind: str, feature: Feature, rows: Rows, progress: Progress
) -> tuple[int, float]:
    """The least effort that finds enough of the truth, and how much that is."""
    queries = np.concatenate(list(_blocks(feature, _spread(rows, SAMPLE))))
    k = min(MEASURED_K + 1, len(rows))

    def told() -> Iterator[Vectors]:
        done = 0
        for block in _blocks(feature, rows):
            yield block
            done += len(block)
            progress("measure the index", done, len(rows))

    _, truth = knn_ground_truth(queries, told(), k, metric_type=faiss.METRIC_INNER_PRODUCT, ngpu=0)
    most = index.nlist if kind == "ivf" else 1024
    effort, recall = 1 if kind == "ivf" else 16, 0.0
    while True:
        _set_effort(index, kind, effort)
        _, found = index.search(queries, k)
        hits = [len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]
        recall = float(np.mean(hits)) / k
        if recall >= GOAL or effort >= most:
            return effort, recall
        effort = min(2 * effort, most)


def _set_effort(index: Any, kind: str, effort: int) -> None:
    if kind == "ivf":
        index.nprobe = effort
    elif kind == "hnsw":
        index.hnsw.efSearch = effort


def _most_effort(index: Any, kind: str) -> int:
    """The effort with which everything is looked at."""
    if kind == "flat":
        return 0
    return int(index.nlist if kind == "ivf" else index.ntotal)


def _params(kind: str, effort: int) -> Any:
    made: Any = faiss  # whose types know neither class in full
    if kind == "ivf":
        return made.SearchParametersIVF(nprobe=effort)
    return made.SearchParametersHNSW(efSearch=effort)


def _on_gpu(index: Any, record: IndexRecord) -> Any:
    """The index on the GPUs, where there are any and they can search it."""
    if record.kind == "hnsw" or record.effort > MOST_ON_GPU or faiss.get_num_gpus() < 1:
        return index
    return faiss.index_cpu_to_all_gpus(index)


def _spread(rows: Rows, count: int) -> Rows:
    """``count`` of the rows at most, drawn evenly, always the same."""
    if len(rows) <= count:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, count, replace=False))


def _keys(record: IndexRecord) -> tuple[str, str]:
    name = f"{INDEX}/{record.feature}.{record.kind}"
    return f"{name}.faiss", f"{name}.json"


def _write(files: Files, index: Any, record: IndexRecord) -> None:
    """Keep an index in the store; its record last, for without one there is none."""
    data = faiss.serialize_index(index)
    index_key, record_key = _keys(record)
    files.remove(record_key)
    files.write(index_key, [data])
    checksum = 0
    for start in range(0, len(data), BLOCK_BYTES):  # a gigabyte is not copied in one piece
        checksum = google_crc32c.extend(checksum, data[start : start + BLOCK_BYTES].tobytes())
    record = replace(record, crc32c=checksum)
    files.write(record_key, [json.dumps(asdict(record), indent=2).encode()])


def _read(files: Files, asked: IndexRecord) -> tuple[Any, IndexRecord] | None:
    """The kept index if it is of these vectors and whole, else None."""
    index_key, record_key = _keys(asked)
    raw = files.read(record_key)
    if raw is None:
        return None
    try:
        record = IndexRecord(**json.loads(raw))
    except (ValueError, TypeError, RecursionError):  # of another version, or damaged: made anew
        return None
    if not isinstance(record.effort, int) or record.effort < 1:
        return None
    same = ("format", "feature", "fingerprint", "rows", "content", "kind")
    if any(getattr(record, name) != getattr(asked, name) for name in same):
        return None
    data = files.read(index_key)
    if data is None or google_crc32c.value(data) != record.crc32c:
        return None
    try:
        return faiss.deserialize_index(np.frombuffer(data, np.uint8)), record
    except RuntimeError:  # written by a FAISS that this one does not read
        return None
