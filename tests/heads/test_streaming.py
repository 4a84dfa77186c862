"""Training on more than fits into memory."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mmc.heads import batches as batches_module
from mmc.heads import memory
from mmc.heads.batches import ResidentData, load_prepared
from mmc.heads.models.linear import Linear, LinearConfig
from mmc.heads.options import TrainConfig
from mmc.heads.splits import targets as targets_of
from mmc.heads.streaming import StreamedData
from mmc.heads.trainer import train
from mmc.store.errors import DamagedStoreError, InputError

FEATURES = {"image": "clip/image", "text": "clip/text"}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(batches_module, "MIN_BLOCK_ROWS", 3)
    monkeypatch.setitem(batches_module.TILE_BYTES, "cpu", 2 * 4 * 16)


HEAD = Linear({"image": (8,), "text": (8,)}, 5, LinearConfig(normalize="l2"))


def train_rows(store):
    return store.rows(split="train", features=list(FEATURES.values()))


def stream(store, window_rows: int) -> StreamedData:
    rows = train_rows(store)
    return StreamedData(
        store,
        FEATURES,
        rows,
        targets_of(store, rows),
        HEAD,
        device=CPU,
        dtype=torch.float32,
        window_rows=window_rows,
    )


def both(store, window_rows: int) -> tuple[StreamedData, ResidentData]:
    rows = train_rows(store)
    resident = load_prepared(store, FEATURES, rows, HEAD, CPU, torch.float32)
    return stream(store, window_rows), ResidentData(
        inputs=resident, targets=targets_of(store, rows)
    )


def collect(data, batch_size: int, epoch: int = 0, reads=None) -> list[tuple]:
    return [
        ({key: value.clone() for key, value in batch.items()}, targets.clone())
        for batch, targets in data.batches(batch_size, seed=3, reads=reads).epoch(0, epoch)
    ]


def test_a_window_that_holds_everything_gives_the_resident_batches(make_store: Callable):
    streamed, resident = both(make_store(), 10_000)
    for epoch in range(2):
        ours, theirs = collect(streamed, 7, epoch), collect(resident, 7, epoch)
        assert len(ours) == len(theirs)
        for (x, y), (x0, y0) in zip(ours, theirs, strict=True):
            assert torch.equal(x["inputs"], x0["inputs"])
            assert torch.equal(y, y0)


@pytest.mark.parametrize("window_rows", [1, 5, 9, 20])
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_every_row_once_per_epoch_with_its_targets(make_store: Callable, window_rows, batch_size):
    streamed, resident = both(make_store(), window_rows)
    known = {row.numpy().tobytes(): i for i, row in enumerate(resident.inputs["inputs"])}
    assert len(known) == len(resident), "the rows must differ for this test to mean anything"
    batches = collect(streamed, batch_size, epoch=1)
    rows = [known[x.numpy().tobytes()] for batch, _ in batches for x in batch["inputs"]]
    assert sorted(rows) == list(range(len(resident)))
    assert torch.equal(torch.cat([y for _, y in batches]), resident.targets[rows].float())
    sizes = [len(y) for _, y in batches]
    assert sizes[:-1] == [min(batch_size, len(resident))] * (len(sizes) - 1)


def test_the_order_is_random_and_the_same_for_a_seed(make_store: Callable):
    streamed, resident = both(make_store(), 9)

    def order(epoch: int) -> list[float]:
        return [float(x) for b, _ in collect(streamed, 4, epoch) for x in b["inputs"][:, 0]]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != [float(x) for x in resident.inputs["inputs"][:, 0]]


def test_blocks_come_in_the_order_of_the_rows(make_store: Callable):
    streamed, resident = both(make_store(), 5)
    seen = torch.cat([block["inputs"] for block in streamed.blocks()])
    assert torch.equal(seen, resident.inputs["inputs"])


def test_windows_are_used_again(make_store: Callable):
    """Two windows at most, however many an epoch has."""
    source = stream(make_store(), 6).batches(4, seed=0)
    assert len(source.plan(0, 0)) > 3
    for epoch in range(3):
        for _ in source.epoch(0, epoch):
            assert len(source._windows) == 2


def test_an_epoch_can_be_left_early(make_store: Callable):
    source = stream(make_store(), 6).batches(4, seed=0)
    epoch = source.epoch(0, 0)
    next(epoch)
    epoch.close()
    assert sum(len(y) for _, y in source.epoch(0, 1)) == len(source.data)


def test_damage_found_while_reading_ahead_is_raised(make_store: Callable):
    store = make_store()
    shard = Path(store.path, "features/clip/text/c.1.0")
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedStoreError, match="checksum"):
        collect(stream(store, 6), 4)


def test_training_streamed_gives_a_run_as_good(make_store: Callable, tmp_path):
    store = make_store(n=400)
    said: list[str] = []
    whole = train(store, tmp_path / "whole", TrainConfig(epochs=20, batch_size=16))
    small = train(
        store,
        tmp_path / "small",
        TrainConfig(epochs=20, batch_size=16, max_memory="6K"),
        report=said.append,
    )
    assert any("streamed" in line and "--max-memory" in line for line in said)
    for split in ("val", "test"):
        assert small.metrics[split]["mAP"] == pytest.approx(whole.metrics[split]["mAP"], abs=0.1)
    covered = train(
        store, tmp_path / "again", TrainConfig(epochs=20, batch_size=16, max_memory="1G")
    )
    assert np.array_equal(
        covered.run.state["classifier.weight"], whole.run.state["classifier.weight"]
    )


@pytest.mark.parametrize(
    ("text", "size"), [("8G", 8 << 30), ("1.5 MB", 3 << 19), ("7", 7), ("2kib", 2048)]
)
def test_sizes(text, size):
    assert memory.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "8X", "0", "8 G B"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="8G"):
        memory.parse_size(text)


def test_plan_keeps_to_the_budget():
    def plan(budget: int, targets: int = 0) -> memory.Plan:
        return memory.plan(
            train=(1000, 10),
            val=(100, 20),
            targets=targets,
            budget=budget,
            batch_size=8,
            windows=2,
        )

    place = plan(12_000)
    assert (place.window_rows, place.val_rows) == (0, 100)
    place = plan(4_000)
    assert place.window_rows * 2 * 10 + place.val_rows * 20 <= 4_000
    assert 100 < place.window_rows < 1000
    assert 0 < place.val_rows < 100
    assert plan(12_000, targets=1).window_rows > 0, "targets need memory too"
    place = plan(4_000, targets=1)
    assert place.window_rows * 2 * 11 + place.val_rows * 20 + 1100 <= 4_000
    assert plan(500, targets=1).window_rows == 8
    assert memory.allowed(CPU) > 0
