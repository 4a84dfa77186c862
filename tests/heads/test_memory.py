"""How much memory a training's data is given, and that it keeps to it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmc.heads import memory
from mmc.heads.memory import Needs, Plan
from mmc.heads.models.linear import Linear, LinearConfig
from mmc.heads.streaming import StreamedData
from mmc.store import EmbeddingStore, FieldSpec
from mmc.store.errors import InputError

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"), [("8G", 8 << 30), ("1.5 MB", 3 << 19), ("7", 7), ("2kib", 2048)]
)
def test_sizes(text, size):
    assert memory.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "8X", "0", "8 G B"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="8G"):
        memory.parse_size(text)


def test_some_memory_is_allowed_without_a_word():
    assert memory.allowed(CPU) > 0


sizes = st.integers(1, 1 << 20)
needs = st.builds(
    Needs,
    train_rows=st.integers(0, 1 << 20),
    val_rows=st.integers(0, 1 << 16),
    batch_size=st.integers(1, 1 << 16),
    stored=sizes,
    prepared=sizes,
    val_prepared=sizes,
    target=sizes,
    labels=st.integers(0, 1 << 30),
    score=sizes,
    tile=st.integers(1, 1 << 26),
    processes=st.integers(1, 4),
)


@given(needs, st.integers(0, 40).flatmap(lambda power: st.integers(1, 2 << power)))
def test_everything_planned_is_within_the_budget_or_nothing_could_be(need: Needs, budget: int):
    place = memory.plan(need, budget)
    assert place.bytes == sum(place.parts.values())
    if place.fits:
        assert place.bytes <= budget
        assert memory.check(place) is place
    else:
        with pytest.raises(InputError, match="--max-memory"):
            memory.check(place)
        # What it says is true.
        assert memory.plan(need, place.bytes).fits
    if place.resident <= budget:
        assert not place.streamed
    if place.window_rows:
        assert min(need.batch_size, need.train_rows) <= place.window_rows <= need.train_rows


NEEDS = Needs(
    train_rows=100_000,
    val_rows=1_000,
    batch_size=1_000,
    stored=2_000,
    prepared=4_000,
    val_prepared=4_000,
    target=100,
    labels=10 * MIB,
    score=100,
    tile=MIB,
)


def test_more_memory_gives_larger_windows_and_more_batches():
    places = [memory.plan(NEEDS, size * MIB) for size in (16, 40, 80, 160, 320, 640)]
    assert [place.fits for place in places] == [False, *[True] * 5]
    rows = [place.window_rows for place in places[1:]]
    assert rows == [*sorted(rows[:-1]), 0]
    assert [place.buffers for place in places[2:-1]] == [3, 3, 3]


def test_rows_that_fit_as_they_are_stored_are_read_once():
    """Twice as large when prepared."""
    place = memory.plan(NEEDS, 280 * MIB)
    assert place.resident > 280 * MIB
    assert place.window_rows == NEEDS.train_rows


def test_a_head_that_trains_nothing_needs_room_for_validation_rows_alone():
    need = replace(NEEDS, train_rows=0, val_rows=5_000, labels=0)
    place = memory.plan(need, 40 * MIB)
    assert place.fits
    assert not place.val_streamed
    small = memory.plan(need, 15 * MIB)
    assert small.fits
    assert small.val_streamed
    assert not small.window_rows


def make_store(folder: Path, rows: int, width: int) -> EmbeddingStore:
    random = np.random.default_rng(0)
    table = pa.table(
        {
            "id": [str(row) for row in range(rows)],
            "labels": pa.array([[row % 7] for row in range(rows)], pa.list_(pa.int32())),
            "split": ["val" if row % 10 == 0 else "train" for row in range(rows)],
        }
    )
    names = tuple("abcdefg")
    store = EmbeddingStore.create(
        folder, table, label_set=names, task="multilabel", source={"spec": "x"}
    )
    field = FieldSpec(name="image", shape=(width,), dtype="float16", tower="image")
    with store.writer("a", [field], {}, {}) as writer:
        for shard in range(writer.num_shards):
            start, stop = writer.bounds(shard)
            values = random.random((stop - start, width), "float32").astype("float16")
            writer.commit(shard, "image", np.arange(start, stop), {"image": values})
    return EmbeddingStore.open(folder)


def test_windows_and_batches_take_what_is_planned(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "LEAST_BLOCK", 1000)
    store = make_store(tmp_path / "store", 2000, 16)
    need = Needs(
        train_rows=2000,
        val_rows=0,
        batch_size=50,
        stored=32,
        prepared=64,
        val_prepared=64,
        target=28,
        labels=0,
        score=28,
        tile=1024,
    )
    place = memory.plan(need, 80_000)
    assert place.fits
    assert 50 <= place.window_rows < 2000
    data = StreamedData(
        store,
        {"image": "a/image"},
        np.arange(2000),
        torch.zeros(2000, 7, dtype=torch.int8),
        Linear({"image": (16,)}, 7, LinearConfig()),
        device=CPU,
        dtype=torch.float32,
        window_rows=place.window_rows,
        buffers=place.buffers,
        block_bytes=place.block,
        tile_bytes=place.tile,
    )
    source = data.batches(50, seed=0)
    assert sum(len(y) for _, y in source.epoch(0, 0)) == 2000
    windows = [values for window in source._windows for values in window.fields.values()]
    batches = [values for one in source._buffers for values in (*one.inputs.values(), one.targets)]
    assert len(windows) == 2
    assert sum(values.nbytes for values in windows) <= place.parts["training rows"]
    assert sum(values.nbytes for values in batches) == place.parts["batches"]


PEAK = """
import json, sys, threading
from pathlib import Path
from mmc.heads.options import TrainConfig
from mmc.heads.trainer import train
from mmc.store import EmbeddingStore

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) << 10

small, large, out, limit = sys.argv[1:]
train(EmbeddingStore.open(small), out + "/small", TrainConfig(epochs=1, device="cpu"))
before = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
said = []
config = TrainConfig(epochs=2, device="cpu", max_memory=limit)
train(EmbeddingStore.open(large), out + "/large", config, report=said.append)
done.set()
thread.join()
print(json.dumps({"grown": peak - before, "said": said}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_training_takes_no_more_memory_than_it_is_allowed(tmp_path):
    """The process grows by the limit, and by what any training takes, whatever its data.

    Much of that (code, buffers of libraries) it has taken before, for a training on a small store;
    tables of samples are read anew.
    """
    make_store(tmp_path / "small", 500, 1024)
    make_store(tmp_path / "large", 60_000, 1024)  # 117 MiB
    script = tmp_path / "peak.py"
    script.write_text(PEAK, encoding="utf-8")
    places = [str(tmp_path / name) for name in ("small", "large", "runs")]
    ended = subprocess.run(
        [sys.executable, str(script), *places, "40M"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert any("it is streamed" in line for line in found["said"])
    assert found["grown"] < 1.1 * 40 * MIB + 32 * MIB, found["grown"] / MIB


def test_the_line_on_what_is_streamed():
    place = memory.plan(NEEDS, 80 * MIB)
    assert memory.describe(place) == (
        f"the data needs {memory.shown(place.resident)} and may take 80.0 MiB (--max-memory): it "
        f"is streamed, {place.window_rows:,} rows shuffled at a time"
    )
    least = memory.describe(memory.plan(NEEDS, MIB))
    assert least.endswith("all the same")
    assert isinstance(place, Plan)
