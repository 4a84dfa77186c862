"""Which files a SOURCE means: braces, globs, numbered pieces, and what to say of a slip."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmc.extract.sources import SourceOptions, patterns, read_source
from mmc.extract.sources.read import is_there
from mmc.extract.sources.splits import split_of_file
from mmc.store.errors import InputError


def table(path, *ids, label="a"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("id,text,label\n" + "".join(f"{name},t,{label}{name}\n" for name in ids))
    return path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("s_{000..002}.tar", ["s_000.tar", "s_001.tar", "s_002.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..6..3}", ["0", "3", "6"]),
        ("{a..c}x", ["ax", "bx", "cx"]),
        ("{a,b}{1,2}", ["a1", "a2", "b1", "b2"]),
        ("{x,y{1..2},}z", ["xz", "y1z", "y2z", "z"]),
        ("{one}", ["{one}"]),
        ("{open", ["{open"]),
        ("a}{b", ["a}{b"]),
        ("{a,{b}", ["{a,{b}"]),
    ],
)
def test_braces(pattern, names):
    assert patterns._names(pattern) == names


@given(st.text("{},.a1", max_size=12))
def test_any_braces_end(text):
    assert patterns._names(text)


def test_what_is_a_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for spec in ("a*.csv", "a?.csv", "[ab].csv", "{a,b}.csv", "~/x{0..3}"):
        assert patterns.is_pattern(spec), spec
    for spec in ("a.csv", "{a}.csv", "s3://b/*.csv", "a[.csv", "a=b.csv"):
        assert not patterns.is_pattern(spec), spec
    (tmp_path / "a[1]{x,y}*.csv").write_text("id,text\n1,x\n")
    assert not patterns.is_pattern("a[1]{x,y}*.csv")
    assert len(read_source("a[1]{x,y}*.csv").table) == 1


@pytest.mark.parametrize(
    "spec", [r"C:\data\*.csv", r"C:\data\{a,b}.csv", "D:/x[1].csv", r"\\host\share\*.tar"]
)
def test_windows_paths_are_names_of_files(spec):
    with pytest.raises(InputError, match="there is no file or folder") as caught:
        read_source(spec)
    assert "did you mean" not in str(caught.value)


def test_too_many_files():
    with pytest.raises(InputError, match="more than 100,000 files"):
        patterns.expand("/x/{0..99999999999999}.tar")


def test_tables_of_a_pattern(tmp_path):
    for at in (2, 10, 1):
        table(tmp_path / f"part-{at}.csv", f"x{at}", f"y{at}")
    samples = read_source(str(tmp_path / "part-*.csv"))
    assert samples.table["id"].to_pylist() == ["x1", "y1", "x2", "y2", "x10", "y10"]
    assert samples.source["spec"] == str(tmp_path / "part-*.csv")
    assert samples.source["counts"]["splits"] == {"train": 6}
    braces = read_source(str(tmp_path / "part-{1..2}.csv"))
    assert len(braces.table) == 4
    (tmp_path / "part-0.md").write_text("no table")
    mixed = read_source(str(tmp_path / "part-*"))
    assert mixed.table == samples.table
    assert any("files left out: part-0.md" in note for note in mixed.notes)
    # The same folder by itself, and as a split.
    assert read_source(str(tmp_path)).table == samples.table
    named = read_source(f"train={tmp_path}/part-*.csv,test={tmp_path}/part-{{1,1}}.csv".replace(
        f"test={tmp_path}/part-{{1,1}}.csv", f"test={table(tmp_path / 'z' / 'q.csv', 'q')}"
    ))  # fmt: skip
    assert named.source["counts"]["splits"] == {"test": 1, "train": 6}


def test_rows_without_ids_in_several_tables_of_one_split(tmp_path):
    for name in ("train-0.csv", "train-1.csv"):
        (tmp_path / name).write_text("text,label\nx,a\ny,b\n")
    samples = read_source(str(tmp_path))
    assert len(set(samples.table["id"].to_pylist())) == 4
    assert set(samples.table["split"].to_pylist()) == {"train"}


def test_splits_by_the_names_in_a_pattern(tmp_path):
    table(tmp_path / "train.csv", 1)
    table(tmp_path / "valid.csv", 2)
    samples = read_source(str(tmp_path / "{train,valid}.csv"))
    assert samples.table["split"].to_pylist() == ["train", "val"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.csv", "train"), ("dev.jsonl.gz", "val"), ("test-00000-of-00003.parquet", "test"),
        ("validation_7.tar", "val"), ("train-shard-3.csv", "train"), ("trainer.csv", None),
        ("train_labels.csv", None), ("7.csv", None), ("test2021.csv", "test"),
    ],
)  # fmt: skip
def test_splits_of_files(name, split):
    assert split_of_file(f"/data/{name}") == split


def test_numbered_pieces_of_splits(tmp_path):
    for at in range(3):
        table(tmp_path / f"train-0000{at}-of-00003.csv", f"t{at}")
    table(tmp_path / "test-00000-of-00001.csv", "v")
    samples = read_source(str(tmp_path))
    assert samples.table["split"].to_pylist() == ["train"] * 3 + ["test"]
    assert any("train-00000-of-00003.csv and 2 more is train" in note for note in samples.notes)
    inner = tmp_path / "hub" / "data"
    for at in range(2):
        table(inner / f"train-0000{at}-of-00002.csv", f"t{at}")
    assert len(read_source(str(tmp_path / "hub")).table) == 2
    table(tmp_path / "training.csv", "w")
    with pytest.raises(InputError, match="all for train; name the files"):
        read_source(str(tmp_path))


def test_what_is_missing_of_a_pattern(tmp_path):
    table(tmp_path / "a1.csv", 1)
    with pytest.raises(InputError, match=r"2 of the 3 files .* are not there, first .*a2\.csv"):
        read_source(str(tmp_path / "a{1..3}.csv"))
    with pytest.raises(InputError, match=rf"no file matches .*b\*.csv .looked below {tmp_path}"):
        read_source(str(tmp_path / "b*.csv"))
    (tmp_path / "c.md").write_text("x")
    with pytest.raises(InputError, match=r"no format reads .*c\.md"):
        read_source(str(tmp_path / "c.*"))


@pytest.mark.parametrize(
    ("wanted", "offered"),
    [
        ("trian.csv", "train.csv"),
        ("Train.csv", "train.csv"),
        ("train.tsv", "train.csv"),
        ("moviesgenre.csv", "movie_genre.csv"),
        ("val.csv", None),
        ("test.csv", None),
        ("all.csv", None),
        ("label.csv", None),
        ("zzz", None),
    ],
)
def test_only_names_that_are_alike_are_offered(tmp_path, wanted, offered):
    for name in ("train.csv", "movie_genre.csv", "README.md", "images.txt", ".train.csv"):
        table(tmp_path / name, 1)
    with pytest.raises(InputError) as caught:
        read_source(str(tmp_path / wanted))
    hint = str(caught.value).partition("did you mean ")[2]
    assert hint == (f"{offered}?" if offered else "")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    (tmp_path / "movies").mkdir()
    with pytest.raises(InputError, match=r"has no movie\).*did you mean movies\?"):
        read_source(str(tmp_path / "movie" / "train.csv"))


def test_whether_a_source_is_still_there(tmp_path):
    first, second = table(tmp_path / "a1.csv", 1), table(tmp_path / "a2.csv", 2)
    specs = [str(first), str(tmp_path / "a*.csv"), f"train={first},val={second}"]
    assert all(map(is_there, specs))
    first.unlink()
    assert [is_there(spec) for spec in specs] == [False, True, False]
    second.unlink()
    assert not any(map(is_there, specs))


def test_several_formats_of_one_pattern(tmp_path):
    table(tmp_path / "x1.csv", 1)
    (tmp_path / "x2.jsonl").write_text('{"id": 2, "text": "t", "label": "b"}\n')
    samples = read_source(str(tmp_path / "x*"), SourceOptions())
    assert samples.table["id"].to_pylist() == ["1", "2"]
