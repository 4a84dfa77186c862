"""extract -> train-head -> predict, evaluate, info, verify, as a user runs them."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmc.store import EmbeddingStore


def read(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_extract_twice_does_nothing_the_second_time(mmc: Callable, dataset, backbone, tmp_path):
    args = ("extract", dataset, tmp_path / "s", "--backbone", backbone, "--name", "clip", "--json")
    first, second = mmc(*args), mmc(*args)
    assert (first.code, second.code) == (0, 0)
    assert first.json()["embedded"] == 100
    assert second.json()["embedded"] == 0
    assert second.json()["skipped"] == 100
    assert "multilabel" in first.err
    store = EmbeddingStore.open(tmp_path / "s")
    assert store.label_set == ("bright", "dark blue", "red")
    assert len(store.rows(split="train", features=["clip/image", "clip/text"])) == 60


def test_train_head_says_how_good_it_is_and_writes_the_run(mmc: Callable, trained, tmp_path):
    store, _ = trained
    result = mmc("train-head", store, tmp_path / "run", "--head", "mlp", "--set", "head.hidden=16")
    assert result.code == 0, result.err
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "head.safetensors",
        "run.json",
        "history.csv",
        "README.md",
    }
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["head_config"]["hidden"] == 16
    assert "test" in record["metrics"]
    shown = f"{record['metrics']['test']['mAP']:.4f}"
    assert shown in result.out


def test_predict_on_the_store_and_on_the_source_agree(mmc: Callable, trained, dataset, tmp_path):
    store, run = trained
    from_store = mmc("predict", run, store, "--split", "test", "--out", tmp_path / "a.csv")
    from_source = mmc("predict", run, dataset / "test.csv", "--out", tmp_path / "b.csv")
    assert from_store.code == 0, from_store.err
    assert from_source.code == 0, from_source.err
    assert read(tmp_path / "a.csv") == read(tmp_path / "b.csv")
    rows = read(tmp_path / "a.csv")
    assert len(rows) == 21
    assert [row[0] for row in rows[1:]] == [f"s{i}" for i in range(80, 100)]
    known = {"", "bright", "dark blue", "red"}
    assert {label for row in rows[1:] for label in row[1].split("|")} <= known
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv"]


def test_predict_keeps_the_embeddings_where_it_is_told(mmc: Callable, trained, dataset, tmp_path):
    _, run = trained
    args = ("predict", run, dataset / "test.csv", "--out", tmp_path / "a.csv", "--store")
    assert mmc(*args, tmp_path / "cache").code == 0
    assert len(EmbeddingStore.open(tmp_path / "cache")) == 20
    again = mmc(*args, tmp_path / "cache")
    assert again.code == 0, again.err


def test_scores_are_probabilities_and_long_form_ranks(mmc: Callable, trained, tmp_path):
    store, run = trained
    out = tmp_path / "p.csv"
    assert mmc("predict", run, store, "--split", "test", "--out", out, "--scores").code == 0
    head, *rows = read(out)
    assert head[2:] == ["score:bright", "score:dark blue", "score:red"]
    assert all(0 <= float(value) <= 1 for row in rows for value in row[2:])
    args = ("--format", "long", "--top-k", 2)
    assert mmc("predict", run, store, "--split", "test", "--out", out, *args).code == 0
    head, *rows = read(out)
    assert head == ["id", "label", "score", "rank"]
    assert [row[3] for row in rows] == ["1", "2"] * 20


def test_evaluate_gives_the_metrics_of_the_run(mmc: Callable, trained):
    store, run = trained
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    result = mmc("evaluate", run, store, "--split", "test", "--json")
    assert result.json()["mAP"] == pytest.approx(record["metrics"]["test"]["mAP"], abs=1e-9)
    table = mmc("evaluate", run, store)
    assert table.code == 0
    assert "mAP" in table.out


def test_info_shows_what_the_store_holds(mmc: Callable, trained):
    store, _ = trained
    table = mmc("info", store).out
    for word in ("clip/image", "clip/text", "float16", "train", "dark blue", "100"):
        assert word in table
    assert mmc("info", store, "--json").json()["rows"] == 100


def test_verify_finds_and_repairs_damage(mmc: Callable, trained, dataset, backbone, tmp_path):
    store = tmp_path / "copy.store"
    shutil.copytree(trained[0], store)
    assert mmc("verify", store).code == 0
    shard = store / "features/clip/image/c.0.0"
    data = bytearray(shard.read_bytes())
    data[10] ^= 0xFF
    shard.write_bytes(data)
    damaged = mmc("verify", store)
    assert damaged.code == 1
    assert str(shard.relative_to(store)) in damaged.out + damaged.err
    mmc("verify", store, "--repair")
    args = ("--backbone", backbone, "--name", "clip")
    assert mmc("extract", dataset, store, *args).code == 0
    assert mmc("verify", store).code == 0
    whole = EmbeddingStore.open(trained[0])["clip/image"][:]
    assert (EmbeddingStore.open(store)["clip/image"][:] == whole).all()


def test_a_bad_picture_is_counted_and_predicted_as_nothing(
    mmc: Callable, trained, dataset, backbone, tmp_path
):
    folder = tmp_path / "set"
    shutil.copytree(dataset, folder)
    (folder / "images" / "85.jpg").write_bytes(b"<html>not found</html>")
    args = ("--backbone", backbone, "--name", "clip")
    loose = mmc("extract", folder, tmp_path / "a", *args)
    assert loose.code == 0
    assert "s85" in loose.err
    assert mmc("extract", folder, tmp_path / "b", *args, "--strict").code == 1
    run = trained[1]
    mmc("predict", run, tmp_path / "a", "--split", "test", "--out", tmp_path / "p.csv")
    rows = dict(row[:2] for row in read(tmp_path / "p.csv")[1:])
    assert len(rows) == 20
    assert rows["s85"] == ""


def test_predict_writes_over_nothing_of_the_users(mmc: Callable, trained, dataset, tmp_path):
    folder, run = tmp_path / "set", tmp_path / "run"
    shutil.copytree(dataset, folder)
    shutil.copytree(trained[1], run)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for source, out in (
        (folder / "test.csv", folder / "test.csv"),
        (folder, folder / "train.csv"),
        (f"test={folder / 'test.csv'}", folder / "test.csv"),
        (folder / "test.csv", run / "run.json"),
        (folder / "test.csv", trained[0] / "p.csv"),
    ):
        result = mmc("predict", run, source, "--out", out)
        assert result.code == 2, result.err
        assert "--out" in result.error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_predict_does_not_relabel_a_store_of_other_sources(
    mmc: Callable, trained, dataset, tmp_path
):
    store = tmp_path / "s"
    shutil.copytree(trained[0], store)
    before = EmbeddingStore.open(store).samples
    args = ("--out", tmp_path / "p.csv", "--store", store)
    result = mmc("predict", trained[1], dataset / "test.csv", *args)
    assert result.code == 2
    assert "--store" in result.error
    assert EmbeddingStore.open(store).samples.equals(before)


def test_what_a_killed_predict_left_is_removed(mmc: Callable, trained, dataset, tmp_path):
    left = tmp_path / ".mmc-predict-old" / "store"
    left.mkdir(parents=True)
    result = mmc("predict", trained[1], dataset / "test.csv", "--out", tmp_path / "p.csv")
    assert result.code == 0, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


def test_labels_that_the_run_does_not_know_are_said(mmc: Callable, trained, dataset, tmp_path):
    table = (dataset / "test.csv").read_text(encoding="utf-8").replace("red", "rouge")
    (tmp_path / "test.csv").write_text(table, encoding="utf-8")
    args = ("--image-root", dataset / "images", "--out", tmp_path / "p.csv")
    result = mmc("predict", trained[1], tmp_path / "test.csv", *args)
    assert result.code == 0, result.err
    assert "'rouge'" in result.err


def test_a_source_that_was_moved_stays_the_same_source(mmc: Callable, dataset, backbone, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(dataset, first)
    args = (tmp_path / "s", "--backbone", backbone, "--name", "clip")
    mmc("extract", first, *args)
    first.rename(second)
    (second / "val.csv").unlink()
    moved = mmc("extract", second, *args)
    assert moved.code == 0, moved.err
    assert f"{first} is not there any more, and this source has its samples" in moved.err
    assert "20 gone from the source, 80 unchanged" in moved.err


@pytest.mark.parametrize("command", ["train-head", "predict", "extract"])
def test_a_place_that_cannot_be_written_is_one_line(
    mmc: Callable, trained, dataset, backbone, command
):
    out = "/dev/null/out"
    result = {
        "train-head": lambda: mmc("train-head", trained[0], out, "--epochs", 1),
        "predict": lambda: mmc("predict", trained[1], trained[0], "--out", out),
        "extract": lambda: mmc("extract", dataset, out, "--backbone", backbone),
    }[command]()
    assert result.code in (1, 2)
    assert "/dev/null" in result.error


def test_labels_of_any_script_on_a_terminal_of_ascii(dataset, backbone, tmp_path):
    rows = [f"x{i},{i}.jpg,na\u00efve|\u0645\u0631" for i in range(4)]
    table = tmp_path / "train.csv"
    table.write_text("\n".join(["id,image,labels", *rows]) + "\n", encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    args = ("--backbone", backbone, "--image-root", str(dataset / "images"))
    for command in (
        ("extract", str(table), str(tmp_path / "s"), *args),
        ("info", str(tmp_path / "s")),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "mmc.cli", *command],
            capture_output=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert b"na\\xefve" in done.stdout


def test_a_source_of_another_task_is_not_mixed_in(
    mmc: Callable, trained, table, dataset, backbone, tmp_path
):
    store = tmp_path / "s"
    shutil.copytree(trained[0], store)
    before = EmbeddingStore.open(store).samples
    rows = [(f"x{i}", f"{i}.jpg", "a day", "cat" if i % 2 else "dog") for i in range(6)]
    other = table("other.csv", ("id", "image", "caption", "labels"), *rows)
    args = ("--backbone", backbone, "--name", "clip", "--image-root", dataset / "images")
    result = mmc("extract", other, store, *args)
    assert result.code == 2
    assert "--task multilabel" in result.error
    assert EmbeddingStore.open(store).samples.equals(before)
    assert mmc("extract", other, store, *args, "--task", "multilabel").code == 0
    assert len(EmbeddingStore.open(store)) == 106


def test_reading_a_source_in_another_way_is_said(
    mmc: Callable, trained, dataset, backbone, tmp_path
):
    store = tmp_path / "s"
    shutil.copytree(trained[0], store)
    args = ("--backbone", backbone, "--name", "clip", "--label-separator", ";")
    result = mmc("extract", dataset, store, *args, "--task", "multiclass")
    assert result.code == 0, result.err
    assert "warning: the task was multilabel with 3 labels and is now multiclass" in result.err


def test_a_run_that_reads_texts_needs_no_images(mmc: Callable, trained, dataset, tmp_path):
    args = ("--head", "linear", "--features", "clip/text", "--epochs", 2)
    assert mmc("train-head", trained[0], tmp_path / "run", *args).code == 0
    shutil.copy(dataset / "test.csv", tmp_path / "test.csv")  # without the pictures
    result = mmc("predict", tmp_path / "run", tmp_path / "test.csv", "--out", tmp_path / "p.csv")
    assert result.code == 0, result.err
    assert len(read(tmp_path / "p.csv")) == 21
    assert mmc("predict", trained[1], tmp_path / "test.csv", "--out", tmp_path / "q.csv").code == 2


def test_new_data_beside_the_old_shares_its_image_root(mmc: Callable, dataset, backbone, tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    for name in ("train.csv", "test.csv"):
        shutil.copy(dataset / name, folder / name)
    args = ("--backbone", backbone, "--name", "clip", "--image-root", dataset / "images")
    assert mmc("extract", folder / "train.csv", tmp_path / "s", *args).code == 0
    assert mmc("train-head", tmp_path / "s", tmp_path / "r", "--epochs", 2).code == 0
    result = mmc("predict", tmp_path / "r", folder / "test.csv", "--out", tmp_path / "p.csv")
    assert result.code == 0, result.err
