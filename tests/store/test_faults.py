"""Damage, full disks, dead processes: an error that names the file, never a wrong number."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from mmc.store import EmbeddingStore, compact, files, repair, verify
from mmc.store.errors import DamagedStoreError, MmcError, StoreLockedError
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The features of a filled store of 20 rows in shards of 8."""
    filled(f"{tmp_path}/s", bad={3: "bad"})
    return tmp_path / "s" / "features" / ALIAS


def opened(folder: Path) -> EmbeddingStore:
    return EmbeddingStore.open(folder.parents[1])


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("rows", [slice(None), slice(8, 10), [9, 10, 11, 12, 15]])
@pytest.mark.parametrize("at", [0, 20, 63, 64, 67, 70, -1, -20])
def test_any_flipped_byte_is_found(folder: Path, at: int, rows: Any) -> None:
    """Data (64 bytes), checksum (4), index (16) and its checksum (4) of the second shard."""
    flip(folder / "image" / "c.1.0", at)
    with pytest.raises(DamagedStoreError, match=r"image/c\.1\.0.* is damaged.*mmc verify --repair"):
        opened(folder)[IMAGE].take(rows, missing="fill")
    found = [(problem.kind, problem.feature, problem.shard) for problem in verify(opened(folder))]
    assert found == [("shard", IMAGE, 1)]


def test_a_sparse_gather_checks_structure_and_all_on_request(folder: Path) -> None:
    flip(folder / "image" / "c.1.0", 0)
    feature = opened(folder)[IMAGE]
    assert feature.take([15, 13]).shape == (2, 4)
    with pytest.raises(DamagedStoreError):
        feature.take([15, 13], check=True)
    (folder / "image" / "c.1.0").write_bytes(b"")
    with pytest.raises(DamagedStoreError, match="too short"):
        opened(folder)[IMAGE].take([15, 13])


@pytest.mark.parametrize("size", [0, 10, 64, 87])
def test_truncated_shards(folder: Path, size: int) -> None:
    path = folder / "image" / "c.1.0"
    path.write_bytes(path.read_bytes()[:size])
    for rows in (slice(None), [9, 15]):
        with pytest.raises(DamagedStoreError, match=r"image/c\.1\.0"):
            opened(folder)[IMAGE].take(rows, missing="fill")


def test_status_without_shard(folder: Path) -> None:
    (folder / "image" / "c.1.0").unlink()
    feature = opened(folder)[IMAGE]
    for rows in (slice(None), [9], slice(15, 17)):
        with pytest.raises(DamagedStoreError, match=r"c\.1\.0 is missing and its rows are marked"):
            feature.take(rows, missing="fill")
    assert feature.take([0, 17]).shape == (2, 4)


def test_shard_without_status_is_not_there(folder: Path) -> None:
    (folder / "status_image" / "c.1").unlink()
    store = opened(folder)
    assert np.isnan(store[IMAGE].take(slice(8, 16), missing="fill")).all()
    assert [(p.kind, p.tower, p.shard) for p in verify(store)] == [("status", "image", 1)]
    assert "status_image/c.1" in verify(store)[0].file
    repair(store)
    assert verify(store) == []
    with store.writer(ALIAS, FIELDS, IDENTITY, {}) as writer:
        assert writer.pending("image").tolist() == list(range(8, 16))


@pytest.mark.parametrize("damage", ["flip", "short", "long"])
def test_damaged_status(folder: Path, damage: str) -> None:
    path = folder / "status_image" / "c.0"
    if damage == "flip":
        flip(path, 1)
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "short" else b"\0" * 40)
    store = opened(folder)
    for read in (lambda: store[IMAGE], lambda: store.rows(features=[IMAGE]), store.info):
        with pytest.raises(DamagedStoreError, match=r"status_image/c\.0"):
            read()
    assert [(p.kind, p.tower, p.shard) for p in verify(store)] == [("status", "image", 0)]
    assert [p.kind for p in repair(store)] == ["status"]
    assert np.flatnonzero(store[IMAGE].done).tolist() == list(range(8, 20))


