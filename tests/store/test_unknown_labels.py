"""Samples of which some labels are known and others not, as a store keeps them."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmc.store import EmbeddingStore, Labels
from mmc.store.chain.step import store_state
from mmc.store.errors import DamagedStoreError, FormatVersionError, InputError
from mmc.store.samples import SamplesFile, canonical, check_meta, settled, with_internal
from mmc.store.schema import check_format
from mmc.store.showing import format_summary
from mmc.store.sync import merge
from mmc.store.testing import LABELS, SOURCE, samples_table
from mmc.store.verify import compact, verify

Hot = npt.NDArray[np.int8]

HOT = hnp.arrays(
    np.int8,
    st.tuples(st.integers(1, 7), st.integers(1, 4)),
    elements=st.sampled_from([-1, 0, 1]),
)


def lists(hot: Hot, value: int) -> pa.Array:
    cells = [np.flatnonzero(row == value).tolist() for row in hot]
    return pa.array(cells, pa.list_(pa.int32()))


def table_of(hot: Hot, numbers: Any = None, **columns: Any) -> pa.Table:
    """Labels as a source may give them: also for rows of which nothing is known."""
    numbers = range(len(hot)) if numbers is None else numbers
    data = {"labels": lists(hot, 1), "unknown_labels": lists(hot, -1), **columns}
    return samples_table(numbers, **data)


def names_of(count: int) -> list[str]:
    return [f"x{number}" for number in range(count)]


def create(path: Path, hot: Hot, **changes: Any) -> EmbeddingStore:
    arguments = {"label_set": LABELS[: hot.shape[1]], "task": "multilabel", "source": SOURCE}
    return EmbeddingStore.create(path / "s", table_of(hot), **{**arguments, **changes})


def sync(store: EmbeddingStore, table: pa.Table, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"label_set": LABELS, "task": "multilabel", "source": SOURCE}
    return store.sync(table, **{**arguments, **changes})


@settings(max_examples=80, deadline=None)
@given(hot=HOT, data=st.data())
def test_columns_and_compressed_rows_give_the_labels_back(hot: Hot, data: st.DataObject) -> None:
    gone = np.array(data.draw(st.lists(st.booleans(), min_size=len(hot), max_size=len(hot))))
    meta = check_meta(names_of(hot.shape[1]), "multilabel", SOURCE)
    table = canonical(table_of(hot), meta)
    unknown = table["unknown_labels"] if "unknown_labels" in table.column_names else None
    assert (unknown is None) == (not ((hot < 0) & (hot >= 0).any(1, keepdims=True)).any())
    given_labels, lacking = table["labels"].to_pylist(), (unknown or [None] * len(hot))
    for cell, row, left in zip(given_labels, hot, lacking, strict=True):
        assert (cell is None) == (row < 0).all()
        assert left is None or left.as_py() is None or 0 < len(left.as_py()) < len(row)
    expected = np.where(gone[:, None], -1, hot).astype(np.int8)
    rows = data.draw(st.none() | st.lists(st.integers(0, len(hot) - 1)))
    part = expected if rows is None else expected[rows]
    for labels in (
        Labels.of(table["labels"], gone, hot.shape[1], unknown),
        Labels.of_hot(expected),
    ):
        np.testing.assert_array_equal(labels.multi_hot(rows), part)
        np.testing.assert_array_equal(labels.counts(rows), (part == 1).sum(0))
        np.testing.assert_array_equal(labels.known_counts(rows), (part >= 0).sum(0))
        np.testing.assert_array_equal(labels.known, (expected >= 0).any(1))
        indptr, indices = labels.unknown(rows)
        found = [indices[a:b].tolist() for a, b in itertools.pairwise(indptr)]
        kept = (part < 0) & (part >= 0).any(1, keepdims=True)
        assert found == [np.flatnonzero(row).tolist() for row in kept]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_merge_equals_a_loop(data: st.DataObject) -> None:
    """One source, synced twice, the label set in another order: each cell keeps its meaning."""
    width = data.draw(st.integers(1, 4))
    shape = st.tuples(st.integers(1, 5), st.just(width))
    entries = st.sampled_from([-1, 0, 1])
    before, after = (data.draw(hnp.arrays(np.int8, shape, elements=entries)) for _ in range(2))
    ids = [
        data.draw(st.lists(st.integers(0, 8), min_size=len(x), max_size=len(x), unique=True))
        for x in (before, after)
    ]
    names = names_of(width)
    order = data.draw(st.permutations(names))
    metas = check_meta(names, "multilabel", SOURCE), check_meta(order, "multilabel", SOURCE)
    old = canonical(table_of(before, ids[0]), metas[0])
    old = with_internal(old, np.zeros(len(before), np.int16), np.zeros(len(before), bool))
    moved = after[:, [names.index(name) for name in order]]
    old, described = settled(old, metas[0])
    merged = merge(old, described, canonical(table_of(moved, ids[1]), metas[1]), metas[1])

    pairs = dict(zip(ids[0], before, strict=True))
    model = pairs | dict(zip(ids[1], after, strict=True))
    table = merged.table
    unknown = table["unknown_labels"] if "unknown_labels" in table.column_names else None
    gone = np.zeros(len(table), bool)
    hot = Labels.of(table["labels"], gone, width, unknown).multi_hot()
    hot = hot[:, [merged.meta.label_set.index(name) for name in names]]
    for number, row in zip(table["id"].to_pylist(), hot, strict=True):
        assert row.tolist() == model[int(number[1:])].tolist()
    assert merged.meta.format == (1 if unknown is None else 2)
    changed = sum(
        (pairs[i] != row).any() for i, row in zip(ids[1], after, strict=True) if i in pairs
    )
    assert merged.report.relabelled == changed


@pytest.mark.parametrize(
    ("labels", "unknown", "message"),
    [
        ([[0], [1]], [[0], None], "'s0' has label 'cat', which is among its unknown ones as well"),
        ([[0], [1]], [[3], None], "'s0' has label index 3 and the label set has 3"),
        ([[0], [1]], ["cat", None], "column 'unknown_labels' cannot be read as list<"),
    ],
)
def test_unknown_labels_that_are_refused(
    tmp_path: Path, labels: Any, unknown: Any, message: str
) -> None:
    table = samples_table(range(2), labels=labels, unknown_labels=unknown)
    with pytest.raises(InputError, match=message):
        EmbeddingStore.create(
            tmp_path / "s", table, label_set=LABELS, task="multilabel", source=SOURCE
        )


def test_a_task_with_one_label_has_none_that_is_unknown(tmp_path: Path) -> None:
    table = samples_table(range(2), labels=[[0], [1]], unknown_labels=[[2], None])
    with pytest.raises(InputError, match="'s0' has unknown labels and the task is multiclass"):
        EmbeddingStore.create(
            tmp_path / "s", table, label_set=LABELS, task="multiclass", source=SOURCE
        )


def test_readers_of_format_1_refuse_such_a_store_and_no_other(tmp_path: Path) -> None:
    hot = np.array([[1, -1, 0], [0, 0, 1], [-1, -1, -1]], np.int8)
    store = create(tmp_path, hot)
    metadata = pq.read_schema(tmp_path / "s" / "samples.parquet").metadata[b"mmc"]
    root = json.loads((tmp_path / "s" / "zarr.json").read_text())["attributes"]["mmc"]
    for written in (json.loads(metadata), root):
        assert written["format"] == 2
        with pytest.raises(FormatVersionError, match="format 2 and this mmc reads up to 1"):
            check_format(written["format"], "here", 1)  # what a reader of format 1 asks
    assert EmbeddingStore.open(tmp_path / "s").labels.multi_hot().tolist() == hot.tolist()
    assert verify(store) == []
    # All of them known: the store is as any other again.
    sync(store, table_of(np.abs(hot)))
    assert "unknown_labels" not in store.samples.column_names
    root = json.loads((tmp_path / "s" / "zarr.json").read_text())["attributes"]["mmc"]
    assert (root["format"], SamplesFile(store.files).meta.format) == (1, 1)
    assert verify(store) == []


def test_a_format_that_promises_more_than_there_is_is_damage(tmp_path: Path) -> None:
    create(tmp_path, np.array([[1, 0, 0], [0, 1, 0]], np.int8))
    path = tmp_path / "s" / "samples.parquet"
    table = pq.read_table(path)
    text = table.schema.metadata[b"mmc"].replace(b'"format":1', b'"format":2')
    pq.write_table(table.replace_schema_metadata({b"mmc": text}), path)
    with pytest.raises(DamagedStoreError, match="has format 2 and no 'unknown_labels'"):
        EmbeddingStore.open(tmp_path / "s")


def test_a_column_of_that_name_in_a_store_of_format_1_is_the_users(tmp_path: Path) -> None:
    store = create(tmp_path, np.array([[1, 0, 0], [0, 1, 0]], np.int8))
    path = tmp_path / "s" / "samples.parquet"
    table = pq.read_table(path)
    metadata = table.schema.metadata
    table = table.append_column("unknown_labels", pa.array(["mine", "too"]))
    pq.write_table(table.replace_schema_metadata(metadata), path)
    store = EmbeddingStore.open(tmp_path / "s")
    assert store.labels.multi_hot().tolist() == [[1, 0, 0], [0, 1, 0]]
    assert store.info()["partly_labelled"] == 0
    sync(store, table_of(np.array([[1, -1, 0]], np.int8)))
    assert store.column("user.unknown_labels").to_pylist() == [None, "too"]
    assert store.labels.multi_hot([0]).tolist() == [[1, -1, 0]]


def test_what_info_says_and_compaction_keeps(tmp_path: Path) -> None:
    hot = np.array([[1, -1, 0], [0, -1, -1], [0, 1, 0], [-1, -1, -1]], np.int8)
    store = create(tmp_path, hot)
    before = store_state(store.path, [])
    info = store.info()
    assert (info["format"], info["labelled"], info["partly_labelled"]) == (2, 3, 2)
    assert info["unknown_labels"] == {"dog": 2, "owl": 1}
    text = format_summary(info)
    assert "unknown  3 single labels of 2 samples, in 2 labels" in text
    assert "dog          1        2" in text
    assert sync(store, table_of(hot[1:], [1, 2, 3])).gone == 1
    assert sync(store, table_of(np.abs(hot[1:2]), [1], text=["text 1"])).relabelled == 1
    assert store_state(store.path, []) != before
    sync(store, table_of(hot[1:], [1, 2, 3]))
    compact(store)
    store = EmbeddingStore.open(store.path)
    assert store.labels.multi_hot().tolist() == hot[1:].tolist()
    assert store.rows(labelled=True).tolist() == [0, 1]
    assert verify(store) == []
