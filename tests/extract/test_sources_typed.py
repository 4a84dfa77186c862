"""Parquet, Arrow, saved and loaded Hugging Face data sets: types, labels, pictures in the file."""

import io
import json
import random
import threading

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmc.extract.content import Content
from mmc.extract.keys import add_keys, content_key
from mmc.extract.sources import SourceOptions, embedded, read_source, saved_dataset
from mmc.store.errors import InputError

CLASSES = ["cat", "dog|wolf", "NA"]
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": CLASSES, "_type": "ClassLabel"},
    "tags": {"feature": {"names": ["p", "q"], "_type": "ClassLabel"}, "_type": "List"},
    "n": {"dtype": "int64", "_type": "Value"},
}


def picture(number: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4 + number, 3), (number % 256, 0, 0)).save(data, "PNG")
    return data.getvalue()


def table(rows=6, *, start=0, described=True, path=None) -> pa.Table:
    """Pictures as structs, a class label (-1 = none), a list of them, and a number."""
    numbers = range(start, start + rows)
    images = [{"bytes": picture(n), "path": path} for n in numbers]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    result = pa.table(
        {
            "image": pa.array(images, kind),
            "label": pa.array([n % 4 - 1 for n in numbers], pa.int64()),
            "tags": pa.array([[0, 1][: n % 3] for n in numbers], pa.list_(pa.int64())),
            "n": pa.array(list(numbers), pa.int64()),
        }
    )
    if described:
        told = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
        result = result.replace_schema_metadata(told)
    return result


def write(path, data, **options):
    """By suffix: .parquet, .feather (an Arrow file), .arrow (a stream)."""
    if path.suffix == ".parquet":
        pq.write_table(data, path, **options)
    elif path.suffix == ".feather":
        feather.write_feather(data, path, **{"compression": "uncompressed", **options})
    else:
        ipc = pa.ipc.IpcWriteOptions(**options)
        with (
            pa.OSFile(str(path), "wb") as sink,
            pa.ipc.new_stream(sink, data.schema, options=ipc) as writer,
        ):
            writer.write_table(data, max_chunksize=4)
    return str(path)


def named(samples):
    return [
        None if cell is None else [samples.label_set[at] for at in cell]
        for cell in samples.table["labels"].to_pylist()
    ]


def contents(samples) -> list[bytes]:
    """The pictures, as the pipeline reads them; keys must agree."""
    keyed = add_keys(samples, None, workers=2)
    keyed = keyed.append_column("_source", pa.array([0] * len(keyed), pa.int16()))
    content = Content(keyed, [samples.source])
    result = [content.image_bytes(row) for row in range(len(keyed))]
    assert keyed["image_key"].to_pylist() == [content_key(data) for data in result]
    return result


@pytest.mark.parametrize("name", ["t.parquet", "t.feather", "t.arrow"])
def test_class_labels_types_and_pictures(tmp_path, name):
    samples = read_source(write(tmp_path / name, table()))
    assert samples.label_set == tuple(CLASSES)
    assert samples.task == "multiclass"
    assert named(samples) == [None, ["cat"], ["dog|wolf"], ["NA"], None, ["cat"]]
    assert samples.table["n"].type == pa.int64()
    assert samples.table["tags"].to_pylist()[:3] == [[], ["p"], ["p", "q"]]
    assert samples.table["id"].to_pylist()[:2] == [f"{name}#0", f"{name}#1"]
    assert contents(samples) == [picture(n) for n in range(6)]
    assert samples.source["counts"]["images"] == 6
    assert samples.source["counts"]["missing_images"] == 0


@pytest.mark.parametrize("name", ["t.parquet", "t.feather", "t.arrow"])
def test_lists_of_class_labels_and_tables_that_tell_nothing(tmp_path, name):
    spec = write(tmp_path / name, table())
    samples = read_source(spec, SourceOptions(label_column="tags"))
    assert samples.task == "multilabel"
    assert named(samples)[:3] == [[], ["p"], ["p", "q"]]
    samples = read_source(write(tmp_path / name, table(described=False)))
    assert samples.label_set == ("-1", "0", "1", "2")
    assert contents(samples)[1] == picture(1)


