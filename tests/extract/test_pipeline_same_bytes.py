"""Interrupted, killed, grown or spread over other threads: an extraction ends in the same bytes."""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from counting_backbone import CALLS
from pipeline_case import SPEC, Case

from mmc.extract.engines import Engine
from mmc.store import EmbeddingStore, files, verify
from mmc.store.errors import MmcError


@pytest.fixture
def case(tmp_path) -> Case:
    """50 samples in four shards, with repeated pictures and texts within and across shards."""
    case = Case(tmp_path)
    case.add(13)
    case.add(2, image="s3.png", text="said twice")
    case.add(20)
    case.add(2, image="s3.png", text="said twice")
    case.add(13)
    (tmp_path / "s21.png").write_bytes(b"no picture")
    return case


def test_any_number_of_workers(case):
    case.extract("one", workers=1)
    case.extract("five", workers=5)
    assert case.files("one") == case.files("five")


def test_decoding_ahead_of_a_device(case, monkeypatch):
    case.extract("fused")
    # What runs on a GPU: a pool that decodes, one thread that encodes.
    monkeypatch.setattr(Engine, "_encode_here", Engine._encode_on_device)
    case.extract("ahead", workers=1)
    assert case.files("ahead") == case.files("fused")


@pytest.mark.parametrize("rows", [1, 9, 30, 70])
def test_ctrl_c_keeps_what_is_done_and_the_next_run_goes_on(case, rows):
    case.extract("whole")
    total = {"image rows": CALLS["image rows"], "text rows": CALLS["text rows"]}

    def interrupt(stage, done, count):
        if stage != "files" and done + 50 * (stage == "texts") >= rows:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        case.extract(backbones=(f"{SPEC}[delay=0.05]",), workers=1, progress=interrupt)
    assert any("same command" in line for line in case.said)
    assert verify(EmbeddingStore.open(case.folder / "store")) == []
    case.extract()
    again = {name: CALLS[name] for name in total}
    assert all(again[name] <= total[name] for name in total)
    assert again != total
    assert case.files() == case.files("whole")


def test_kill_minus_nine(case):
    case.extract("whole")
    case.write()
    settings = {"source": str(case.table), "store": str(case.folder / "store")}
    code = f"""
import json, sys
from pipeline_case import config
from mmc.extract.pipeline import extract
settings = json.loads({json.dumps(json.dumps(settings))})
spec = {SPEC!r} + "[delay=0.15]"
extract(settings["source"], settings["store"], config(backbones=(spec,), workers=1))
"""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, text=True
    )
    try:
        wait_for(case.folder / "store/features/fake/status_image/c.2", child)
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
    store = EmbeddingStore.open(case.folder / "store")
    assert (store.status("fake", "image")[:32] != 0).all()
    assert (store.status("fake", "text") == 0).any()
    assert verify(store) == []
    case.extract()
    assert case.files() == case.files("whole")


def wait_for(path: Path, child: subprocess.Popen) -> None:
    """Wait for the status file of a shard: the shards before it are complete then."""
    for _ in range(600):
        if path.exists():
            return
        assert child.poll() is None, "the extraction ended before it was killed"
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


@pytest.mark.parametrize("seed", range(12))
def test_any_mixture_of_repeats_shards_batches_and_stops(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    spec = SPEC if seed < 8 else "python:counting_backbone:Fused"
    case = Case(tmp_path)
    case.add(2)
    for _ in range(draw.randint(1, 30)):
        repeated = {
            "image": draw.choice(["", "p0.png", "p1.png", "p2.png"]),
            "text": draw.choice(["", "x", "hello " * 3]),
        }
        case.add(1, **{name: value for name, value in repeated.items() if draw.random() < 0.5})
    (tmp_path / "p1.png").write_bytes(b"no picture")
    settings = {
        "backbones": (spec,),
        "shard_rows": draw.choice([1, 2, 4, 16]),
        "batch_size": draw.randint(1, 5),
    }
    case.extract("whole", workers=1, **settings)
    if seed % 2:
        monkeypatch.setattr(Engine, "_encode_here", Engine._encode_on_device)
    calls = []

    def interrupt(stage, done, count):
        calls.append(stage)
        if stage != "files" and len(calls) > draw.randint(0, 20):
            raise KeyboardInterrupt

    slow = settings | {"backbones": (f"{spec}[delay=0.005]",)}
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            case.extract(workers=3, progress=interrupt, **slow)
    # A last change, so that the last run writes and leaves its own spec in the record.
    case.add(1)
    case.extract(workers=draw.randint(1, 4), **settings)
    case.extract("whole", workers=1, **settings)
    assert case.files() == case.files("whole")
    store = EmbeddingStore.open(tmp_path / "store")
    values = store["fake/image"].take(range(len(store)), missing="fill")
    first = {}
    for row, sample in enumerate(case.rows):
        same = first.setdefault(sample["image"], row)
        np.testing.assert_array_equal(values[row], values[same])
        assert np.isnan(values[row]).any() == (sample["image"] in ("", "p1.png"))


def test_growing_in_steps(case):
    rows = case.rows
    case.extract("whole")
    for end in (7, 16, 33, len(rows)):
        case.rows = rows[:end]
        case.extract()
    assert case.files() == case.files("whole")


def test_a_long_shard_is_committed_now_and_then(case, monkeypatch):
    case.extract("whole", shard_rows=64)
    monkeypatch.setattr("mmc.extract.engines.FLUSH_SECONDS", 0.0)
    commits = []
    from mmc.store import Writer

    commit = Writer.commit
    monkeypatch.setattr(
        Writer, "commit", lambda self, *args, **kw: commits.append(1) or commit(self, *args, **kw)
    )
    slow = (f"{SPEC}[delay=0.05]",)
    case.extract(backbones=slow, shard_rows=64, workers=1)
    assert len(commits) > 3
    ours, whole = case.files(), case.files("whole")
    assert {name: data for name, data in ours.items() if name != "fake/zarr.json"} == {
        name: data for name, data in whole.items() if name != "fake/zarr.json"
    }


def test_a_full_disk_is_an_error_and_harms_nothing(case, monkeypatch):
    case.extract("whole")
    write, room = files.write_temporary, [12]

    def full(path, fill):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, fill)

    monkeypatch.setattr(files, "write_temporary", full)
    with pytest.raises(MmcError, match=r"(?i)no space|full") as caught:
        case.extract()
    assert caught.value.exit_code == 1
    room[0] = 10**9
    assert verify(EmbeddingStore.open(case.folder / "store")) == []
    case.extract()
    assert case.files() == case.files("whole")
