"""Loading what a head reads, and cutting it into batches."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mmc.heads import batches as module
from mmc.heads.batches import (
    ResidentBatches,
    derive_seed,
    dropout_seed,
    load_prepared,
    raw_blocks,
    reading_threads,
)
from mmc.heads.models.linear import Linear, LinearConfig
from mmc.store.errors import DamagedStoreError

FEATURES = {"image": "clip/image", "text": "clip/text"}
CPU = torch.device("cpu")


@pytest.mark.parametrize("block_rows", [256, 7, 1])
def test_blocks_hold_the_rows_asked_for(make_store: Callable, monkeypatch, block_rows):
    store = make_store()
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    monkeypatch.setattr(module, "MIN_BLOCK_ROWS", block_rows)
    rows = store.rows(split="train", features=list(FEATURES.values()))
    seen = np.full((len(rows), 8), np.nan, dtype=np.float32)
    for first, batch in raw_blocks(store, FEATURES, rows, CPU):
        assert set(batch) == {"image", "text"}
        assert batch["image"].dtype == torch.float32
        seen[first : first + len(batch["image"])] = batch["image"].numpy()
    np.testing.assert_array_equal(seen, store["clip/image"].take(rows).astype(np.float32))


@pytest.mark.parametrize("tile_rows", [1, 3, 1000])
def test_prepared_inputs_are_what_the_head_prepares(make_store: Callable, monkeypatch, tile_rows):
    monkeypatch.setitem(module.TILE_BYTES, "cpu", tile_rows * 4 * 16)
    store = make_store()
    rows = store.rows(features=list(FEATURES.values()))[5:33]
    head = Linear({"image": (8,), "text": (8,)}, 5, LinearConfig(normalize="l2"))
    loaded = load_prepared(store, FEATURES, rows, head, CPU, torch.float32)
    batch = {
        role: torch.from_numpy(store[name].take(rows).astype(np.float32))
        for role, name in FEATURES.items()
    }
    assert torch.equal(loaded["inputs"], head.prepare(batch)["inputs"])
    half = load_prepared(store, FEATURES, rows, head, CPU, torch.bfloat16)
    assert half["inputs"].dtype == torch.bfloat16
    torch.testing.assert_close(half["inputs"].float(), loaded["inputs"], rtol=0.01, atol=0.01)


def test_damage_met_by_a_reading_thread_is_raised(make_store: Callable):
    store = make_store()
    shard = Path(store.path, "features/clip/text/c.1.0")
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    rows = store.rows(features=list(FEATURES.values()))
    head = Linear({"image": (8,), "text": (8,)}, 5, LinearConfig())
    with pytest.raises(DamagedStoreError, match="checksum"):
        load_prepared(store, FEATURES, rows, head, CPU, torch.float32)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_reading_threads_compute_alone_and_others_as_before():
    seen: list[int] = []
    with reading_threads() as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [2]


def test_blocks_are_whole_chunks_where_there_is_room(make_store: Callable):
    store = make_store()
    rows = np.arange(len(store))
    chunk = store["clip/image"].chunk_rows
    assert chunk > 1
    size = module.stored_bytes(store, FEATURES)
    wide = module.Reader(store, FEATURES, rows, block_bytes=size * (2 * chunk + 1))
    assert all(first % (2 * chunk) == 0 for first, _ in wide.blocks)


def make(rows: int, batch_size: int, seed: int = 0, multilabel: bool = True) -> ResidentBatches:
    x = torch.arange(rows).float()
    targets = torch.stack([x % 2, x % 3 == 0], 1).to(torch.int8) if multilabel else x.long()
    return ResidentBatches({"x": x[:, None], "y": -x}, targets, batch_size, seed=seed)


def collect(batches: ResidentBatches, stage: int = 0, epoch: int = 0) -> list[torch.Tensor]:
    return [batch["x"][:, 0].clone() for batch, _ in batches.epoch(stage, epoch)]


@pytest.mark.parametrize(("rows", "size"), [(10, 3), (10, 5), (10, 100), (1, 1), (7, 1)])
def test_every_row_once_per_epoch(rows, size):
    batches = make(rows, size)
    parts = collect(batches)
    assert len(parts) == len(batches)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(rows).float())
    assert all(len(part) == min(size, rows) for part in parts[:-1])


def test_inputs_and_targets_stay_together():
    for batch, targets in make(23, 4).epoch(0, 3):
        x = batch["x"][:, 0]
        assert torch.equal(batch["y"], -x)
        assert targets.dtype == torch.float32
        assert torch.equal(targets, torch.stack([x % 2, x % 3 == 0], 1).float())
    for batch, targets in make(23, 4, multilabel=False).epoch(0, 3):
        assert targets.dtype == torch.int64
        assert torch.equal(targets, batch["x"][:, 0].long())


def test_the_order_depends_on_seed_stage_and_epoch_alone():
    def order(seed, stage, epoch):
        return torch.cat(collect(make(50, 7, seed), stage, epoch)).tolist()

    assert order(0, 0, 0) == order(0, 0, 0)
    others = [order(1, 0, 0), order(0, 1, 0), order(0, 0, 1), list(range(50))]
    assert all(order(0, 0, 0) != other for other in others)


def test_only_what_is_read_is_gathered():
    x = torch.arange(6).float()
    batches = ResidentBatches({"a": x, "b": x}, x.long(), 2, seed=0, reads=("b",))
    assert all(set(batch) == {"b"} for batch, _ in batches.epoch(0, 0))


def test_buffers_are_used_again():
    """Fresh memory for each batch is what makes a loop slow."""
    places = {batch["x"].data_ptr() for batch, _ in make(40, 8).epoch(0, 0)}
    assert len(places) == 1


def test_derived_seeds_differ():
    seeds = {derive_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125
    assert dropout_seed(0, 0, 0) not in {derive_seed(0, 1, 0, 0), derive_seed(0)}
    assert 0 <= derive_seed(2**63 - 1, 7) < 2**63