def test_an_uncompressed_arrow_file_gives_offsets_and_others_rows(tmp_path):
    plain = read_source(write(tmp_path / "t.arrow", table())).table
    assert plain["image"].to_pylist()[0] == "t.arrow"
    assert plain["size"].to_pylist() == [len(picture(n)) for n in range(6)]
    data = (tmp_path / "t.arrow").read_bytes()
    offset = plain["image_offset"][2].as_py()
    assert data[offset : offset + len(picture(2))] == picture(2)
    packed = write(tmp_path / "t.feather", table(), compression="zstd", chunksize=4)
    samples = read_source(packed)
    assert samples.table["image"].to_pylist()[0] == "t.feather#image"
    assert samples.table["image_offset"].to_pylist() == list(range(6))
    assert contents(samples) == [picture(n) for n in range(6)]
    with pytest.raises(InputError, match="is a compressed Arrow stream"):
        read_source(write(tmp_path / "z.arrow", table(), compression="zstd"))


def test_plain_bytes_are_pictures_where_they_look_like_it(tmp_path):
    data = pa.table(
        {
            "jpg": pa.array([picture(0), None, picture(2)], pa.large_binary()),
            "vector": pa.array([b"\x00" * 8] * 3, pa.binary()),
            "caption": ["a", "b", "c"],
            "class": ["x", "y", "x"],
        }
    )
    for name in ("t.parquet", "t.feather", "t.arrow"):
        samples = read_source(write(tmp_path / name, data))
        assert samples.table["image"].null_count == 1
        assert samples.table["text"].to_pylist() == ["a", "b", "c"]
        assert "vector" not in samples.table.column_names
        assert any("columns of bytes left out: vector" in note for note in samples.notes)
        keyed = add_keys(samples, None, workers=1)["image_key"].to_pylist()
        assert keyed == [content_key(picture(0)), None, content_key(picture(2))]


def test_pictures_as_paths_and_both_in_one_column(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(picture(9))
    rows = [{"bytes": None, "path": "a.png"}, {"bytes": picture(1), "path": "x.png"}, None]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    data = pa.table(
        {"image": pa.array(rows[:1] * 3, kind), "label": [0, 1, 0], "text": list("abc")}
    )
    data = data.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    )
    for name in ("t.parquet", "t.arrow"):
        samples = read_source(write(tmp_path / name, data))
        assert samples.table["image"].to_pylist() == ["a.png"] * 3
        assert contents(samples) == [picture(9)] * 3
        paths = pa.table({"image": ["a.png", "../up.png"], "text": ["a", "b"]})
        with pytest.raises(InputError, match=rf"{name}:2: image path '../up.png' leaves"):
            read_source(write(tmp_path / name, paths))
    mixed = data.set_column(0, "image", pa.array(rows, kind))
    samples = read_source(write(tmp_path / "m.parquet", mixed), SourceOptions(image_root=None))
    assert samples.table["image"].to_pylist() == ["a.png", "m.parquet#image", None]


def test_shards_and_splits_by_file_name(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", table(4))
    write(tmp_path / "train-00001-of-00002.parquet", table(4, start=4))
    write(tmp_path / "validation-00000-of-00001.parquet", table(2, start=8))
    samples = read_source(str(tmp_path))
    assert samples.table["split"].to_pylist() == ["train"] * 8 + ["val"] * 2
    assert contents(samples) == [picture(n) for n in range(10)]
    assert samples.label_set == tuple(CLASSES)
    assert samples.table["n"].to_pylist() == list(range(10))


def test_carried_columns_of_different_types(tmp_path):
    base = {"text": ["a", "b"], "label": ["x", "y"]}
    one = {**base, "n": [1, 2], "m": [1, 2], "empty": [None, None], "only": [True, False]}
    two = {**base, "n": [0.5, None], "m": ["p", "q"], "empty": ["e", None]}
    write(tmp_path / "train.parquet", pa.table(one))
    write(tmp_path / "test.parquet", pa.table(two))
    columns = read_source(str(tmp_path)).table
    assert columns["n"].to_pylist() == [1.0, 2.0, 0.5, None]
    assert columns["m"].to_pylist() == ["1", "2", "p", "q"]
    assert columns["empty"].to_pylist() == [None, None, "e", None]
    assert columns["only"].to_pylist() == [True, False, None, None]


@pytest.mark.parametrize(
    ("values", "expected", "task"),
    [
        ([["a, b", "c"], ["c"], []], [["a, b", "c"], ["c"], []], "multilabel"),
        ([1.0, 0.0, None], [["1"], ["0"], None], "binary"),
        ([True, False, True], [["true"], ["false"], ["true"]], "binary"),
        (["a|b", "b", None], [["a", "b"], ["b"], None], "multilabel"),
        ([[1, 2], [2], None], [["1", "2"], ["2"], None], "multilabel"),
    ],
)
def test_labels_of_any_type(tmp_path, values, expected, task):
    data = pa.table({"text": ["a", "b", "c"], "label": values})
    for name in ("t.parquet", "t.feather"):
        samples = read_source(write(tmp_path / name, data))
        assert (named(samples), samples.task) == (expected, task)
    words = pa.table({"text": ["a", "b"], "label": pa.array(["x", "y"]).dictionary_encode()})
    assert named(read_source(write(tmp_path / "d.parquet", words))) == [["x"], ["y"]]


def test_templates_and_texts_of_other_types(tmp_path):
    data = pa.table({"year": [1990, None], "captions": [["a b", "c"], ["d"]], "id": [7, 8]})
    spec = write(tmp_path / "t.parquet", data)
    samples = read_source(spec, SourceOptions(text_template="{year}: x"))
    assert samples.table["text"].to_pylist() == ["1990: x", None]
    assert samples.table["id"].to_pylist() == ["7", "8"]
    samples = read_source(spec)
    assert samples.table["text"].to_pylist() == ["a b c", "d"]
    assert any("joined by spaces" in note for note in samples.notes)


def test_columns_are_named_as_for_other_tables(tmp_path):
    spec = write(tmp_path / "t.parquet", pa.table({"text": ["a"], "label": ["x"]}))
    with pytest.raises(InputError, match=r"t\.parquet has no column 'genre' \(--label-column\)"):
        read_source(spec, SourceOptions(label_column="genre"))
    assert read_source(spec, SourceOptions(label_column="-")).task == "unlabelled"


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.feather"])
def test_files_that_are_none(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match=r"cannot read .* as (Parquet|Arrow)") as error:
        read_source(str(path))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="has no rows"):
        read_source(write(path, table(0)))


