"""Content keys: same content same key, unchanged files are not read again."""

import hashlib
import os

import pyarrow as pa
import pytest

from mmc.extract import keys
from mmc.extract.keys import add_keys
from mmc.extract.sources import SourceOptions, read_source


@pytest.fixture
def folder(tmp_path):
    for name, data in {"a": b"one", "b": b"one", "c": b"two"}.items():
        (tmp_path / f"{name}.jpg").write_bytes(data)
    (tmp_path / "t.csv").write_text(
        "id,image,text\n1,a.jpg,x\n2,b.jpg,\n3,c.jpg,x\n4,gone.jpg,y\n5,,z\n6,a.jpg,z\n"
    )
    return tmp_path


def keyed(folder, known=None, workers=2, **rest):
    return add_keys(read_source(str(folder / "t.csv")), known, workers=workers, **rest)


def test_keys_are_of_the_content(folder):
    table = keyed(folder)
    images = table["image_key"].to_pylist()
    assert images[0] == hashlib.sha256(b"one").hexdigest()[:32]
    assert images[0] == images[1] == images[5] != images[2]
    assert images[3] is None
    assert images[4] is None
    texts = table["text_key"].to_pylist()
    assert texts[0] == texts[2] == hashlib.sha256(b"x").hexdigest()[:32]
    assert texts[1] is None
    assert len(set(texts)) == 4
    assert table["size"].to_pylist() == [3, 3, 3, None, None, 3]
    stamps = table["mtime_ns"].to_pylist()
    assert stamps[0] == os.stat(folder / "a.jpg").st_mtime_ns
    assert stamps[3] is None
    for name, kind in {"image_key": "string", "text_key": "string", "size": "int64"}.items():
        assert table.schema.field(name).type == kind


def test_the_number_of_workers_changes_nothing(folder):
    assert keyed(folder, workers=1) == keyed(folder, workers=5)


def test_unchanged_files_are_not_read_again(folder, monkeypatch):
    known = keyed(folder)
    read = []
    monkeypatch.setattr(keys, "_read", lambda path: read.append(path.name) or path.read_bytes())
    assert keyed(folder, known) == known
    assert read == []
    os.utime(folder / "b.jpg", ns=(1, 1))
    assert keyed(folder, known)["image_key"] == known["image_key"]
    (folder / "c.jpg").write_bytes(b"three")
    (folder / "gone.jpg").write_bytes(b"here")
    changed = keyed(folder, known)["image_key"].to_pylist()
    assert sorted(set(read)) == ["b.jpg", "c.jpg", "gone.jpg"]
    assert changed[2] == hashlib.sha256(b"three").hexdigest()[:32]
    assert changed[3] == hashlib.sha256(b"here").hexdigest()[:32]


def test_what_is_no_file_has_no_key(folder):
    (folder / "gone.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "c.jpg").unlink()
    os.symlink(folder / "nowhere", folder / "c.jpg")
    with (folder / "t.csv").open("a") as file:
        file.write("7,pipe.jpg,x\n")
    assert keyed(folder)["image_key"].is_null().to_pylist() == [
        False, False, True, True, True, False, True,
    ]  # fmt: skip


def test_progress_counts_pictures(folder, monkeypatch):
    monkeypatch.setattr(keys, "_CHUNK", 2)
    seen = []
    keyed(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 4), (4, 4)]


def test_parts_of_one_file(tmp_path):
    (tmp_path / "all.tar").write_bytes(b"abcabcxyz")
    (tmp_path / "t.csv").write_text("id,image,text\n1,all.tar,x\n2,all.tar,x\n3,all.tar,x\n4,,x\n")
    samples = read_source(str(tmp_path / "t.csv"))
    offsets = pa.array([0, 3, 6, None], pa.int64())
    at = samples.table.column_names.index("image_offset")
    samples.table = samples.table.set_column(at, "image_offset", offsets)
    sizes = pa.array([3, 3, 3, None], pa.int64())
    samples.table = samples.table.append_column("size", sizes)
    table = add_keys(samples, None, workers=2)
    images = table["image_key"].to_pylist()
    assert images[0] == images[1] == hashlib.sha256(b"abc").hexdigest()[:32]
    assert images[2] == hashlib.sha256(b"xyz").hexdigest()[:32]
    assert images[3] is None
    assert table["size"].to_pylist() == [3, 3, 3, None]
    assert add_keys(samples, table, workers=1) == table


def test_texts_alone(tmp_path):
    (tmp_path / "t.csv").write_text("id,text\n1,é\n2,\n")
    samples = read_source(str(tmp_path / "t.csv"), SourceOptions())
    table = add_keys(samples, None, workers=1)
    assert table["text_key"].to_pylist() == [hashlib.sha256("é".encode()).hexdigest()[:32], None]
    assert table["image_key"].null_count == 2
