"""What a writer accepts, keeps and refuses."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmc.store import EmbeddingStore, Feature, FieldSpec
from mmc.store.errors import InputError, MmcError, RowsNotDoneError, StoreLockedError
from mmc.store.testing import (
    ALIAS,
    FIELDS,
    IDENTITY,
    LABELS,
    SHARD_ROWS,
    SOURCE,
    expected,
    fill,
    filled,
    samples_table,
)

IMAGE = FIELDS[:1]


def create(path: Path, rows: int = 20) -> EmbeddingStore:
    return EmbeddingStore.create(
        path / "s", samples_table(range(rows)), label_set=LABELS, task="multilabel", source=SOURCE
    )


def values(rows: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((rows, 4)).astype("float16")


def test_shards_of_a_store(tmp_path: Path) -> None:
    with create(tmp_path).writer(ALIAS, IMAGE, IDENTITY, {}, 8) as writer:
        assert (writer.shard_rows, writer.num_shards) == (8, 3)
        assert [writer.bounds(shard) for shard in range(3)] == [(0, 8), (8, 16), (16, 20)]
        with pytest.raises(InputError, match="shard 3 is outside"):
            writer.bounds(3)
    with create(tmp_path / "b").writer(ALIAS, IMAGE, IDENTITY, {}) as writer:
        assert (writer.shard_rows, writer.num_shards) == (1024, 1)


def test_rows_not_named_stay_as_they_are(tmp_path: Path) -> None:
    store, data = create(tmp_path), values(20)
    with store.writer(ALIAS, IMAGE, IDENTITY, {}, 8) as writer:
        for rows in ([5, 1], [7], [3, 0], [1]):
            writer.commit(0, "image", rows, {"image": data[rows]})
            if rows == [7]:
                assert writer.pending("image").tolist() == [0, 2, 3, 4, 6, *range(8, 20)]
        data[2] = 0
        writer.commit(0, "image", [2], {"image": data[[2]]}, failed={4: "bad", 5: "worse"})
    feature = store[f"{ALIAS}/image"]
    assert np.flatnonzero(feature.done).tolist() == [0, 1, 2, 3, 7]
    np.testing.assert_array_equal(feature.take([0, 1, 2, 3, 7]), data[[0, 1, 2, 3, 7]])
    assert store.status(ALIAS, "image")[:8].tolist() == [1, 1, 1, 1, 2, 2, 0, 1]
    with pytest.raises(RowsNotDoneError, match=r"\(4, 5, 6; 1 missing, 2 failed\)"):
        feature.take([4, 5, 6])


def test_wide_floats_are_rounded_and_too_large_ones_refused(tmp_path: Path) -> None:
    store = create(tmp_path)
    wide = np.random.default_rng(0).standard_normal((4, 4)).astype("float32")
    with store.writer(ALIAS, IMAGE, IDENTITY, {}, 8) as writer:
        writer.commit(2, "image", range(16, 20), {"image": wide})
        np.testing.assert_array_equal(store[f"{ALIAS}/image"][16:], wide.astype("float16"))
        wide[1, 1] = 70_000
        with pytest.raises(InputError, match="beyond float16's range"):
            writer.commit(2, "image", range(16, 20), {"image": wide})


@pytest.mark.parametrize(
    ("rows", "arrays", "failed", "message"),
    [
        ([8], {"image": values(1)}, {}, "row 8 is not in the shard of rows 0 to 7"),
        ([0], {"image": values(1)}, {9: "x"}, "row 9 is not in the shard"),
        ([0, 0], {"image": values(2)}, {}, "row 0 is committed twice"),
        ([0], {"image": values(1)}, {0: "x"}, "row 0 is committed twice"),
        ([0], {"image": values(2)}, {}, "needs shape"),
        ([0], {"image": values(1)[:, :3]}, {}, "needs shape"),
        ([0], {"image": np.ones((1, 4), "complex64")}, {}, "is float16, got complex64"),
        ([0], {}, {}, "has the fields image; got none"),
        ([0], {"image": values(1), "more": values(1)}, {}, "got image, more"),
    ],
)
def test_commits_that_are_refused(
    tmp_path: Path, rows: Any, arrays: Any, failed: Any, message: str
) -> None:
    store = create(tmp_path)
    with store.writer(ALIAS, IMAGE, IDENTITY, {}, 8) as writer:
        with pytest.raises(InputError, match=message):
            writer.commit(0, "image", rows, arrays, failed)
        with pytest.raises(InputError, match="no 'text' tower; it has image"):
            writer.commit(0, "text", [0], {})
        assert len(writer.pending("image")) == 20
    assert not list((tmp_path / "s/features" / ALIAS / "image").glob("c.*"))


def test_integers_never_wrap_around(tmp_path: Path) -> None:
    classes = FieldSpec(name="classes", shape=(), dtype="int8", tower="image")
    with create(tmp_path).writer(ALIAS, [classes], IDENTITY, {}) as writer:
        with pytest.raises(InputError, match="is int8, got int64"):
            writer.commit(0, "image", [0], {"classes": np.array([300])})
        writer.commit(0, "image", [0], {"classes": np.array([-3], "int8")})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alias": "a/b"}, "name 'a/b' cannot name a folder"),
        ({"alias": ".hidden"}, "cannot name a folder"),
        ({"fields": []}, "no fields"),
        ({"fields": [*IMAGE, *IMAGE]}, "'image' is given twice"),
        ({"shard_rows": 0}, "shard_rows=0"),
        ({"compress": "gzip"}, "choose zstd"),
        ({"identity": {"a": object()}}, "cannot be kept as JSON"),
    ],
)
def test_writers_that_are_refused(tmp_path: Path, changes: Any, message: str) -> None:
    store = create(tmp_path)
    arguments = {"alias": ALIAS, "fields": IMAGE, "identity": IDENTITY, "context": {}, **changes}
    with pytest.raises(InputError, match=message), store.writer(**arguments):
        pass
    assert store.aliases == ()


def test_a_tower_is_added_but_not_changed(tmp_path: Path) -> None:
    store = create(tmp_path)
    with store.writer(ALIAS, IMAGE, IDENTITY, {}, SHARD_ROWS) as writer:
        fill(store, writer)
    with store.writer(ALIAS, FIELDS, IDENTITY, {}) as writer:
        assert len(writer.pending("image")) == 0
        assert len(writer.pending("text")) == 20
        fill(store, writer)
    assert store.record(ALIAS).towers == ("image", "text")
    # Asking for one tower leaves the other alone.
    with store.writer(ALIAS, IMAGE, IDENTITY, {}) as writer:
        assert set(writer.fields) == {field.name for field in FIELDS}
    tokens = FieldSpec(name="image_tokens", shape=(2, 4), dtype="float16", tower="image")
    wider = FieldSpec(name="image", shape=(8,), dtype="float16", tower="image")
    moved = FieldSpec(name="image", shape=(4,), dtype="float16", tower="fused")
    for fields in ([*IMAGE, tokens], [tokens], [wider]):
        with (
            pytest.raises(InputError, match=r"has image \(4,\) float16 for the image tower"),
            store.writer(ALIAS, fields, IDENTITY, {}),
        ):
            pass
    with (
        pytest.raises(InputError, match="another tower"),
        store.writer(ALIAS, [moved], IDENTITY, {}),
    ):
        pass
    assert store.features == tuple(f"{ALIAS}/{field.name}" for field in FIELDS)


def test_settings_of_an_alias_stay(tmp_path: Path) -> None:
    store = filled(f"{tmp_path}/s")
    for changes, message in [
        ({"shard_rows": 16}, "shards of 8 rows, not 16"),
        ({"compress": "zstd"}, "not compressed"),
    ]:
        with (
            pytest.raises(InputError, match=message),
            store.writer(ALIAS, FIELDS, IDENTITY, {}, **changes),
        ):
            pass
    with store.writer(ALIAS, FIELDS, IDENTITY, {}, 8) as writer:
        assert writer.shard_rows == 8
    packed = filled(f"{tmp_path}/z", compress="zstd")
    with packed.writer(ALIAS, FIELDS, IDENTITY, {}) as writer:
        assert packed.record(ALIAS).compress == "zstd"


def test_the_context_is_that_of_the_last_who_wrote(tmp_path: Path) -> None:
    store = create(tmp_path)
    with store.writer(ALIAS, IMAGE, IDENTITY, {"torch": "1"}, 8) as writer:
        writer.commit(0, "image", [0], {"image": values(1)})
    with store.writer(ALIAS, IMAGE, IDENTITY, {"torch": "2"}):
        pass
    assert store.provenance(ALIAS).context == {"torch": "1"}
    with store.writer(ALIAS, IMAGE, IDENTITY, {"torch": "2"}) as writer:
        writer.commit(0, "image", [1], {"image": values(1)})
    assert store.provenance(ALIAS).context == {"torch": "2"}
    assert store.provenance(ALIAS).identity == IDENTITY


def test_towers_depend_on_what_they_read(tmp_path: Path) -> None:
    """A change of either content makes the fused tower run again."""
    fused = FieldSpec(name="fused", shape=(4,), dtype="float16", tower="fused")
    store = create(tmp_path, 4)
    with store.writer(ALIAS, [*IMAGE, fused], IDENTITY, {}, 8) as writer:
        for tower in ("image", "fused"):
            writer.commit(0, tower, range(4), {tower: values(4)})
    store.sync(
        samples_table(
            range(4), image_key=["i0", "new", "i2", "i3"], text_key=["t0", "t1", "new", "t3"]
        ),
        label_set=LABELS,
        task="multilabel",
        source=SOURCE,
    )
    assert store.status(ALIAS, "image").tolist() == [1, 0, 1, 1]
    assert store.status(ALIAS, "fused").tolist() == [1, 0, 0, 1]
    rows = store.rows(features=[f"{ALIAS}/image", f"{ALIAS}/fused"], split="train")
    assert rows.tolist() == [0, 3]


def test_rows_that_are_gone_are_not_pending(tmp_path: Path) -> None:
    store = create(tmp_path, 6)
    arguments: dict[str, Any] = {"label_set": LABELS, "task": "multilabel", "source": SOURCE}
    store.sync(samples_table([0, 1, 5]), **arguments)
    with store.writer(ALIAS, IMAGE, IDENTITY, {}) as writer:
        assert writer.pending("image").tolist() == [0, 1, 5]


def test_one_writer_per_alias(tmp_path: Path) -> None:
    store = create(tmp_path)
    with store.writer(ALIAS, IMAGE, IDENTITY, {}):
        pid = f"process {os.getpid()} on "
        with (
            pytest.raises(StoreLockedError, match=f"held by {pid}"),
            store.writer(ALIAS, IMAGE, IDENTITY, {}),
        ):
            pass
        # Not even to throw it away, and no sample may move meanwhile.
        with (
            pytest.raises(StoreLockedError),
            store.writer(ALIAS, IMAGE, IDENTITY, {}, overwrite=True),
        ):
            pass
        with pytest.raises(StoreLockedError):
            store.sync(samples_table(range(3)), label_set=LABELS, task="multilabel", source=SOURCE)
        with store.writer("other", IMAGE, IDENTITY, {}) as writer:
            assert len(writer.pending("image")) == 20
    with store.writer(ALIAS, IMAGE, IDENTITY, {}):
        pass


def test_a_reader_sees_commits_when_it_asks_again(tmp_path: Path) -> None:
    store, data = create(tmp_path), values(20)
    with store.writer(ALIAS, IMAGE, IDENTITY, {}, 8) as writer:
        before = store[f"{ALIAS}/image"]
        writer.commit(0, "image", range(8), {"image": data[:8]})
        first = store[f"{ALIAS}/image"]
        np.testing.assert_array_equal(first.take([3, 1]), data[[3, 1]])
        writer.commit(0, "image", [1], {"image": data[[9]]})
        assert not before.done.any()
        # The map that was opened stays valid when its file is replaced.
        np.testing.assert_array_equal(first.take([3, 1]), data[[3, 1]])
        np.testing.assert_array_equal(store[f"{ALIAS}/image"].take([3, 1]), data[[3, 9]])


def test_a_reader_that_opens_a_shard_late_sees_its_status_of_that_moment(tmp_path: Path) -> None:
    """Between asking for the feature and reading, row 1 was reset and failed."""
    store, data = create(tmp_path), values(20)
    with store.writer(ALIAS, IMAGE, IDENTITY, {}, 8) as writer:
        writer.commit(0, "image", range(8), {"image": data[:8]})
        feature = store[f"{ALIAS}/image"]
        writer.commit(0, "image", [], {"image": values(0)}, failed={1: "bad"})
    with pytest.raises(RowsNotDoneError):
        feature.take([0, 1])
    np.testing.assert_array_equal(feature.take([0, 2]), data[[0, 2]])
    assert np.isnan(store[f"{ALIAS}/image"].take([1, 1], missing="fill")).all()


def test_a_reader_refuses_an_alias_that_was_overwritten(tmp_path: Path) -> None:
    store = filled(f"{tmp_path}/s")
    feature, again = store[f"{ALIAS}/image"], store[f"{ALIAS}/image"]
    np.testing.assert_array_equal(again[:8], expected(store, FIELDS[0], range(8)))
    with store.writer(ALIAS, FIELDS, {"other": 1}, {}, 8, overwrite=True) as writer:
        fill(store, writer)
    with pytest.raises(MmcError, match="overwritten while it was read; open the store again"):
        feature[:8]
    with pytest.raises(MmcError, match="open the store again"):
        again[8:]


def test_label_text_needs_a_row_per_label(tmp_path: Path) -> None:
    store = create(tmp_path)
    with store.writer(ALIAS, IMAGE, IDENTITY, {}) as writer:
        for array in (np.ones((2, 4)), np.ones(3), np.ones((3, 0))):
            with pytest.raises(InputError, match="3 labels need an array"):
                writer.write_label_text(LABELS, array, "{label}")
        writer.write_label_text(LABELS, np.ones((3, 4)), "a {label}")
        writer.write_label_text(LABELS[:2], np.zeros((2, 2)), "b {label}")
    found = store.label_text(ALIAS)
    assert found is not None
    assert found[0] == LABELS[:2]
    assert found[1].tolist() == [[0, 0], [0, 0]]


def test_info_is_plain_json(tmp_path: Path) -> None:
    store = filled(f"{tmp_path}/s", bad={3: "bad"})
    store.sync(samples_table(range(19)), label_set=LABELS, task="multilabel", source=SOURCE)
    info = json.loads(json.dumps(store.info()))
    assert (info["rows"], info["gone"], info["labelled"]) == (19, 1, 19)
    assert info["splits"] == {"train": 7, "val": 6, "test": 6}
    assert info["labels"] == {"cat": 7, "dog": 6, "owl": 6}
    alias = info["aliases"][ALIAS]
    assert alias["towers"] == {
        "image": {"done": 18, "failed": 1, "missing": 0},
        "text": {"done": 19, "failed": 0, "missing": 0},
    }
    image = alias["features"]["image"]
    assert (image["shape"], image["dtype"], image["done"]) == ([20, 4], "float16", 18)
    # Three shards of 8 rows (the last padded) with checksum and index, and the description.
    folder = tmp_path / "s" / "features" / ALIAS / "image"
    assert image["bytes"] == 3 * (8 * 8 + 4 + 20) + (folder / "zarr.json").stat().st_size
    assert alias["fingerprint"] == store.provenance(ALIAS).fingerprint
    assert info["bytes"] > image["bytes"]


def test_a_writer_whose_samples_were_changed_by_another_process_is_refused(tmp_path: Path) -> None:
    """It would embed the contents that it knows, and the rows would count as done."""
    ours = filled(f"{tmp_path}/s")
    theirs = EmbeddingStore.open(tmp_path / "s")
    keys = ["new", *(f"i{number}" for number in range(1, 20))]
    theirs.sync(
        samples_table(range(20), image_key=keys),
        label_set=LABELS,
        task="multilabel",
        source=SOURCE,
    )
    with (
        pytest.raises(MmcError, match="changed by another process in the meantime; run it again"),
        ours.writer(ALIAS, FIELDS, IDENTITY, {}),
    ):
        pass
    with theirs.writer(ALIAS, FIELDS, IDENTITY, {}) as writer:
        assert writer.pending("image").tolist() == [0]


def test_a_record_that_was_read_before_an_overwrite_is_not_mixed_with_what_lies_there_now(
    tmp_path: Path,
) -> None:
    store = filled(f"{tmp_path}/s")
    record, status = store.record(ALIAS), store.status(ALIAS, "image")
    prefix = f"features/{ALIAS}"
    with store.writer(ALIAS, FIELDS, {"other": 1}, {}, 8, overwrite=True) as writer:
        fill(store, writer)
    with pytest.raises(MmcError, match="overwritten while it was read; open the store again"):
        Feature(store.files, prefix, ALIAS, record, "image", status)
    store.files.remove_tree(prefix)
    with pytest.raises(MmcError, match="open the store again"):
        Feature(store.files, prefix, ALIAS, record, "image", status)


def test_files_that_vanish_while_they_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mmc info` beside a writer: its temporary files come and go."""
    store = filled(f"{tmp_path}/s")
    whole = store.files.tree_bytes("")
    walk = os.walk

    def walk_late(path: Any) -> Any:
        return ((folder, names, [*files, ".c.0.tmp"]) for folder, names, files in walk(path))

    monkeypatch.setattr(os, "walk", walk_late)
    assert store.files.tree_bytes("") == whole