def test_a_class_number_without_a_name(tmp_path):
    data = table(2).set_column(1, "label", pa.array([0, 3]))
    with pytest.raises(InputError, match="label has a label number that none of its 3 names has"):
        read_source(write(tmp_path / "t.parquet", data))


@pytest.mark.parametrize("name", ["t.parquet", "t.feather", "t.arrow"])
def test_pictures_alone_and_late_ones(tmp_path, name):
    samples = read_source(write(tmp_path / name, table(3).select(["image"])))
    assert contents(samples) == [picture(n) for n in range(3)]
    assert samples.task == "unlabelled"
    late = pa.table(
        {"image": pa.array([None] * 40 + [picture(1)], pa.binary()), "text": ["a"] * 41}
    )
    samples = read_source(write(tmp_path / name, late))
    assert samples.table["image"].null_count == 40


@pytest.mark.parametrize("name", ["t.parquet", "t.feather", "t.arrow"])
def test_columns_of_the_users_own_that_are_named_like_ours(tmp_path, name):
    own = {"size": [7, 8], "image_offset": [9, 10], "label": ["x", "y"]}
    columns = read_source(write(tmp_path / name, pa.table({"text": ["a", "b"], **own}))).table
    assert columns["user.size"].to_pylist() == [7, 8]
    assert columns["user.image_offset"].to_pylist() == [9, 10]
    assert columns["image_offset"].null_count == 2
    assert "size" not in columns.column_names
    pictures = pa.array([picture(0), picture(1)], pa.binary())
    samples = read_source(write(tmp_path / name, pa.table({"image": pictures, **own})))
    assert samples.table["user.size"].to_pylist() == [7, 8]
    assert contents(samples) == [picture(0), picture(1)]


def test_a_table_may_say_where_its_pictures_lie(tmp_path):
    """As a store's table of samples does, and what `mmc caption` writes."""
    samples = read_source(write(tmp_path / "a.feather", table(3)))
    columns = ["id", "image", "image_offset", "size"]
    again = read_source(write(tmp_path / "b.parquet", samples.table.select(columns)))
    assert contents(again) == contents(samples)
    samples = read_source(write(tmp_path / "c.parquet", table(3)))
    again = read_source(write(tmp_path / "d.parquet", samples.table.select(columns)))
    assert contents(again) == [picture(n) for n in range(3)]


def test_types_that_only_some_readers_know(tmp_path):
    data = pa.table(
        {
            "text": pa.array(["a", "b"], pa.string_view()),
            "label": pa.array(["x", "y"]).dictionary_encode(),
            "kind": pa.array(["p", "q"]).dictionary_encode(),
            "ext": pa.ExtensionArray.from_storage(
                pa.opaque(pa.int64(), "t", "v"), pa.array([1, 2])
            ),
        }
    )
    samples = read_source(write(tmp_path / "t.feather", data))
    assert samples.table["text"].to_pylist() == ["a", "b"]
    assert named(samples) == [["x"], ["y"]]
    assert samples.table["kind"].type == pa.string()
    assert samples.table["ext"].type == pa.int64()


