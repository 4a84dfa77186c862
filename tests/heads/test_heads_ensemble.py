"""The ensemble: what its weights are, that they help, and that they never hurt on validation."""

import numpy as np
import pytest
import torch

from mmc.heads import metrics
from mmc.heads.batches import ResidentData
from mmc.heads.engine import Engine
from mmc.heads.losses.bce import BCE
from mmc.heads.losses.ce import CE
from mmc.heads.models import ensemble as module
from mmc.heads.models.ensemble import Ensemble, EnsembleConfig, weighted
from mmc.heads.models.linear import Linear, LinearConfig
from mmc.heads.options import OptimConfig, TrainConfig
from mmc.heads.trainer import train
from mmc.store.errors import InputError


def fitted(head, batches, targets, task="multilabel", lr=0.003):
    """Train on the first batch, validate and fit on the second; (metric on each, what was said)."""
    torch.manual_seed(0)
    head.fit_inputs([batches[0]])
    if task == "multilabel":
        counts = targets[0].sum(0).double()
    else:
        counts = torch.bincount(targets[0], minlength=head.num_labels).double()
    loss = BCE if task == "multilabel" else CE
    loss = loss(loss.Config(), counts, torch.full_like(counts, len(targets[0])))
    head.set_prior(loss.prior())
    with torch.no_grad():
        data = [
            ResidentData(inputs=head.prepare(b), targets=t)
            for b, t in zip(batches, targets, strict=True)
        ]
    Engine(
        head,
        loss,
        train=data[0],
        val=data[1],
        task=task,
        batch_size=32,
        epochs=30,
        lr=lr,
        optim=OptimConfig(),
        seed=0,
        dtype=torch.float32,
    ).run()
    with torch.no_grad():
        said = head.fit_validation(data[1].blocks(), targets[1], task)
        scores = [metrics.score(head.score(d.inputs), d.targets, task) for d in data]
    return scores, said


def two_witnesses(rows: int, seed: int, noise: float = 0.5, wide: int = 6):
    """``a`` knows the first two labels, ``b`` the others; the rest of each is noise."""
    g = torch.Generator().manual_seed(seed)
    y = (torch.rand(rows, 4, generator=g) < 0.4).to(torch.int8)
    signs = 2.0 * y - 1
    a, b = (noise * torch.randn(rows, wide, generator=g) for _ in range(2))
    a[:, :2] += signs[:, :2]
    b[:, :2] += signs[:, 2:]
    return {"a": a, "b": b}, y


INPUTS = {"a": (6,), "b": (6,)}


