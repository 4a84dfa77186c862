"""Training on more than fits into memory."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmc.heads import batches as batches_module
from mmc.heads import memory
from mmc.heads.batches import ResidentData, load_prepared
from mmc.heads.models.ensemble import Ensemble
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
    monkeypatch.setattr(memory, "LEAST_BLOCK", 100)
    monkeypatch.setitem(batches_module.TILE_BYTES, "cpu", 2 * 4 * 16)


HEAD = Linear({"image": (8,), "text": (8,)}, 5, LinearConfig(normalize="l2"))


def train_rows(store):
    return store.rows(split="train", features=list(FEATURES.values()))


def stream(store, window_rows: int, **settings) -> StreamedData:
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
        **settings,
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


def test_a_window_that_holds_everything_is_read_once(make_store: Callable, monkeypatch):
    streamed = stream(make_store(), 10_000)
    read = []
    monkeypatch.setattr(
        streamed.reader,
        "read_into",
        lambda block, out, read_into=streamed.reader.read_into: (
            read.append(block),
            read_into(block, out),
        ),
    )
    source = streamed.batches(7, seed=0)
    for epoch in range(3):
        assert sum(len(y) for _, y in source.epoch(0, epoch)) == len(streamed)
    assert sorted(read) == streamed.reader.blocks


@pytest.mark.parametrize("buffers", [1, 2, 5])
def test_the_batches_do_not_depend_on_how_many_there_are_at_a_time(make_store: Callable, buffers):
    store = make_store()
    ours = collect(stream(store, 9, buffers=buffers, tile_bytes=1), 4)
    theirs = collect(stream(store, 9), 4)
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
        TrainConfig(epochs=20, batch_size=16, max_memory="36K"),
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


def test_too_little_memory_is_an_error_that_says_how_much_it_takes(make_store: Callable, tmp_path):
    store = make_store(n=400)
    with pytest.raises(InputError, match=r"--max-memory 2\.0 KiB is too small: .* takes") as raised:
        train(store, tmp_path / "run", TrainConfig(batch_size=16, max_memory="2K"))
    least = re.search(r"takes ([\d.]+) KiB", str(raised.value))
    assert least is not None
    enough = f"{float(least[1]) + 0.05}K"  # it was rounded
    train(store, tmp_path / "run", TrainConfig(epochs=1, batch_size=16, max_memory=enough))


def test_weights_of_an_ensemble_are_fitted_on_all_validation_rows(
    make_store: Callable, tmp_path, monkeypatch
):
    """Streamed as well as in memory, and they are the same."""
    store, seen = make_store(n=400), []
    fit = Ensemble.fit_validation

    def spy(self, blocks, targets, task, metric=None):
        seen.append(len(targets))
        return fit(self, blocks, targets, task, metric)

    monkeypatch.setattr(Ensemble, "fit_validation", spy)
    plan = memory.plan
    weights = []
    for streamed in (False, True):
        monkeypatch.setattr(
            memory,
            "plan",
            lambda needs, budget, s=streamed: replace(plan(needs, budget), val_streamed=s),
        )
        config = TrainConfig(head="ensemble", epochs=5, batch_size=16)
        run = train(store, tmp_path / f"{streamed}", config).run
        weights.append(run.state["weights"])
    assert seen == [len(store.rows(split="val"))] * 2
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-4)
