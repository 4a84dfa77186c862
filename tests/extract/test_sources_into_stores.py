"""What the sources promise, as it arrives in a store."""

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from pipeline_case import Case, config

from mmc.extract.pipeline import extract
from mmc.extract.sources import SourceOptions
from mmc.store import EmbeddingStore


@pytest.fixture
def case(tmp_path) -> Case:
    return Case(tmp_path)


def into_store(case: Case, name: str, **settings) -> EmbeddingStore:
    case.said.clear()
    store = case.folder / f"{name}.store"
    extract(str(case.folder / name), str(store), config(**settings), report=case.said.append)
    return EmbeddingStore.open(store)


@pytest.mark.parametrize("name", ["t.parquet", "t.feather", "z.feather"])
def test_pictures_in_a_table_are_embedded_like_files(case, name):
    case.add(21)
    case.extract()
    expected = EmbeddingStore.open(case.folder / "store")
    columns = {key: [row[key] for row in case.rows] for key in ("id", "text", "labels", "split")}
    pictures = [(case.folder / row["image"]).read_bytes() for row in case.rows]
    pictures[4] = b"no picture"
    data = pa.table({**columns, "image": pa.array(pictures, pa.binary())})
    if name.endswith("parquet"):
        pq.write_table(data, case.folder / name, row_group_size=6)
    else:
        packed = "zstd" if name.startswith("z") else "uncompressed"
        feather.write_feather(data, case.folder / name, compression=packed)
    store = into_store(case, name)
    failed = store.errors("fake").to_pylist()
    assert [one["id"] for one in failed] == ["s4"]
    rows = np.delete(np.arange(21), 4)
    for field in ("fake/image", "fake/text"):
        np.testing.assert_array_equal(store[field].take(rows), expected[field].take(rows))
    assert store.column("image_key").to_pylist()[5] == expected.column("image_key").to_pylist()[5]
    into_store(case, name)
    assert any("nothing to do" in line for line in case.said)


def test_duplicates_that_are_dropped_are_not_in_the_store(case):
    case.add(3)
    case.add(2, image="s0.png", text="number s0 ", split="test")
    case.add(1, image="s0.png", text="another")
    case.rows[0]["text"] = "number s0 "
    case.extract()
    assert any("2 samples have the image and the text of another" in line for line in case.said)
    assert len(EmbeddingStore.open(case.folder / "store")) == 6
    case.extract("clean", source=SourceOptions(dedupe=True))
    store = EmbeddingStore.open(case.folder / "clean")
    assert store.column("id").to_pylist() == ["s1", "s2", "s3", "s5"]
    assert store.sources[0]["counts"]["duplicates_dropped"] == 2
    # On a store that has them, they count as gone from the source.
    case.extract(source=SourceOptions(dedupe=True))
    assert EmbeddingStore.open(case.folder / "store").rows().tolist() == [1, 2, 3, 5]
