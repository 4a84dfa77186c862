"""Labels that are not known of a sample whose others are: columns of labels, lists, sidecars."""

import csv
import json
import shlex

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather as feather
import pytest
from PIL import Image

from mmc.extract.captions_table import write_table
from mmc.extract.prepare import PrepareConfig, prepare
from mmc.extract.sources import SourceOptions, read_source
from mmc.extract.sources.duplicates import duplicates
from mmc.store.errors import InputError

LUNGS = """\
id,text,No Finding,Edema,Pleural Other,Sex
a,one,1.0,0,-1,F
b,two,,1,0,M
c,three,,-1,,F
d,four,0,0.0,1,M
"""
COLUMNS = "No Finding,Edema,Pleural Other"


def write(tmp_path, text, name="t.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(spec, **options):
    return read_source(spec, SourceOptions(**options))


def hot(samples):
    """(n, C): 1 yes, 0 no, -1 unknown."""
    found = np.zeros((len(samples.table), len(samples.label_set)), int)
    labels = samples.table["labels"].to_pylist()
    unknown = [None] * len(labels)
    if "unknown_labels" in samples.table.column_names:
        unknown = samples.table["unknown_labels"].to_pylist()
    for row, (yes, open_) in enumerate(zip(labels, unknown, strict=True)):
        found[row] = -1 if yes is None else 0
        found[row, yes or []], found[row, open_ or []] = 1, -1
    return found.tolist()


def test_a_column_for_each_label(tmp_path):
    samples = read(write(tmp_path, LUNGS), label_column=COLUMNS)
    assert samples.label_set == ("No Finding", "Edema", "Pleural Other")
    assert samples.task == "multilabel"
    assert hot(samples) == [[1, 0, -1], [-1, 1, 0], [-1, -1, -1], [0, 0, 1]]
    assert samples.table["labels"].to_pylist()[2] is None
    assert samples.source["counts"]["labelled"] == 3
    assert "Edema" not in samples.table.column_names
    assert samples.table["Sex"].to_pylist() == ["F", "M", "F", "M"]
    notes = "\n".join(samples.notes)
    assert "from 3 columns (No Finding, Edema, Pleural Other)" in notes
    assert "3 empty cells read as unknown; if they mean no, give --missing-labels -1" in notes
    assert "2 single labels of 2 samples are unknown" in notes
    # Without the option they are what they were: the user's columns.
    assert read(write(tmp_path, LUNGS)).task == "unlabelled"


def test_empty_cells_mean_no_where_the_user_says_what_unknown_looks_like(tmp_path):
    samples = read(write(tmp_path, LUNGS), label_column=COLUMNS, missing_labels="-1")
    assert hot(samples) == [[1, 0, -1], [0, 1, 0], [0, -1, 0], [0, 0, 1]]
    assert "labels: 3 empty cells read as no" in samples.notes
    words = LUNGS.replace("-1", "?")
    assert hot(read(write(tmp_path, words), label_column=COLUMNS, missing_labels="?")) == (
        hot(samples)
    )
    with pytest.raises(InputError, match=r"t\.csv:4: column Edema holds '-1'"):
        read(write(tmp_path, LUNGS), label_column=COLUMNS, missing_labels="-")


@pytest.mark.parametrize("form", ["csv", "parquet", "arrow", "jsonl"])
def test_every_table_says_the_same(tmp_path, form):
    frame = pd.DataFrame(
        {
            "id": ["a", "b", "c", "d"],
            "text": ["one", "two", "three", "four"],
            "floats": [1.0, np.nan, -1.0, 0.0],
            "numbers": [0, 1, -1, 1],
            "truths": [True, False, True, False],
        }
    )
    path = str(tmp_path / f"t.{form}")
    if form == "csv":
        frame.to_csv(path, index=False)
    elif form == "parquet":
        frame.to_parquet(path)
    elif form == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:  # NaN as a number, not as null
        floats = pa.array(frame["floats"], from_pandas=False)
        table = pa.Table.from_pandas(frame).set_column(2, "floats", floats)
        feather.write_feather(table, path, compression="uncompressed")
    samples = read(path, label_column="floats,numbers,truths")
    assert hot(samples) == [[1, 0, 1], [-1, 1, 0], [-1, -1, 1], [0, 1, 0]]


def test_patterns_and_names_with_commas(tmp_path):
    text = 'id,text,tag_b,"tag_a, old",other\n1,x,1,0,5\n2,y,0,1,5\n'
    path = write(tmp_path, text)
    assert read(path, label_column="tag_*").label_set == ("tag_b", "tag_a, old")
    assert read(path, label_column='["tag_a, old"]').label_set == ("tag_a, old",)
    with pytest.raises(InputError, match=r"no column 'tag_c' \(--label-column\); it has: id, text"):
        read(path, label_column="tag_b,tag_c")
    with pytest.raises(InputError, match="column other holds '5'"):
        read(path, label_column="*")
    with pytest.raises(InputError, match="cannot read label-column 'tag_b,,x'"):
        read(path, label_column="tag_b,,x")
    with pytest.raises(InputError, match="--label-separator has no meaning"):
        read(path, label_column="tag_*", label_separator="|")
    one = write(tmp_path, 'id,text,"a,b",a,b\n1,x,cat,1,0\n2,y,dog,1,0\n', "one.csv")
    assert read(one, label_column="a,b").label_set == ("cat", "dog")


def test_tables_of_one_source_may_have_other_columns(tmp_path):
    write(tmp_path, "id,text,a,b\n1,x,1,0\n2,y,0,1\n", "train.csv")
    write(tmp_path, "id,text,b\n3,z,1\n", "val.csv")
    write(tmp_path, "id,text\n4,w\n", "test.csv")
    samples = read(str(tmp_path), label_column="a,b")
    assert hot(samples) == [[1, 0], [0, 1], [-1, 1], [-1, -1]]
    assert samples.table["labels"].to_pylist()[3] is None


def test_merged_columns(tmp_path):
    path = write(tmp_path, "id,text,a,b,c\n1,x,0,-1,1\n2,y,1,-1,0\n3,z,0,0,-1\n")
    samples = read(path, label_column="a,b,c", merge_labels="a,b=ab")
    assert samples.label_set == ("ab", "c")
    assert hot(samples) == [[-1, 1], [1, 0], [0, -1]]


def test_one_label_for_each_sample_where_it_is_asked_for(tmp_path):
    path = write(tmp_path, "id,text,a,b,c\n1,x,0,0,1\n2,y,1,0,0\n3,z,0,1,0\n")
    samples = read(path, label_column="a,b,c")
    assert samples.task == "multilabel"
    assert any("has exactly one; --task multiclass" in note for note in samples.notes)
    samples = read(path, label_column="a,b,c", task="multiclass")
    assert (samples.task, samples.table["labels"].to_pylist()) == ("multiclass", [[2], [0], [1]])
    both = write(tmp_path, "id,text,a,b,c\n1,x,0,1,1\n2,y,1,0,0\n", "both.csv")
    with pytest.raises(InputError, match=r"both\.csv:2 has 2 labels and the task is multiclass"):
        read(both, label_column="a,b,c", task="multiclass")


def test_lists_with_a_column_of_unknown_labels(tmp_path):
    path = write(
        tmp_path,
        "id,text,labels,unknown_labels\n1,x,a|b,c\n2,y,,a|b\n3,z,c,\n4,w,NA,a\n5,v,,a|b|c\n",
    )
    samples = read(path)
    assert samples.label_set == ("a", "b", "c")
    assert hot(samples) == [[1, 1, -1], [-1, -1, 0], [0, 0, 1], [-1] * 3, [-1] * 3]
    assert samples.table["labels"].to_pylist()[3:] == [None, None]
    assert samples.source["columns"]["unknown"] == "unknown_labels"
    bare = read(path, unknown_column="-")
    assert bare.table["user.unknown_labels"].to_pylist() == ["c", "a|b", "", "a", "a|b|c"]
    assert hot(bare)[0] == [1, 1, 0]
    twice = write(tmp_path, "id,text,labels,unknown_labels\n1,x,a|b,b\n", "twice.csv")
    with pytest.raises(InputError, match=r"twice\.csv:2 has label b, which is among its unknown"):
        read(twice)
    assert hot(read(twice, merge_labels="a,b=ab"))[0] == [1]
    one = write(tmp_path, "id,text,label,unknown_labels\n1,x,a,b\n2,y,b,\n", "one.csv")
    assert read(one).task == "multilabel"
    with pytest.raises(InputError, match="binary was asked for, and single labels are unknown"):
        read(one, task="binary")


def test_lists_of_zeros_ones_and_minus_ones_are_no_labels(tmp_path):
    path = write(tmp_path, 'id,text,labels\n1,x,"[1, 0, -1, 0]"\n2,y,"[0, 0, 1, 1]"\n')
    with pytest.raises(InputError, match=r"zeros and ones, such as .*--label-column"):
        read(path)


@pytest.mark.parametrize(
    ("level", "names", "rows"),
    [
        ("all", ("animal", "car", "cat"), [[0, 1, -1], [-1, 0, 0], [1, -1, 1]]),
        ("top", ("animal", "car"), [[-1, 1], [-1, 0], [1, -1]]),
    ],
)
def test_sidecars_with_minus_one_or_null(tmp_path, level, names, rows):
    (tmp_path / "organized_Tags.json").write_text('{"animal": ["cat"], "car": []}')
    for name, encoded in (("a", [0, 1, -1]), ("b", [None, 0, 0]), ("c", [1, -1, 1])):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{name}.jpg")
        (tmp_path / f"{name}.json").write_text(json.dumps({"encoded_labels": encoded}))
    samples = read(str(tmp_path), label_level=level)
    assert samples.label_set == names
    assert hot(samples) == rows
    (tmp_path / "a.json").write_text('{"encoded_labels": [0, 2, 0]}')
    with pytest.raises(InputError, match="2 at place 2, not 0, 1, or -1 for unknown"):
        read(str(tmp_path))


@pytest.mark.parametrize("form", ["csv", "webdataset"])
def test_prepared_data_is_the_same_data(tmp_path, form):
    lines = [["id", "image", "text", "a", "b", "c", "split"]]
    cells = ["1,0,-1", ",1,0", "-1,-1,-1", "0,0,0", "0,1,", "1,,0"]
    for at, cell in enumerate(cells):
        Image.new("RGB", (8 + at, 8)).save(tmp_path / f"{at}.png")
        split = ("train", "val")[at % 2]
        lines.append([f"s{at}", f"{at}.png", f"t{at}", *cell.split(","), split])
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    options = SourceOptions(label_column="a,b,c")
    before = read_source(str(tmp_path / "t.csv"), options)
    out, config = str(tmp_path / "out"), PrepareConfig(to=form, source=options)
    done = prepare(str(tmp_path / "t.csv"), out, config, report=lambda line: None)
    assert done.warnings == ()
    after = read_source(out)
    assert (after.label_set, after.task) == (before.label_set, before.task)
    ids = [samples.table["id"].to_pylist() for samples in (before, after)]
    rows = [dict(zip(i, hot(s), strict=True)) for i, s in zip(ids, (before, after), strict=True)]
    assert rows[0] == rows[1]
    assert min(map(min, rows[0].values())) < 0
    # What is told is a loss is one: the same folder with an unknown label taken away.
    again = prepare(str(tmp_path / "t.csv"), out, config, report=lambda line: None)
    assert again.warnings == ()


def test_of_two_copies_the_one_that_knows_more_stays():
    table = pa.table(
        {
            "id": list("abc"),
            "split": ["train"] * 3,
            "labels": pa.array([None, [0], [0]], pa.list_(pa.int32())),
            "unknown_labels": pa.array([None, [1], None], pa.list_(pa.int32())),
            "image": pa.array(["i"] * 3),
            "image_key": ["i"] * 3,
            "text": ["t"] * 3,
            "text_key": ["t"] * 3,
        }
    )
    found = duplicates(table)
    assert found.repeats.tolist() == [0, 1]
    assert found.originals.tolist() == [2, 2]


@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
def test_a_table_with_captions_keeps_what_is_unknown(tmp_path, name):
    before = read(write(tmp_path, LUNGS), label_column=COLUMNS)
    said = []
    out = tmp_path / name
    write_table(out, before, ["x"] * 4, "generated", said.append)
    after = read_source(str(out))
    assert said == []
    names = [before.label_set.index(label) for label in after.label_set]
    assert hot(after) == [[row[at] for at in names] for row in hot(before)]
    assert after.table["generated"].to_pylist() == ["x"] * 4


def test_columns_that_may_be_labels_are_told_where_there_are_none(tmp_path):
    advice = read(write(tmp_path, LUNGS)).advice
    assert advice[-1].endswith(f"--label-column '{COLUMNS}'")
    assert not any(
        "--label-column" in line
        for line in read(write(tmp_path, LUNGS), label_column=COLUMNS).advice
    )

    commas = 'id,text,age,"a, b",c\n1,one,30,1,0\n2,two,1,0,1\n'
    path = write(tmp_path, commas, "commas.csv")
    said = shlex.split(read(path).advice[-1])
    assert hot(read(path, label_column=said[-1])) == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    "cells", [("0", "0"), ("1", "1"), ("", ""), ("1", "2"), ("yes and no", "1"), ("1.5", "0")]
)
def test_other_columns_are_not_taken_for_labels(tmp_path, cells):
    path = write(tmp_path, "id,text,x\na,one,{}\nb,two,{}\n".format(*cells))
    assert not any("--label-column" in line for line in read(path).advice)


def test_typed_columns_that_may_be_labels(tmp_path):
    frame = pd.DataFrame({"id": ["a", "b"], "text": ["one", "two"]})
    frame = frame.assign(flag=[True, False], share=[0.0, None], one=[1, 0], size=[1, 7])
    frame.to_parquet(tmp_path / "t.parquet")
    assert read(str(tmp_path / "t.parquet")).advice[-1].endswith("--label-column flag,one")
