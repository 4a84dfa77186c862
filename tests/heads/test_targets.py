"""Targets of large sets: kept sparse, the same batch by batch and in the end."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmc.heads import splits, targets
from mmc.heads.options import TrainConfig
from mmc.heads.targets import (
    DenseTargets,
    SparseTargets,
    as_targets,
    load_targets,
    nbytes_of,
)
from mmc.heads.training import Setup
from mmc.store.samples import Labels

CPU = torch.device("cpu")
HOT = hnp.arrays(
    np.int8, st.tuples(st.integers(1, 9), st.integers(1, 6)), elements=st.sampled_from([-1, 0, 1])
)


@settings(max_examples=60, deadline=None)
@given(hot=HOT, data=st.data())
def test_rows_are_those_of_the_table(hot: np.ndarray, data: st.DataObject) -> None:
    labels = Labels.of_hot(hot)
    known = np.flatnonzero(labels.known)
    table = torch.from_numpy(hot[known])
    index = st.lists(st.integers(0, len(known) - 1)) if len(known) else st.just([])
    index = torch.tensor(data.draw(index), dtype=torch.int64)
    for kept in (SparseTargets(labels, known, CPU), DenseTargets(table)):
        assert len(kept) == len(known)
        assert torch.equal(kept.rows(index), table[index])
        assert torch.equal(kept.whole(), table)
        room = kept.room(len(index) + 1).fill_(7)
        assert kept.rows(index, room[1:]).dtype == torch.float32
        assert torch.equal(room[1:], table[index].float())
        assert (room[0] == 7).all()


def test_classes_stay_numbers() -> None:
    kept = as_targets(torch.tensor([2, 0, 1]))
    assert kept.rows(torch.tensor([2, 0])).tolist() == [1, 2]
    assert kept.room(4).dtype == torch.int64
    assert as_targets(kept) is kept


@pytest.mark.parametrize("unknown", [0, 3, 40])
def test_large_sets_are_sparse_where_that_is_smaller(unknown: int) -> None:
    n, width = 60_000, 5_000
    draw = np.random.default_rng(0)

    def rows(count: int) -> tuple[np.ndarray, np.ndarray]:
        wanted = np.sort(draw.choice(width, count, replace=False)).astype(np.int32)
        return np.arange(n + 1) * len(wanted), np.tile(wanted, n)

    labels = Labels(*rows(4), np.ones(n, bool), width)
    if unknown:
        labels = replace(labels, **dict(zip(UNKNOWN, rows(unknown), strict=True)))
    store: Any = SimpleNamespace(labels=labels, label_set=range(width), task="multilabel")
    kept = load_targets(store, np.arange(n), CPU)
    assert isinstance(kept, SparseTargets)
    assert kept.nbytes == nbytes_of(store, np.arange(n)) < n * width / 20
    few = np.arange(100)
    assert isinstance(load_targets(store, few, CPU), DenseTargets)
    assert nbytes_of(store, few) == 100 * width


UNKNOWN = ("unknown_indptr", "unknown_indices")


def test_labels_that_are_mostly_unknown_stay_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "MOST_DENSE", 0)
    hot = np.full((50, 20), -1, np.int8)
    hot[:, 0] = 1
    store: Any = SimpleNamespace(labels=Labels.of_hot(hot), label_set=range(20), task="multilabel")
    assert isinstance(load_targets(store, np.arange(50), CPU), DenseTargets)


@pytest.mark.parametrize("unknown", [0.0, 0.3])
def test_a_training_ends_with_the_same_bits(
    unknown: float, make_store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(n=200, unknown=unknown)
    config = TrainConfig(
        head="linear", device="cpu", epochs=3, batch_size=32, precision="float32", lr=0.01
    )
    ended = []
    for sparse in (False, True):
        monkeypatch.setattr(targets, "MOST_DENSE", 0 if sparse else 1 << 28)
        monkeypatch.setattr(targets, "_sparse_bytes", lambda labels, rows: 0)
        for streamed in (False, True):
            setup = Setup(store, config)
            head, loss = setup.build()
            place = setup.place(head)
            if streamed:
                rows = len(setup.splits.train)
                place = replace(place, window_rows=rows, val_streamed=True)
            data = setup.load(head, place)
            assert data.train is not None
            for part in (data.train, data.val):
                assert isinstance(part.targets, SparseTargets) == sparse
            setup.fit(head, loss, None, place, lambda *_: None)
            ended.append(head.state_dict())
    for state in ended[1:]:
        for key, value in state.items():
            assert torch.equal(value, ended[0][key]), key


def test_what_is_hashed_does_not_depend_on_the_blocks(
    make_store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(unknown=0.2)
    chosen = splits.choose(store, ("clip/image",), trains=True)
    rows = chosen.test
    truth = splits.targets(store, rows)
    before = splits.digest(chosen, store), splits.rows_digest(store, rows, truth)
    monkeypatch.setattr(splits, "BLOCK_ENTRIES", 12)
    assert (splits.digest(chosen, store), splits.rows_digest(store, rows, truth)) == before


def test_the_hash_of_a_large_set_tells_every_label(
    make_store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splits, "MOST_WRITTEN", 0)
    store = make_store(unknown=0.2)
    chosen = splits.choose(store, ("clip/image",), trains=True)
    hot = store.labels.multi_hot()
    found = {splits.digest(chosen, store)}
    row = int(chosen.train[1])
    for value in {-1, 0, 1} - {int(hot[row, 0])}:
        other = hot.copy()
        other[row, 0] = value
        monkeypatch.setattr(store, "_labels", Labels.of_hot(other))
        found.add(splits.digest(chosen, store))
    assert len(found) == 3
