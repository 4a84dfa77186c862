"""From a run and a store to logits, probabilities, decisions and a CSV file, in bounded memory.

Legend: n rows, C labels.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from mmc.heads import checks, formats
from mmc.heads.artifact import Run
from mmc.heads.batches import BLOCK_ROWS, READERS, Preparer, reading_threads
from mmc.heads.devices import pick_device
from mmc.heads.models.base import Batch
from mmc.heads.options import PredictConfig
from mmc.heads.ranking import top_k_mask
from mmc.heads.temperature import probabilities
from mmc.heads.thresholds import decide
from mmc.store.errors import InputError

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

Rows = npt.NDArray[np.int64]
Progress = Callable[[str, int, int], None]
"""Told (stage, samples done, samples in all)."""

# A batch is as large as fits here, counting what the head reads and what it gives, in float32.
BLOCK_BYTES = 256 << 20
MAX_BATCH = 65_536


@dataclass(frozen=True)
class Predictions:
    """What a head says about n samples, in the order they were asked for."""

    ids: pa.StringArray
    logits: Tensor
    """float32 (n, C), NaN where ``ok`` is False."""
    probabilities: Tensor
    """float32 (n, C), NaN where ``ok`` is False."""
    decisions: Tensor
    """bool (n, C), False where ``ok`` is False."""
    ok: Tensor
    """bool (n,): the features of the row were there."""


class Predictor:
    """A run's head on a device, reading one store.

    Raises:
        InputError, FingerprintMismatchError: the store has not the features of the run.
    """

    def __init__(
        self,
        run: Run,
        store: "EmbeddingStore",
        *,
        device: str | torch.device = "auto",
        batch_bytes: int | None = None,
    ) -> None:
        self.run, self.store = run, store
        self.features = {role: store[name] for role, name in run.resolve_features(store).items()}
        self._done = np.logical_and.reduce([f.done for f in self.features.values()])
        self.device = pick_device(str(device))
        self.head = run.build_head(self.device)
        width = sum(int(np.prod(f.shape[1:])) for f in self.features.values())
        row_bytes = 4 * (width + 4 * len(run.label_set))
        self.batch = max(1, min(MAX_BATCH, (batch_bytes or BLOCK_BYTES) // row_bytes))

    def done(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Which of ``rows`` hold every feature that the head reads: bool (n,)."""
        done: npt.NDArray[np.bool_] = self._done[rows]
        return done

    def logits(self, rows: Rows) -> Tensor:
        """float32 (n, C) on the device; every row must be done."""
        return self.over(rows, self.head.score, len(self.run.label_set))

    @torch.no_grad()
    def over(self, rows: Rows, function: Callable[[Batch], Tensor], width: int) -> Tensor:
        """``function`` of what the head prepares of ``rows``, by batches: float32 (n, width)."""
        out = torch.empty(len(rows), width, device=self.device)
        step = min(self.batch, BLOCK_ROWS)
        with reading_threads() as pool:
            for i in range(0, len(rows), step):
                out[i : i + step] = function(self._prepared(rows[i : i + step], pool))
        return out

    def _prepared(self, rows: Rows, pool: ThreadPoolExecutor) -> Batch:
        """What the head prepares of ``rows``."""
        preparer = Preparer(self.head, self.device, torch.float32)
        room = preparer.room(len(rows), self._read(rows[:1]))
        step = -(-len(rows) // READERS)

        def prepare(start: int) -> None:
            preparer.put(self._read(rows[start : start + step]), room, start)

        list(pool.map(prepare, range(0, len(rows), step)))
        return room

    def _read(self, rows: Rows) -> Batch:
        """The stored fields of ``rows``."""
        return {
            role: torch.from_numpy(feature.take(rows, check=True))
            for role, feature in self.features.items()
        }


def logits(
    run: Run,
    store: "EmbeddingStore",
    rows: Rows,
    *,
    device: str | torch.device = "auto",
) -> Tensor:
    """Logits float32 (n, C) of ``rows`` on the device; refuses other features than the run's.

    Raises:
        RowsNotDoneError: a row holds no features.
    """
    return Predictor(run, store, device=device).logits(np.asarray(rows, dtype=np.int64))


def predict(
    run: Run,
    store: "EmbeddingStore",
    rows: Rows | None = None,
    config: PredictConfig | None = None,
) -> Predictions:
    """Predictions for ``rows`` in their order (default: every sample), of ``config.split`` if set.

    All in memory; `predict_blocks` is for more samples than that.
    """
    config = config or PredictConfig()
    rows = select_rows(store, rows, None if config.split == "all" else config.split)
    parts = list(predict_blocks(run, store, rows, config))
    ids = pa.concat_arrays([part.ids for part in parts])
    tensors = ([getattr(p, name) for p in parts] for name in _TENSORS)
    return Predictions(ids, *(torch.cat(column) for column in tensors))


_TENSORS = ("logits", "probabilities", "decisions", "ok")


def predict_blocks(
    run: Run,
    store: "EmbeddingStore",
    rows: Rows,
    config: PredictConfig,
    progress: Progress | None = None,
) -> Iterator[Predictions]:
    """Predictions for ``rows`` in blocks, on the CPU."""
    predictor = Predictor(run, store, device=config.device)
    ids = store.column("id").combine_chunks().cast(pa.string())
    for i in range(0, max(len(rows), 1), predictor.batch):
        taken = rows[i : i + predictor.batch]
        ok = predictor.done(taken)
        scores = predictor.logits(taken[ok])
        p = probabilities(scores, run.task, run.temperature)
        chosen = _choose(p, scores, run, config)
        mask = torch.from_numpy(ok)
        yield Predictions(
            ids.take(pa.array(taken)),
            _spread(scores, mask, torch.nan),
            _spread(p, mask, torch.nan),
            _spread(chosen, mask, False),
            mask,
        )
        if progress:
            progress("predict", i + len(taken), len(rows))


def select_rows(store: "EmbeddingStore", rows: Rows | None, split: str | None) -> Rows:
    """``rows`` in their order (default: every sample of the store), those of ``split`` if given.

    Raises:
        InputError: no sample is left.
    """
    wanted = store.rows() if rows is None else np.asarray(rows, dtype=np.int64)
    if split is not None:
        wanted = wanted[np.isin(wanted, store.rows(split=split))]
    if not len(wanted):
        splits = sorted({s for s in store.column("split").to_pylist() if s})
        has = f"its splits: {', '.join(splits)}" if splits else "it has no splits"
        what = f"no samples in split {split!r} ({has})" if split else "no samples"
        raise InputError(f"{store.path} has {what}")
    return wanted


@dataclass(frozen=True)
class PredictionReport:
    """What `predict_csv` wrote."""

    path: Path
    form: str
    split: str | None
    """None: all samples that were asked for."""
    rows: int
    failed: int
    """Rows whose features were not there: written with empty labels."""
    checks: list[checks.Check]

    @property
    def ok(self) -> bool:
        """Every check passed."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        """What was written, then a line per check."""
        what = f" of split {self.split}" if self.split else ""
        head = f"{self.path}: {self.rows:,} samples{what}, format {self.form}"
        return "\n".join([head, *(f"  {check}" for check in self.checks)])


def predict_csv(
    run: Run,
    store: "EmbeddingStore",
    out: str | Path,
    config: PredictConfig | None = None,
    *,
    rows: Rows | None = None,
    progress: Progress | None = None,
) -> PredictionReport:
    """Predict, write the CSV file (whole or not at all), then check what is on disk.

    Without ``rows`` and ``config.split``: the test split where there is one, else every sample;
    split "all" is every sample.

    Raises:
        InputError: no samples, other features, or a form that cannot hold the task.
    """
    config = config or PredictConfig()
    if config.top_k is not None and config.top_k > len(run.label_set):
        raise InputError(f"--top-k {config.top_k}: the run has {len(run.label_set)} labels")
    split = config.split
    if split is None and rows is None:
        split = default_split(store)
    elif split == "all":
        split = None
    rows = select_rows(store, rows, split)
    layout = formats.choose(
        config.form,
        run,
        _source(store, rows),
        scores=config.scores,
        top_k=config.top_k,
    )
    failed = []

    def blocks() -> Iterator[Predictions]:
        for block in predict_blocks(run, store, rows, config, progress):
            failed.append(~block.ok.numpy())
            yield block

    path = formats.write(blocks(), out, layout)
    lost = np.concatenate(failed)
    ids = store.column("id").combine_chunks().cast(pa.string()).take(pa.array(rows))
    found = checks.check_file(
        path,
        layout,
        ids=ids,
        failed=lost,
        truth=_truth(run, store, rows),
        reference=run.metrics.get("val"),
        top_k=config.top_k,
    )
    return PredictionReport(path, layout.form, split, len(rows), int(lost.sum()), found)


def default_split(store: "EmbeddingStore", rows: Rows | None = None) -> str | None:
    """What to predict when nobody says: the test split where ``rows`` have any of it, else all."""
    tests = store.rows(split="test")
    found = len(tests) if rows is None else np.isin(rows, tests).any()
    return "test" if found else None


def aligned_targets(run: Run, store: "EmbeddingStore", rows: Rows) -> Tensor:
    """Truth of ``rows`` in the run's label order: int8 (n, C) in {-1, 0, 1}, -1 for unknown rows.

    A label of the run that the store lacks is no to rows with lists of labels, and unknown to rows
    of a table with a column for each label.

    Raises:
        InputError: the store has a label that the run does not know.
    """
    run.check_labels(store.label_set, store.path)
    known = torch.from_numpy(np.ascontiguousarray(store.labels.multi_hot(rows)))
    if tuple(store.label_set) == run.label_set:
        return known
    place = {label: i for i, label in enumerate(run.label_set)}
    out = torch.zeros(len(rows), len(run.label_set), dtype=torch.int8)
    if len(store.label_set):
        out[torch.from_numpy(_by_columns(store, rows))] = -1
        out[:, [place[label] for label in store.label_set]] = known
        out[(known < 0).all(1)] = -1
    else:
        out[:] = -1
    return out


def _by_columns(store: "EmbeddingStore", rows: Rows) -> npt.NDArray[np.bool_]:
    """(n,) whether the labels of each row came from columns of one label each."""
    by = [
        source.get("options", {}).get("label_column") not in (None, "-")
        and source.get("columns", {}).get("labels") is None
        for source in store.sources
    ]
    if not any(by):
        return np.zeros(len(rows), bool)
    return np.array(by)[store.column("_source").to_numpy()[rows]]


def _truth(
    run: Run, store: "EmbeddingStore", rows: Rows
) -> Callable[[int, int], npt.NDArray[np.int8]] | None:
    """Reads the truth of a range of ``rows``; None when the store's labels are not the run's."""
    if not set(store.label_set) <= set(run.label_set) or not store.labels.known[rows].any():
        return None
    return lambda start, stop: aligned_targets(run, store, rows[start:stop]).numpy()


def _choose(p: Tensor, scores: Tensor, run: Run, config: PredictConfig) -> Tensor:
    if config.top_k is not None:
        return top_k_mask(scores, config.top_k)
    return decide(p, run.task, run.thresholds, at_least_one=config.at_least_one)


def _spread(values: Tensor, ok: Tensor, fill: float | bool) -> Tensor:
    """Rows (k, C) back to their places among n rows, ``fill`` elsewhere; on the CPU."""
    out = torch.full((len(ok), values.shape[1]), fill, dtype=values.dtype)
    out[ok] = values.cpu()
    return out


def _source(store: "EmbeddingStore", rows: Rows) -> dict[str, Any]:
    """Recipe of the source that the first of ``rows`` came from."""
    if not len(store.sources):
        return {}
    index = store.column("_source").combine_chunks()[int(rows[0])].as_py()
    return dict(store.sources[index])
