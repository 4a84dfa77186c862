"""Stacked linear heads against each alone; folds and their properties."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.model_selection import StratifiedKFold

from mmc.heads import splits
from mmc.heads.batches import ResidentData
from mmc.heads.engine import Engine
from mmc.heads.losses.asl import ASL
from mmc.heads.losses.bce import BCE
from mmc.heads.models.linear import Linear, LinearConfig
from mmc.heads.models.mlp import MLP, MLPConfig
from mmc.heads.options import OptimConfig
from mmc.heads.search.folds import deal, fold_splits
from mmc.heads.search.stacked import WIDE, Stack, heads_at_once, stackable
from mmc.heads.splits import Splits
from mmc.store import EmbeddingStore
from mmc.store.errors import InputError

D, C, N, VAL = 24, 7, 130, 60


# -- stacked ---------------------------------------------------------------------------------------


def problem(dtype: torch.dtype) -> tuple[ResidentData, ResidentData, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N + VAL, D, generator=g)
    y = (x @ torch.randn(D, C, generator=g) + torch.randn(N + VAL, C, generator=g) > 1).to(
        torch.int8
    )
    y[torch.rand(N + VAL, C, generator=g) < 0.02] = -1
    train = ResidentData(inputs={"inputs": x[:N].to(dtype)}, targets=y[:N])
    return train, ResidentData(inputs={"inputs": x[N:]}, targets=y[N:]), (y[:N] == 1).sum(0)


SETTINGS = [
    {"lr": 0.003},
    {"lr": 0.03, "weight_decay": 0.0},
    {"lr": 0.01, "loss": ASL, "schedule": "constant", "warmup": 0.2},
    {"lr": 0.01, "ema": 0.9, "beta2": 0.9},
    {"lr": 0.5, "patience": 1},
    {"lr": 0.01, "epochs": 17, "clip_norm": 0.0},
    {"lr": 0.01, "loss_settings": {"pos_weight": "auto", "reduction": "sum"}},
    {"lr": 0.01, "metric": "micro_f1", "clip_norm": 0.01},
]


def engine(setting: dict, dtype: torch.dtype) -> Engine:
    setting = dict(setting)
    train, val, positives = problem(dtype)
    kind = setting.pop("loss", BCE)
    known = torch.full_like(positives, N)
    loss = kind(kind.Config(**setting.pop("loss_settings", {})), positives, known)
    head = Linear({"inputs": (D,)}, C, LinearConfig(normalize="none"))
    head.set_prior(loss.prior())
    return Engine(
        head,
        loss,
        train=train,
        val=val,
        task="multilabel",
        batch_size=16,
        epochs=setting.pop("epochs", 30),
        lr=setting.pop("lr"),
        optim=OptimConfig(**setting),
        seed=3,
        dtype=dtype,
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)], ids=["float32", "bf16"]
)
def test_stacked_heads_end_as_each_alone(dtype, tolerance):
    settings = SETTINGS if dtype == torch.float32 else SETTINGS[:4]
    stacked = [engine(setting, dtype) for setting in settings]
    done: list[int] = []
    with torch.autocast("cpu", torch.bfloat16):  # of a caller; it is none of ours
        Stack(stacked).run(lambda place, error: done.append(place))
    assert sorted(done) == list(range(len(settings)))
    for setting, mine in zip(settings, stacked, strict=True):
        alone = engine(setting, dtype)
        alone.run()
        assert not mine.head.training
        if dtype == torch.float32:  # rounding may let another validation be the best
            assert len(mine.position.history) == len(alone.position.history), setting
            for row, other in zip(mine.position.history, alone.position.history, strict=True):
                assert row.keys() == other.keys()
                assert row["best"] == other["best"], setting
                for key in row.keys() - {"seconds", "stage", "best"}:
                    assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), (setting, key)
            for key, value in alone.head.state_dict().items():
                found = mine.head.state_dict()[key]
                assert torch.allclose(found, value, atol=tolerance, rtol=tolerance), (setting, key)
        else:
            best = [max(r[f"val_{e.metric}"] for r in e.position.history) for e in (mine, alone)]
            assert best[0] == pytest.approx(best[1], abs=tolerance), setting
    if dtype == torch.float32:
        ends = {mine.position.history[-1]["epoch"] for mine in stacked}
        assert len(ends) > 2, "they stop at different times"


def test_a_head_owns_its_weights_after_the_stack():
    stacked = [engine(setting, torch.float32) for setting in SETTINGS[:2]]
    Stack(stacked).run(lambda place, error: None)
    first, second = (e.head.classifier.weight for e in stacked)
    before = second.clone()
    first.data.zero_()
    assert torch.equal(second, before)
    assert first.untyped_storage().nbytes() == first.numel() * 4
    assert not first.requires_grad


def test_one_that_diverges_leaves_the_others_alone():
    stacked = [
        engine({"lr": 1e38, "clip_norm": 0.0}, torch.float32),
        engine({"lr": 0.01}, torch.float32),
    ]
    errors = {}
    Stack(stacked).run(lambda place, error: errors.update({place: error}))
    assert "diverged" in errors[0]
    assert errors[1] == ""
    alone = engine({"lr": 0.01}, torch.float32)
    alone.run()
    for key, value in alone.head.state_dict().items():
        assert torch.allclose(stacked[1].head.state_dict()[key], value, atol=2e-5), key


def test_what_is_stacked():
    plain = OptimConfig()
    assert stackable(Linear, LinearConfig(), plain)
    assert not stackable(Linear, LinearConfig(output="cosine"), plain)
    assert not stackable(MLP, MLPConfig(), plain)
    for other in ({"accumulation": 2}, {"schedule": "plateau"}, {"compile": True}):
        assert not stackable(Linear, LinearConfig(), OptimConfig(**other))
    assert heads_at_once(80, streamed=False) == 32
    assert heads_at_once(WIDE + 1, streamed=False) == 1
    assert heads_at_once(10_000, streamed=True) == 2


# -- folds -----------------------------------------------------------------------------------------


def one_hot(classes: np.ndarray) -> csr_array:
    ones = np.ones(len(classes), np.int64)
    return csr_array((ones, classes, np.arange(len(classes) + 1)))


def test_one_label_per_sample_is_a_stratified_k_fold():
    classes = np.repeat(np.arange(6), [51, 20, 13, 9, 5, 5])
    fold = deal(one_hot(classes), np.arange(103), 5, seed=(0,))
    theirs = np.empty(103, np.int64)
    for index, (_, held) in enumerate(StratifiedKFold(5).split(classes, classes)):
        theirs[held] = index
    for label in range(6):
        counts = np.bincount(fold[classes == label], minlength=5)
        assert counts.max() - counts.min() <= 1, label
        expected = np.bincount(theirs[classes == label], minlength=5)
        assert sorted(counts) == sorted(expected), label
    sizes = np.bincount(fold, minlength=5)
    assert sizes.max() - sizes.min() <= 2


def test_many_labels_are_spread_evenly():
    random = np.random.default_rng(1)
    truth = random.random((600, 30)) < np.logspace(-0.5, -2.3, 30)
    fold = deal(csr_array(truth.astype(np.int64)), np.arange(600), 5, seed=(0,))
    counts = np.stack([truth[fold == f].sum(0) for f in range(5)])
    spread = counts.max(0) - counts.min(0)
    by_chance = np.stack([truth[random.integers(0, 5, 600) == f].sum(0) for f in range(5)])
    assert spread[-10:].max() <= 2, "labels with few samples"
    assert spread.mean() < 0.4 * (by_chance.max(0) - by_chance.min(0)).mean()
    sizes = np.bincount(fold)
    assert sizes.max() - sizes.min() <= 12


def test_groups_stay_together_and_folds_even():
    random = np.random.default_rng(2)
    groups = np.unique(random.integers(0, 150, 500), return_inverse=True)[1]
    truth = csr_array((random.random((500, 8)) < 0.2).astype(np.int64))
    fold = deal(truth, groups, 4, seed=(0,))
    assert all(len(set(fold[groups == g])) == 1 for g in range(groups.max() + 1))
    sizes = np.bincount(fold)
    assert sizes.max() - sizes.min() <= 12
    assert (fold == deal(truth, groups, 4, seed=(0,))).all()
    assert (fold != deal(truth, groups, 4, seed=(1,))).any()


@pytest.mark.parametrize("rows", [2, 3, 5, 9])
def test_no_fold_is_empty(rows):
    same = csr_array(np.ones((rows, 3), np.int64))
    for labels in (same, csr_array((rows, 3), dtype=np.int64), one_hot(np.arange(rows) % 3)):
        for k in range(2, rows + 1):
            assert len(set(deal(labels, np.arange(rows), k, seed=(0,)))) == k


def test_samples_that_share_a_content_stay_together(make_store: Callable, monkeypatch):
    store = make_store(n=120)
    keys = {
        "image_key": [None if i % 10 == 0 else f"k{i // 3}" for i in range(120)],
        "text_key": [f"t{i % 40}" if i < 60 else f"t{i}" for i in range(120)],
    }
    column = EmbeddingStore.column

    def keyed(self: EmbeddingStore, name: str) -> pa.ChunkedArray:
        return pa.chunked_array([keys[name]]) if name in keys else column(self, name)

    monkeypatch.setattr(EmbeddingStore, "column", keyed)

    def shared(features: list[str], key: str) -> int:
        """How many contents stand in two of a fold's three parts."""
        several = 0
        for rows, held in parts(store, features, 3)[1]:
            names = [{keys[key][r] for r in part} - {None} for part in (rows.train, rows.val, held)]
            several += len(names[0] & names[1]) + len((names[0] | names[1]) & names[2])
        return several

    both = ["clip/image", "clip/text"]
    assert shared(both, "image_key") == shared(both, "text_key") == 0
    assert shared(["clip/image"], "image_key") == 0
    assert shared(["clip/image"], "text_key") > 0, "a head that sees no text is told nothing by it"
    keys["text_key"] = ["a template"] * 120
    (note,) = parts(store, both, 3)[2]
    assert "1 texts belong to more than 30 samples each" in note
    assert shared(both, "image_key") == 0
    # A chain: each sample shares its picture with one neighbour and its text with the other.
    pool = np.sort(np.concatenate([*parts(store, both, 3)[0].__dict__.values()][:2])).tolist()
    place = {row: index for index, row in enumerate(pool)}
    keys["image_key"] = [f"k{place.get(i, -i) // 2}" for i in range(120)]
    keys["text_key"] = [f"t{(place.get(i, -i) + 1) // 2}" for i in range(120)]
    with pytest.raises(InputError, match=r"\(1 groups that share no picture or text\)"):
        parts(store, both, 3)
    for row in pool[:30]:
        keys["image_key"][row], keys["text_key"][row] = f"own {row}", f"own {row}"
    (note,) = parts(store, both, 3)[2]
    assert "stay together" in note


