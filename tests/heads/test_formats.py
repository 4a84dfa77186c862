"""Every CSV form reads back as what was predicted, with csv and with our own reader."""

import csv
import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmc.heads import formats, readback
from mmc.heads.formats import Layout, choose, write
from mmc.heads.predict import Predictions
from mmc.heads.runfiles import write_atomic
from mmc.store.errors import InputError, MmcError

MakeStore = Callable[..., Any]
AWKWARD = ("a", "b c", 'quo"ted', "com,ma", "line\nend", "ä | ö")


def predictions(ids: list[str], p: Any, chosen: Any, ok: list[bool] | None = None) -> Predictions:
    probabilities = torch.tensor(p, dtype=torch.float32)
    mask = torch.tensor(ok if ok is not None else [True] * len(ids), dtype=torch.bool)
    nan = torch.where(mask[:, None], probabilities, torch.nan)
    decisions = torch.tensor(chosen, dtype=torch.bool) & mask[:, None]
    return Predictions(pa.array(ids, pa.string()), torch.logit(nan), nan, decisions, mask)


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


THREE = predictions(
    ["x1", 'x"2', "x,3", "x4"],
    [[0.9, 0.25, 0.6], [0.1, 0.2, 0.3], [0.5, 1e-7, 1.0], [0, 0, 0]],
    [[1, 0, 1], [0, 0, 0], [1, 0, 1], [1, 1, 1]],
    [True, True, True, False],
)
LAYOUT = Layout(form="default", label_set=("a", "b", "c"), task="multilabel")


def test_default(tmp_path: Path) -> None:
    path = write([THREE], tmp_path / "out.csv", LAYOUT)
    assert path.read_bytes() == b'id,labels\nx1,a c\n"x""2",\n"x,3",a c\nx4,\n'
    assert [p.name for p in tmp_path.iterdir()] == ["out.csv"]


def test_scores_keep_every_digit(tmp_path: Path) -> None:
    path = write([THREE], tmp_path / "out.csv", replace(LAYOUT, scores=True))
    header, *rows = rows_of(path)
    assert header == ["id", "labels", "score:a", "score:b", "score:c"]
    assert rows[2] == ["x,3", "a c", "0.5", "1e-7", "1"]
    assert rows[3] == ["x4", "", "", "", ""]


def test_wide(tmp_path: Path) -> None:
    path = write([THREE], tmp_path / "out.csv", replace(LAYOUT, form="wide"))
    assert rows_of(path) == [
        ["id", "a", "b", "c"],
        ["x1", "1", "0", "1"],
        ['x"2', "0", "0", "0"],
        ["x,3", "1", "0", "1"],
        ["x4", "", "", ""],
    ]


def test_long_is_best_first_and_keeps_every_sample(tmp_path: Path) -> None:
    path = write([THREE], tmp_path / "out.csv", replace(LAYOUT, form="long"))
    assert rows_of(path) == [
        ["id", "label", "score", "rank"],
        ["x1", "a", "0.9", "1"],
        ["x1", "c", "0.6", "2"],
        ['x"2', "", "", ""],
        ["x,3", "c", "1", "1"],
        ["x,3", "a", "0.5", "2"],
        ["x4", "", "", ""],
    ]


def test_hateful_memes(tmp_path: Path) -> None:
    layout = Layout(form="hateful-memes", label_set=("0", "1"), task="binary")
    block = predictions(
        ["8291", "46971", "3"],
        [[0.7, 0.3], [0.25, 0.75], [0, 0]],
        [[1, 0], [0, 1], [0, 0]],
        [True, True, False],
    )
    path = write([block], tmp_path / "out.csv", layout)
    assert path.read_text() == "id,proba,label\n8291,0.3,0\n46971,0.75,1\n3,,\n"


