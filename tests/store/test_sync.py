"""Merging tables by id, against a model in plain dictionaries."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from natsort import natsorted

from mmc.store import EmbeddingStore, SyncReport
from mmc.store.errors import InputError
from mmc.store.samples import canonical, check_meta, with_internal
from mmc.store.showing import format_summary
from mmc.store.sync import merge
from mmc.store.testing import LABELS, SOURCE, samples_table

NAMES = ["x1", "x2", "x10", "y"]


def sync(store: EmbeddingStore, table: pa.Table, **changes: Any) -> SyncReport:
    arguments: dict[str, Any] = {"label_set": LABELS, "task": "multilabel", "source": SOURCE}
    return store.sync(table, **{**arguments, **changes})


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore.create(
        tmp_path / "s", samples_table(range(6)), label_set=LABELS, task="multilabel", source=SOURCE
    )


def test_nothing_new_writes_nothing(store: EmbeddingStore) -> None:
    before = store.files.signature("samples.parquet")
    report = sync(store, samples_table([5, 3, 4, 0, 1, 2]))
    assert report == SyncReport(
        added=0,
        changed_images=0,
        changed_texts=0,
        relabelled=0,
        gone=0,
        unchanged=6,
        label_set=LABELS,
    )
    assert store.files.signature("samples.parquet") == before


def test_the_report_counts_each_kind(store: EmbeddingStore) -> None:
    table = samples_table(
        [0, 1, 2, 3, 9],
        image_key=["i0", "new", "i2", "i3", "i9"],
        text_key=["t0", "new", "new", "t3", "t9"],
        labels=[[0], [1], [2], [2], [0]],
        split=["train", "val", "test", "train", "val"],
    )
    assert sync(store, table) == SyncReport(
        added=1,
        changed_images=1,
        changed_texts=2,
        relabelled=1,
        gone=2,
        unchanged=1,
        label_set=LABELS,
    )
    assert store.column("_gone").to_pylist() == [False] * 4 + [True] * 2 + [False]
    assert store.labels.known.tolist() == [True] * 4 + [False] * 2 + [True]


def test_another_source_adds_and_takes_over(store: EmbeddingStore) -> None:
    more = samples_table([5, 6], labels=[[0], [1]])
    report = sync(store, more, label_set=("owl", "eel"), source={"spec": "more.csv"})
    assert (report.added, report.relabelled, report.gone) == (1, 0, 0)
    assert report.label_set == ("cat", "dog", "eel", "owl")
    assert store.column("labels").to_pylist() == [[0], [1], [3], [0], [1], [3], [2]]
    assert store.column("_source").to_pylist() == [0, 0, 0, 0, 0, 1, 1]
    assert [source["spec"] for source in store.sources] == ["samples.csv", "more.csv"]
    # Without s5, which belongs to the other source now, nothing of the first one is gone.
    assert sync(store, samples_table(range(5))).gone == 0
    assert sync(store, samples_table(range(4))).gone == 1
    assert sync(store, samples_table([6]), source={"spec": "more.csv"}).gone == 1
    assert store.rows().tolist() == [0, 1, 2, 3, 6]


def test_the_recipe_of_a_source_is_replaced(store: EmbeddingStore) -> None:
    sync(store, samples_table(range(6)), source={**SOURCE, "format": "tsv"})
    assert store.sources == [{**SOURCE, "format": "tsv"}]


def test_the_only_source_decides_the_label_set(store: EmbeddingStore) -> None:
    """A table read with the wrong separator, then with the right one, leaves nothing behind."""
    table = samples_table(range(4), labels=[[0]] * 4)
    report = sync(store, table, label_set=("owl",))
    assert report.label_set == ("owl",)
    assert (report.relabelled, report.gone) == (3, 2)  # row 2 was an owl before
    labels = store.column("labels").to_pylist()
    assert labels[:4] == [[0]] * 4
    assert all(label == 0 for cell in labels[4:] for label in cell or ())


def test_a_smaller_label_set_of_one_source_of_two_keeps_the_names(store: EmbeddingStore) -> None:
    sync(store, samples_table(range(6, 8), labels=[[0]] * 2), source={"spec": "more.csv"})
    table = samples_table(range(6), labels=[[0]] * 6)
    report = sync(store, table, label_set=("owl",))
    assert report.label_set == LABELS
    assert store.column("labels").to_pylist()[:6] == [[2]] * 6


def test_an_unlabelled_store_takes_the_order_that_is_given(tmp_path: Path) -> None:
    bare = samples_table(range(2), labels=pa.nulls(2))
    store = EmbeddingStore.create(
        tmp_path / "s", bare, label_set=(), task="unlabelled", source=SOURCE
    )
    report = sync(store, samples_table(range(2)), label_set=("z", "a"), task="binary")
    assert report.label_set == ("z", "a")
    assert store.task == "binary"
    assert report.relabelled == 2


def test_tasks_widen_with_further_sources(store: EmbeddingStore) -> None:
    sync(store, samples_table(range(6)), task="multiclass")
    assert store.task == "multiclass"
    sync(
        store,
        samples_table([7], labels=[[0]]),
        label_set=("cat", "dog"),
        task="binary",
        source={"spec": "b"},
    )
    assert store.task == "multiclass"
    with pytest.raises(InputError, match="2 labels"):
        sync(store, samples_table(range(6), labels=[[0, 1]] * 6), task="multiclass")
    sync(store, samples_table(range(6), labels=[[0, 1]] * 6))
    assert store.task == "multilabel"


def test_two_binary_sources_with_other_names_make_a_multiclass_store(tmp_path: Path) -> None:
    table = samples_table(range(2), labels=[[0], [1]])
    store = EmbeddingStore.create(
        tmp_path / "s", table, label_set=("no", "yes"), task="binary", source=SOURCE
    )
    more = samples_table([5], labels=[[1]])
    sync(store, more, label_set=("no", "maybe"), task="binary", source={"spec": "b"})
    assert store.task == "multiclass"
    assert store.label_set == ("maybe", "no", "yes")
    assert store.column("labels").to_pylist() == [[1], [2], [0]]


def test_columns_come_and_go(store: EmbeddingStore) -> None:
    sync(store, samples_table(range(6), price=[1, 2, 3, 4, 5, 6]))
    sync(store, samples_table([9], weight=[0.5]), source={"spec": "b"})
    assert store.column("price").to_pylist() == [1, 2, 3, 4, 5, 6, None]
    assert store.column("weight").to_pylist() == [None] * 6 + [0.5]
    sync(store, samples_table([9], price=["dear"]), source={"spec": "b"})
    assert store.column("price").to_pylist() == ["1", "2", "3", "4", "5", "6", "dear"]
    assert "weight" not in store.samples.column_names
    with pytest.raises(InputError, match="column 'price' has another type"):
        sync(store, samples_table([9], price=[[1]]), source={"spec": "b"})


def test_without_hashes_the_origin_tells_a_change(tmp_path: Path) -> None:
    def table(**columns: Any) -> pa.Table:
        return samples_table(range(2), image_key=pa.nulls(2), text_key=pa.nulls(2), **columns)

    store = EmbeddingStore.create(
        tmp_path / "s", table(), label_set=LABELS, task="multilabel", source=SOURCE
    )
    assert sync(store, table()).unchanged == 2
    assert sync(store, table(image=["0.png", "other.png"])).changed_images == 1
    assert sync(store, table(image=["0.png", "other.png"], mtime_ns=[1, 1])).changed_images == 2
    assert sync(store, table(text=["text 0", None])).changed_texts == 1
    # With a hash the origin does not matter: a file may move.
    sync(store, samples_table(range(2)))
    report = sync(store, samples_table(range(2), image=["moved/0.png", "1.png"]))
    assert (report.changed_images, report.unchanged) == (0, 2)
    assert store.column("image").to_pylist() == ["moved/0.png", "1.png"]


def test_a_refused_table_changes_nothing(store: EmbeddingStore) -> None:
    before = store.files.signature("samples.parquet")
    with pytest.raises(InputError):
        sync(store, samples_table([1, 1]))
    assert store.files.signature("samples.parquet") == before
    assert len(store) == 6


def rows() -> st.SearchStrategy[dict[str, Any]]:
    """id to (labels by name or None, split, image_key, text_key)."""
    names = st.none() | st.sets(st.sampled_from(NAMES), max_size=3).map(frozenset)
    key = st.sampled_from([None, "a", "b"])
    row = st.tuples(names, st.sampled_from(["train", "val"]), key, key)
    return st.dictionaries(st.sampled_from("abcdefgh"), row, max_size=8)


def as_table(model: dict[str, Any], label_set: list[str]) -> pa.Table:
    cells = model.values()
    index = {name: number for number, name in enumerate(label_set)}
    labels = [None if c[0] is None else [index[name] for name in c[0]] for c in cells]
    return pa.table(
        {
            "id": pa.array(list(model), pa.string()),
            "labels": pa.array(labels, pa.list_(pa.int32())),
            "split": pa.array([c[1] for c in cells], pa.string()),
            "image_key": pa.array([c[2] for c in cells], pa.string()),
            "text_key": pa.array([c[3] for c in cells], pa.string()),
        }
    )


@settings(max_examples=60, deadline=None)
@given(old=rows(), new=rows(), order=st.permutations(NAMES), extra=st.booleans())
def test_merge_equals_a_loop(
    old: dict[str, Any], new: dict[str, Any], order: list[str], extra: bool
) -> None:
    """One source, synced twice, label sets in any order."""
    used = {name for cell in old.values() for name in cell[0] or ()}
    first = NAMES if extra else natsorted(used)
    meta = check_meta(first, "multilabel", SOURCE)
    table = canonical(as_table(old, first), meta)
    table = with_internal(table, np.zeros(len(old), np.int16), np.zeros(len(old), bool))
    new_meta = check_meta(order, "multilabel", SOURCE)
    merged = merge(table, meta, canonical(as_table(new, order), new_meta), new_meta)

    ids = [*old, *(name for name in new if name not in old)]
    result = merged.table.to_pylist()
    assert [row["id"] for row in result] == ids
    label_set = merged.meta.label_set
    assert list(label_set) == order
    images, texts, relabelled = [], [], 0
    for place, (row, name) in enumerate(zip(result, ids, strict=True)):
        truth = new.get(name, old.get(name))
        assert truth is not None
        names = None if row["labels"] is None else {label_set[label] for label in row["labels"]}
        assert (names, row["split"], row["image_key"], row["text_key"]) == truth
        assert row["_gone"] == (name not in new)
        if name in old and name in new:
            images += [place] if old[name][2] != new[name][2] else []
            texts += [place] if old[name][3] != new[name][3] else []
            relabelled += old[name][:2] != new[name][:2]
    assert merged.changed["image"].tolist() == images
    assert merged.changed["text"].tolist() == texts
    report = merged.report
    assert report.relabelled == relabelled
    assert report.added == len(ids) - len(old)
    assert report.gone == len(set(old) - set(new))
    assert report.unchanged == sum(old.get(name) == cell for name, cell in new.items())


def test_label_trees_of_all_sources_are_one(store: EmbeddingStore, tmp_path: Path) -> None:
    assert store.label_tree == {}
    animals = {"animal": ["cat", "dog"], "bird": ["owl"]}
    sync(store, samples_table(range(6)), source={**SOURCE, "label_tree": animals})
    assert store.label_tree == animals
    more = {"animal": ["dog", "eel"], "thing": []}
    sync(store, samples_table([9]), source={"spec": "more.csv", "label_tree": more})
    again = EmbeddingStore.open(tmp_path / "s")
    assert again.label_tree == {"animal": ["cat", "dog", "eel"], "bird": ["owl"], "thing": []}
    assert again.info()["label_tree"] == again.label_tree
    lines = [line for line in format_summary(again.info()).splitlines() if line.startswith("tree")]
    assert lines == ["tree     3 parents over 4 labels: animal (3), bird (1), thing (0)"]
    sync(store, samples_table(range(6)), source={**SOURCE, "label_tree": None})
    assert store.label_tree == more