def parts(store: EmbeddingStore, features: list[str], folds: int, seed: int = 0):
    chosen = splits.choose(store, features, trains=True)
    return chosen, *fold_splits(store, features, chosen, folds, seed)


def test_each_fold_parts_the_rows_in_three(make_store: Callable):
    store = make_store(n=120)
    chosen, found, notes = parts(store, ["clip/image"], 4)
    pool = np.sort(np.concatenate([chosen.train, chosen.val]))
    assert notes == []
    assert (np.sort(np.concatenate([held for _, held in found])) == pool).all()
    for rows, held in found:
        assert isinstance(rows, Splits)
        together = np.concatenate([rows.train, rows.val, held])
        assert len(set(together)) == len(together) == len(pool)
        assert (np.diff(rows.train) > 0).all()
        share = len(rows.val) / (len(rows.val) + len(rows.train))
        assert share == pytest.approx(len(chosen.val) / len(pool), abs=0.06)
    again = parts(store, ["clip/image"], 4)[1]
    other = parts(store, ["clip/image"], 4, seed=1)[1]
    assert all((a[1] == b[1]).all() for a, b in zip(found, again, strict=True))
    assert any(
        len(a[1]) != len(b[1]) or (a[1] != b[1]).any() for a, b in zip(found, other, strict=True)
    )


def test_test_rows_are_never_in_a_fold(make_store: Callable):
    store = make_store(n=120)
    tests = set(store.rows(split="test").tolist())
    for rows, held in parts(store, ["clip/image"], 3)[1]:
        assert not tests & set(np.concatenate([rows.train, rows.val, held]).tolist())
        assert not len(rows.test)
