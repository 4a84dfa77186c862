"""WebDataset sources: keys, layouts, labels, splits, ids, and tars that are not what they seem."""

import os
import shutil
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import add, jpeg, sample, write_tar

from mmc.extract import keys
from mmc.extract.images import ImageError, decode_rgb, read_image
from mmc.extract.keys import add_keys
from mmc.extract.sources import SourceOptions, read_source, resolve_image
from mmc.store.errors import InputError


def rows(samples, *names):
    return list(zip(*(samples.table[name].to_pylist() for name in names), strict=True))


def named(samples):
    return [
        None if cell is None else [samples.label_set[at] for at in cell]
        for cell in samples.table["labels"].to_pylist()
    ]


def pictures(samples):
    """The bytes that each row's image, offset and size name."""
    return [
        image and read_image(resolve_image(samples.source, image), offset, size)
        for image, offset, size in rows(samples, "image", "image_offset", "size")
    ]


def said(samples, text):
    return any(text in line for line in [*samples.notes, *samples.warnings])


@pytest.fixture
def folder(tmp_path):
    """Two tars of two samples each; keys begin again in the second."""
    for tar, words in enumerate([("cat", "dog"), ("dog", "bird")]):
        members = {}
        for at, word in enumerate(words):
            members |= sample(f"{at:05d}", 10 * tar + at, labels=[word, "animal"], year=2000 + at)
        write_tar(tmp_path / f"{tar:05d}.tar", members)
    return tmp_path


def test_standard_keys(folder):
    samples = read_source(str(folder))
    assert samples.source["format"] == "webdataset"
    assert samples.source["image_root"] == str(folder)
    assert rows(samples, "id", "text", "year") == [
        ("00000/00000", "caption 00000", "2000"),
        ("00000/00001", "caption 00001", "2001"),
        ("00001/00000", "caption 00000", "2000"),
        ("00001/00001", "caption 00001", "2001"),
    ]
    words = ["cat", "dog", "dog", "bird"]
    assert [set(labels) for labels in named(samples)] == [{"animal", word} for word in words]
    assert samples.task == "multilabel"
    assert pictures(samples) == [jpeg(0), jpeg(1), jpeg(10), jpeg(11)]


@pytest.mark.parametrize(
    "pattern",
    ["{0}", "{0}/*.tar", "{0}/0000[01].tar", "{0}/{{00000..00001}}.tar", "{0}/{{00000,00001}}.tar"],
)
def test_however_the_tars_are_named_ids_are_the_same(folder, pattern):
    samples = read_source(pattern.format(folder))
    assert samples.table["id"].to_pylist()[::2] == ["00000/00000", "00001/00000"]
    assert samples.table == read_source(str(folder)).table
    assert samples.source["spec"] == pattern.format(folder)


def test_one_tar_and_a_relative_name(folder, monkeypatch):
    one = read_source(str(folder / "00001.tar"))
    assert one.table["id"].to_pylist() == ["00001/00000", "00001/00001"]
    monkeypatch.chdir(folder)
    for spec in ("00001.tar", "./00001.tar", f"../{folder.name}/00001.tar"):
        assert read_source(spec).table == one.table
        assert read_source(spec).source == one.source
    assert read_source("*.tar").source["spec"] == str(folder / "*.tar")


def test_splits_by_name_and_by_folder(folder, tmp_path):
    spec = f"train={folder}/00000.tar,val={folder}/0000[1].tar"
    samples = read_source(spec)
    assert samples.table["split"].to_pylist() == ["train", "train", "val", "val"]
    assert samples.table["id"].to_pylist()[2] == "00001/00000"
    split = tmp_path / "split"
    for name, source in (("val", "00001"), ("train", "00000"), ("test", "00000")):
        (split / name).mkdir(parents=True)
        shutil.copy(folder / f"{source}.tar", split / name / "00000.tar")
    samples = read_source(str(split))
    assert rows(samples, "id", "split")[::2] == [
        ("train/00000/00000", "train"), ("val/00000/00000", "val"), ("test/00000/00000", "test"),
    ]  # fmt: skip
    # The same by name: ids are places in the folder of all.
    named = read_source(f"train={split}/train,val={split}/val/*.tar,test={split}/test/00000.tar")
    assert rows(named, "id", "split", "image") == rows(samples, "id", "split", "image")
    assert named.source["image_root"] == str(split)
    flat = tmp_path / "flat"
    for name in ("train-000.tar", "train-001.tar", "valid_0.tar"):
        flat.mkdir(exist_ok=True)
        shutil.copy(folder / "00000.tar", flat / name)
    assert read_source(str(flat)).source["counts"]["splits"] == {"train": 4, "val": 2}


