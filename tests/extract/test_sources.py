"""What a SOURCE may be, which columns it has, ids and splits."""

import csv
import json
import sys
import tempfile
import types
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmc.extract.sources import SOURCES, Records, SourceOptions, read_source
from mmc.store.errors import InputError
from mmc.store.registry import Entry, load


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, newline="")
    return str(path)


def rows(samples, *columns):
    return [tuple(row[name] for name in columns) for row in samples.table.to_pylist()]


def labels_of(samples):
    """Label names of each sample; None = unlabelled."""
    return [
        None if cell is None else [samples.label_set[at] for at in cell]
        for cell in samples.table["labels"].to_pylist()
    ]


KAGGLE = 'ImageID,Labels,Caption\n1.jpg,3 1,"a cat, a dog"\n2.jpg,1,"two\nlines"\n'


def test_kaggle_file(tmp_path):
    for name in ("1.jpg", "2.jpg"):
        write(tmp_path / "data" / name, "x")
    samples = read_source(write(tmp_path / "any.csv", KAGGLE))
    assert rows(samples, "id", "split", "text", "image") == [
        ("1.jpg", "train", "a cat, a dog", "1.jpg"),
        ("2.jpg", "train", "two\nlines", "2.jpg"),
    ]
    assert samples.table.schema.field("labels").type == pa.list_(pa.int32())
    assert labels_of(samples) == [["1", "3"], ["1"]]
    assert (samples.task, samples.label_set) == ("multilabel", ("1", "3"))
    assert samples.source["form"] == "kaggle"
    assert samples.source["label_separator"] == " "
    assert samples.source["image_root"] == str(tmp_path / "data")
    assert samples.source["columns"] == {
        "id": "ImageID", "image": "ImageID", "text": "Caption", "labels": "Labels", "split": None,
    }  # fmt: skip
    assert json.loads(json.dumps(samples.source)) == samples.source
    assert any(note.startswith("format: Kaggle CSV") for note in samples.notes)


def test_folder_takes_only_plain_names_and_says_so(tmp_path):
    write(tmp_path / "train.csv", KAGGLE)
    write(tmp_path / "test.csv", 'ImageID,Caption\n9.jpg,"x"\n')
    write(tmp_path / "test_labels.csv", "ImageID,Labels\n9.jpg,1\n")
    write(tmp_path / "README.md", "not a table")
    samples = read_source(str(tmp_path))
    assert rows(samples, "id", "split") == [
        ("1.jpg", "train"), ("2.jpg", "train"), ("9.jpg", "test"),
    ]  # fmt: skip
    assert labels_of(samples)[2] is None
    assert any("left out: test_labels.csv" in note for note in samples.notes)
    assert any("no val split" in line for line in samples.advice)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "Dev"])
def test_names_of_the_validation_split(tmp_path, name):
    write(tmp_path / "train.jsonl", '{"id": 1, "text": "a", "label": 0}\n')
    write(tmp_path / f"{name}.jsonl", '{"id": 2, "text": "b", "label": 1}\n')
    assert rows(read_source(str(tmp_path)), "id", "split") == [("1", "train"), ("2", "val")]


def test_named_files_may_be_of_different_formats_and_folders(tmp_path):
    train = write(tmp_path / "a" / "one.csv", "id,text,label,year\n1,x,p,1999\n2,y,q,2001\n")
    test = write(tmp_path / "b" / "two.jsonl", '{"id": 3, "text": "z", "more": [1, {"k": 2}]}\n')
    samples = read_source(f"train={train},test={test}")
    assert rows(samples, "id", "split", "year", "more") == [
        ("1", "train", "1999", None),
        ("2", "train", "2001", None),
        ("3", "test", None, '[1, {"k": 2}]'),
    ]
    assert samples.task == "binary"
    assert samples.source["spec"] == f"train={train},test={test}"


def test_a_spec_is_one_source_wherever_it_is_read_from(tmp_path, monkeypatch):
    path = write(tmp_path / "t.csv", "id,text\n1,a\n")
    monkeypatch.chdir(tmp_path)
    assert read_source("t.csv").source["spec"] == read_source(path).source["spec"]
    assert read_source("train=t.csv").source["spec"] == f"train={path}"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.csv": "id,text\n1,x\n", "b.csv": "id,text\n2,y\n"}, "a.csv, b.csv"),
        ({"train.csv": "id,text\n1,x\n", "test.jsonl": '{"id":2,"text":"y"}'}, "jsonl, csv"),
        ({"dev.csv": "id,text\n1,x\n", "val.csv": "id,text\n2,y\n"}, "dev.csv and val.csv"),
        ({"notes.md": "hello"}, "no table"),
    ],
)
def test_folders_that_do_not_tell_which_files(tmp_path, files, message):
    for name, text in files.items():
        write(tmp_path / name, text)
    with pytest.raises(InputError, match=message):
        read_source(str(tmp_path))


