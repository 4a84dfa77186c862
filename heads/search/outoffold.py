"""What heads say of samples that they have not seen, as a file of a run.

``out_of_fold.parquet``: id (string), fold (int16, from 0), labels (list of int32, places in the
run's label set; null where unknown), unknown_labels (the same, of single labels that are unknown;
null where none is; only where there are any), logits (C float32 in a list of fixed size), a row per
sample in the order of the store.

Legend: n samples, C labels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mmc.heads.runfiles import OUT_OF_FOLD, write_atomic
from mmc.heads.temperature import probabilities
from mmc.store.errors import InputError, MmcError
from mmc.store.samples import UNKNOWN

if TYPE_CHECKING:
    from mmc.heads.artifact import Run


@dataclass(frozen=True, kw_only=True)
class OutOfFold:
    """Every labelled sample of train and val once, in the order of the store."""

    ids: pa.StringArray
    fold: Tensor
    """int64 (n,): the fold that it was held out with, from 0."""
    logits: Tensor
    """float32 (n, C), by the head that was trained on the other folds."""
    targets: Tensor
    """int8 (n, C) in {-1, 0, 1} for multilabel, else the class as int64 (n,)."""
    task: str
    temperature: float = 1.0
    """The run's, which fits these logits."""

    @property
    def probabilities(self) -> Tensor:
        """float32 (n, C)."""
        return probabilities(self.logits, self.task, self.temperature)

    def save(self, folder: Path) -> None:
        """Write the file, whole or not at all."""
        width = self.logits.shape[1]
        flat = pa.array(self.logits.contiguous().view(-1).numpy())
        columns = {
            "id": self.ids,
            "fold": pa.array(self.fold.numpy().astype(np.int16)),
            "labels": _lists(self.targets),
        }
        unknown = _unknown(self.targets)
        if unknown is not None:
            columns[UNKNOWN.name] = unknown
        columns["logits"] = pa.FixedSizeListArray.from_arrays(flat, width)
        table = pa.table(columns)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        write_atomic(folder / OUT_OF_FOLD, sink.getvalue().to_pybytes())

    @classmethod
    def load(cls, run: "Run") -> "OutOfFold":
        """What a run holds; see `mmc.heads.artifact.Run.out_of_fold`."""
        path = None if run.path is None else run.path / OUT_OF_FOLD
        if path is None or not path.exists():
            raise InputError(
                f"{run.path or 'this run'} has no out-of-fold predictions: train it with --folds 5"
            )
        try:
            table = pq.read_table(path).combine_chunks()
            labels = table["labels"].combine_chunks()
            unknown = None
            if UNKNOWN.name in table.column_names:
                unknown = table[UNKNOWN.name].combine_chunks()
            flat = table["logits"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            logits = torch.from_numpy(flat.reshape(-1, len(run.label_set)).copy())
            return cls(
                ids=table["id"].combine_chunks(),
                fold=torch.from_numpy(table["fold"].to_numpy().astype(np.int64)),
                logits=logits,
                targets=_targets(labels, unknown, len(run.label_set), run.task),
                task=run.task,
                temperature=run.temperature,
            )
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise MmcError(f"{path} is damaged ({error}); train with --folds again") from None


def _lists(targets: Tensor) -> pa.ListArray:
    """Targets as lists of labels, null where a row is unknown."""
    if targets.ndim == 1:
        counts, flat = (targets >= 0).long(), targets[targets >= 0]
        known = targets >= 0
    else:
        counts, flat = (targets == 1).sum(1), (targets == 1).nonzero()[:, 1]
        known = (targets >= 0).any(1)
    return _list_array(counts, flat, known)


def _unknown(targets: Tensor) -> pa.ListArray | None:
    """The unknown labels of rows of which others are known; None: there are none."""
    if targets.ndim == 1:
        return None
    lacking = (targets < 0) & (targets >= 0).any(1, keepdim=True)
    counts = lacking.sum(1)
    return _list_array(counts, lacking.nonzero()[:, 1], counts > 0) if counts.any() else None


def _list_array(counts: Tensor, flat: Tensor, known: Tensor) -> pa.ListArray:
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int().numpy()
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(flat.int().numpy()), mask=pa.array(~known.numpy())
    )


def _places(labels: pa.ListArray) -> tuple[Tensor, Tensor]:
    """(row, label) of each entry."""
    counts = labels.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    rows = torch.from_numpy(np.repeat(np.arange(len(labels)), counts))
    values = labels.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    return rows, torch.from_numpy(values)


def _targets(labels: pa.ListArray, unknown: pa.ListArray | None, width: int, task: str) -> Tensor:
    """What `_lists` and `_unknown` were made from."""
    n = len(labels)
    known = torch.from_numpy(labels.is_valid().to_numpy(zero_copy_only=False))
    rows, columns = _places(labels)
    if task == "multilabel":
        targets = torch.zeros(n, width, dtype=torch.int8)
        targets[rows, columns] = 1
        if unknown is not None:
            targets[_places(unknown)] = -1
        targets[~known] = -1
        return targets
    classes = torch.full((n,), -1)
    classes[rows] = columns
    return classes