def numbered(path, count, labels=None, **extra):
    members = dict(extra)
    for n in range(count):
        members[f"image_{n}.jpg"] = jpeg(n)
        members[f"caption_{n}.txt"] = f"text {n}"
        members[f"metadata_{n}.json"] = {"labels": labels} if labels else {"year": n}
    return write_tar(path, members)


def test_numbered_keys_in_class_folders(tmp_path):
    numbered(tmp_path / "Drama" / "00000.tar", 12, ["Drama", "Crime"])
    numbered(tmp_path / "Comedy" / "00000.tar", 2, ["Comedy"])
    samples = read_source(str(tmp_path))
    ids = samples.table["id"].to_pylist()
    assert ids[:3] == ["Comedy/00000/0", "Comedy/00000/1", "Drama/00000/0"]
    assert ids[-1] == "Drama/00000/11"
    assert named(samples)[-1] == ["Crime", "Drama"]
    assert samples.table["text"][13].as_py() == "text 11"
    assert pictures(samples)[13] == jpeg(11)
    assert rows(samples, "folder")[0] == ("Comedy",)
    one = read_source(str(tmp_path), SourceOptions(label_column="folder"))
    assert (one.task, one.label_set) == ("binary", ("Comedy", "Drama"))


def test_the_folder_is_the_class_where_nothing_else_says_one(tmp_path):
    for name in ("b", "a", "c"):
        numbered(tmp_path / "train" / name / "0.tar", 2)
        numbered(tmp_path / "test" / name / "0.tar", 1)
    samples = read_source(str(tmp_path))
    assert (samples.task, samples.label_set) == ("multiclass", ("a", "b", "c"))
    assert rows(samples, "id", "split")[0] == ("train/a/0/0", "train")
    assert samples.source["counts"]["splits"] == {"train": 6, "test": 3}
    assert said(samples, "labels: from the tars' folders (a, b, c)")
    plain = read_source(str(tmp_path), SourceOptions(label_column="-"))
    assert plain.task == "unlabelled"
    only = read_source(str(tmp_path / "train" / "a"))
    assert only.task == "unlabelled"


def test_a_folder_above_all_class_folders_is_no_class(tmp_path):
    for name in ("train/b", "train/a/more", "test/a"):
        numbered(tmp_path / "set" / "data" / name / "0.tar", 1)
    samples = read_source(str(tmp_path / "set"))
    assert (samples.task, samples.label_set) == ("binary", ("a", "b"))
    assert rows(samples, "id", "labels", "split") == [
        ("data/train/a/more/0/0", [0], "train"),
        ("data/train/b/0/0", [1], "train"),
        ("data/test/a/0/0", [0], "test"),
    ]


def test_numbered_keys_with_gaps(tmp_path):
    path = write_tar(
        tmp_path / "t.tar",
        {
            "image_0007.jpg": jpeg(7), "image_1.jpg": jpeg(1), "metadata_7.json": {"labels": "a"},
            "caption_7.txt": "seven", "caption_3.txt": "three", "image_1x.jpg": jpeg(9),
            "metadata_4.json": {"labels": "b"},
        },
    )  # fmt: skip
    samples = read_source(str(path))
    assert rows(samples, "id", "text") == [("t/7", "seven"), ("t/1", None), ("t/3", "three")]
    assert pictures(samples) == [jpeg(7), jpeg(1), None]
    assert said(samples, "1 members left out that are not image_, caption_ or metadata_")
    assert said(
        samples, "1 samples have neither a picture nor a text and are left out, first t.tar: 4"
    )


def test_numbers_alone_are_no_layout(tmp_path):
    path = write_tar(tmp_path / "t.tar", {"image_1.jpg": jpeg(1), "image_1.txt": "one"})
    assert rows(read_source(str(path)), "id", "text") == [("t/image_1", "one")]


