"""Separators, names, natural order, empty cells, task."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmc.extract.sources import SourceOptions, read_source
from mmc.extract.sources.labels import natural_order, read_labels
from mmc.store.errors import InputError


def parse(cells, groups=None, separator=None, task=None, **more):
    return read_labels(
        pa.chunked_array([pa.array(cells, pa.string())]),
        np.array(groups if groups is not None else [0] * len(cells)),
        separator=separator,
        task=task,
        where=lambda row: f"t.csv:{row + 2}",
        **more,
    )


def named(labels):
    return [
        None if cell is None else [labels.names[at] for at in cell]
        for cell in labels.column.to_pylist()
    ]


@pytest.mark.parametrize(
    ("cells", "separator", "expected"),
    [
        (["3 1", "2", "10 2"], " ", [["1", "3"], ["2"], ["2", "10"]]),
        (["Science Fiction|Action", "Drama"], "|", [["Action", "Science Fiction"], ["Drama"]]),
        (["|Comedy|", "Action||Drama", "N/A"], "|", [["Comedy"], ["Action", "Drama"], None]),
        (["Comedy|N/A", "Drama"], "|", [["Comedy", "N/A"], ["Drama"]]),
        (["a;b", "c"], ";", [["a", "b"], ["c"]]),
        (["Action, Comedy", "Comedy, Drama"], ",", [["Action", "Comedy"], ["Comedy", "Drama"]]),
        (["dog,cat", "dog"], ",", [["cat", "dog"], ["dog"]]),
        (["1,3", "2"], ",", [["1", "3"], ["2"]]),
        (["a|b, c", "d"], "|", [["a", "b, c"], ["d"]]),
        ([" x | y ", "x|x|y"], "|", [["x", "y"], ["x", "y"]]),
        (['["b, c", "a"]', "[]", '["d|e"]'], None, [["a", "b, c"], [], ["d|e"]]),
        (["['it''s', \"x\"]", "['y']"], None, [["its", "x"], ["y"]]),
        (["[1, 0]", "[true]", "[1]"], None, [["0", "1"], ["true"], ["1"]]),
    ],
)
def test_separators(cells, separator, expected):
    labels = parse(cells)
    assert named(labels) == expected
    assert labels.separator == separator
    assert labels.task == "multilabel"


@pytest.mark.parametrize(
    "cells",
    [
        ["Portland, Oregon", "Portland, Maine", "Salem, Oregon"],
        ["Jewelry, Watches", "Shoes", "Bags, Wallets"],
        ["Science Fiction", "Historical Fiction", "Fiction"],
        ["1.5", "2.5", "7.4"],
        ["n.a.", "a/b", "none"],
        ["[not a list", "{neither}", "x"],
    ],
)
def test_names_with_separators_in_them_survive(cells):
    labels = parse(cells)
    assert named(labels) == [[cell] for cell in cells]
    assert labels.task == "multiclass"
    assert labels.separator is None


def test_commas_kept_are_said_and_a_given_separator_divides():
    cells = ["Portland, Oregon", "Portland, Maine", "x"]
    assert any("--label-separator ," in note for note in parse(cells).notes)
    told = parse(cells, separator=",")
    assert named(told)[0] == ["Oregon", "Portland"]
    assert told.task == "multilabel"
    assert named(parse(["a b", "b  c"], separator=" ")) == [["a", "b"], ["b", "c"]]
    assert named(parse(["a::b", "b"], separator="::")) == [["a", "b"], ["b"]]


def test_words_in_many_combinations_get_a_hint():
    pairs = [" ".join(pair) for pair in itertools.permutations("abcdef", 2)]
    labels = parse(pairs)
    assert labels.task == "multiclass"
    assert any("only 6 words" in note for note in labels.notes)


def test_natural_order():
    assert natural_order({"10", "2", "1", "-1"}) == ("-1", "1", "2", "10")
    assert natural_order({"a10", "a2", "b"}) == ("a2", "a10", "b")
    assert natural_order({"no", "yes"}) == ("no", "yes")
    assert natural_order({"false", "true"}) == ("false", "true")


def test_integers_have_one_spelling():
    assert named(parse(["1.0", "0.0", "1"])) == [["1"], ["0"], ["1"]]
    assert named(parse(["01", "1", "2"])) == [["1"], ["1"], ["2"]]
    assert named(parse(["01", "02", "10"])) == [["01"], ["02"], ["10"]]
    assert named(parse(["1.0", "1.1", "x"])) == [["1.0"], ["1.1"], ["x"]]
    assert any("1.0 read as 1" in note for note in parse(["1.0", "2.0"]).notes)


def test_names_that_other_readers_lose():
    """Where nothing else is there, they are names."""
    cells = ["NA", "None", "null", "nan", "N/A"]
    labels = parse(cells)
    assert named(labels) == [[cell] for cell in cells]
    assert any("--missing-labels N/A,NA,None,nan,null" in note for note in labels.notes)


def test_marks_of_a_missing_label():
    cells = ["a", "NA", " nan ", "b", "none", "Na", "N/A"]
    labels = parse(cells)
    assert named(labels) == [["a"], None, None, ["b"], ["none"], ["Na"], None]
    assert labels.names == ("Na", "a", "b", "none")
    assert "labels: 3 cells that hold N/A, NA, nan read as unlabelled" in labels.notes[0]
    kept = parse(cells, missing=frozenset())
    assert named(kept)[1:3] == [["NA"], ["nan"]]
    assert not any("read as unlabelled" in note for note in kept.notes)
    told = parse(["?", "a", "b", "NA"], missing=frozenset({"?"}))
    assert named(told) == [None, ["a"], ["b"], ["NA"]]
    assert parse(["?", "?"], missing=frozenset({"?"})).task == "unlabelled"
    # A split that holds marks alone is unlabelled as a whole, its empty cells too.
    assert named(parse(["a|b", "NA", ""], groups=[0, 1, 1]))[1:] == [None, None]


def test_missing_labels_may_be_told(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,label\na,NA\nb,x\nc,y\nd,?\n", encoding="utf-8")

    def names(**options):
        samples = read_source(str(path), SourceOptions(**options))
        return [
            cell and [samples.label_set[at] for at in cell]
            for cell in samples.table["labels"].to_pylist()
        ]

    assert names() == [None, ["x"], ["y"], ["?"]]
    assert names(missing_labels="-") == [["NA"], ["x"], ["y"], ["?"]]
    assert names(missing_labels="?, -1") == [["NA"], ["x"], ["y"], None]


def test_labels_that_a_format_knows():
    """Its order, its labels that no sample has, no dividing and no marks of the missing."""
    names = ("b|c", "a", "NA", "z")
    labels = parse(["a", "NA", "b|c", "", None], label_set=names)
    assert labels.names == names
    assert named(labels) == [["a"], ["NA"], ["b|c"], None, None]
    assert labels.task == "multiclass"
    labels = parse(['["a", "b|c"]', "[]"], label_set=names)
    assert labels.column.to_pylist() == [[0, 1], []]
    assert labels.task == "multilabel"
    with pytest.raises(InputError, match=r"t\.csv:3: q is none of the source's labels"):
        parse(["a", '["q"]'], label_set=names)


@pytest.mark.parametrize(
    ("cells", "task"),
    [
        (["0", "1", "0"], "binary"),
        (["cat", "dog"], "binary"),
        (["a", "b", "c"], "multiclass"),
        (["1 2", "1"], "multilabel"),
        (["a|", "b|"], "multilabel"),
        (["[0]", "[1]"], "multilabel"),
        (["1", "1"], "multilabel"),
        (["1", ""], "multilabel"),
        ([None, ""], "unlabelled"),
    ],
)
def test_task(cells, task):
    assert parse(cells).task == task


def test_empty_cells():
    assert named(parse(["1 2", "", " ", None])) == [["1", "2"], [], [], None]
    assert named(parse(["a", "b", "", None])) == [["a"], ["b"], None, None]
    assert any("1 empty cells read as unlabelled" in n for n in parse(["a", "b", ""]).notes)
    assert any("2 empty cells read as none" in n for n in parse(["1 2", "", " "]).notes)
    assert named(parse(["a", "b", ""], task="multilabel")) == [["a"], ["b"], []]
    # A split without a single label is unlabelled, not a split of samples with no label.
    assert named(parse(["1 2", "", "", ""], groups=[0, 0, 1, 1])) == [["1", "2"], [], None, None]


def test_task_may_be_given():
    assert parse(["0", "1"], task="multiclass").task == "multiclass"
    assert parse(["0", "1"], task="multilabel").task == "multilabel"
    with pytest.raises(InputError, match="exactly 2 labels and the source has 3: a, b, c"):
        parse(["a", "b", "c"], task="binary")
    with pytest.raises(InputError, match=r"t\.csv:3 has 2 labels and the task is multiclass"):
        parse(["1", "1 2"], task="multiclass")
    with pytest.raises(InputError, match="has only x"):
        parse(["x", "x"], task="multiclass")
    with pytest.raises(InputError, match="no labels"):
        parse([None], task="binary")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ('{"a": 1}', r"t\.csv:3: the label is an object"),
        ("[[1], 2]", r"t\.csv:3: \[1\] in the list"),
        ("[null]", r"t\.csv:3: None in the list"),
    ],
)
def test_values_that_are_no_labels(cell, message):
    with pytest.raises(InputError, match=message):
        parse(["a", cell])


def test_a_place_for_each_label_is_no_list_of_names():
    with pytest.raises(InputError, match=r"t\.csv:3: the labels are lists of 3 zeros and ones"):
        parse([None, "[1, 0, 1]", "[0, 1, 0]"])
    assert named(parse(["[1, 0]", "[0, 1]", "[1, 0]"])) == [["0", "1"]] * 3
    assert named(parse(["[0, 1, 2]", "[1, 0, 3]"])) == [["0", "1", "2"], ["0", "1", "3"]]


def test_a_label_on_every_sample_is_warned_of():
    assert "label 'x' is on all 2" in parse(["x", "x", None]).warnings[0]
    assert parse(["x|y", "y", "x"]).warnings == []


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.sets(st.sampled_from(["a b", "c, d", "é", "10", "9", "NA"])), min_size=1),
    seed=st.randoms(use_true_random=False),
)
def test_joined_labels_come_back(rows, seed):
    """Whatever the order and repeats, the sets are those that were joined."""
    cells = []
    for row in rows:
        parts = [*row, *(["", *row] if seed.random() < 0.5 else [])]
        seed.shuffle(parts)
        cells.append("|".join(parts))
    told = {"separator": "|", "task": "multilabel", "missing": frozenset()} if any(rows) else {}
    labels = parse(cells, **told)
    if any(rows):
        assert [set(cell) for cell in named(labels)] == rows
        assert list(labels.names) == list(natural_order(set().union(*rows)))
        assert all(cell == sorted(set(cell)) for cell in labels.column.to_pylist())
    else:
        assert labels.task in ("unlabelled", "multilabel")


def test_words_between_spaces_are_labels_in_the_kaggle_form(tmp_path):
    words = ("one", "two", "three", "four")
    cells = [" ".join(w for i, w in enumerate(words) if code >> i & 1) for code in range(1, 16)]
    rows = "".join(f"{i}.jpg,{cell},text {i}\n" for i, cell in enumerate(cells))
    kaggle, other = tmp_path / "train.csv", tmp_path / "other.csv"
    kaggle.write_text("ImageID,Labels,Caption\n" + rows, encoding="utf-8")
    other.write_text("name,Labels,Caption\n" + rows, encoding="utf-8")
    samples = read_source(str(kaggle), SourceOptions())
    assert (samples.task, samples.source["label_separator"]) == ("multilabel", " ")
    assert set(samples.label_set) == set(words)
    samples = read_source(str(other), SourceOptions())
    assert len(samples.label_set) == 15
    assert any("--label-separator" in note for note in samples.notes)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet", "t.feather"])
def test_pipes_between_labels_in_every_table(tmp_path, name):
    cells = ["Action|Comedy", "|Comedy|", "", "Action||Science Fiction"]
    rows = [{"text": f"t{n}", "genre": cell} for n, cell in enumerate(cells)]
    path = tmp_path / name
    if name.endswith("jsonl"):
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif name.endswith("sv"):
        sign = "," if name.endswith("csv") else "\t"
        lines = ["text" + sign + "genre", *(sign.join(row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        feather.write_feather(pa.Table.from_pylist(rows), path)
    samples = read_source(str(path))
    assert (samples.task, samples.source["label_separator"]) == ("multilabel", "|")
    assert samples.label_set == ("Action", "Comedy", "Science Fiction")
    assert samples.table["labels"].to_pylist() == [[0, 1], [1], [], [0, 2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_level": "top"}, "label level top has no effect: this source has no tree"),
        ({"ties": "first"}, "ties first has no effect: this source has no annotators' votes"),
        ({}, None),
    ],
)
def test_options_without_effect_are_said(tmp_path, options, message):
    path = tmp_path / "t.csv"
    path.write_text("text,label\na,x\nb,y\n", encoding="utf-8")
    warnings = read_source(str(path), SourceOptions(**options)).warnings
    assert warnings == [] if message is None else message in warnings[0]


def test_unknown_levels_are_refused():
    with pytest.raises(InputError, match="unknown label level 'up'; choose from top, leaf, all"):
        SourceOptions(label_level="up")


def test_a_separator_that_no_cell_holds(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("id,text,labels\n1,a,red blue\n2,b,red\n")
    said = read_source(str(path), SourceOptions(label_separator="|")).notes
    assert any("no label cell contains '|'" in line for line in said)
    said = read_source(str(path), SourceOptions(label_separator=" ")).notes
    assert not any("no label cell" in line for line in said)
