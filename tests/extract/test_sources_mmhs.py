"""MMHS150K: votes, ties, merging before the vote, splits, what is missing on either side."""

import json

import pytest
from PIL import Image

from mmc.extract.sources import SourceOptions, read_source
from mmc.store.errors import InputError

NAMES = ("NotHate", "Racist", "Sexist", "Homophobe", "Religion", "OtherHate")
BASE = 1_110_000_000_000_000_000
VOTES = {1: [0, 0, 1], 2: [1, 2, 0], 3: [5], 4: [2, 0], 5: [3, 3, 0, 0], 6: [4, 4, 0, 0, 4]}


def make(folder, votes=None, *, splits=None, absent=(), words=None, entries=None):
    """A folder in the form of MMHS150K; keys of ``votes`` are the ends of the ids."""
    folder.mkdir()
    (folder / "img_resized").mkdir()
    truth = {}
    for number, labels in (votes or VOTES).items():
        id_ = str(BASE + number)
        truth[id_] = {
            "img_url": f"http://example.com/{number}.jpg",
            "labels": labels,
            "tweet_url": f"http://example.com/{number}",
            "tweet_text": f"tweet {number}",
            "labels_str": [NAMES[label] for label in labels],
        }
        if number not in absent:
            Image.new("RGB", (2, 2)).save(folder / "img_resized" / f"{id_}.jpg")
    truth.update(entries or {})
    (folder / "MMHS150K_GT.json").write_text(json.dumps(truth), encoding="utf-8")
    for split, numbers in (splits or {}).items():
        (folder / "splits").mkdir(exist_ok=True)
        ids = "\n".join(str(BASE + number) for number in numbers)
        (folder / "splits" / f"{split}_ids.txt").write_text(ids + "\n", encoding="utf-8")
    for number, text in (words or {}).items():
        (folder / "img_txt").mkdir(exist_ok=True)
        (folder / "img_txt" / f"{BASE + number}.json").write_text(text, encoding="utf-8")
    return str(folder)


def named(samples):
    return {
        int(id_) - BASE: cell and [samples.label_set[at] for at in cell]
        for id_, cell in zip(
            samples.table["id"].to_pylist(), samples.table["labels"].to_pylist(), strict=True
        )
    }


def test_the_majority_decides_however_many_vote(tmp_path):
    samples = read_source(make(tmp_path / "x"))
    assert samples.label_set == NAMES
    assert samples.task == "multiclass"
    assert named(samples) == {
        1: ["NotHate"],
        2: None,
        3: ["OtherHate"],
        4: None,
        5: None,
        6: ["Religion"],
    }
    assert samples.table["id"].to_pylist()[0] == "1110000000000000001"
    assert samples.table["text"].to_pylist()[:2] == ["tweet 1", "tweet 2"]
    assert samples.table["votes"].to_pylist()[1] == ["Racist", "Sexist", "NotHate"]
    assert any("3 of 6 samples have no majority and are unlabelled" in n for n in samples.notes)
    assert any("1 with 1, 1 with 2, 2 with 3, 1 with 4, 1 with 5" in n for n in samples.notes)


@pytest.mark.parametrize(
    ("ties", "expected"),
    [
        ("unlabelled", {2: None, 4: None, 5: None}),
        ("first", {2: ["Racist"], 4: ["Sexist"], 5: ["Homophobe"]}),
        ("nothate", {2: ["NotHate"], 4: ["NotHate"], 5: ["NotHate"]}),
        ("drop", {}),
    ],
)
def test_ties(tmp_path, ties, expected):
    samples = read_source(make(tmp_path / "x"), SourceOptions(ties=ties))
    found = named(samples)
    assert {key: found[key] for key in (2, 4, 5) if key in found} == expected
    assert [found[key] for key in (1, 3, 6)] == [["NotHate"], ["OtherHate"], ["Religion"]]


def test_unknown_ties_are_refused(tmp_path):
    with pytest.raises(
        InputError, match="unknown ties 'most'; choose from unlabelled, first, drop"
    ):
        read_source(make(tmp_path / "x"), SourceOptions(ties="most"))


def test_labels_are_merged_before_the_vote(tmp_path):
    merge = "racist,sexist,homophobe,religion,otherHate=hate"
    samples = read_source(make(tmp_path / "x"), SourceOptions(merge_labels=merge))
    assert samples.label_set == ("NotHate", "hate")
    assert samples.task == "binary"
    assert named(samples) == {
        1: ["NotHate"],
        2: ["hate"],
        3: ["hate"],
        4: None,
        5: None,
        6: ["hate"],
    }
    with pytest.raises(InputError, match="no label 'racst'; did you mean Racist"):
        read_source(str(tmp_path / "x"), SourceOptions(merge_labels="racst=hate"))