def test_kinds(tmp_path):
    members = {
        "a.PNG": jpeg(1, kind="PNG"), "a.TXT": "upper", "a.cls": "3\n",
        "b.seg.png": jpeg(2), "b.jpg": jpeg(3), "b.cls": "12",
        "c.v1.jpg": jpeg(4), "c.npy": b"x", "d.webp": jpeg(5, kind="WEBP"),
        "x.y/e.bmp": jpeg(6, kind="BMP"), "x.y/e.txt": "dots in folders", "./f.gif": jpeg(7),
    }  # fmt: skip
    samples = read_source(str(write_tar(tmp_path / "t.tar", members)))
    assert rows(samples, "id", "text") == [
        ("t/a", "upper"), ("t/b", None), ("t/c", None), ("t/d", None),
        ("t/x.y/e", "dots in folders"), ("t/f", None),
    ]  # fmt: skip
    assert pictures(samples)[:3] == [jpeg(1, kind="PNG"), jpeg(3), jpeg(4)]
    assert (samples.task, samples.label_set) == ("binary", ("3", "12"))
    assert named(samples) == [["3"], ["12"], None, None, None, None]
    assert said(samples, "1 members repeat what their sample already has")
    assert said(samples, "no picture, text or metadata: 1, first t.tar: c.npy")


def test_metadata_becomes_columns(tmp_path):
    members = {}
    members |= sample(
        "a", 1, id="x1", n=3, f=1.5, ok=True, none=None, deep={"k": ["é"]}, text="meta"
    )
    members |= sample("b", 2, nan=float("nan"), half="\ud83d", size="big", cls="c")
    samples = read_source(str(write_tar(tmp_path / "t.tar", members)))
    first, second = samples.table.to_pylist()
    assert (first["n"], first["f"], first["ok"], first["none"]) == ("3", "1.5", "true", None)
    assert (first["deep"], first["user.id"], first["user.text"]) == ('{"k": ["é"]}', "x1", "meta")
    assert (second["nan"], second["half"], second["user.size"]) == (None, "\ufffd", "big")
    assert second["n"] is None
    assert (first["id"], first["text"]) == ("t/a", "caption a")


def test_columns_of_the_metadata_by_name_and_by_option(tmp_path):
    members = {}
    for at, label in enumerate(["u", "v", "u"]):
        members[f"{at}.jpg"] = jpeg(at)
        members[f"{at}.json"] = {"caption": f"c{at}", "genre": label, "label": "z", "split": "dev"}
    path = write_tar(tmp_path / "t.tar", members)
    samples = read_source(str(path))
    assert rows(samples, "text", "split")[0] == ("c0", "val")
    assert samples.label_set == ("z",)
    assert said(samples, "labels: from 'label' of the metadata, not genre")
    other = read_source(str(path), SourceOptions(label_column="genre", text_column="-"))
    assert other.label_set == ("u", "v")
    assert other.table["text"].null_count == 3
    joined = read_source(str(path), SourceOptions(text_template="{genre}: {caption}"))
    assert joined.table["text"].to_pylist() == ["u: c0", "v: c1", "u: c2"]
    with pytest.raises(InputError, match=r"no column 'nope' \(--label-column\)"):
        read_source(str(path), SourceOptions(label_column="nope"))


def test_samples_are_put_together_by_key(tmp_path):
    path = write_tar(
        tmp_path / "t.tar",
        {"a.jpg": jpeg(1), "b.jpg": jpeg(2), "a.txt": "A", "b.txt": "B", "c.txt": "C"},
    )
    with tarfile.open(path, "a") as tar:
        add(tar, "a.jpg", jpeg(9))
    samples = read_source(str(path))
    assert rows(samples, "id", "text") == [("t/a", "A"), ("t/b", "B"), ("t/c", "C")]
    assert pictures(samples) == [jpeg(1), jpeg(2), None]
    assert said(samples, "not all neighbours (3 times, first t.tar: a.txt)")
    assert said(samples, "1 members repeat what their sample already has and are left out, first t")


def test_names_are_data(tmp_path):
    names = ["../../up", "/abs/olute", "new\nline", "-dash", "with space", "c:\\x", "é" * 120]
    members = {}
    for at, name in enumerate(names):
        members |= {f"{name}.jpg": jpeg(at)}
    path = write_tar(tmp_path / "in" / "t.tar", members)
    samples = read_source(str(path))
    assert samples.table["id"].to_pylist() == [f"t/{name}" for name in names]
    assert pictures(samples) == [jpeg(at) for at in range(len(names))]
    assert os.listdir(tmp_path) == ["in"]
    assert not any("\n" in line for line in [*samples.notes, *samples.warnings])