def test_kaggle_takes_header_names_and_separator_of_the_source(
    tmp_path: Path, make_store: MakeStore, make_run: Callable[..., Any]
) -> None:
    columns = {"id": "ImageID", "image": "ImageID", "labels": "Labels", "text": "Caption"}
    store = make_store(
        label_set=("1", "2", "17"),
        source={"form": "kaggle", "columns": columns, "label_separator": " "},
    )
    run = make_run(store)
    # A test file has no label column; the run remembers its name.
    test_source = {"form": "kaggle", "columns": {"id": "ImageID", "labels": None}}
    layout = choose("auto", run, test_source)
    block = predictions(["7.jpg"], [[0.9, 0.1, 0.8]], [[1, 0, 1]])
    path = write([block], tmp_path / "out.csv", layout)
    assert path.read_text() == "ImageID,Labels\n7.jpg,1 17\n"


@pytest.mark.parametrize(
    ("form", "task", "source", "expected"),
    [
        ("auto", "multilabel", {"form": "kaggle"}, "kaggle"),
        ("auto", "binary", {"form": "hateful-memes"}, "hateful-memes"),
        ("auto", "multilabel", {"form": "hateful-memes"}, "default"),
        ("auto", "multiclass", {"form": "table"}, "default"),
        ("auto", "multiclass", {}, "default"),
        ("long", "binary", {"form": "kaggle"}, "long"),
    ],
)
def test_auto_follows_the_source(
    form: str,
    task: str,
    source: dict[str, Any],
    expected: str,
    make_store: MakeStore,
    make_run: Callable[..., Any],
) -> None:
    labels = {"multilabel": ("a", "b"), "multiclass": ("a", "b", "c"), "binary": ("0", "1")}[task]
    run = make_run(make_store(task, label_set=labels))
    assert choose(form, run, source).form == expected


def test_forms_that_cannot_hold_it_are_refused(
    make_store: MakeStore, make_run: Callable[..., Any]
) -> None:
    run = make_run(make_store(label_set=("a b", "c")))
    with pytest.raises(InputError, match="unknown format 'xml'; choose from auto, default"):
        choose("xml", run, {})
    with pytest.raises(InputError, match="for binary tasks; this run is multilabel"):
        choose("hateful-memes", run, {})
    with pytest.raises(InputError, match="'a b' contains the separator ' '"):
        choose("kaggle", run, {"label_separator": " "})
    with pytest.raises(InputError, match="leave --scores out"):
        choose("long", run, {}, scores=True)
    binary = make_run(make_store("binary", name="binary"))
    with pytest.raises(InputError, match="leave --top-k out"):
        choose("hateful-memes", binary, {}, top_k=2)


def test_a_separator_that_occurs_in_a_label_is_not_used(
    make_store: MakeStore, make_run: Callable[..., Any]
) -> None:
    run = make_run(make_store(label_set=("a b", "c|d")))
    assert choose("default", run, {"label_separator": " "}).separator == ";"
    assert choose("default", run, {"label_separator": "/"}).separator == "/"


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for bad in (tmp_path / "folder", tmp_path / "file" / "out.csv"):
        with pytest.raises(InputError, match="cannot write"):
            write([THREE], bad, LAYOUT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_an_error_half_way_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("old")

    def broken() -> Any:
        yield THREE
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        write(broken(), path, LAYOUT)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.csv"]


@st.composite
def cases(draw: Any) -> tuple[Layout, list[Predictions]]:
    """Any form, any labels and ids, blocks of any size, some failed."""
    task = draw(st.sampled_from(["multilabel", "multiclass", "binary"]))
    c = 2 if task == "binary" else draw(st.integers(1 if task == "multilabel" else 2, 5))
    form = draw(st.sampled_from(["default", "kaggle", "wide", "long", "hateful-memes"]))
    form = form if form != "hateful-memes" or task == "binary" else "default"
    scores = draw(st.booleans()) and form not in ("long", "hateful-memes")
    layout = Layout(form=form, label_set=AWKWARD[:c], task=task, separator="|#|", scores=scores)
    ids = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6)
    names = draw(st.lists(ids, min_size=1, max_size=12, unique=True))
    seed = draw(st.integers(0, 2**16))
    random = np.random.default_rng(seed)
    p = random.random((len(names), c)).astype(np.float32) ** 4
    chosen = p > 0.3 if task == "multilabel" else np.eye(c, dtype=bool)[p.argmax(1)]
    ok = random.random(len(names)) > 0.2
    cut = draw(st.integers(0, len(names)))
    spans = [slice(0, cut), slice(cut, None)]
    blocks = [predictions(names[s], p[s].reshape(-1, c), chosen[s], ok[s].tolist()) for s in spans]
    return layout, blocks