def test_as_multilabel_every_vote_counts(tmp_path):
    samples = read_source(make(tmp_path / "x"), SourceOptions(task="multilabel"))
    assert samples.task == "multilabel"
    assert named(samples)[2] == ["NotHate", "Racist", "Sexist"]
    assert named(samples)[3] == ["OtherHate"]


def test_splits_and_what_they_do_not_agree_with(tmp_path):
    splits = {"train": [1, 2, 3, 77], "val": [4, 1], "test": [5, 2]}
    samples = read_source(make(tmp_path / "x", splits=splits))
    assert samples.table["split"].to_pylist() == ["val", "test", "train", "val", "test", ""]
    told = " ".join(samples.warnings)
    assert "ids of the split files without an entry are left out: 1, first" in told
    assert "ids in several split files: 2, first" in told
    assert "entries in no split file: 1, first" in told


def test_images_and_words_that_are_not_there(tmp_path):
    words = {1: '{"img_text": "SALE"}', 2: '{"img_text": ""}', 3: "{", 99: '{"img_text": "x"}'}
    spec = make(tmp_path / "x", absent=(4,), words=words)
    Image.new("RGB", (2, 2)).save(tmp_path / "x" / "img_resized" / "123.jpg")
    samples = read_source(spec, SourceOptions(text_template="{tweet_text} [SEP] {img_text}"))
    assert samples.table["img_text"].to_pylist() == ["SALE", None, None, None, None, None]
    assert samples.table["text"].to_pylist()[:2] == ["tweet 1 [SEP] SALE", "tweet 2 [SEP] "]
    told = " ".join(samples.warnings)
    assert "images without an entry are left out: 1, first 123.jpg" in told
    assert "1 files of img_txt cannot be read" in told
    assert "1 of 6 images are not there" in told
    assert samples.source["counts"]["missing_images"] == 1


def test_the_file_itself_and_no_votes(tmp_path):
    spec = make(tmp_path / "x", entries={"7": {"tweet_text": "t", "labels": [], "labels_str": []}})
    (tmp_path / "x" / "MMHS150K_GT.json").rename(tmp_path / "x" / "other.json")
    samples = read_source(f"{spec}/other.json")
    assert samples.source["format"] == "mmhs"
    assert samples.table["id"].to_pylist()[-1] == "7"
    assert samples.table["labels"].to_pylist()[-1] is None


def test_images_elsewhere(tmp_path):
    spec = make(tmp_path / "x")
    (tmp_path / "x" / "img_resized").rename(tmp_path / "pictures")
    samples = read_source(spec, SourceOptions(image_root=str(tmp_path / "pictures")))
    assert samples.source["counts"]["missing_images"] == 0
    with pytest.raises(InputError, match="none of the 6 images is there"):
        read_source(spec)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"labels": [0.5], "labels_str": ["x"]}, "9: labels must be a list of whole numbers"),
        ({"labels": [0, 1], "labels_str": ["NotHate"]}, "9: labels_str must have a name for each"),
        ({"labels": [0], "labels_str": ["Racist"]}, "9: label 0 is called Racist here and NotHate"),
        ([1], "9 is no object"),
    ],
)
def test_entries_that_are_refused(tmp_path, entry, message):
    with pytest.raises(InputError, match=message) as error:
        read_source(make(tmp_path / "x", entries={"9": entry}))
    assert "\n" not in str(error.value)


def test_files_that_are_refused(tmp_path):
    path = tmp_path / "MMHS150K_GT.json"
    for text, message in [
        ('{"1": {"labels": [0], "labels": [1], "tweet_text": "a"}}', "key 'labels' is there twice"),
        ('{"1": ', "is not valid JSON"),
        ("{}", "is no object of tweets"),
    ]:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_source(str(tmp_path))


@pytest.mark.shared_data
def test_the_shared_set(shared_data):
    folder = shared_data / "tiny_mmhs_gt"
    samples = read_source(str(folder))
    assert samples.label_set == ("Drama", "Comedy", "Action", "Horror", "Romance", "Documentary")
    assert len(samples.table) == 60
    assert samples.source["counts"]["splits"] == {"test": 10, "train": 42, "val": 8}
    # By hand: 8 of three different votes, 2 of two votes; one vote and five (3 to 2) decide.
    assert samples.source["counts"]["labelled"] == 50
    assert any("images without an entry are left out: 1" in line for line in samples.warnings)
    assert samples.table["img_text"].null_count == 36
