"""Which rows train, validate and test a head, and what is left out and why."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from mmc.heads import leakage
from mmc.store.errors import InputError
from mmc.store.holdout import held_out, names_of

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

BLOCK_ENTRIES = 1 << 26
"""Labels of rows that are written out at a time to be hashed."""
MOST_WRITTEN = 1 << 28
"""Of more rows x labels the compressed rows are hashed: writing out 10^10 takes long."""

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Ascending store rows, labelled and done in every feature that the head reads."""

    train: Rows
    val: Rows
    test: Rows
    notes: list[str] = field(default_factory=list)
    """Lines to say aloud: what was left out, what was decided."""
    seen: dict[str, dict[str, int]] = field(default_factory=dict)
    """val and test -> content -> how many of its rows share it with a training row."""


def choose(store: "EmbeddingStore", features: Sequence[str], *, trains: bool) -> Splits:
    """The rows of each split.

    Without usable ``val`` rows a tenth of the training rows validates, chosen by a hash of the id
    (of the picture where several samples share one) so that it stays the same when samples are
    added. Rows without any split train when no row is
    marked ``train``.

    Args:
        trains: False for a head that trains nothing: it needs no training rows.

    Raises:
        InputError: nothing to train or to validate on.
    """
    notes: list[str] = []
    marked = "train" if len(store.rows(split="train")) else ""
    rows = {
        name: _usable(store, features, split, name, notes)
        for name, split in (("train", marked), ("val", "val"), ("test", "test"))
    }
    meant = store.rows(split="val")
    if trains and len(meant) and _waiting(store, features, meant) == len(meant):
        raise InputError(
            f"none of the {len(meant):,} val samples of {store.path} is embedded yet; run the same "
            "`mmc extract` again to finish it"
        )
    if marked == "" and len(rows["train"]):
        notes.append("no row is marked train: rows without a split are used for training")
    if not len(rows["val"]) and len(rows["train"]):
        held = _held_out(store, rows["train"])
        why = "no usable val rows" if len(store.rows(split="val")) else "no val split"
        rows["train"], rows["val"] = rows["train"][~held], rows["train"][held]
        notes.append(
            f"{why}: {len(rows['val']):,} of {held.size:,} training rows (by a hash of their id) "
            "are held out for validation"
        )
    for name in ("train", "val"):
        if not len(rows[name]) and trains:
            raise InputError(_empty(store, features, name, marked))
    seen = _seen(store, features, rows, notes) if trains else {}
    return Splits(**rows, notes=notes, seen=seen)


def _seen(
    store: "EmbeddingStore", features: Sequence[str], rows: dict[str, Rows], notes: list[str]
) -> dict[str, dict[str, int]]:
    """What `leakage` finds in val and test; says it of the one that tells how good the head is."""
    seen = {
        name: leakage.also_in_train(store, features, rows["train"], rows[name])
        for name in ("val", "test")
        if len(rows[name])
    }
    name = "test" if "test" in seen else "val"
    what = leakage.described(seen[name])
    if what:
        notes.append(
            f"warning: of {len(rows[name]):,} {name} samples {what}: new samples may do worse than "
            "the figures (`mmc extract --dedupe` drops samples that share both picture and text)"
        )
    near = leakage.near_in_train(store, features, rows["train"], rows[name])
    if near:
        notes.append(
            f"warning: {near:,} of {len(rows[name]):,} {name} samples are near-identical to a "
            "training sample by every embedding; `mmc labels` lists near duplicates"
        )
    return seen


def targets(store: "EmbeddingStore", rows: Rows) -> Tensor:
    """Multilabel: int8 (n, C); otherwise the class as int64 (n,). Rows must be labelled."""
    if store.task == "multilabel":
        return torch.from_numpy(np.ascontiguousarray(store.labels.multi_hot(rows)))
    labels = store.labels
    return torch.from_numpy(labels.indices[labels.indptr[rows]].astype(np.int64))