@pytest.mark.parametrize("name", ["t.parquet", "t.feather"])
def test_rows_are_read_at_random_by_threads(tmp_path, name, monkeypatch):
    """Whatever the order and the threads, with blocks of a few rows and few of them kept."""
    monkeypatch.setattr(embedded, "_BLOCK_BYTES", 400)
    monkeypatch.setattr(embedded, "_KEPT_BYTES", 1200)
    options = {"row_group_size": 25} if name.endswith("parquet") else {"chunksize": 25}
    write(tmp_path / name, table(80), **options, compression="zstd")
    faults = []

    def look(seed: int) -> None:
        rows = list(range(80)) * 2
        random.Random(seed).shuffle(rows)
        for row in rows:
            if embedded.read_picture(tmp_path / name, "image", row) != picture(row):
                faults.append(row)

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_rows_that_are_not_there(tmp_path):
    path = tmp_path / "t.parquet"
    write(path, table(3))
    for column, row in (("image", 3), ("image", -1), ("absent", 0)):
        with pytest.raises(OSError, match=r"cannot read row"):
            embedded.read_picture(path, column, row)
    with pytest.raises(FileNotFoundError):
        embedded.read_picture(tmp_path / "none.parquet", "image", 0)
    write(path, table(3, start=5))
    assert embedded.read_picture(path, "image", 0) == picture(5)  # another file by now


def test_memory_stays_small_over_a_long_row_group(tmp_path):
    rng = np.random.default_rng(0)
    rows = [b"\x89PNG" + rng.bytes(200_000) for _ in range(300)]
    data = pa.table({"image": pa.array(rows, pa.binary()), "label": ["x", "y"] * 150})
    pq.write_table(data, tmp_path / "t.parquet", row_group_size=300)
    del data
    for row in range(300):
        assert embedded.read_picture(tmp_path / "t.parquet", "image", row) == rows[row]
    kept = [
        array for (file, *_), (array, _) in embedded._kept._blocks.items() if "t.par" in file[0]
    ]
    assert sum(array.nbytes for array in kept) < 10_000_000  # what was read is let go


def test_a_row_group_is_decoded_once_by_threads_that_are_near(tmp_path, monkeypatch):
    """And by as many cursors as it takes where they are further apart than what may be kept."""
    monkeypatch.setattr(embedded, "_BLOCK_BYTES", 400)
    write(tmp_path / "t.parquet", table(120))
    decoded = []
    blocks = embedded._Parquet.blocks

    def watched(self, part, column):
        for block in blocks(self, part, column):
            decoded.append(len(block))
            yield block

    monkeypatch.setattr(embedded._Parquet, "blocks", watched)

    def read(order):
        decoded.clear()
        for row in order:
            assert embedded.read_picture(tmp_path / "t.parquet", "image", row) == picture(row)
        return sum(decoded)

    apart = [start + step for step in range(30) for start in (0, 30, 60, 90)]
    assert read(range(120)) == 120
    assert read(apart) == 120
    monkeypatch.setattr(embedded, "_KEPT_BYTES", 1600)
    monkeypatch.setattr(embedded, "_NEAR", 2)
    assert read(range(120)) == 120
    # Four ways from the start, some blocks of them twice; one way for all would be 1,700 and more.
    assert read(apart) < 700


def test_images_of_tables_are_told_from_files():
    assert embedded.table_of("a/b.parquet#image") == ("a/b.parquet", "image")
    assert embedded.table_of("a#b.jpg") == ("a#b.jpg", None)
    assert embedded.table_of("x.parquet") == ("x.parquet", None)
    assert embedded.table_of(embedded.inside("d.v2.arrow", "my col")) == ("d.v2.arrow", "my col")


def save(folder, parts, features=FEATURES):
    """What `save_to_disk` writes, by hand; ``parts``: {split or None: tables}."""
    for split, tables in parts.items():
        part = folder / split if split else folder
        part.mkdir(parents=True)
        names = [f"data-{n:05}-of-{len(tables):05}.arrow" for n in range(len(tables))]
        for name, data in zip(names, tables, strict=True):
            write(part / name, data)
        state = {"_data_files": [{"filename": name} for name in names], "_split": None}
        (part / "state.json").write_text(json.dumps(state), encoding="utf-8")
        (part / "dataset_info.json").write_text(json.dumps({"features": features}))
    if None not in parts:
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(parts)}))
    return str(folder)