def test_bad_parts_are_counted(tmp_path):
    members = {
        "a.jpg": b"", "a.txt": b"caf\xe9", "b.jpg": jpeg(1)[:100], "b.json": "{not json",
        "c.jpg": jpeg(2), "c.json": [1, 2], "d.json": {"labels": ["x"]},
    }  # fmt: skip
    samples = read_source(str(write_tar(tmp_path / "t.tar", members)))
    assert rows(samples, "id", "text") == [("t/a", "café"), ("t/b", None), ("t/c", None)]
    assert said(samples, "2 samples have metadata that is no JSON object, first t.tar: b.json")
    assert said(samples, "1 texts are not in UTF-8")
    assert said(samples, "1 samples have neither a picture nor a text")
    empty, cut, good = pictures(samples)
    assert decode_rgb(good).shape == (3, 16, 24)
    for data in (empty, cut):
        with pytest.raises(ImageError):
            decode_rgb(data)
    given = read_source(str(tmp_path), SourceOptions(encoding="latin-1"))
    assert given.table["text"][0].as_py() == "café"
    assert not said(given, "UTF-8")


def test_a_tar_that_is_cut_off(folder):
    path = folder / "00001.tar"
    # In the second sample's caption; its picture is whole.
    with tarfile.open(path) as tar:
        caption = tar.getmember("00001.txt").offset_data
    path.write_bytes(path.read_bytes()[: caption + 3])
    samples = read_source(str(folder))
    assert len(samples.table) == 4
    assert samples.table["text"][3].as_py() is None
    (line,) = [line for line in samples.warnings if "cut off" in line]
    assert line.startswith(f"00001.tar: it is cut off after {caption + 3:,} bytes")
    assert "used: 2 samples before that" in line


def test_tars_that_are_none_do_not_stop_the_others(folder):
    (folder / "00002.tar").write_bytes(b"")
    (folder / "00003.tar").write_bytes(b"<html>")
    write_tar(folder / "00004.tar", {})
    samples = read_source(str(folder))
    assert len(samples.table) == 4
    assert said(samples, "00002.tar is an empty file")
    assert said(samples, "00003.tar is not a tar")
    for at in range(5, 12):
        (folder / f"{at:05d}.tar").write_bytes(b"")
    assert said(read_source(str(folder)), "4 more of 12 tars are damaged")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.tar", b"", "a.tar is an empty file, not a tar"),
        ("a.tar", b"<html>", "a.tar is not a tar"),
        ("a.tar", bytes(10240), "there are no samples in .*a.tar"),
        ("a.tar.gz", b"\x1f\x8b", "a.tar.gz is packed.*unpack it first"),
        ("a.tar", b"\x1f\x8b" + bytes(600), "packed with gzip"),
    ],
)
def test_one_tar_that_is_none(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        read_source(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_tar_without_pictures_and_texts(tmp_path):
    path = write_tar(tmp_path / "t.tar", {"a.json": {"labels": ["x"]}, "b.json": {"labels": ["y"]}})
    with pytest.raises(InputError, match="no sample has a picture or a text"):
        read_source(str(path))


def test_folders_of_tables_are_not_taken(folder):
    (folder / "train.csv").write_text("id,text,label\n1,x,a\n2,y,b\n")
    assert read_source(str(folder)).source["format"] == "csv"
    (folder / "train.csv").rename(folder / "notes.csv")
    (folder / "00000.parquet").write_bytes(b"beside each tar, as img2dataset writes it")
    samples = read_source(str(folder))
    assert samples.source["format"] == "webdataset"
    assert said(samples, "files left out: notes.csv (the tars are read")


def test_links_into_a_circle(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "up").symlink_to(folder)
    assert len(read_source(str(folder)).table) == 4


def test_keys_of_members(folder):
    samples = read_source(str(folder))
    table = add_keys(samples, None, workers=2)
    assert table["image_key"].null_count == 0
    assert len(set(table["image_key"].to_pylist())) == 4
    assert table["size"] == samples.table["size"]
    assert add_keys(read_source(str(folder / "*.tar")), table, workers=1) == table


def test_keys_are_not_read_again_until_the_tar_changes(folder, monkeypatch):
    known = add_keys(read_source(str(folder)), None, workers=1)
    hashed = []
    real = keys.content_key
    monkeypatch.setattr(keys, "content_key", lambda data: hashed.append(len(data)) or real(data))
    monkeypatch.chdir(folder)
    again = add_keys(read_source("."), known, workers=1)
    assert again == known
    assert len(hashed) == 2  # the texts, which differ by number alone
    os.utime(folder / "00001.tar", ns=(1, 1))
    hashed.clear()
    assert add_keys(read_source("."), known, workers=1)["image_key"] == known["image_key"]
    assert len(hashed) == 2 + 2


@settings(max_examples=60, deadline=None)
@given(
    at=st.integers(0, 9000),
    value=st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"{}", b"}", b'"', b"0x"])),
    cut=st.integers(0, 9000),
)
def test_any_damage_makes_samples_or_one_line(tmp_path_factory, at, value, cut):
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    members = sample("a", 1, labels=["x"]) | sample("b", 2, labels=["y"], deep={"k": 1})
    data = bytearray(write_tar(path, members).read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data[: len(data) - cut])
    message = ""
    try:
        samples = read_source(str(path))
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    if message:
        return
    assert 0 < len(samples.table) <= 7
    assert not any("\n" in line for line in [*samples.notes, *samples.warnings])
    for image, offset, size in rows(samples, "image", "image_offset", "size"):
        assert image is None or offset + size <= path.stat().st_size