def label_rows(store: "EmbeddingStore", rows: Rows) -> tuple[Rows, Rows]:
    """Row i of ``rows`` has the labels ``indices[indptr[i]:indptr[i + 1]]``, int64."""
    indptr, indices = store.labels.given(rows)
    return indptr, indices.astype(np.int64)


def digest(splits: Splits, store: "EmbeddingStore") -> str:
    """Hash of the rows that decide the parameters, and of their labels."""
    state = hashlib.blake2b(digest_size=16)
    step = max(1, BLOCK_ENTRIES // max(len(store.label_set), 1))
    for rows in (splits.train, splits.val):
        state.update(len(rows).to_bytes(8, "little"))
        state.update(np.ascontiguousarray(rows).tobytes())
        if len(rows) * len(store.label_set) > MOST_WRITTEN:
            for array in (*store.labels.given(rows), *store.labels.unknown(rows)):
                state.update(array.tobytes())
            continue
        for start in range(0, len(rows), step):
            state.update(targets(store, rows[start : start + step]).numpy().tobytes())
    return state.hexdigest()


def rows_digest(store: "EmbeddingStore", rows: Rows, truth: Tensor) -> str:
    """Hash of which samples these are and what is true of them, whatever their order.

    Args:
        truth: of ``rows``: int8 (n, C), or classes int64 (n,).
    """
    ids = store.column("id").take(pa.array(rows))
    order = pc.sort_indices(ids).to_numpy()
    state = hashlib.blake2b(digest_size=16)
    state.update("\0".join(ids.take(pa.array(order)).to_pylist()).encode())
    known = truth.cpu().numpy()
    step = max(1, BLOCK_ENTRIES // max(known[:1].size, 1))
    for start in range(0, len(order), step):
        state.update(known[order[start : start + step]].tobytes())
    return state.hexdigest()


def _usable(
    store: "EmbeddingStore", features: Sequence[str], split: str, name: str, notes: list[str]
) -> Rows:
    """Rows of a split that can be used; says what is left out."""
    everything = store.rows(split=split)
    done = store.rows(split=split, features=list(features))
    labelled = store.labels.known[done]
    if store.task in ("binary", "multiclass"):
        labelled &= np.diff(store.labels.indptr)[done] == 1
    waiting = _waiting(store, features, everything)
    not_done, unlabelled = len(everything) - len(done) - waiting, int((~labelled).sum())
    left_out = [
        f"{count:,} {what}"
        for count, what in ((not_done, "without features"), (unlabelled, "without labels"))
        if count
    ]
    if waiting:
        notes.append(
            f"warning: {waiting:,} of {len(everything):,} {name} rows are not embedded yet and are "
            "left out; finish `mmc extract`"
        )
    if left_out and (name != "test" or not_done):
        notes.append(f"{name}: {' and '.join(left_out)} of {len(everything):,} rows are left out")
    rows: Rows = done[labelled]
    return rows


def _waiting(store: "EmbeddingStore", features: Sequence[str], rows: Rows) -> int:
    """How many of ``rows`` no extraction has come to yet; failed ones are done with."""
    missing = np.zeros(len(rows), bool)
    for name in features:
        feature = store[name]
        missing |= store.status(feature.alias, feature.tower)[rows] == 0
    return int(missing.sum())


def _held_out(store: "EmbeddingStore", rows: Rows) -> npt.NDArray[np.bool_]:
    """Mask of ``rows`` that validate; samples of one picture stay on one side."""
    return held_out(names_of(store.column("id"), store.column("image_key"), rows))


def _empty(store: "EmbeddingStore", features: Sequence[str], name: str, marked: str) -> str:
    """Why there is nothing in a split."""
    split = {"train": marked}.get(name, name)
    total = len(store.rows(split=split))
    done = len(store.rows(split=split, features=list(features)))
    if not total:
        why = "no rows"
    elif not done:
        why = f"{total:,} rows, none with {', '.join(features)} (`mmc extract` makes them)"
    else:
        why = f"{total:,} rows, none of them labelled and with features"
    if name == "val":
        why = f"{why}, and too few training rows to hold some out"
    return f"{store.path}: nothing to {'train' if name == 'train' else 'validate'} on: {why}"