def test_logits_are_the_prior_plus_weighted_evidence():
    torch.manual_seed(0)
    head = Ensemble({"a": (3,), "b": (2,)}, 2, EnsembleConfig(normalize="none")).eval()
    for parameter in head.parameters():
        parameter.data = torch.randn_like(parameter)
    head.prior.copy_(torch.tensor([0.5, -1.0]))
    head.weights.copy_(torch.tensor([[0.2, 1.5], [0.0, 2.0]]))
    batch = {"a": torch.randn(5, 3), "b": torch.randn(5, 2)}
    expected = np.tile([0.5, -1.0], (5, 1))
    for field, role in enumerate("ab"):
        layer = head.classifiers[field][0]
        w, bias = layer.weight.double().numpy(force=True), layer.bias.double().numpy(force=True)
        evidence = batch[role].double().numpy() @ w.T + bias - [0.5, -1.0]
        expected += head.weights[:, field].numpy() * evidence
    np.testing.assert_allclose(head(batch).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_each_classifier_is_trained_alone_on_its_field():
    head = Ensemble(INPUTS, 4, EnsembleConfig())
    assert [(s.name, s.reads) for s in head.stages()] == [
        ("classifier a", ("a",)),
        ("classifier b", ("b",)),
    ]


def test_a_label_trusts_the_field_that_knows_it():
    head = Ensemble(INPUTS, 4, EnsembleConfig())
    # So few rows that a classifier makes something of noise, too.
    parts = [two_witnesses(n, s, noise=0.8) for n, s in ((60, 0), (400, 1))]
    (_, value), said = fitted(head, [b for b, _ in parts], [t for _, t in parts])
    assert said.startswith("weights: fitted, val mAP")
    w = head.weights
    assert (w >= 0).all()
    assert (w[:2, 0] > 1.5 * w[:2, 1]).all()
    assert (w[2:, 1] > 1.5 * w[2:, 0]).all()
    head.weights.fill_(1)
    with torch.no_grad():
        equal = metrics.score(head(parts[1][0]), parts[1][1], "multilabel")
    assert value > equal + 0.003


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("val_rows", [12, 60])
def test_it_is_never_worse_on_validation_than_what_it_starts_from(seed, val_rows):
    g = torch.Generator().manual_seed(seed)
    head = Ensemble(INPUTS, 4, EnsembleConfig())
    parts = [two_witnesses(n, 10 * seed + n, noise=2.0) for n in (50, val_rows)]
    if seed % 2:
        for batch, _ in parts:  # a field that knows nothing
            batch["b"] = torch.randn(batch["b"].shape, generator=g)
    (_, value), said = fitted(head, [b for b, _ in parts], [t for _, t in parts])
    batch, targets = parts[1]
    with torch.no_grad():
        evidence = head.evidence(head.prepare(batch))
    starts = [torch.ones(4, 2), torch.eye(2)[0].expand(4, 2), torch.eye(2)[1].expand(4, 2)]
    for weights in starts:
        start = metrics.score(weighted(evidence, weights, head.prior), targets, "multilabel")
        assert value >= start - 1e-5, said
    if "dropped" in said:
        assert any(torch.equal(head.weights, weights) for weights in starts)


def test_weights_that_do_not_help_are_dropped_and_that_is_said():
    head = Ensemble(INPUTS, 4, EnsembleConfig())
    parts = [two_witnesses(n, n) for n in (200, 100)]
    for batch, _ in parts:
        batch["b"] = batch["a"]  # twice the same: no weights rank better than equal ones
    _, said = fitted(head, [b for b, _ in parts], [t for _, t in parts])
    assert "dropped" in said
    assert "no better than" in said
    starts = [torch.ones(4, 2), torch.eye(2)[0].expand(4, 2), torch.eye(2)[1].expand(4, 2)]
    assert any(torch.equal(head.weights, weights) for weights in starts)


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_classes(task):
    classes = 2 if task == "binary" else 3
    g = torch.Generator().manual_seed(0)
    parts = []
    for rows in (80, 300):
        k = torch.randint(classes, (rows,), generator=g)
        a = 0.7 * torch.randn(rows, 6, generator=g)
        a[torch.arange(rows), k] += 1
        parts.append(({"a": a, "b": torch.randn(rows, 6, generator=g)}, k))
    head = Ensemble(INPUTS, classes, EnsembleConfig())
    (_, value), said = fitted(head, [b for b, _ in parts], [t for _, t in parts], task)
    assert value > 0.7
    assert said.startswith("weights: ")
    assert head.weights[:, 0].mean() > head.weights[:, 1].mean()


def test_it_learns_from_few_samples_what_a_linear_head_cannot():
    """A short field that knows the labels beside a long one that knows nothing."""
    inputs = {"a": (6,), "b": (300,)}
    parts = []
    for rows, seed in ((60, 0), (150, 1), (1000, 2)):
        batch, y = two_witnesses(rows, seed, noise=1.0)
        y[:, 2:] = y[:, :2]
        g = torch.Generator().manual_seed(seed)
        parts.append(({"a": batch["a"], "b": torch.randn(rows, 300, generator=g)}, y))
    found = {}
    for head in (Linear(inputs, 4, LinearConfig()), Ensemble(inputs, 4, EnsembleConfig())):
        fitted(head, [b for b, _ in parts[:2]], [t for _, t in parts[:2]])
        with torch.no_grad():
            found[type(head)] = metrics.score(head(parts[2][0]), parts[2][1], "multilabel")
    assert found[Ensemble] > found[Linear] + 0.05


def test_the_training_says_what_became_of_the_weights(make_store, tmp_path):
    store = make_store(n=240)
    lines: list[str] = []
    report = train(
        store,
        tmp_path / "run",
        TrainConfig(head="ensemble", device="cpu", epochs=20, batch_size=16),
        report=lines.append,
    )
    (said,) = [line for line in lines if line.startswith("weights: ")]
    assert said in report.notes
    assert report.metrics["test"]["mAP"] > 0.8
    weights = report.run.state["weights"]
    assert (weights[:4, 0] >= weights[:4, 1]).all()  # the text is noise


@pytest.mark.parametrize("settings", [{"spread": ()}, {"spread": (0.0,)}, {"dropout": 1.0}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(InputError, match=f"head.{next(iter(settings))}"):
        EnsembleConfig(**settings)


def test_a_fit_that_runs_away_leaves_equal_weights(monkeypatch):
    """Seen with next to no evidence: the line search steps to infinity."""

    def away(self, closure):
        closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(torch.inf)

    monkeypatch.setattr(torch.optim.LBFGS, "step", away)
    witness = module._Witness(
        torch.full((2, 6, 3), 1e-3, dtype=torch.float64),
        torch.tensor([0, 1, 2, 0, 1, 2]),
        torch.zeros(3, dtype=torch.float64),
    )
    assert torch.equal(witness.fit(1.0), torch.ones(3, 2))
