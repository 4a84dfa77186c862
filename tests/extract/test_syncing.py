"""What `extract` says and does when a source has moved, lost what it had, or names a bad place."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from counting_backbone import CALLS
from pipeline_case import SPEC, Case, config

from mmc.extract import pipeline, syncing
from mmc.extract.pipeline import extract
from mmc.store import EmbeddingStore
from mmc.store.errors import InputError, StoreLockedError


@pytest.fixture
def case(tmp_path) -> Case:
    folder = tmp_path / "data"
    folder.mkdir()
    return Case(folder)


def opened(case: Case, store: str = "store") -> EmbeddingStore:
    return EmbeddingStore.open(case.folder / store)


def again(case: Case, source: str, **settings: object) -> list[str]:
    """Extract another source into the case's store; returns what was said."""
    CALLS.clear()
    said: list[str] = []
    extract(source, str(case.folder / "store"), config(**settings), report=said.append)
    return said


def test_a_source_in_another_place_takes_the_place_of_the_old_one(case):
    case.add(10)
    case.extract()
    before = opened(case)["fake/image"][:]
    moved = case.folder.parent / "moved"
    moved.mkdir()
    for path in case.folder.glob("*.png"):
        shutil.copy2(path, moved)
    del case.rows[3]
    case.write()
    shutil.move(case.table, moved / "all.csv")
    said = again(case, str(moved / "all.csv"))
    store = opened(case)
    assert [source["spec"] for source in store.sources] == [str(moved / "all.csv")]
    assert np.flatnonzero(~store.live).tolist() == [3]
    assert any("taken for the same source in another place" in line for line in said)
    assert any("1 gone from the source, 9 unchanged" in line for line in said)
    assert not any("added to them" in line or "still used" in line for line in said)
    assert not any(name.endswith("batches") for name in CALLS)
    np.testing.assert_array_equal(store["fake/image"][:], before)


def test_another_source_beside_a_lost_one_is_added_and_said(case):
    case.add(10)
    case.extract()
    case.table.rename(case.folder / "old.csv")
    case.rows = case.rows[6:]
    for number in range(8):
        case.add(1, id=f"new{number}")
    case.write()
    other = case.folder / "other.csv"
    case.table.rename(other)
    (case.folder / "old.csv").unlink()
    said = again(case, str(other))
    store = opened(case)
    assert len(store.sources) == 2
    assert store.live.all()
    assert any("6 samples of the store came from" in line for line in said)


def test_a_source_that_is_still_there_is_never_replaced(case):
    case.add(10)
    case.extract()
    copy = case.folder / "copy.csv"
    shutil.copy(case.table, copy)
    said = again(case, str(copy))
    assert len(opened(case).sources) == 2
    assert any("these are added to them" in line for line in said)


def test_lost_texts_are_counted_before_they_are_replaced(case):
    case.add(9)
    case.extract()
    texts = opened(case)["fake/text"][:]
    case.rows[2]["text"] = ""
    case.extract()
    assert any(
        "warning: texts of the store that the source does not have any more: 1;" in line
        for line in case.said
    )
    options = config().source
    case.extract(source=replace(options, text_column="-"))
    assert any(
        "does not have any more: 8;" in line and "--text-column" in line for line in case.said
    )
    assert (opened(case)["fake/text"][:] != texts).any()
    case.extract()
    assert not any("does not have any more" in line for line in case.said)
    case.extract(source=replace(options, image_column="-"))
    assert any(
        "images of the store that the source does not have any more: 9;" in line
        for line in case.said
    )


@pytest.mark.parametrize("below", ["inner", "features/inner", "a/b/c"])
def test_a_store_inside_a_store_is_refused(case, below):
    case.add(3)
    case.extract()
    before = case.files()
    with pytest.raises(InputError, match=r"lies inside the store .*store; choose a path outside"):
        case.extract(f"store/{below}")
    assert case.files() == before


def test_a_store_inside_a_store_at_a_url(case):
    case.add(3)
    case.write()
    place = f"memory://{case.folder.name}-{id(case)}/a/store"
    extract(str(case.table), place, config(), report=lambda line: None)
    with pytest.raises(InputError, match=f"lies inside the store {place};"):
        extract(str(case.table), f"{place}/deep/down", config(), report=lambda line: None)
    extract(str(case.table), f"{place}-2", config(), report=lambda line: None)


def test_a_store_beside_other_groups_of_zarr(case):
    case.add(3)
    (case.folder / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    case.extract()
    assert len(opened(case)) == 3


def test_two_first_extracts_into_one_path(case, monkeypatch):
    case.add(20)
    case.write()
    barrier, created = threading.Barrier(2), syncing._created

    def together(*args):
        barrier.wait(timeout=30)
        return created(*args)

    def one(_):
        settings = config(backbones=(f"{SPEC}[delay=0.2]",))
        try:
            extract(str(case.table), str(case.folder / "store"), settings, report=lambda line: None)
        except StoreLockedError as error:
            return str(error)
        return "done"

    monkeypatch.setattr(syncing, "_created", together)
    with ThreadPoolExecutor(2) as pool:
        found = sorted(pool.map(one, range(2)))
    assert "done" in found
    assert all(text == "done" or "is held by process" in text for text in found)
    assert opened(case).status("fake", "image").tolist() == [1] * 20


def test_a_source_that_is_not_there_is_found_before_a_backbone_is_loaded(case):
    CALLS.clear()
    with pytest.raises(InputError, match="no file or folder"):
        extract(str(case.folder / "nowhere.csv"), str(case.folder / "store"), config())
    assert CALLS["loaded"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbones": (f"{SPEC}[wings=2]",)}, "cannot be built"),
        ({"backbones": (SPEC, "hf:./nowhere"), "names": ("a", "b")}, "no such folder"),
        ({"fields": ("tokens",)}, "has no field 'tokens'"),
        ({"label_names": "nowhere.json"}, "label names nowhere.json: No such file"),
    ],
)
def test_what_is_wrong_with_a_backbone_is_found_before_the_source_is_read(
    case, settings, message, monkeypatch
):
    case.add(2)
    if "label_names" in settings:
        settings = {"label_names": Path(settings["label_names"])}
    monkeypatch.setattr(pipeline, "read_source", lambda *args: pytest.fail("it was read"))
    with pytest.raises(InputError, match=message):
        case.extract(**settings)
    assert not (case.folder / "store").exists()


def test_another_identity_is_found_before_the_source_is_read(case, monkeypatch):
    case.add(4)
    case.extract()
    monkeypatch.setattr(pipeline, "read_source", lambda *args: pytest.fail("it was read"))
    with pytest.raises(InputError, match="was made differently"):
        case.extract(backbones=(f"{SPEC}[weights=b]",))
