"""Samples of the same content: found by content, said, and dropped for an honest evaluation."""

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mmc.extract.keys import add_keys
from mmc.extract.recipe import source_options
from mmc.extract.sources import SourceOptions, read_source
from mmc.extract.sources.duplicates import duplicates, settle


def table(rows):
    """rows: (split, labels, image key, text key); an image key of "?" is a picture not readable."""
    split, labels, image, text = (list(column) for column in zip(*rows, strict=True))
    keys = [None if key == "?" else key for key in image]
    return pa.table(
        {
            "id": [str(n) for n in range(len(rows))],
            "split": split,
            "labels": pa.array(labels, pa.list_(pa.int32())),
            "image": pa.array(image, pa.string()),
            "image_key": pa.array(keys, pa.string()),
            "text": pa.array(text, pa.string()),
            "text_key": pa.array(text, pa.string()),
        }
    )


def pairs(rows):
    found = duplicates(table(rows))
    return list(zip(found.repeats.tolist(), found.originals.tolist(), strict=True))


def test_what_is_the_same():
    rows = [
        ("train", [0], "i", "t"),
        ("train", [0], "i", "u"),
        ("train", [0], "i", None),
        ("train", [0], "i", "t"),
        ("train", [0], None, "t"),
        ("train", [0], "i", None),
        ("train", [0], None, None),
        ("train", [0], None, None),
        ("train", [0], "?", "t"),
        ("train", [0], "?", "t"),
        ("train", [0], None, "t"),
    ]
    assert pairs(rows) == [(3, 0), (5, 2), (10, 4)]


@pytest.mark.parametrize(
    ("splits", "kept"),
    [
        (["train", "train"], 0),
        (["train", "val", "test"], 2),
        (["train", "val", "val"], 1),
        (["", "train"], 1),
        (["train", "holdout", "val"], 2),
        (["train", "holdout"], 1),
    ],
)
def test_which_copy_stays(splits, kept):
    rows = [(split, [0], "i", "t") for split in splits]
    assert {original for _, original in pairs(rows)} == {kept}
    assert len(pairs(rows)) == len(splits) - 1


def test_a_labelled_copy_stays_in_one_split_but_test_goes_first():
    assert pairs([("train", None, "i", "t"), ("train", [0], "i", "t")]) == [(0, 1)]
    assert pairs([("train", [0], "i", "t"), ("test", None, "i", "t")]) == [(0, 1)]


def write(tmp_path):
    for name, colour in (("a", 1), ("b", 1), ("c", 2), ("d", 2), ("e", 3)):
        Image.new("RGB", (4, 4), (colour, 0, 0)).save(tmp_path / f"{name}.png")
    rows = [
        "a.png,same,x,train",
        "b.png,same,x,train",
        "c.png,word,x,train",
        "d.png,word,y,test",
        "e.png,word,y,val",
    ]
    path = tmp_path / "t.csv"
    path.write_text("image,text,label,split\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def test_they_are_reported_and_kept(tmp_path):
    samples = read_source(write(tmp_path))
    keyed = add_keys(samples, None, workers=1)
    lines = []
    assert settle(samples, keyed, False, lines.append).equals(keyed)
    assert lines == [
        "duplicates: 2 samples have the image and the text of another, first b.png those of a.png:"
        " kept; --dedupe drops them",
        "warning: 1 of the duplicates lie across splits (test and train 1): scores there are too"
        " good",
        "warning: 1 of the duplicates have other labels than their copy: both are used",
    ]


def test_they_are_dropped_and_the_counts_follow(tmp_path):
    samples = read_source(write(tmp_path), SourceOptions(dedupe=True))
    lines = []
    left = settle(samples, add_keys(samples, None, workers=1), True, lines.append)
    assert left["id"].to_pylist() == ["a.png", "d.png", "e.png"]
    assert "dropped (--dedupe)" in lines[0]
    assert samples.source["counts"] == {
        "samples": 3,
        "images": 3,
        "texts": 3,
        "labelled": 3,
        "missing_images": 0,
        "splits": {"test": 1, "train": 1, "val": 1},
        "duplicates_dropped": 2,
    }


def test_nothing_is_said_where_there_are_none(tmp_path):
    samples = read_source(write(tmp_path), SourceOptions(image_column="-", text_column="image"))
    lines = []
    settle(samples, add_keys(samples, None, workers=1), True, lines.append)
    assert lines == []


def test_predictions_are_for_every_sample():
    recipe = {"options": {"dedupe": True, "ties": "drop", "merge_labels": "a=b"}, "spec": "x"}
    options = source_options([], recipe, "y.csv", {"dedupe": True})
    assert (options.dedupe, options.ties) == (False, "unlabelled")
    assert (options.merge_labels, options.need_merged_labels) == ("a=b", False)


def test_many_rows_agree_with_counting_by_hand():
    rng = np.random.default_rng(0)
    splits = ["train", "val", "test", ""]
    rows = [
        (splits[rng.integers(4)], [0], str(rng.integers(9)), str(rng.integers(9)))
        for _ in range(400)
    ]
    rank = {"test": 0, "val": 1, "train": 2, "": 3}
    best = {}
    for at, (split, _, *content) in enumerate(rows):
        best.setdefault(tuple(content), []).append((rank[split], at))
    expected = sorted(
        (at, min(copies)[1]) for copies in best.values() for _, at in copies if at != min(copies)[1]
    )
    assert pairs(rows) == expected