def spoil(name: str, content: bytes | None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.unlink()
        if content is not None:
            path.write_bytes(content)

    return damage


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (spoil("image/zarr.json", None), "array"),
        (spoil("image/zarr.json", b"{"), "array"),
        (spoil("text_mask/zarr.json", b"{}"), "array"),
        (spoil("status_text/zarr.json", None), "array"),
        (spoil("status_text/zarr.json", b"{"), "array"),
        (spoil("status_text/zarr.json", b'{"shape": [20]}'), "array"),
        (spoil("errors.parquet", b"PAR1"), "failures"),
        (spoil("label_text/c.0.0", None), "label_text"),
        (spoil("label_text/c.0.0", b"12345678"), "label_text"),
        (spoil("label_text/zarr.json", b'{"attributes": {"mmc": {}}}'), "label_text"),
        (spoil("../../zarr.json", b'{"attributes": {"mmc": {"format": 1}}}'), "root"),
        (spoil("../../zarr.json", b'{"attributes": {"mmc'), "root"),
    ],
)
def test_repair_mends_what_can_be(folder: Path, damage: Callable[[Path], None], kind: str) -> None:
    store = opened(folder)
    with store.writer(ALIAS, FIELDS, IDENTITY, {}) as writer:
        writer.write_label_text(LABELS, np.ones((3, 2)), "{label}")
    damage(folder)
    assert [problem.kind for problem in verify(store)] == [kind]
    assert [problem.kind for problem in repair(store)] == [kind]
    assert verify(store) == []
    with store.writer(ALIAS, FIELDS, IDENTITY, {}) as writer:
        fill(store, writer, bad={3: "bad"})
    expect_whole(store, failed=[3])


@pytest.mark.parametrize("left", [b'{"attributes": {"mmc', None])
def test_a_store_opens_without_the_copy_in_its_root(folder: Path, left: bytes | None) -> None:
    spoil("../../zarr.json", left)(folder)
    store = opened(folder)
    expect_whole(store, failed=[3])
    assert [problem.kind for problem in repair(store)] == ["root"]
    assert verify(opened(folder)) == []
    spoil("../../zarr.json", b"{")(folder)
    spoil("../../samples.parquet", None)(folder)
    with pytest.raises(DamagedStoreError, match=r"zarr\.json is damaged"):
        opened(folder)


@pytest.mark.parametrize(
    ("name", "kind"), [("zarr.json", "alias"), ("../../samples.parquet", "samples")]
)
def test_some_damage_is_beyond_repair_and_said(folder: Path, name: str, kind: str) -> None:
    store = opened(folder)
    (folder / name).write_bytes(b"{")
    assert [problem.kind for problem in verify(store)] == [kind]
    assert [problem.kind for problem in repair(store)] == [kind]
    assert [problem.kind for problem in verify(store)] == [kind]


def test_a_damaged_alias_can_be_made_again(folder: Path) -> None:
    store = opened(folder)
    flip(folder / "zarr.json", (folder / "zarr.json").read_text().index("ViT"))
    with pytest.raises(DamagedStoreError, match="fingerprint is not the hash"):
        _ = store[IMAGE]
    with pytest.raises(DamagedStoreError), store.writer(ALIAS, FIELDS, IDENTITY, {}):
        pass
    with store.writer(ALIAS, FIELDS, IDENTITY, {}, overwrite=True) as writer:
        fill(store, writer)
    expect_whole(store)


def test_damage_never_gets_a_fitting_checksum(folder: Path) -> None:
    """Neither a commit beside damaged rows nor a compaction writes them anew."""
    flip(folder / "image" / "c.0.0", 0)
    store = opened(folder)
    with (
        store.writer(ALIAS, FIELDS, IDENTITY, {}) as writer,
        pytest.raises(DamagedStoreError, match=r"c\.0\.0"),
    ):
        writer.commit(0, "image", [3], {"image": np.ones((1, 4), "float16")})
    store.sync(samples_table(range(1, 20)), label_set=LABELS, task="multilabel", source=SOURCE)
    with pytest.raises(DamagedStoreError, match=r"c\.0\.0"):
        compact(store)
    assert len(opened(folder)) == 20


