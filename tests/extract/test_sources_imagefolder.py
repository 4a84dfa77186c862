"""Image folders: classes by folder, splits, and what is none."""

import os

import pytest

from mmc.extract.sources import SourceOptions, read_source
from mmc.extract.sources.imagefolder import ImageFolder
from mmc.store.errors import InputError


def make(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    return root


def named(samples):
    return [
        None if cell is None else samples.label_set[cell[0]]
        for cell in samples.table["labels"].to_pylist()
    ]


def test_classes(tmp_path):
    make(tmp_path, "c10/2.jpg", "c10/10.PNG", "c2/x.webp", "c2/deep/er/y.JPEG", "c3/z.tiff")
    samples = read_source(str(tmp_path))
    assert samples.source["format"] == "imagefolder"
    assert (samples.task, samples.label_set) == ("multiclass", ("c2", "c3", "c10"))
    ids = ["c2/deep/er/y.JPEG", "c2/x.webp", "c3/z.tiff", "c10/2.jpg", "c10/10.PNG"]
    assert samples.table["id"].to_pylist() == ids
    assert samples.table["image"].to_pylist() == ids
    assert named(samples) == ["c2", "c2", "c3", "c10", "c10"]
    assert samples.source["counts"]["splits"] == {"train": 5}


def test_two_classes_make_a_binary_task_and_names_stand_as_they_are(tmp_path):
    make(tmp_path, "Portland, Oregon/1.jpg", "a|b; c/1.jpg")
    samples = read_source(str(tmp_path))
    assert (samples.task, samples.label_set) == ("binary", ("Portland, Oregon", "a|b; c"))
    make(tmp_path, "NA/1.jpg", "001/1.jpg", "1/1.jpg")
    names = {"NA", "001", "1", "a|b; c", "Portland, Oregon"}
    assert set(read_source(str(tmp_path)).label_set) == names


@pytest.mark.parametrize("val", ["val", "valid", "validation", "dev"])
def test_splits(tmp_path, val):
    make(tmp_path, "train/a/1.jpg", "train/b/2.jpg", f"{val}/a/3.jpg", "test/b/4.jpg")
    samples = read_source(str(tmp_path))
    assert samples.table["split"].to_pylist() == ["train", "train", "val", "test"]
    assert named(samples) == ["a", "b", "a", "b"]
    assert samples.table["id"].to_pylist()[2] == f"{val}/a/3.jpg"
    by_name = read_source(f"train={tmp_path}/train,val={tmp_path}/{val},test={tmp_path}/test")
    assert by_name.table["id"] == samples.table["id"]


def test_a_test_folder_without_classes_is_unlabelled(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "test/3.jpg", "test/4.jpg")
    samples = read_source(str(tmp_path))
    assert named(samples) == ["a", "b", None, None]
    assert any("2 pictures lie in no class folder" in line for line in samples.warnings)


@pytest.mark.parametrize("paths", [("1.jpg", "2.jpg"), ("all/1.jpg", "all/2.jpg")])
def test_pictures_without_classes(tmp_path, paths):
    samples = read_source(str(make(tmp_path, *paths)))
    assert samples.task == "unlabelled"
    assert samples.table["id"].to_pylist() == list(paths)
    assert samples.source["counts"]["splits"] == {"test": 2}


def test_what_is_no_picture_is_left_out(tmp_path):
    make(
        tmp_path, "a/1.jpg", "a/Thumbs.db", "a/.hidden.jpg", "a/._1.jpg", "b/2.jpg", "b/x.txt",
        ".git/3.jpg", "__MACOSX/4.jpg", "b/no_extension", "README.md",
    )  # fmt: skip
    assert read_source(str(tmp_path)).table["id"].to_pylist() == ["a/1.jpg", "b/2.jpg"]


def test_names_that_are_no_text(tmp_path):
    make(tmp_path, "a/1.jpg", "b/2.jpg", "b/猫 🐈.jpg")
    (tmp_path / os.fsdecode(b"b/\xff.jpg")).write_bytes(b"x")
    samples = read_source(str(tmp_path))
    assert samples.table["id"].to_pylist() == ["a/1.jpg", "b/2.jpg", "b/猫 🐈.jpg"]
    assert any("1 pictures left out, for their names are not UTF-8" in w for w in samples.warnings)


def test_links_are_followed_but_not_in_circles(tmp_path):
    make(tmp_path / "real", "1.jpg")
    make(tmp_path / "set", "b/2.jpg")
    (tmp_path / "set" / "a").symlink_to(tmp_path / "real")
    (tmp_path / "set" / "b" / "up").symlink_to(tmp_path / "set")
    ids = read_source(str(tmp_path / "set")).table["id"].to_pylist()
    assert ids[:2] == ["a/1.jpg", "b/2.jpg"]
    assert len(ids) < 10


def test_tables_and_tars_are_not_taken(tmp_path):
    make(tmp_path, "a/1.jpg", "b/2.jpg")
    reader = ImageFolder()
    assert reader.recognises(str(tmp_path))
    for name in (
        "t.csv",
        "t.csv.gz",
        "t.jsonl",
        "t.parquet",
        "t.tar",
        "notes/t.csv",
        "data/t.arrow",
    ):
        make(tmp_path, name)
        assert not reader.recognises(str(tmp_path)), name
        (tmp_path / name).unlink()
    assert reader.recognises(str(tmp_path))
    assert not reader.recognises(str(tmp_path / "a" / "1.jpg"))
    assert not reader.recognises(str(tmp_path / "absent"))


def test_a_folder_without_pictures(tmp_path):
    make(tmp_path, "a/x.txt")
    with pytest.raises(InputError, match="holds no table that mmc reads"):
        read_source(str(tmp_path))
    with pytest.raises(InputError, match="holds no picture"):
        ImageFolder().read(str(tmp_path), SourceOptions())


@pytest.mark.shared_data
def test_recognition_of_the_real_sets(shared_data):
    expected = {
        "movies": "csv",
        "tiny_adds": "sidecars",
        "tiny_adds/data": "sidecars",
        "tiny_mmhs_gt": "mmhs",
        "tiny_webdataset/standard": "webdataset",
        "tiny_hateful_memes_jsonl": "jsonl",
        "tiny_kaggle_csv": "csv",
        "movies/images": "imagefolder",
        "bad_inputs/images": "imagefolder",
    }
    for name, form in expected.items():
        assert read_source(str(shared_data / name)).source["format"] == form, name
