"""Pictures with JSON sidecars: order of the labels, the tree and its levels, what is bad."""

import json
import shutil

import pytest
from PIL import Image

from mmc.extract.sources import SourceOptions, read_source
from mmc.extract.sources.label_tree import at_level
from mmc.store.errors import InputError

TAGS = {"vehicle": ["car"], "animal": ["dog", "cat"], "person": []}
NAMES = ("animal", "car", "cat", "dog", "person", "vehicle")


def make(folder, sidecars, tags=TAGS, suffix=".jpg"):
    """``sidecars``: {stem: labels on, a whole object, raw text, or None for no file}."""
    folder.mkdir(parents=True, exist_ok=True)
    if tags is not None:
        (folder / "organized_Tags.json").write_text(json.dumps(tags), encoding="utf-8")
    for stem, value in sidecars.items():
        image = folder / (stem + suffix)
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(image)
        if isinstance(value, set):
            value = {"encoded_labels": [int(name in value) for name in NAMES]}
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            (folder / f"{stem}.json").write_text(text, encoding="utf-8")
    return str(folder)


def named(samples):
    return {
        image: cell and {samples.label_set[at] for at in cell}
        for image, cell in zip(
            samples.table["image"].to_pylist(), samples.table["labels"].to_pylist(), strict=True
        )
    }


def test_order_and_tree(tmp_path):
    spec = make(tmp_path / "x", {"a": {"animal", "cat"}, "b": {"car"}, "c": set()})
    samples = read_source(spec)
    assert samples.label_set == NAMES
    assert samples.task == "multilabel"
    assert named(samples) == {"a.jpg": {"animal", "cat"}, "b.jpg": {"car"}, "c.jpg": []}
    assert samples.source["label_tree"] == TAGS
    assert samples.table["id"].to_pylist() == ["a.jpg", "b.jpg", "c.jpg"]
    assert samples.warnings == []
    assert any("6 names in organized_Tags.json" in note for note in samples.notes)


@pytest.mark.parametrize(
    ("level", "label_set", "cells"),
    [
        ("all", NAMES, [{"cat"}, {"animal", "cat"}, {"person", "car"}]),
        (
            "top",
            ("animal", "person", "vehicle"),
            [{"animal"}, {"animal"}, {"person", "vehicle"}],
        ),
        ("leaf", ("car", "cat", "dog", "person"), [{"cat"}, {"cat"}, {"person", "car"}]),
    ],
)
def test_levels(tmp_path, level, label_set, cells):
    sidecars = {"a": {"cat"}, "b": {"animal", "cat"}, "c": {"person", "car"}}
    samples = read_source(make(tmp_path / "x", sidecars), SourceOptions(label_level=level))
    assert samples.label_set == label_set
    assert list(named(samples).values()) == cells
    assert samples.source["label_tree"] == TAGS


def test_levels_of_deep_and_tangled_trees():
    deep = {"thing": ["animal"], "animal": ["cat"], "pet": ["cat"]}
    top = at_level(deep, "top", "t")
    assert top["cat"] == ("pet", "thing")
    assert top["animal"] == ("thing",)
    assert at_level(deep, "leaf", "t") == {
        "animal": (),
        "cat": ("cat",),
        "pet": (),
        "thing": (),
    }
    with pytest.raises(InputError, match="no label is at level top"):
        at_level({"a": ["b"], "b": ["a"]}, "top", "t")


def test_folders_splits_and_suffixes(tmp_path):
    sidecars = {"train/a": {"cat"}, "validation/deep/b": {"dog"}, "test/c": None}
    make(tmp_path / "x", sidecars, suffix=".PNG")
    spec = make(tmp_path / "x", {"train/d": {"car"}}, suffix=".webp")
    samples = read_source(spec)
    rows = samples.table.select(["image", "split"]).to_pylist()
    splits = {row["image"]: row["split"] for row in rows}
    assert splits == {
        "test/c.PNG": "test",
        "train/a.PNG": "train",
        "train/d.webp": "train",
        "validation/deep/b.PNG": "val",
    }
    assert named(samples)["test/c.PNG"] is None


def test_tags_above_the_folder_and_missing(tmp_path):
    spec = make(tmp_path / "x" / "data", {"a": {"cat"}, "b": {"dog"}}, tags=None)
    with pytest.raises(InputError, match=r"no organized_Tags\.json"):
        read_source(spec)
    (tmp_path / "x" / "organized_Tags.json").write_text(json.dumps(TAGS), encoding="utf-8")
    assert read_source(spec).label_set == NAMES
    assert read_source(str(tmp_path / "x")).table["image"].to_pylist() == [
        "data/a.jpg",
        "data/b.jpg",
    ]


def test_other_keys_become_columns_and_a_caption_the_text(tmp_path):
    def sidecar(**more):
        return {"encoded_labels": [0] * 5 + [1], "vehicle": ["car"], **more}

    sidecars = {
        "a": sidecar(caption="A red car.", license=4, split="x", mixed=1),
        "b": sidecar(license=None, mixed="two"),
        "c": None,
    }
    table = read_source(make(tmp_path / "x", sidecars)).table
    assert table["text"].to_pylist() == ["A red car.", None, None]
    assert table["license"].to_pylist() == [4, None, None]
    assert table["mixed"].to_pylist() == ["1", "two", None]
    assert table["user.split"].to_pylist() == ["x", None, None]
    assert "vehicle" not in table.column_names