def test_the_only_table_of_a_folder_is_read(tmp_path):
    write(tmp_path / "movies.csv", "id,text\n1,x\n")
    write(tmp_path / "README.txt", "Films, by year\n")
    assert rows(read_source(str(tmp_path)), "id", "split") == [("1", "test")]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/trian.csv", r"no file or folder .*trian\.csv; did you mean train\.csv\?"),
        ("train={0}/train.csv,val={0}/none.csv", r"no file or folder .*none\.csv"),
        ("train={0}/train.csv,training={0}/train.csv", "'train' twice"),
        ("{}/data.xyz", "no format reads"),
    ],
)
def test_specs_that_name_nothing(tmp_path, spec, message):
    write(tmp_path / "train.csv", "id,text\n1,x\n")
    write(tmp_path / "data.xyz", "?")
    with pytest.raises(InputError, match=message) as error:
        read_source(spec.format(tmp_path))
    assert "\n" not in str(error.value)


def test_a_text_file_is_a_table_when_its_first_line_is(tmp_path):
    captions = write(tmp_path / "captions.txt", "id,caption\n1,x\n")
    assert rows(read_source(captions), "text") == [("x",)]
    with pytest.raises(InputError, match="no format reads"):
        read_source(write(tmp_path / "words.txt", "just words\n"))
    write(tmp_path / "f" / "train.txt", "id|text|label\n1|x|y\n")
    assert rows(read_source(str(tmp_path / "f")), "id", "split") == [("1", "train")]


def test_ids_are_unique_across_files(tmp_path):
    write(tmp_path / "train.csv", "id,text\n1,x\n2,y\n")
    write(tmp_path / "test.csv", "id,text\n3,x\n1,z\n")
    with pytest.raises(InputError, match=r"test\.csv:3 has the id '1' of train\.csv:2.*differ"):
        read_source(str(tmp_path))
    write(tmp_path / "test.csv", "id,text\n3,x\n1,x\n")
    with pytest.raises(InputError, match=r"test\.csv:3 .* train\.csv:2.*say the same"):
        read_source(str(tmp_path))


def test_an_empty_id_is_an_error(tmp_path):
    path = write(tmp_path / "t.csv", "id,text\n1,x\n ,y\n")
    with pytest.raises(InputError, match=r"t\.csv:3 has an empty id"):
        read_source(path)


def test_ids_without_an_id_column(tmp_path):
    numbered = read_source(write(tmp_path / "t.csv", "text\nx\ny\n"))
    assert rows(numbered, "id") == [("1",), ("2",)]
    assert any("row's number" in note for note in numbered.notes)
    for name in "ab":
        write(tmp_path / f"{name}.png", "x")
    single = read_source(write(tmp_path / "u.csv", "image,text\na.png,x\nb.png,y\n"))
    assert rows(single, "id") == [("a.png",), ("b.png",)]
    repeated = read_source(write(tmp_path / "u.csv", "image,text\na.png,x\na.png,y\nb.png,z\n"))
    assert rows(repeated, "id") == [("a.png#0",), ("a.png#1",), ("b.png#0",)]
    write(tmp_path / "f" / "train.csv", "text,label\nx,1\n")
    write(tmp_path / "f" / "test.csv", "text\ny\n")
    assert rows(read_source(str(tmp_path / "f")), "id") == [("train-1",), ("test-1",)]


def test_columns_are_found_without_case_and_carried_through(tmp_path):
    path = write(tmp_path / "t.csv", " Sample ID ,TEXT , Genre,Year,size\n01,a,x,1999,big\n")
    samples = read_source(path)
    assert samples.table.to_pylist() == [
        {
            "id": "01", "split": "train", "labels": [0], "text": "a", "image": None,
            "image_offset": None, "Year": "1999", "user.size": "big",
        }
    ]  # fmt: skip


def test_the_better_column_wins_and_it_is_said(tmp_path):
    path = write(tmp_path / "t.csv", "id,title,text\n1,T,x\n")
    samples = read_source(path)
    assert rows(samples, "text", "title") == [("x", "T")]
    assert any("text: from column 'text', not title" in note for note in samples.notes)
    other = read_source(path, SourceOptions(text_column="title"))
    assert rows(other, "text", "user.text") == [("T", "x")]