@given(case=cases(), cells=st.sampled_from([3, 1 << 20]))
@settings(max_examples=150, deadline=None)
def test_reading_back_gives_the_same(
    case: tuple[Layout, list[Predictions]], cells: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    layout, blocks = case
    path = tmp_path_factory.getbasetemp() / "property.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "CHUNK_CELLS", cells)
        patch.setattr(readback, "BLOCK_CELLS", cells)
        write(blocks, path, layout)
        found = list(readback.read_blocks(path, layout))
    ids = [i for block in blocks for i in block.ids.to_pylist()]
    chosen = torch.cat([block.decisions for block in blocks]).numpy()
    p = torch.cat([block.probabilities for block in blocks]).numpy()
    assert [i for block in found for i in block.ids.to_pylist()] == ids
    np.testing.assert_array_equal(np.concatenate([b.decisions for b in found]), chosen)
    assert not any(block.strange for block in found)
    if layout.scores:
        scores = np.concatenate([b.scores for b in found if b.scores is not None])
        np.testing.assert_array_equal(scores, p)
    if layout.form == "long":
        listed = np.concatenate([b.listed_scores for b in found if b.listed_scores is not None])
        assert sorted(listed) == sorted(p[chosen])
    # The standard library agrees on the shape.
    table = rows_of(path)
    assert tuple(table[0]) == layout.header
    assert {len(row) for row in table} == {len(layout.header)}
    if layout.form != "long":
        assert [row[0] for row in table[1:]] == ids


def test_a_long_file_that_spans_reader_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, c = 300, 4
    random = np.random.default_rng(0)
    p = random.random((n, c)).astype(np.float32)
    block = predictions([f"sample {i}" for i in range(n)], p, p > 0.5)
    layout = replace(LAYOUT, form="long", label_set=("a", "b", "c", "d"))
    path = write([block], tmp_path / "out.csv", layout)
    read_options = readback.pacsv.ReadOptions

    def small(**options: Any) -> Any:
        return read_options(**{**options, "block_size": 1000})

    monkeypatch.setattr(readback.pacsv, "ReadOptions", small)
    found = list(readback.read_blocks(path, layout))
    assert len(found) > 5
    assert [i for b in found for i in b.ids.to_pylist()] == block.ids.to_pylist()
    np.testing.assert_array_equal(np.concatenate([b.decisions for b in found]), p > 0.5)


def test_a_link_stays_and_a_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real.csv").write_text("before", encoding="utf-8")
    (tmp_path / "link.csv").symlink_to("real.csv")
    write([THREE], tmp_path / "link.csv", LAYOUT)
    assert (tmp_path / "link.csv").is_symlink()
    assert rows_of(tmp_path / "real.csv")[1][0] == "x1"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: it is no ordinary file"):
        write([THREE], tmp_path / "pipe", LAYOUT)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["~", "out.csv.gz"])
def test_the_file_that_was_written_is_the_one_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write([THREE], Path(name), LAYOUT)
    (block,) = readback.read_blocks(name, LAYOUT)
    assert block.ids.to_pylist() == THREE.ids.to_pylist()


def test_a_full_disk_is_named_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for attempt in (
        lambda: write([THREE], tmp_path / "out.csv", LAYOUT),
        lambda: write_atomic(tmp_path / "out.csv", b"data"),
    ):
        with pytest.raises(MmcError, match=r"cannot write .*out\.csv: No space left on device"):
            attempt()
        assert list(tmp_path.iterdir()) == []
