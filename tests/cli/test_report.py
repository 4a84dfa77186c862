"""`mmc report` as a user runs it."""

import shutil
from collections.abc import Callable
from pathlib import Path


def test_report_finds_its_store_and_shows_pictures(mmc: Callable, trained, tmp_path: Path):
    _, run = trained
    result = mmc("report", run, "--out", tmp_path / "deep" / "r.html")
    assert result.code == 0, result.err
    assert "20 samples of test, 95 % interval" in result.out
    text = (tmp_path / "deep" / "r.html").read_text(encoding="utf-8")
    assert text.count("data:image/jpeg;base64,") > 10
    assert "mmc train-head" in text


def test_report_takes_another_store_and_split(mmc: Callable, trained, tmp_path: Path):
    store, run = trained
    shutil.copytree(store, tmp_path / "copy")
    arguments = ("report", run, "--store", tmp_path / "copy", "--out", tmp_path / "r.html")
    found = mmc(*arguments, "--split", "all", "--json").json()
    assert (found["split"], found["samples"]) == ("all splits", 100)
    assert found["bytes"] == (tmp_path / "r.html").stat().st_size


def test_report_says_what_is_wrong(mmc: Callable, trained, tmp_path: Path):
    store, run = trained
    assert mmc("report", run).code == 2
    missing = mmc("report", run, "--store", tmp_path / "none", "--out", tmp_path / "r.html")
    assert missing.code == 2
    assert "none" in missing.error
    assert mmc("report", store, "--out", tmp_path / "r.html").code == 2
    assert mmc("report", run, "--out", tmp_path).code == 2
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    below = mmc("report", run, "--out", tmp_path / "file" / "r.html")
    assert below.code == 1
    assert "cannot write" in below.error
    assert "measuring" not in below.err
