"""`mmc prepare`: what is written is the same data, smaller, and whole or not at all."""

import csv
import dataclasses
import datetime
import errno
import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tars import jpeg, sample, write_tar

from mmc.extract import prepare_shards
from mmc.extract.images import decode_rgb
from mmc.extract.prepare import PrepareConfig, prepare
from mmc.extract.sources import SourceOptions, read_source, resolve_image
from mmc.store.errors import InputError, MmcError
from mmc.store.files import LocalFiles

FORMS = ("webdataset", "csv")
TEXTS = [
    "plain", 'quotes "in" it, and a comma', "two\nlines", "cr\rlf\r\nend\n", " spaces ", "猫 🐈",
    "\ufeffmark", '"', "tab\tbed", "-1", "=1+1", None,
]  # fmt: skip
IDS = [
    "a/b/c", "../up", "dots.in.id", "ünï", "with space", "007", "7", "x" * 200, "q'\"", "CON",
    "-dash", "c:\\x",
]  # fmt: skip


def run(path, out, say=lambda line: None, **settings):
    return prepare(str(path), str(out), PrepareConfig(**settings), report=say)


def save(path, size, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (3, 4, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, **options)
    return path


@pytest.fixture
def table(tmp_path):
    """Twelve samples in three splits, with awkward ids and texts, and further columns."""
    folder = tmp_path / "source"
    lines = [["id", "image", "text", "genres", "split", "title", "size", "subset"]]
    for at, (name, text) in enumerate(zip(IDS, TEXTS, strict=True)):
        save(folder / f"{at}.jpg", (90 - 5 * at, 60), at, quality=95)
        labels = ("Drama|Sci-Fi, old", "Drama", "")[at % 3]
        split = ("test", "train", "train", "val")[at % 4]
        lines.append([name, f"{at}.jpg", text, labels, split, f"T{at}", "big", "left"])
    with (folder / "t.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    return folder / "t.csv"


def content(samples, *without):
    """All that a source says, row by row, in order within each split."""
    table = samples.table
    names = [n for n in table.column_names if n not in ("image", "image_offset", "size", *without)]
    rows = table.select(names).to_pylist()
    for row in rows:
        cell = row["labels"]
        row["labels"] = None if cell is None else [samples.label_set[at] for at in cell]
    order = {"train": 0, "val": 1, "test": 2}
    return sorted(rows, key=lambda row: order.get(row["split"], 3))


def pictures(samples):
    """The bytes of each picture, in order within each split."""
    columns = ["split", "image", "image_offset", "size"]
    table = samples.table
    if "size" not in table.column_names:
        columns.pop()
    rows = sorted(
        table.select(columns).to_pylist(),
        key=lambda row: {"train": 0, "val": 1, "test": 2}.get(row["split"], 3),
    )
    found = []
    for row in rows:
        data = None
        if row["image"] is not None:
            data = resolve_image(samples.source, row["image"]).read_bytes()
            if row["image_offset"] is not None:
                data = data[row["image_offset"] :][: row["size"]]
        found.append(data)
    return found


@pytest.mark.parametrize("to", FORMS)
def test_the_same_samples(table, tmp_path, to):
    before = read_source(str(table))
    result = run(table, tmp_path / "out", to=to, shard_samples=4)
    after = read_source(str(tmp_path / "out"))
    assert content(after) == content(before)
    assert (after.label_set, after.task) == (before.label_set, before.task)
    assert pictures(after) == pictures(before)
    assert (result.samples, result.images, result.failed, result.dropped) == (12, 12, 0, 0)
    assert result.splits == {"train": 6, "val": 3, "test": 3}
    assert result.warnings == ()
    assert sorted(row["text"] or "" for row in content(after)) == sorted(t or "" for t in TEXTS)
    assert {row["id"] for row in content(after)} == set(IDS)


def wide(folder):
    """A source of each kind at hand."""
    members = {}
    for at in range(5):
        members |= sample(f"{at}", at, labels=["b", "a"][: at % 3], year=at)
    write_tar(folder / "wds" / "0.tar", members)
    for at in range(3):
        for name in ("Drama", "a|b"):
            write_tar(
                folder / "classes" / name / f"{at}.tar",
                {f"image_{at}.jpg": jpeg(at), f"caption_{at}.txt": f"{name} {at}"},
            )
    for at in range(6):
        save(folder / "images" / ("train", "test")[at % 2] / "c,d;e|f"[at] / f"{at}.png", (9, 9))
    lines = [{"id": n, "img": f"{n}.png", "text": f"t{n}", "label": n % 2} for n in range(4)]
    for n in range(4):
        save(folder / "memes" / f"{n}.png", (30, 20), n)
    (folder / "memes" / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (folder / "memes" / "test.jsonl").write_text('{"id": 9, "img": "1.png", "text": "x"}\n')
    (folder / "texts.csv").write_text("id,text,label,fold\n1,x,NA,1\n2,y,None,2\n3,z,1|2,1\n")
    tags = folder / "tags"
    for n in range(3):
        save(tags / f"{n}.jpg", (20, 20), n)
        (tags / f"{n}.json").write_text(json.dumps({"encoded_labels": [int(n > 0), 1, 0], "x": n}))
    (tags / "organized_Tags.json").write_text('{"animal": ["cat"], "z": []}')
    return folder


KINDS = ("wds", "classes", "images", "memes", "texts.csv", "tags")


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_comes_back(tmp_path, kind, to):
    source = str(wide(tmp_path / "in") / kind)
    before = read_source(source)
    result = run(source, tmp_path / "out", to=to, shard_samples=2)
    assert result.warnings == ()
    after = read_source(str(tmp_path / "out"))
    empty = [name for name in before.table.column_names if name not in after.table.column_names]
    assert all(name in ("size",) for name in empty)
    assert len(after.table) == len(before.table)
    for one, other in zip(content(after), content(before), strict=True):
        for name, value in other.items():
            assert one[name] == value or (not one[name] and not value), name
    assert (after.label_set, after.task) == (before.label_set, before.task)
    assert after.source["label_tree"] == before.source["label_tree"]


@pytest.mark.parametrize("to", FORMS)
def test_columns_keep_their_types(tmp_path, to):
    table = pa.table(
        {
            "id": ["a", "b", "c"],
            "text": ["x", "y", "z"],
            "n": pa.array([1, None, 3], pa.int32()),
            "f": [0.5, 1e-9, None],
            "ok": [True, None, False],
            "day": pa.array([datetime.date(2020, 2, 29), None, None]),
            "words": [["x", 'q"'], [], None],
            "deep": [{"k": [1]}, None, {"k": []}],
            "code": ["007", "7", "1.0"],
        }
    )
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "t.parquet")
    result = run(tmp_path / "in" / "t.parquet", tmp_path / "out", to=to)
    assert result.warnings == ()
    after = read_source(str(tmp_path / "out")).table.select(table.column_names)
    assert after.to_pylist() == table.to_pylist()
    assert after.schema.types == table.schema.types


def test_unlabelled_beside_none_of_the_labels(tmp_path):
    path = tmp_path / "in" / "t.jsonl"
    path.parent.mkdir()
    cells = [["a", "b"], [], None, ["a"]]
    path.write_text(
        "".join(json.dumps({"id": n, "text": "x", "labels": c}) + "\n" for n, c in enumerate(cells))
    )
    for to in FORMS:
        assert run(path, tmp_path / to, to=to).warnings == ()
        after = read_source(str(tmp_path / to))
        assert [row["labels"] for row in content(after)] == cells


@pytest.mark.parametrize("to", FORMS)
def test_other_splits_and_none(tmp_path, to):
    path = tmp_path / "in" / "t.csv"
    path.parent.mkdir()
    path.write_text(
        "id,text,split\n1,a,fold 1\n2,b,\n3,c,train\n4,d,../x\n5,e,fold_1\n6,f,fold 1\n"
    )
    result = run(path, tmp_path / "out", to=to)
    after = read_source(str(tmp_path / "out"))
    splits = ["fold 1", "", "train", "../x", "fold_1", "fold 1"]
    assert after.table["split"].to_pylist() == splits
    assert after.table["id"].to_pylist() == [str(n) for n in range(1, 7)]
    assert result.warnings == ()
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_pictures_are_made_smaller_and_never_larger(tmp_path):
    folder = tmp_path / "in"
    save(folder / "wide.jpg", (400, 100), 1)
    save(folder / "tall.png", (30, 300), 2)
    save(folder / "small.png", (50, 40), 3)
    save(folder / "thin.png", (3000, 1), 4)
    save(folder / "exact.jpg", (128, 128), 5, quality=60)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(folder / "turned.jpg", (60, 40), 6, exif=exif)
    Image.new("L", (20, 10), 99).save(folder / "gray.jpg")
    Image.new("CMYK", (20, 10), (1, 2, 3, 4)).save(folder / "ink.jpg")
    Image.new("RGBA", (300, 150), (255, 0, 0, 0)).save(folder / "clear.png")
    result = run(folder, tmp_path / "out", max_side=128, workers=2)
    after = read_source(str(tmp_path / "out"))
    data = dict(zip(after.table["id"].to_pylist(), pictures(after), strict=True))
    sizes = {name: tuple(decode_rgb(one).shape[:0:-1]) for name, one in data.items()}
    assert sizes == {
        "wide.jpg": (128, 32), "tall.png": (13, 128), "small.png": (50, 40), "thin.png": (128, 1),
        "exact.jpg": (128, 128), "turned.jpg": (40, 60), "gray.jpg": (20, 10),
        "ink.jpg": (20, 10), "clear.png": (128, 64),
    }  # fmt: skip
    for name in ("exact.jpg", "gray.jpg"):
        assert data[name] == (folder / name).read_bytes()
    for name, one in data.items():
        header = Image.open(io.BytesIO(one))
        assert header.format == "JPEG", name
        assert header.mode == ("L" if name == "gray.jpg" else "RGB"), name
    # As Pillow's own bicubic would, to the loss of JPEG at this quality.
    reference = Image.open(folder / "wide.jpg").resize((128, 32), Image.Resampling.BICUBIC)
    difference = decode_rgb(data["wide.jpg"]).permute(1, 2, 0).numpy() - np.asarray(reference, int)
    assert np.abs(difference).mean() < 4
    assert result.images == 9


def test_quality(tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    (tmp_path / "in").mkdir()
    noise.save(tmp_path / "in" / "a.png")
    sizes = [
        run(tmp_path / "in", tmp_path / f"q{quality}", quality=quality, to="csv").bytes
        for quality in (20, 95)
    ]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("to", FORMS)
def test_pictures_that_cannot_be_used(tmp_path, to):
    folder = tmp_path / "in"
    save(folder / "good.jpg", (20, 20))
    (folder / "cut.jpg").write_bytes((folder / "good.jpg").read_bytes()[:-20])
    (folder / "t.csv").write_text(
        "id,image,text\n1,good.jpg,a\n2,cut.jpg,b\n3,cut.jpg,\n4,,d\n5,,\n6,gone.jpg,f\n"
    )
    said = []
    result = run(folder / "t.csv", tmp_path / "out", say=said.append, to=to)
    assert (result.samples, result.images, result.failed, result.dropped) == (4, 1, 3, 2)
    after = read_source(str(tmp_path / "out"))
    assert after.table["id"].to_pylist() == ["1", "2", "4", "6"]
    assert after.table["image"].is_null().to_pylist() == [False, True, True, True]
    assert "warning: 3 pictures could not be used:" in said
    assert any(line.startswith("  2: truncated JPEG") for line in said)
    assert any(line == "  6: no such file" for line in said)
    assert any("2 samples left out" in line for line in said)


def test_nothing_to_prepare(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"can be used, first a\.jpg: not an image: an HTML page"):
        run(folder, tmp_path / "out")
    (folder / "t.csv").write_text("id,text\n1,\n2, \n")
    with pytest.raises(InputError, match="there is nothing to prepare"):
        run(folder / "t.csv", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_bombs_are_refused(tmp_path):
    folder = tmp_path / "in"
    save(folder / "a.png", (300, 300))
    save(folder / "b.png", (20, 20))
    result = run(folder, tmp_path / "out", max_pixels=1000)
    assert (result.images, result.dropped) == (1, 1)


def test_shards_are_balanced_and_indexed(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [f"{n},text {n},{'train' if n < 23 else 'test'}" for n in range(30)]
    (folder / "t.csv").write_text("id,text,split\n" + "\n".join(rows) + "\n")
    result = run(folder / "t.csv", tmp_path / "out", shard_samples=10)
    out = tmp_path / "out"
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*.tar"))
    assert names == ["test/00000.tar", "train/00000.tar", "train/00001.tar", "train/00002.tar"]
    counts = []
    for name in names:
        with tarfile.open(out / name) as tar:
            counts.append(len(tar.getnames()) // 2)
    assert counts == [7, 8, 8, 7]
    assert result.shards == 4
    index = pq.read_table(out / "index.parquet")
    assert index.column_names == ["id", "split", "shard", "key", "offset", "size"]
    assert index["id"].to_pylist() == [str(n) for n in range(30)]
    assert index["key"][29].as_py() == "000000029"


def test_the_index_says_where_pictures_lie(table, tmp_path):
    run(table, tmp_path / "out", shard_samples=4)
    for row in pq.read_table(tmp_path / "out" / "index.parquet").to_pylist():
        with tarfile.open(tmp_path / "out" / row["shard"]) as tar:
            member = tar.getmember(f"{row['key']}.jpg")
            assert (member.offset_data, member.size) == (row["offset"], row["size"])
            metadata = json.load(tar.extractfile(f"{row['key']}.json"))
        assert (metadata["id"], metadata["split"]) == (row["id"], row["split"])


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith((".lock", ".owner"))
    }


@pytest.mark.parametrize("to", FORMS)
def test_the_same_bytes_again_whatever_the_threads(table, tmp_path, to):
    run(table, tmp_path / "one", to=to, shard_samples=3, workers=1)
    run(table, tmp_path / "two", to=to, shard_samples=3, workers=4)
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    del one["prepare.json"], two["prepare.json"]
    assert one == two


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_an_interrupted_run_goes_on(table, tmp_path, monkeypatch, to, after):
    out = tmp_path / "out"
    whole = run(table, tmp_path / "whole", to=to, shard_samples=3)
    kind = prepare_shards.TarShards if to == "webdataset" else prepare_shards.ImageFolders
    real, written = kind.write, []

    def stop_in_the_middle(self, name, samples):
        def some():
            yield next(iter(samples))
            if len(written) == after:
                raise KeyboardInterrupt

            yield from samples

        real(self, name, some())
        written.append(name)

    monkeypatch.setattr(kind, "write", stop_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        run(table, out, to=to, shard_samples=3)
    assert not [path for path in out.rglob("*") if ".tmp" in path.name]
    if to == "webdataset" and after:
        with pytest.raises(InputError, match="half prepared"):
            read_source(str(out))
    monkeypatch.undo()
    said = []
    result = run(table, out, say=said.append, to=to, shard_samples=3)
    assert result.reused == after
    assert any("going on where an earlier run stopped" in line for line in said)
    assert dataclasses.replace(result, seconds=0, reused=0, out="") == dataclasses.replace(
        whole, seconds=0, reused=0, out=""
    )
    left, right = tree(out), tree(tmp_path / "whole")
    del left["prepare.json"], right["prepare.json"]
    assert left == right


def test_a_finished_folder_is_left_alone(table, tmp_path):
    first = run(table, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    said = []
    again = run(table, tmp_path / "out", say=said.append)
    assert any("nothing to do" in line for line in said)
    assert dataclasses.replace(again, seconds=first.seconds) == first
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("to", FORMS)
def test_what_was_prepared_otherwise_is_refused_or_replaced(table, tmp_path, to):
    out = tmp_path / "out"
    run(table, out, to=to, shard_samples=3)
    with pytest.raises(InputError, match=r"with --max-side 512, not 64; give --overwrite"):
        run(table, out, to=to, shard_samples=3, max_side=64)
    os.utime(table.parent / "3.jpg", ns=(1, 1))
    with pytest.raises(InputError, match="its source was not as it is now"):
        run(table, out, to=to, shard_samples=3)
    (out / "mine.txt").write_text("kept")
    result = run(table, out, to="csv" if to == "webdataset" else "webdataset", overwrite=True)
    assert result.reused == 0
    assert (out / "mine.txt").read_text() == "kept"
    assert content(read_source(str(out))) == content(read_source(str(table)))
    assert not list(out.rglob("*.tar" if to == "webdataset" else "*.jpg"))


def test_other_content_is_never_touched(table, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"holds other content \(thesis\.txt\)"):
            run(table, out, overwrite=overwrite)
    assert os.listdir(out) == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    (out / "prepare.json").write_text("{}")
    with pytest.raises(InputError, match="is not of `mmc prepare`"):
        run(table, out)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        run(table, tmp_path / "file")


def test_source_and_output_apart(tmp_path):
    folder = tmp_path / "in"
    save(folder / "a" / "1.jpg", (9, 9))
    save(folder / "b" / "1.jpg", (9, 9))
    for out in (folder, tmp_path, folder / "small", folder / "a"):
        with pytest.raises(InputError, match=r"name (another folder|a folder elsewhere)"):
            run(folder, out)
    write_tar(tmp_path / "tars" / "0.tar", sample("x", 1))
    with pytest.raises(InputError, match=r"would become part of it"):
        run(tmp_path / "tars" / "*.tar", tmp_path / "tars" / "out")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "t.csv").write_text("id,text\n1,x\n")
    assert run(tmp_path / "tables", tmp_path / "tables" / "out").samples == 1


@pytest.mark.parametrize("to", FORMS)
def test_a_full_disk_leaves_nothing_half_made(table, tmp_path, monkeypatch, to):
    out = tmp_path / "out"
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args, **kwargs):
        raise full

    if to == "webdataset":
        monkeypatch.setattr(tarfile.TarFile, "addfile", fail)
    else:
        monkeypatch.setattr("pathlib.Path.write_bytes", fail)
    with pytest.raises(MmcError, match="No space left on device") as caught:
        run(table, out, to=to)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert [name for name in os.listdir(out) if not name.startswith(".")] in (
        ["prepare.json"], ["train", "prepare.json"], ["prepare.json", "train"],
        ["images", "prepare.json"], ["prepare.json", "images"],
    )  # fmt: skip
    assert not [path for path in out.rglob("*") if path.suffix in (".tar", ".jpg", ".tmp")]
    assert run(table, out, to=to).samples == 12


def test_a_table_is_written_whole_or_not_at_all(table, tmp_path, monkeypatch):
    real = LocalFiles.write_stream

    def fail(self, key, fill):
        if key == "val.csv":
            raise MmcError("cannot write val.csv: No space left on device")
        real(self, key, fill)

    monkeypatch.setattr(LocalFiles, "write_stream", fail)
    with pytest.raises(MmcError):
        run(table, tmp_path / "out", to="csv")
    monkeypatch.undo()
    with pytest.raises(InputError, match="half prepared"):
        read_source(str(tmp_path / "out"))
    result = run(table, tmp_path / "out", to="csv")
    assert (result.samples, result.reused) == (12, result.shards)


def test_options_of_the_source_hold(table, tmp_path):
    options = SourceOptions(label_column="title", text_template="{title}: {text}")
    run(table, tmp_path / "out", source=options)
    before, after = read_source(str(table), options), read_source(str(tmp_path / "out"))
    assert content(after) == content(before)
    assert after.label_set == tuple(f"T{n}" for n in range(12))
    assert after.task == "multiclass"


@pytest.mark.parametrize("to", FORMS)
def test_duplicates_are_dropped_when_asked(tmp_path, to):
    for name, seed in (("a", 1), ("copy of a", 1), ("b", 2)):
        save(tmp_path / f"in/{name}.jpg", (30, 20), seed)
    lines = ["id,image,text,label,split", "1,a.jpg,t,x,train", "2,copy of a.jpg,t,y,test"]
    lines += ["3,b.jpg,t,y,train", "4,a.jpg,other,x,train"]
    (tmp_path / "in/t.csv").write_text("\n".join(lines))
    said = []
    source = SourceOptions(dedupe=True)
    result = run(tmp_path / "in/t.csv", tmp_path / "out", said.append, to=to, source=source)
    assert (result.samples, result.dropped, result.warnings) == (3, 0, ())
    assert sorted(read_source(str(tmp_path / "out")).table["id"].to_pylist()) == ["2", "3", "4"]
    assert any("1 samples have the image and the text of another" in line for line in said)
    assert run(tmp_path / "in/t.csv", tmp_path / "all", to=to).samples == 4


@pytest.mark.parametrize("to", FORMS)
def test_options_hold_when_it_is_read(table, tmp_path, to):
    run(table, tmp_path / "out", to=to)
    options = SourceOptions(label_column="title", id_column="-", text_column="subset")
    after = read_source(str(tmp_path / "out"), options)
    assert set(after.label_set) == {f"T{n}" for n in range(12)}
    assert set(after.table["text"].to_pylist()) == {"left"}


def test_what_a_killed_run_left_is_cleared_away(table, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmc.extract.prepare.write_record", die)
    with pytest.raises(KeyboardInterrupt):
        run(table, out, to="csv")
    monkeypatch.undo()
    half = out / "images" / ".00000.1234.tmp"
    half.mkdir()
    (half / "000000000.jpg").write_bytes(b"half")
    (out / ".train.csv.1234-0.tmp").write_text("half")
    result = run(table, out, to="csv")
    assert (result.samples, result.reused) == (12, 3)
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": "zip"}, "cannot prepare 'zip'; choose from webdataset, csv"),
        ({"max_side": 0}, "--max-side must be 1 or more"),
        ({"quality": 101}, "--quality must be 1 to 100"),
        ({"shard_samples": 0}, "--shard-samples must be 1"),
        ({"workers": -1}, "--workers must be 1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(InputError, match=message):
        PrepareConfig(**settings)


def test_progress_counts_samples(table, tmp_path):
    seen = []
    prepare(
        str(table),
        str(tmp_path / "out"),
        PrepareConfig(shard_samples=5),
        report=lambda line: None,
        progress=lambda *args: seen.append(args),
    )
    assert seen[-1] == ("pictures", 12, 12)
    assert [done for _, done, _ in seen] == list(range(1, 13))


@pytest.mark.shared_data
@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize(
    "name",
    [
        "tiny_webdataset/per_class", "tiny_webdataset/standard", "tiny_hateful_memes_jsonl",
        "tiny_kaggle_csv", "tiny_mmhs_gt", "tiny_adds/data",
    ],
)  # fmt: skip
def test_real_sets(shared_data, tmp_path, name, to):
    source = str(shared_data / name)
    before = read_source(source)
    result = run(source, tmp_path / "out", to=to, max_side=64, shard_samples=25)
    assert result.warnings == ()
    after = read_source(str(tmp_path / "out"))
    keep = ("id", "split", "labels", "text")
    assert [{k: row[k] for k in keep} for row in content(after)] == [
        {k: row[k] for k in keep} for row in content(before)
    ]
    assert (after.label_set, after.task) == (before.label_set, before.task)
    for data in pictures(after):
        assert max(decode_rgb(data).shape) <= 64