def test_what_has_no_partner_is_counted(tmp_path):
    spec = make(tmp_path / "x", {"a": {"cat"}, "b": None, "c": {"dog"}})
    (tmp_path / "x" / "c.jpg").unlink()
    samples = read_source(spec)
    assert named(samples) == {"a.jpg": {"cat"}, "b.jpg": None}
    assert any("1 of 2 pictures have no JSON file" in line for line in samples.warnings)
    assert any("1 JSON files have no picture" in line for line in samples.warnings)


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        ({"encoded_labels": [1, 0]}, "has 2 values and organized_Tags.json has 6 labels"),
        ({"encoded_labels": [0, 0, 0.5, 0, 0, 0]}, "has 0.5 at place 3"),
        ({"encoded_labels": [0, "1", 0, 0, 0, 0]}, 'has "1" at place 2'),
        ({"encoded_labels": [0, 0, 0, 0, 0, -2]}, "has -2 at place 6"),
        ({"encoded_labels": [True, 0, 0, 0, 0, 0]}, "has true at place 1"),
        ({"encoded_labels": 3}, "is no list"),
        ({"labels": []}, 'has no "encoded_labels"'),
        ([1, 0], 'has no "encoded_labels"'),
        ('{"encoded_labels": [1', "is not valid JSON"),
    ],
)
def test_bad_sidecars(tmp_path, sidecar, message):
    spec = make(tmp_path / "x", {"a": {"cat"}, "bad": sidecar, "c": sidecar})
    with pytest.raises(InputError, match=message) as error:
        read_source(spec)
    assert str(error.value).startswith("bad.json")
    assert "2 JSON files are at fault" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"animal": {"mammal": ["cat"]}}, "animal has .* give a list of the names below it"),
        ({"x": "notalist"}, "x has .* give a list"),
        ({"x": [1]}, "x has .* give a list"),
        ({}, "is no object of lists"),
        (["a"], "is no object of lists"),
        ({"a": [""]}, "an empty name"),
    ],
)
def test_bad_tags(tmp_path, tags, message):
    with pytest.raises(InputError, match=message):
        read_source(make(tmp_path / "x", {"a": None}, tags=tags))


def test_repeated_tags_count_once(tmp_path):
    tags = {"animal": ["cat", "cat"], "vehicle": ["cat"], "cat": []}
    sidecar = {"encoded_labels": [0, 1, 0]}
    samples = read_source(make(tmp_path / "x", {"a": sidecar, "b": sidecar}, tags=tags))
    assert samples.label_set == ("animal", "cat", "vehicle")
    assert samples.source["label_tree"] == {"animal": ["cat"], "vehicle": ["cat"], "cat": []}
    assert any("repeated names below animal count once" in note for note in samples.notes)


def test_merged_labels_are_merged_in_the_tree(tmp_path):
    spec = make(tmp_path / "x", {"a": {"cat"}, "b": {"dog", "car"}})
    samples = read_source(spec, SourceOptions(merge_labels="cat,dog=pet"))
    assert samples.label_set == ("animal", "car", "pet", "person", "vehicle")
    assert samples.source["label_tree"] == {"vehicle": ["car"], "animal": ["pet"], "person": []}
    assert named(samples) == {"a.jpg": {"pet"}, "b.jpg": {"pet", "car"}}


@pytest.mark.shared_data
def test_the_shared_set(shared_data):
    folder = shared_data / "tiny_adds"
    samples = read_source(str(folder))
    tree = json.loads((folder / "organized_Tags.json").read_text(encoding="utf-8"))
    assert samples.label_set == tuple(
        sorted({*tree, *(name for below in tree.values() for name in below)})
    )
    assert len(samples.label_set) == 80
    assert len(samples.table) == 60
    for image, labels in named(samples).items():
        sidecar = json.loads((folder / image).with_suffix(".json").read_text(encoding="utf-8"))
        below = {name for key in tree if key in sidecar for name in [key, *sidecar[key]]}
        assert labels == below
    top = read_source(str(folder), SourceOptions(label_level="top"))
    assert top.label_set == tuple(sorted(tree))


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("ok", None),
        ("no_json", None),
        ("wrong_length", "2 values"),
        ("not_binary", "has 2 at place 1"),
        ("no_key", 'no "encoded_labels"'),
        ("bad_json", "not valid JSON"),
    ],
)
def test_the_shared_bad_cases(shared_data, tmp_path, case, message):
    folder = shared_data / "bad_inputs" / "adds"
    for path in [*folder.glob(f"{case}.*"), folder / "organized_Tags.json", folder / "orphan.json"]:
        shutil.copy(path, tmp_path)
    if message is not None:
        with pytest.raises(InputError, match=message):
            read_source(str(tmp_path))
        return
    samples = read_source(str(tmp_path))
    expected = {"animal", "cat"} if case == "ok" else None
    assert named(samples) == {f"{case}.jpg": expected}
    assert any("1 JSON files have no picture" in line for line in samples.warnings)