class FullDisk:
    """Lets some files through, then writes half a file and fails as the kernel does."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.write = files.write_temporary

    def __call__(self, path: Path, fill_file: Callable[[BinaryIO], None]) -> None:
        self.room -= 1
        if self.room < 0:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self.write(path, fill_file)


def test_a_full_disk_leaves_nothing_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    room = 0
    while True:
        disk = FullDisk(room)
        monkeypatch.setattr(files, "write_temporary", disk)
        problem = ""
        try:
            if not (path / "zarr.json").exists():
                EmbeddingStore.create(
                    path,
                    samples_table(range(12)),
                    label_set=LABELS,
                    task="multilabel",
                    source=SOURCE,
                )
            store = EmbeddingStore.open(path)
            with store.writer(ALIAS, FIELDS, IDENTITY, {}, 8) as writer:
                fill(store, writer)
        except MmcError as error:
            problem = str(error)
        monkeypatch.setattr(files, "write_temporary", disk.write)
        assert list(path.rglob("*.tmp")) == []
        if (path / "zarr.json").exists():
            store = EmbeddingStore.open(path)
            assert verify(store) == []
        if disk.room >= 0:
            break
        assert problem.startswith(f"cannot write {path}/")
        assert "No space left on device; make room" in problem
        # A little more room each time, so that every write is once the one that fails.
        room += 1
    assert room > 3
    expect_whole(store)


def test_a_place_that_is_not_ours_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MmcError, match=r"cannot write .*zarr\.json: .*file is not a folder"):
        EmbeddingStore.create(
            tmp_path / "file" / "s",
            samples_table(range(2)),
            label_set=LABELS,
            task="multilabel",
            source=SOURCE,
        )


WRITER = """
import sys, time
from mmc.store import EmbeddingStore
from mmc.store.testing import ALIAS, FIELDS, IDENTITY, fill
store = EmbeddingStore.open(sys.argv[1])
with store.writer(ALIAS, FIELDS, IDENTITY, {}, 2) as writer:
    print("open", flush=True)
    fill(store, writer)
    print("done", flush=True)
    time.sleep(60)
"""


def start(path: Path) -> subprocess.Popen[str]:
    """A process that writes to the store; returns when it holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_kill_minus_nine_loses_only_what_was_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store = EmbeddingStore.create(
        path, samples_table(range(400)), label_set=LABELS, task="multilabel", source=SOURCE
    )
    done = 0
    for _ in range(3):
        process = start(path)
        with (
            pytest.raises(StoreLockedError, match=f"process {process.pid} on "),
            store.writer(ALIAS, FIELDS, IDENTITY, {}),
        ):
            pass
        wanted = done + 20
        deadline = time.monotonic() + 30
        while (store.status(ALIAS, "image") == 1).sum() < min(wanted, 400):
            assert time.monotonic() < deadline
        end(process)
        assert verify(store) == []
        feature = store[IMAGE]
        rows = np.flatnonzero(feature.done)
        assert len(rows) >= wanted
        done = len(rows)
        feature.take(rows, check=True)
    # The lock of a dead owner is no lock.
    with store.writer(ALIAS, FIELDS, IDENTITY, {}) as writer:
        fill(store, writer)
        undisturbed = filled(f"{tmp_path}/other", range(400))
    expect_whole(store)
    assert list(path.rglob("*.tmp")) == []
    rows = np.arange(400)
    np.testing.assert_array_equal(store[IMAGE].take(rows), undisturbed[IMAGE].take(rows))


def test_the_owner_of_a_lock_may_be_unknown(tmp_path: Path) -> None:
    store = filled(f"{tmp_path}/s")
    with store.writer(ALIAS, FIELDS, IDENTITY, {}):
        owner = tmp_path / "s" / f".owner-{ALIAS}"
        assert json.loads(owner.read_text())["pid"] == os.getpid()
        owner.write_text("{")
        with (
            pytest.raises(StoreLockedError, match="held by another process; wait"),
            store.writer(ALIAS, FIELDS, IDENTITY, {}),
        ):
            pass
    assert not owner.exists()