def test_options_name_columns(tmp_path):
    path = write(tmp_path / "t.csv", "a,b,c,d\n1,hello,x,dev\n2,bye,y,train\n")
    options = SourceOptions(
        id_column="a", text_column="B", label_column="c", split_column="d", task="binary"
    )
    samples = read_source(path, options)
    assert rows(samples, "id", "text", "labels", "split") == [
        ("1", "hello", [0], "val"), ("2", "bye", [1], "train"),
    ]  # fmt: skip
    assert samples.source["options"]["text_column"] == "B"


@pytest.mark.parametrize("role", ["id", "image", "text", "label", "split"])
def test_a_wrong_column_name_lists_those_there_are(tmp_path, role):
    path = write(tmp_path / "t.csv", "id,text,label\n1,x,y\n")
    options = SourceOptions(**{f"{role}_column": "nope"})
    with pytest.raises(InputError, match=rf"'nope' \(--{role}-column\); it has: id, text, label"):
        read_source(path, options)


def test_columns_can_be_switched_off(tmp_path):
    path = write(tmp_path / "t.csv", "id,image,text,label\n1,no.jpg,x,y\n2,no.jpg,x,z\n")
    options = SourceOptions(image_column="-", label_column="-")
    samples = read_source(path, options)
    assert samples.task == "unlabelled"
    assert rows(samples, "user.image") == [("no.jpg",), ("no.jpg",)]


def test_neither_image_nor_text(tmp_path):
    path = write(tmp_path / "t.csv", "id,year\n1,1999\n")
    with pytest.raises(InputError, match="no column for images or texts among id, year"):
        read_source(path)


def test_split_column_names_are_normalised(tmp_path):
    path = write(
        tmp_path / "t.csv",
        "id,text,split\n1,a,Train\n2,a,validation\n3,a,dev\n4,a,TEST\n5,a,fold1\n6,a,\n",
    )
    assert rows(read_source(path), "split") == [
        ("train",), ("val",), ("val",), ("test",), ("fold1",), ("",),
    ]  # fmt: skip


def test_text_template(tmp_path):
    path = write(tmp_path / "t.csv", "id,title,text\n1,T,x\n2,,y\n3,,\n")
    samples = read_source(path, SourceOptions(text_template="{title} [SEP] {text}"))
    assert rows(samples, "text") == [("T [SEP] x",), (" [SEP] y",), (None,)]
    assert rows(samples, "title", "user.text")[0] == ("T", "x")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{titel}", r"no column 'titel' \(--text-template\); it has: id, title"),
        ("{Title}", r"no column 'Title' \(--text-template\); it has: id, title"),
        ("{title", "cannot read"),
        ("plain", "names no column"),
        ("{}", "write columns as"),
        ("{title:>9}", "write columns as"),
    ],
)
def test_bad_text_templates(tmp_path, template, message):
    path = write(tmp_path / "t.csv", "id,title\n1,T\n")
    with pytest.raises(InputError, match=message):
        read_source(path, SourceOptions(text_template=template))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "regression"}, "unknown task"),
        ({"split_by": "random:0.5,0.5"}, "cannot read split-by"),
        ({"split_by": "hash:0.5,0.6"}, "sum to 1"),
        ({"split_by": "hash:1.5,-0.5"}, "sum to 1"),
        ({"split_by": "hash:a,b"}, "cannot read split-by"),
        ({"encoding": "utf-9"}, "unknown encoding"),
        ({"encoding": "hex"}, "unknown encoding"),
        ({"label_separator": ""}, "separator is empty"),
    ],
)
def test_options_are_checked(settings, message):
    with pytest.raises(InputError, match=message):
        SourceOptions(**settings)


@pytest.mark.parametrize("entry", SOURCES, ids=lambda entry: entry.name)
def test_every_entry_loads_and_refuses_what_is_not_its_own(entry, tmp_path):
    reader = load(entry)()
    assert not reader.recognises(str(tmp_path))
    assert not reader.recognises(str(tmp_path / "absent.csv"))
    assert not reader.recognises(str(tmp_path / "absent.jsonl"))
    assert entry.description


