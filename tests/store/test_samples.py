"""The table of samples: what is refused, how it is kept, labels."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmc.store import EmbeddingStore, Labels
from mmc.store.errors import DamagedStoreError, FormatVersionError, InputError, NotAStoreError
from mmc.store.samples import labels_column, take_rows
from mmc.store.testing import LABELS, SOURCE, samples_table


def create(path: Path, table: pa.Table, **changes: Any) -> EmbeddingStore:
    arguments = {"label_set": LABELS, "task": "multilabel", "source": SOURCE, **changes}
    return EmbeddingStore.create(path / "s", table, **arguments)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a", "b", "a"]}, "id 'a' occurs twice, in rows 0 and 2"),
        ({"id": ["a", None, "c"]}, "row 1 has no id"),
        ({"id": ["a", "b", ""]}, "row 2 has no id"),
        ({"labels": [[0], [3], []]}, "'s1' has label index 3 and the label set has 3"),
        ({"labels": [[0], [-1], []]}, "label index -1"),
        ({"size": ["many", "few", "1"]}, "column 'size' cannot be read as int64"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create(tmp_path, samples_table(range(3), **columns))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "regression"}, "unknown task 'regression'"),
        ({"task": "binary"}, "binary task has 2 labels"),
        ({"label_set": ("a", "b", "a")}, "label 'a' occurs twice"),
        ({"label_set": ("a", "", "c")}, "empty name"),
        ({"source": {}}, "no 'spec'"),
        ({"source": {"spec": "x", "root": Path("/")}}, "cannot be kept as JSON"),
    ],
)
def test_descriptions_that_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        create(tmp_path, samples_table(range(3)), **changes)
    assert not (tmp_path / "s").exists()


def test_no_id_column(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no 'id' column; found \['name'\]"):
        create(tmp_path, pa.table({"name": ["a"]}))


def test_single_label_tasks_allow_one_label(tmp_path: Path) -> None:
    table = samples_table(range(2), labels=[[0, 1], [1]])
    with pytest.raises(InputError, match="'s0' has 2 labels and the task is multiclass"):
        create(tmp_path, table, task="multiclass")


def test_only_an_id_is_needed_and_types_are_converted(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": pa.array([7, 8]),
            "labels": pa.array([[2, 0, 2], None], pa.large_list(pa.int64())),
            "split": pa.array(["val", None]).dictionary_encode(),
            "text": pa.nulls(2),
            "_gone": ["mine", "too"],
            "price": [1.5, None],
        }
    )
    store = create(tmp_path, table)
    samples = store.samples
    assert samples.column("id").to_pylist() == ["7", "8"]
    assert samples.column("labels").to_pylist() == [[0, 2], None]
    assert samples.column("split").to_pylist() == ["val", ""]
    assert samples.column("user._gone").to_pylist() == ["mine", "too"]
    assert samples.column("_gone").to_pylist() == [False, False]
    assert samples.column("price").to_pylist() == [1.5, None]
    assert samples.column("image").to_pylist() == [None, None]
    assert store.rows(split="").tolist() == [1]
    assert store.rows(labelled=True).tolist() == [0]
    assert store.rows(labelled=False).tolist() == [1]
    assert store.rows(split="nowhere").tolist() == []
    with pytest.raises(InputError, match="no column 'prize'; there are id, split"):
        store.column("prize")


def test_a_store_without_rows(tmp_path: Path) -> None:
    store = create(tmp_path, samples_table([]), label_set=(), task="unlabelled")
    assert len(store) == 0
    assert store.rows().tolist() == []
    assert store.labels.multi_hot().shape == (0, 0)
    assert store.info()["rows"] == 0


@settings(max_examples=50, deadline=None)
@given(
    labels=st.lists(st.none() | st.sets(st.integers(0, 4)).map(sorted), min_size=1, max_size=12),
    gone=st.sets(st.integers(0, 11)),
    data=st.data(),
)
def test_labels_equal_a_loop(labels: Any, gone: set[int], data: st.DataObject) -> None:
    mask = np.isin(np.arange(len(labels)), list(gone))
    column = pa.chunked_array([pa.array(labels, pa.list_(pa.int32()))])
    found = Labels.of(column, mask, 5)
    rows = data.draw(st.none() | st.lists(st.integers(0, len(labels) - 1)))
    truth = []
    for row in range(len(labels)) if rows is None else rows:
        unknown = labels[row] is None or mask[row]
        one = [-1] * 5 if unknown else [int(label in labels[row]) for label in range(5)]
        truth.append(one)
    hot = np.array(truth, np.int8).reshape(-1, 5)
    np.testing.assert_array_equal(found.multi_hot(rows), hot)
    np.testing.assert_array_equal(found.counts(rows), (hot == 1).sum(axis=0))


def test_labels_column_keeps_null_and_empty_apart() -> None:
    column = labels_column(np.array([2, 0, 0]), np.array([1, 3]), np.array([True, True, False]))
    assert column.to_pylist() == [[1, 3], [], None]


def test_what_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError, match=r"no store at .*nothing; `mmc extract"):
        EmbeddingStore.open(tmp_path / "nothing")
    with pytest.raises(NotAStoreError, match=r"it has no zarr\.json"):
        EmbeddingStore.open(tmp_path)
    (tmp_path / "a.csv").write_text("id\n1\n")
    with pytest.raises(NotAStoreError, match=r"a\.csv is a file, not a store"):
        EmbeddingStore.open(tmp_path / "a.csv")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(NotAStoreError, match="is a run, not a store"):
        EmbeddingStore.open(tmp_path / "run")
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    with pytest.raises(NotAStoreError, match="mmc did not make"):
        EmbeddingStore.open(tmp_path)
    with pytest.raises(InputError, match="cannot open nope://x"):
        EmbeddingStore.open("nope://x")


def test_a_newer_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    create(tmp_path, samples_table(range(2)))
    root = tmp_path / "s" / "zarr.json"
    root.write_text(root.read_text().replace('"format": 1', '"format": 3'))
    with pytest.raises(FormatVersionError, match=r"format 3 .* reads up to 2; upgrade mmc"):
        EmbeddingStore.open(tmp_path / "s")


def test_the_table_decides_not_its_copy(tmp_path: Path) -> None:
    """A kill between the two leaves an old copy in zarr.json."""
    create(tmp_path, samples_table(range(2)))
    root = tmp_path / "s" / "zarr.json"
    root.write_text(root.read_text().replace('"cat"', '"cow"'))
    assert EmbeddingStore.open(tmp_path / "s").label_set == LABELS


@pytest.mark.parametrize("content", [None, b"", b"PAR1 and then nothing"])
def test_a_damaged_table_is_named(tmp_path: Path, content: bytes | None) -> None:
    create(tmp_path, samples_table(range(2)))
    path = tmp_path / "s" / "samples.parquet"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DamagedStoreError, match=r"samples\.parquet"):
        EmbeddingStore.open(tmp_path / "s")


def test_a_flipped_byte_in_the_table_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    """Every page has a checksum; what is no page at the end of the file says where they are."""
    store = create(tmp_path, samples_table(range(40), price=np.arange(40) / 7))
    path, whole = tmp_path / "s" / "samples.parquet", store.samples
    raw = path.read_bytes()
    length = int.from_bytes(raw[-8:-4], "little")
    seen = 0
    for at in range(4, len(raw) - 8 - length, 13):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        try:
            table = EmbeddingStore.open(tmp_path / "s").samples
        except DamagedStoreError as error:
            assert "samples.parquet is damaged" in str(error)  # noqa: PT017
            seen += 1
        else:
            assert table.equals(whole)
    assert seen > 50


def test_somebody_elses_parquet_is_not_taken(tmp_path: Path) -> None:
    create(tmp_path, samples_table(range(2)))
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "s" / "samples.parquet")
    with pytest.raises(DamagedStoreError, match="not the samples table"):
        EmbeddingStore.open(tmp_path / "s")


def test_create_refuses_other_content_and_leaves_it_alone(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"holds other files \(thesis\.tex\)"):
        create(tmp_path, samples_table(range(2)))
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
    (folder / "thesis.tex").rename(folder / "samples.parquet")
    with pytest.raises(InputError, match="holds other files"):
        create(tmp_path, samples_table(range(2)))
    (folder / "samples.parquet").unlink()
    create(tmp_path, samples_table(range(2)))
    with pytest.raises(InputError, match="is a file"):
        EmbeddingStore.create(
            folder / "zarr.json",
            samples_table(range(2)),
            label_set=LABELS,
            task="multilabel",
            source=SOURCE,
        )


def test_an_open_store_keeps_its_view_while_another_syncs(tmp_path: Path) -> None:
    create(tmp_path, samples_table(range(3)))
    reader = EmbeddingStore.open(tmp_path / "s")
    writer = EmbeddingStore.open(tmp_path / "s")
    writer.sync(samples_table(range(5)), label_set=LABELS, task="multilabel", source=SOURCE)
    assert len(reader) == 3
    assert reader.column("id").to_pylist() == ["s0", "s1", "s2"]
    assert len(writer) == 5


def test_long_texts_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow's take fails beyond 2 GiB of text in a column; here a block holds a few rows."""
    monkeypatch.setattr("mmc.store.samples._TAKE_BYTES", 64)
    texts = pa.chunked_array([["a" * 9, None, "", "b"], ["c" * 40], [], ["d", "e"]], pa.string())
    table = pa.table({"text": texts, "number": range(7)})
    for rows in ([], [3], [6, 0, 4, 4, 1, 2, 5, 3, 0]):
        wanted = np.array(rows, np.int64)
        assert take_rows(table, wanted).equals(table.take(pa.array(wanted)))
