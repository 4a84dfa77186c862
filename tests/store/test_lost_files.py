"""Files of a filled store that are not there any more: seen, named, and nothing else is lost."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mmc.store import EmbeddingStore, compact, conclusion, repair, verify
from mmc.store.errors import DamagedStoreError, MmcError
from mmc.store.testing import (
    ALIAS,
    FIELDS,
    IDENTITY,
    LABELS,
    SOURCE,
    expect_whole,
    fill,
    filled,
    samples_table,
)

IMAGE = f"{ALIAS}/image"
RECORD = f"features/{ALIAS}/zarr.json"


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> EmbeddingStore:
    """20 rows in shards of 8, of which row 3 failed; in a folder, and in an object store."""
    place = {"local": f"{tmp_path}/s", "memory": f"memory://lost-{tmp_path.name}"}[request.param]
    return filled(place, bad={3: "bad"})


def test_a_lost_record_is_damage_that_stops_everything(store: EmbeddingStore) -> None:
    raw = store.files.read(RECORD)
    assert raw is not None
    store.files.remove(RECORD)
    shards = store.files.names(f"features/{ALIAS}/image")
    (problem,) = verify(store)
    assert (problem.kind, problem.feature, problem.repairable) == ("alias", ALIAS, False)
    assert problem.file.endswith(RECORD)
    assert problem.what.startswith("is missing, and without it")
    for repaired in (False, True):
        with pytest.raises(MmcError, match=r"^1 cannot be repaired: the lines above say"):
            conclusion([problem], "s", repaired=repaired)
    assert repair(store) == [problem] == verify(store)
    where = r"features/clip/zarr\.json is missing.*put it back, extract again with --overwrite"
    uses: list[Callable[[], object]] = [
        lambda: store.features,
        lambda: store[IMAGE],
        lambda: store.rows(features=[IMAGE]),
        store.info,
        lambda: compact(store),
        lambda: store.writer(ALIAS, FIELDS, IDENTITY, {}).__enter__(),
    ]
    store.sync(samples_table(range(19)), label_set=LABELS, task="multilabel", source=SOURCE)
    for use in uses:
        with pytest.raises(DamagedStoreError, match=where):
            use()
    assert store.files.names(f"features/{ALIAS}/image") == shards
    store.sync(samples_table(range(20)), label_set=LABELS, task="multilabel", source=SOURCE)
    store.files.write(RECORD, [raw])
    expect_whole(store, failed=[3])
    assert verify(store) == []


def test_content_that_changes_while_the_record_is_lost_is_missing_when_it_is_back(
    store: EmbeddingStore,
) -> None:
    raw = store.files.read(RECORD)
    assert raw is not None
    store.files.remove(RECORD)
    keys = [f"i{number}" for number in range(20)]
    keys[9] = "another picture"
    store.sync(
        samples_table(range(20), image_key=keys),
        label_set=LABELS,
        task="multilabel",
        source=SOURCE,
    )
    store.files.write(RECORD, [raw])
    assert np.flatnonzero(store.status(ALIAS, "image") == 0).tolist() == [9]
    assert (store.status(ALIAS, "text") == 1).all()


def test_overwrite_needs_no_record(store: EmbeddingStore) -> None:
    store.files.remove(RECORD)
    with store.writer(ALIAS, FIELDS, {"new": 1}, {}, 4, overwrite=True) as writer:
        fill(store, writer)
    expect_whole(store)
    assert verify(store) == []


def test_a_deleted_alias_is_no_damage(store: EmbeddingStore) -> None:
    store.files.remove_tree(f"features/{ALIAS}")
    assert store.aliases == ()
    assert verify(store) == []


@pytest.mark.parametrize("rows", [range(20), range(1, 20)])
def test_an_interrupted_removal_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: range
) -> None:
    """Half of the objects are gone: neither the old numbers nor an error, with or without sync.

    (In a folder one rename takes all of them away.)
    """
    store = filled(f"memory://removal-{tmp_path.name}")
    real, left = MemoryFileSystem.rm_file, [10]

    def rm_file(self: MemoryFileSystem, path: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "rm_file", rm_file)
        with (
            pytest.raises(KeyboardInterrupt),
            store.writer(ALIAS, FIELDS, {"new": 1}, {}, 4, overwrite=True),
        ):
            pass
    assert store.files.names(f"features/{ALIAS}") != []
    assert store.aliases == ()
    assert verify(store) == []
    store.sync(samples_table(rows), label_set=LABELS, task="multilabel", source=SOURCE)
    with store.writer(ALIAS, FIELDS, {"new": 1}, {}, 4) as writer:
        assert len(writer.pending("image")) == len(rows)
        fill(store, writer)
    assert store[IMAGE].fingerprint == store.provenance(ALIAS).fingerprint
    assert (store.status(ALIAS, "image")[store.live] == 1).all()


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_lost_status_is_seen_and_its_rows_are_made_again(
    store: EmbeddingStore, tower: str
) -> None:
    for name in store.files.names(f"features/{ALIAS}/status_{tower}"):
        store.files.remove(f"features/{ALIAS}/status_{tower}/{name}")
    found = {(problem.kind, problem.shard, problem.repairable) for problem in verify(store)}
    wanted = {("array", None, True), *(("status", shard, True) for shard in range(3))}
    # The reason of row 3 has no failed row any more, which is no harm.
    assert found == wanted
    repair(store)
    assert verify(store) == []
    with store.writer(ALIAS, FIELDS, IDENTITY, {}) as writer:
        assert writer.pending(tower).tolist() == list(range(20))
        fill(store, writer, bad={3: "bad"})
    expect_whole(store, failed=[3])


def test_lost_reasons_are_seen_and_their_rows_are_tried_again(store: EmbeddingStore) -> None:
    store.files.remove(f"features/{ALIAS}/errors.parquet")
    (problem,) = verify(store)
    with pytest.raises(MmcError, match=r"^1 damaged in s: run `mmc verify s --repair`$"):
        conclusion([problem], "s", repaired=False)
    assert conclusion([problem], "s", repaired=True).startswith("1 mended: run the same")
    assert conclusion([], "s", repaired=False) == "s: every checksum is right"
    assert (problem.kind, problem.what) == (
        "failures",
        "it lacks the reasons of 1 of the 1 rows that failed",
    )
    repair(store)
    assert verify(store) == []
    with store.writer(ALIAS, FIELDS, IDENTITY, {}) as writer:
        assert writer.pending("image").tolist() == [3]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_lost_description_of_an_array_is_seen_and_made_again(
    store: EmbeddingStore, field: object
) -> None:
    name = getattr(field, "name", "")
    store.files.remove(f"features/{ALIAS}/{name}/zarr.json")
    with pytest.raises(DamagedStoreError, match=f"{name}/zarr.json is missing"):
        store[f"{ALIAS}/{name}"]
    assert [problem.feature for problem in verify(store)] == [f"{ALIAS}/{name}"]
    repair(store)
    expect_whole(store, failed=[3])


def test_a_lost_field_is_seen_shard_by_shard(store: EmbeddingStore) -> None:
    store.files.remove_tree(f"features/{ALIAS}/image")
    assert [problem.kind for problem in verify(store)] == ["array"]
    # With its description back, the shards are looked for.
    found = [(problem.kind, problem.shard) for problem in repair(store)]
    assert found == [("array", None), ("shard", 0), ("shard", 1), ("shard", 2)]
    assert verify(store) == []
    with store.writer(ALIAS, FIELDS, IDENTITY, {}) as writer:
        fill(store, writer, bad={3: "bad"})
    expect_whole(store, failed=[3])