class Parts:
    """A format of someone else: pictures inside one file, named by a scheme."""

    def recognises(self, spec):
        return spec.startswith("parts:")

    def read(self, spec, options):
        columns = pa.table(
            {
                "image": ["all.bin", "all.bin"],
                "image_offset": pa.array([0, 7], pa.int64()),
                "size": pa.array([7, 3], pa.int64()),
                "text": ["a", "b"],
            }
        )
        folder = spec.removeprefix("parts:")
        return Records(
            where="parts", folder=folder, columns=columns, lines=[1, 2], description="parts"
        )


def test_a_new_format_is_one_class_and_one_line(tmp_path, monkeypatch):
    (tmp_path / "all.bin").write_bytes(b"0123456789")
    module = types.ModuleType("parts_for_test")
    module.Parts = Parts
    monkeypatch.setitem(sys.modules, "parts_for_test", module)
    entry = Entry("parts", "parts_for_test:Parts", "for this test")
    monkeypatch.setattr("mmc.extract.sources.SOURCES", (*SOURCES, entry))
    samples = read_source(f"parts:{tmp_path}")
    assert samples.source["format"] == "parts"
    assert rows(samples, "image", "image_offset", "size") == [("all.bin", 0, 7), ("all.bin", 7, 3)]
    assert samples.source["spec"] == f"parts:{tmp_path}"


@pytest.mark.shared_data
def test_real_sets(shared_data):
    movies = read_source(str(shared_data / "movies"))
    assert movies.source["counts"]["splits"] == {"train": 3621, "val": 776, "test": 776}
    assert movies.source["counts"]["missing_images"] == 0
    names = (shared_data / "movies" / "labels.txt").read_text().split("\n")
    assert list(movies.label_set) == [name for name in names if name]
    memes = read_source(str(shared_data / "tiny_hateful_memes_jsonl"))
    assert (memes.task, memes.label_set) == ("binary", ("0", "1"))
    assert memes.source["form"] == "hateful-memes"
    assert memes.source["counts"]["splits"] == {"train": 40, "val": 12, "test": 12}
    tiny = read_source(str(shared_data / "tiny_kaggle_csv"))
    assert tiny.source["counts"]["splits"] == {"train": 48, "test": 12}
    assert tiny.label_set == tuple(str(n) for n in (*range(1, 12), *range(13, 20)))
    captions = read_source(str(shared_data / "coco_captions_text"))
    assert captions.source["counts"]["splits"] == {"train": 7000, "val": 1000, "test": 1000}
    assert captions.source["counts"]["images"] == 0
    folder = shared_data / "tiny_movie_genre_csv"
    options = SourceOptions(image_root=str(folder / "SampleMoviePosters"))
    genres = read_source(str(folder / "MovieGenre.csv"), options)
    assert genres.source["counts"]["missing_images"] == 6
    latin = read_source(str(folder / "MovieGenre_latin1.csv"), options)
    assert latin.table.drop_columns("text") == genres.table.drop_columns("text")
    assert latin.table["text"] == genres.table["text"]


CELLS = [*"ab12", "", "a|b", "1 2", "../x", "[1]", '{"k": 1}', "a\nb"]


@settings(max_examples=80, deadline=None)
@given(
    header=st.permutations(["id", "image", "text", "label", "split", "x"]),
    data=st.lists(
        st.lists(st.sampled_from(CELLS), min_size=6, max_size=6),
        min_size=1,
        max_size=5,
    ),
    options=st.fixed_dictionaries(
        {
            "task": st.sampled_from([None, "binary", "multilabel"]),
            "split_by": st.sampled_from([None, "hash:0.5,0.5", "stratified:0.5,0.2,0.3"]),
            "label_separator": st.sampled_from([None, "|", " "]),
            "image_column": st.sampled_from([None, "-"]),
        }
    ),
)  # fmt: skip
def test_any_table_makes_samples_or_one_line(header, data, options):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a").write_bytes(b"x")
        with open(Path(folder, "t.csv"), "w", newline="") as file:
            csv.writer(file).writerows([header, *data])
        message = ""
        try:
            samples = read_source(f"{folder}/t.csv", SourceOptions(**options))
        except InputError as error:
            message = str(error)
        else:
            assert 0 < len(samples.table) <= len(data)
            assert len(set(samples.table["id"].to_pylist())) == len(samples.table)
            named = [name for cell in labels_of(samples) for name in cell or []]
            assert set(named) == set(samples.label_set)
            if samples.task in ("binary", "multiclass"):
                assert all(cell is None or len(cell) == 1 for cell in labels_of(samples))
            assert not any("\n" in line for line in [*samples.notes, *samples.warnings])
        assert "\n" not in message