BAD = {
    "ok.tar": (2, ""),
    "missing_parts.tar": (3, "1 samples have neither"),
    "duplicate_keys.tar": (2, "1 members repeat"),
    "interleaved.tar": (2, "not all neighbours (4 times"),
    "dirs_and_dots.tar": (4, "1 members repeat"),
    "traversal.tar": (3, "1 links among the members"),
    "unicode_names.tar": (2, ""),
    "bad_parts.tar": (3, "1 samples have metadata that is no JSON"),
    "macos_junk.tar": (2, "hidden or have no kind: 3"),
    "truncated.tar": (1, "truncated.tar: it is cut off"),
    "per_class_gap.tar": (3, "1 members left out"),
    "empty.tar": "no samples in .*empty.tar",
    "zero_byte.tar": "zero_byte.tar is an empty file",
    "not_a_tar.tar": "not_a_tar.tar is not a tar",
    "ok.tar.gz": "unpack it first",
}


@pytest.mark.shared_data
def test_bad_tars(shared_data):
    folder = shared_data / "bad_inputs" / "tar"
    assert {path.name for path in folder.iterdir()} == set(BAD)
    for name, expected in BAD.items():
        if isinstance(expected, str):
            with pytest.raises(InputError, match=expected):
                read_source(str(folder / name))
            continue
        samples = read_source(str(folder / name))
        assert len(samples.table) == expected[0], name
        assert said(samples, expected[1]), name
    together = read_source(str(folder / "*.tar"))
    assert len(together.table) == sum(e[0] for e in BAD.values() if not isinstance(e, str))
    for name in ("names.tar", "newline_and_invalid_utf8_names.tar"):
        samples = read_source(str(shared_data / "bad_inputs" / name))
        for data in pictures(samples):
            assert data is None or decode_rgb(data).shape == (3, 64, 96)
    assert samples.table["id"][1].as_py().endswith("bad_utf8_\\xff\\xfe")


@pytest.mark.shared_data
def test_real_sets(shared_data):
    folder = shared_data / "tiny_webdataset"
    standard = read_source(str(folder / "standard"))
    assert (len(standard.table), len(standard.label_set)) == (60, 69)
    assert standard.source["columns"]["labels"] == "labels"
    classes = read_source(str(folder / "per_class"))
    assert (len(classes.table), classes.task) == (60, "multilabel")
    assert classes.table["text"].null_count == 0
    for name, labels in zip(classes.table["id"].to_pylist(), named(classes), strict=True):
        assert name.split("/")[0] in labels
    bare = read_source(str(folder / "clip_retrieval_tests"))
    assert (len(bare.table), bare.task) == (11, "unlabelled")
    contents = add_keys(bare, None, workers=1)["image_key"].to_pylist()
    assert len(set(contents)) == 7
    for samples in (standard, classes, bare):
        for data in pictures(samples):
            assert 128 <= max(decode_rgb(data).shape) <= 640