def test_a_saved_data_set_is_read_without_the_library(tmp_path):
    parts = {
        "train": [table(5, described=False), table(4, start=5, described=False)],
        "validation": [table(3, start=9, described=False)],
    }
    spec = save(tmp_path / "saved", parts)
    samples = read_source(spec)
    assert samples.source["format"] == "hf-saved"
    assert samples.label_set == tuple(CLASSES)
    assert samples.table["split"].to_pylist() == ["train"] * 9 + ["val"] * 3
    assert samples.table["id"].to_pylist()[5] == "train/data-00001-of-00002.arrow#0"
    assert contents(samples) == [picture(n) for n in range(12)]
    assert len(read_source(f"hf-dataset:{spec}[val]").table) == 3
    with pytest.raises(InputError, match="has no split 'dev2'; it has train, validation"):
        read_source(f"hf-dataset:{spec}[dev2]")
    single = read_source(save(tmp_path / "one", {None: [table(4)]}))
    assert single.source["counts"]["splits"] == {"train": 4}


def test_splits_that_number_their_classes_otherwise(tmp_path):
    parts = {name: [table(4, described=False)] for name in ("train", "test")}
    spec = save(tmp_path / "saved", parts)
    turned = {**FEATURES, "label": {"names": CLASSES[::-1], "_type": "ClassLabel"}}
    info = json.dumps({"features": turned})
    (tmp_path / "saved/test/dataset_info.json").write_text(info, encoding="utf-8")
    samples = read_source(spec)
    assert samples.label_set == tuple(CLASSES)
    assert named(samples) == [
        *(None, ["cat"], ["dog|wolf"], ["NA"]),
        *(None, ["NA"], ["dog|wolf"], ["cat"]),
    ]


def test_saved_data_sets_that_are_not_complete(tmp_path):
    spec = save(tmp_path / "saved", {"train": [table(2)], "test": [table(2)]})
    (tmp_path / "saved" / "test" / "state.json").unlink()
    with pytest.raises(InputError, match="test is not there or not complete"):
        read_source(spec)
    state = {"_data_files": [{"filename": "../../etc/passwd"}]}
    (tmp_path / "saved" / "test" / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"cannot read .*saved/test/passwd as Arrow"):
        read_source(spec)
    state = {"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}
    (tmp_path / "saved" / "test" / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="flatten_indices"):
        read_source(spec)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("hf-dataset:cifar10", ("cifar10", None, None)),
        ("hf-dataset:owner/name[train]", ("owner/name", None, ["train"])),
        ("hf-dataset:owner/name/config[train, test]", ("owner/name", "config", ["train", "test"])),
        ("hf-dataset:./a/b[x]", ("./a/b", None, ["x"])),
    ],
)
def test_names_of_the_hub(spec, expected):
    assert saved_dataset.parse(spec) == expected


@pytest.mark.parametrize("spec", ["hf-dataset:", "hf-dataset:a[b", "hf-dataset:a[]"])
def test_names_that_cannot_be_read(spec):
    with pytest.raises(InputError, match=r"cannot read|names no split"):
        read_source(spec)


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r"not installed; install it: pip install datasets"):
        read_source("hf-dataset:owner/name[train]")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The library, with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def test_what_the_library_saves_and_loads(tmp_path, hub):
    images = [Image.open(io.BytesIO(picture(n))) for n in range(6)]
    columns = {"image": images, "label": [0, 1, 2, -1, 0, 1], "caption": list("uvwxyz")}
    features = hub.Features(
        image=hub.Image(), label=hub.ClassLabel(names=CLASSES), caption=hub.Value("string")
    )
    data = hub.Dataset.from_dict(columns, features=features)
    hub.DatasetDict(train=data, test=data.select([4, 5])).save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "pq" / "data" / "train-00000-of-00001.parquet")
    expected = [["cat"], ["dog|wolf"], ["NA"], None, ["cat"], ["dog|wolf"]]
    saved = read_source(str(tmp_path / "saved"))
    assert named(saved) == expected + expected[4:]
    assert contents(saved) == [picture(n) for n in (0, 1, 2, 3, 4, 5, 4, 5)]
    loaded = read_source(f"hf-dataset:{tmp_path / 'pq'}[train]")
    assert named(loaded) == expected
    assert loaded.table["text"].to_pylist() == list("uvwxyz")
    assert contents(loaded) == [picture(n) for n in range(6)]
    assert named(read_source(str(tmp_path / "pq"))) == expected


def test_a_data_set_that_is_not_there(hub):
    with pytest.raises(InputError, match="cannot load hf-dataset:nobody/nothing") as error:
        read_source("hf-dataset:nobody/nothing[train]")
    assert "\n" not in str(error.value)
