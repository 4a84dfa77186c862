"""Parts of a batch, in turn or in several processes, give the gradient of the whole."""

import dataclasses
import typing
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmc.heads.batches import ResidentBatches, Share
from mmc.heads.distributed import Processes
from mmc.heads.gradients import Gradients, JoinedGradients
from mmc.heads.losses import LOSSES
from mmc.heads.losses.base import Loss
from mmc.heads.models.base import Batch
from mmc.heads.models.fusion import Fusion
from mmc.heads.models.linear import Linear
from mmc.heads.options import TrainConfig
from mmc.heads.trainer import train
from mmc.store import EmbeddingStore
from mmc.store.registry import load

LABELS, ROWS = 5, 13
CASES = [
    (entry.name, {"reduction": reduction, **weights})
    for entry in LOSSES
    for config in [load(entry).Config]
    for reduction in typing.get_args(typing.get_type_hints(config)["reduction"])
    for weights in (
        [{}, {"pos_weight": "auto"}]
        if "pos_weight" in {f.name for f in dataclasses.fields(config)}
        else [{}]
    )
]


def make_loss(name: str, settings: dict) -> Loss:
    cls = load(next(entry for entry in LOSSES if entry.name == name))
    positives = torch.tensor([3.0, 9.0, 1.0, 4.0, 2.0])
    known = torch.full_like(positives, positives.sum())
    return cls(cls.Config(**settings), positives, known)


def make_targets(loss: Loss, unknown: bool) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    if "multilabel" in loss.tasks:
        targets = (torch.rand(ROWS, LABELS, generator=random) < 0.4).float()
        hidden = torch.rand(ROWS, LABELS, generator=random) < 0.4
        hidden[8:11] = True  # a whole part of which nothing is known
        return targets.masked_fill(hidden, -1.0) if unknown else targets
    targets = torch.randint(0, LABELS, (ROWS,), generator=random)
    hidden = torch.rand(ROWS, generator=random) < 0.4
    hidden[8:11] = True
    return targets.masked_fill(hidden, -1) if unknown else targets


