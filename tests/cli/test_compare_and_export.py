"""`mmc compare` and `mmc export` as a user runs them."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def runs(trained: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs on the same store."""
    from mmc.cli import app

    folder = tmp_path_factory.mktemp("compared") / "runs"
    folder.mkdir()
    shutil.copytree(trained[1], folder / "both")
    arguments = ["train-head", str(trained[0]), str(folder / "text"), "--features", "clip/text"]
    app([*arguments, "--epochs", "2"], standalone_mode=False)
    return folder


def test_compare_shows_a_table_and_writes_it(mmc: Callable, runs: Path, tmp_path: Path):
    result = mmc("compare", runs, "--csv", tmp_path / "runs.csv")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[1].startswith("run ")
    assert {line.split()[0] for line in lines[2:4]} == {"both", "text"}
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [str(runs / line.split()[0]) for line in lines[2:4]]
    assert all(int(row["epochs"]) > 0 and float(row["rate"]) > 0 for row in rows)
    record = mmc("compare", runs / "both", runs / "text", "--json").json()
    assert [row["run"] for row in record["rows"]] == [row["run"] for row in rows]
    assert record["rows"][0]["seconds"] >= record["rows"][0]["train_seconds"]


def test_compare_on_a_store_gives_intervals(mmc: Callable, trained, runs: Path):
    result = mmc("compare", runs, "--store", trained[0], "--split", "test", "--json")
    assert result.code == 0, result.err
    found = result.json()
    assert found["measured"]["rows"] == 20
    low, high = found["rows"][1]["difference_interval"]
    assert low <= found["rows"][1]["difference"] <= high
    assert "95 % interval" in mmc("compare", runs, "--store", trained[0]).out


def test_compare_goes_on_without_a_bad_run(mmc: Callable, runs: Path, tmp_path: Path):
    mixed = mmc("compare", runs / "both", tmp_path)
    assert mixed.code == 0
    assert mixed.err.splitlines() == [f"warning: {tmp_path} holds no run; left out"]
    alone = mmc("compare", tmp_path)
    assert alone.code == 2
    assert "mmc train-head" in alone.error
    assert mmc("compare", runs, "--csv", tmp_path).code == 1
    assert list(tmp_path.iterdir()) == []


def test_export_writes_a_model_that_was_checked(mmc: Callable, runs: Path, tmp_path: Path):
    import onnxruntime

    result = mmc("export", runs / "text", "--to", "onnx", "--out", tmp_path / "head.onnx")
    assert result.code == 0, result.err
    assert "largest difference from torch" in result.out
    session = onnxruntime.InferenceSession(tmp_path / "head.onnx")
    assert [value.name for value in session.get_inputs()] == ["text"]
    copy = tmp_path / "my.run"
    shutil.copytree(runs / "text", copy)
    report = mmc("export", copy, "--to", "onnx", "--json").json()
    assert report["path"] == str(tmp_path / "my.onnx")
    assert (tmp_path / "my.onnx").read_bytes()
    assert report["max_difference"]["logits"] < 1e-4


def test_export_refuses_what_it_cannot_do(mmc: Callable, runs: Path, trained, tmp_path: Path):
    unknown = mmc("export", runs / "text", "--to", "pickle", "--out", tmp_path / "x")
    assert unknown.code == 2
    assert "onnx" in unknown.error
    no_run = mmc("export", trained[0], "--to", "onnx", "--out", tmp_path / "x")
    assert no_run.code == 2
    assert "is not a run" in no_run.error
    assert mmc("export", runs / "text", "--to", "onnx", "--out", tmp_path).code == 2
    assert list(tmp_path.iterdir()) == []


def test_export_of_a_store(mmc: Callable, runs: Path, trained, tmp_path: Path):
    import pyarrow.parquet as pq

    store = tmp_path / "my.store"
    shutil.copytree(trained[0], store)
    result = mmc("export", store, "--to", "parquet", "--run", runs / "both", "--thumbnails")
    assert result.code == 0, result.err
    assert "my.parquet: 100 samples" in result.out
    table = pq.read_table(tmp_path / "my.parquet")
    assert table["comment"].to_pylist() == ["kept"] * 100
    assert Path(table["image"].to_pylist()[0]).is_file()
    assert table["thumbnail"].to_pylist()[0]["bytes"].startswith(b"\xff\xd8")
    arrays = mmc("export", store, "--to", "npy", "--features", "clip/text", "--json").json()
    assert arrays["features"] == {"clip/text": "clip_text.npy"}
    assert (tmp_path / "my-arrays" / "clip_text.npy").is_file()


def test_options_of_a_store_do_not_go_with_onnx(mmc: Callable, runs: Path):
    result = mmc("export", runs / "text", "--to", "onnx", "--split", "test")
    assert result.code == 2
    assert "--split is for --to parquet and npy" in result.error