@pytest.mark.parametrize("unknown", [False, True], ids=["known", "partly unknown"])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_parts_give_the_loss_and_the_gradient_of_the_whole(name, settings, unknown):
    """The reference is the loss of the whole batch, differentiated as it stands."""
    loss = make_loss(name, settings)
    targets = make_targets(loss, unknown)
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, LABELS)
    x = torch.randn(ROWS, 3)
    whole = loss(layer(x), targets)
    wanted = torch.autograd.grad(whole, list(layer.parameters()))
    joined = JoinedGradients(list(layer.parameters()), loss, Processes())
    for _ in range(2):  # the second step finds nothing left of the first
        for rows in ((0, 8), (8, 11), (11, 13)):
            part = slice(*rows)
            joined.add(loss(layer(x[part]), targets[part]), targets[part])
        joined.join()
        for parameter, gradient in zip(layer.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        joined.clear()
    assert joined.mean_loss() == pytest.approx(whole.item(), rel=1e-5)


def test_a_step_of_one_batch_is_left_as_it_is():
    layer = torch.nn.Linear(2, 1)
    gradients = Gradients(list(layer.parameters()))
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    loss = layer(x).mean()
    wanted = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
    gradients.add(loss, torch.zeros(2, 1))
    gradients.join()
    assert all(torch.equal(p.grad, g) for p, g in zip(layer.parameters(), wanted, strict=True))
    gradients.clear()
    assert all(p.grad is None for p in layer.parameters())
    assert gradients.mean_loss() == pytest.approx(loss.item())


# -- accumulation ----------------------------------------------------------------------------------


def weights(store: EmbeddingStore, folder, batch: int, parts: int, task: str, *settings: str):
    config = TrainConfig(
        head="linear",
        device="cpu",
        precision="float32",
        batch_size=batch,
        epochs=20,
        lr=0.01,
        settings=(f"optim.accumulation={parts}", *settings),
    )
    return train(store, folder, config).run


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("multilabel", ()),
        ("multilabel", ("optim.ema=0.9", "loss.reduction=sum", "optim.clip_norm=0.5")),
        ("multiclass", ("loss.pos_weight=auto",)),
    ],
)
def test_accumulated_batches_train_as_the_joined_one(
    make_store: Callable, tmp_path, task, settings
):
    """27 rows: batches of 4 by threes are 12, 12 and 3 rows, as batches of 12 are.

    Where classes are all as frequent, the first gradient of the biases is 0 but for rounding, and
    AdamW makes a step of it: hence another seed.
    """
    store = make_store(task, seed=1)
    joined = weights(store, tmp_path / "joined", 12, 1, task, *settings)
    parts = weights(store, tmp_path / "parts", 4, 3, task, *settings)
    for key, value in joined.state.items():
        torch.testing.assert_close(parts.state[key], value, rtol=1e-4, atol=1e-5)
    for a, b in zip(joined.history, parts.history, strict=True):
        assert a["epoch"] == b["epoch"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["lr"] == b["lr"]


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
@pytest.mark.parametrize("settings", [(), ("loss.reduction=sum", "optim.clip_norm=0.5")])
def test_a_batch_in_parts_trains_as_the_whole(
    make_store: Callable, tmp_path, monkeypatch, task, settings
):
    """Batches of 12 in parts of 5, 5 and 2 rows; the last batch is shorter."""
    settings = settings if task == "multilabel" else ("loss.pos_weight=auto",)
    store = make_store(task, seed=1)
    whole = weights(store, tmp_path / "whole", 12, 1, task, *settings)
    monkeypatch.setattr(Linear, "part_rows", 5)
    seen = []
    score = Linear.score

    def watched(self: Linear, prepared: Batch) -> Tensor:
        logits = score(self, prepared)
        if self.training:
            seen.append(len(logits))
        return logits

    monkeypatch.setattr(Linear, "score", watched)
    parts = weights(store, tmp_path / "parts", 12, 1, task, *settings)
    assert set(seen[:3]) == {5, 2}
    assert max(seen) == 5
    for key, value in whole.state.items():
        torch.testing.assert_close(parts.state[key], value, rtol=1e-4, atol=1e-5)
    for a, b in zip(whole.history, parts.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_parts_are_smaller_where_samples_are_larger():
    def rows(tokens: int) -> int:
        return Fusion({"image_tokens": (tokens, 64)}, 3, Fusion.Config()).part_rows

    assert rows(1) > rows(64) > rows(1024) >= 1
    assert rows(1) <= Linear.part_rows


def test_defaults_count_the_rows_of_a_step(make_store: Callable, tmp_path):
    store = make_store(n=400)
    plain = train(store, tmp_path / "a", TrainConfig(batch_size=64, epochs=1, device="cpu"))
    settings = ("optim.accumulation=4",)
    parts = TrainConfig(batch_size=16, epochs=1, device="cpu", settings=settings)
    assert train(store, tmp_path / "b", parts).lr == pytest.approx(plain.lr)


# -- shares ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [20, 23])
@pytest.mark.parametrize("count", [2, 3])
def test_shares_of_a_batch_are_the_batch(rows, count):
    """Batches of 5: not divisible by the processes, and the last may be short."""
    x = torch.arange(rows)
    whole = ResidentBatches({"x": x[:, None]}, x, 5, seed=1)
    shares = [Share(index, count) for index in range(count)]
    parts = [
        ResidentBatches(
            {"x": x[s.index :: count, None]}, x[s.index :: count], 5, seed=1, share=s, size=rows
        )
        for s in shares
    ]
    for epoch in range(3):
        batches = [sorted(y.tolist()) for _, y in whole.epoch(0, epoch)]
        found = [[(b["x"][:, 0].tolist(), y.tolist()) for b, y in p.epoch(0, epoch)] for p in parts]
        assert all(len(p) == len(batches) for p in found)
        for index, batch in enumerate(batches):
            assert all(p[index][0] == p[index][1] for p in found)
            assert sorted(y for p in found for y in p[index][1]) == batch
