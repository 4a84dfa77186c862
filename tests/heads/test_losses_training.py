"""Losses in a training: every one learns, and what one asks of a head."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from mmc.heads.artifact import Run
from mmc.heads.losses import LOSSES
from mmc.heads.models.cosine import CosineOutput
from mmc.heads.models.linear import Linear, LinearConfig
from mmc.heads.options import TrainConfig, parse_set
from mmc.heads.predict import logits
from mmc.heads.trainer import train
from mmc.store.config import build
from mmc.store.errors import InputError
from mmc.store.registry import load

MULTILABEL = [entry.name for entry in LOSSES if entry.needs.startswith("multilabel")]
CLASSES = [entry.name for entry in LOSSES if not entry.needs.startswith("multilabel")]


def config(head: str, loss: str, *settings: str, **changes) -> TrainConfig:
    values = {"device": "cpu", "epochs": 20, "batch_size": 16, **changes}
    return TrainConfig(head=head, loss=loss, settings=settings, **values)


def test_the_table_has_the_losses_of_both_kinds():
    assert MULTILABEL == ["bce", "smooth_bce", "focal", "asl", "zlpr", "aam"]
    assert CLASSES == ["ce", "smooth_ce", "focal_ce"]


@pytest.mark.parametrize("loss", MULTILABEL)
def test_a_head_learns_labels_and_decides_well_at_tuned_thresholds(make_store, tmp_path, loss):
    store = make_store(n=240)
    report = train(store, tmp_path / "run", config("linear", loss, lr=0.01))
    assert report.metrics["test"]["mAP"] > 0.97
    # Whatever the loss takes for "yes": ASL lifts probabilities, cosines are never far apart.
    assert report.metrics["test"]["micro_f1"] > 0.9
    run = Run.load(tmp_path / "run")
    assert run.loss == loss
    rows = store.rows(split="test", features=list(store.features))
    assert torch.equal(logits(run, store, rows), logits(report.run, store, rows))


SETTINGS = {
    "bce": ["pos_weight=auto", "pos_weight=cap pos_weight_cap=2", "reduction=sum"],
    "smooth_bce": ["smoothing=0.3", "towards=prior", "pos_weight=auto", "reduction=sum"],
    "focal": ["gamma=1", "alpha=0.75", "pos_weight=cap pos_weight_cap=2", "reduction=sum"],
    "asl": [
        *("gamma_neg=2", "gamma_pos=1", "clip=0.2", "detach_weight=true", "pos_weight=auto"),
        *("pos_weight=cap pos_weight_cap=2", "reduction=sum_per_sample_mean"),
    ],
    "zlpr": ["smoothing=0", "reduction=mean"],
    "aam": ["scale=8", "margin=0.5", "kind=cosine", "pos_weight=auto", "reduction=sum"],
    "ce": ["pos_weight=auto", "pos_weight=cap pos_weight_cap=1.1", "reduction=sum"],
    "smooth_ce": ["smoothing=0.4", "pos_weight=auto", "reduction=sum"],
    "focal_ce": ["gamma=1", "smoothing=0.2", "pos_weight=auto", "reduction=sum"],
}
"""Every setting of every loss, as a user types it; `pos_weight_cap` is the same one everywhere."""


@pytest.mark.parametrize("entry", LOSSES, ids=lambda entry: entry.name)
def test_every_setting_can_be_typed_and_changes_the_gradient(entry):
    cls, given = load(entry), SETTINGS[entry.name]
    known = {field.name for field in fields(cls.Config)}
    assert {pair.partition("=")[0] for line in given for pair in line.split()} | {
        "pos_weight_cap"
    } >= known
    counts = torch.tensor([50.0, 20.0, 5.0])
    torch.manual_seed(0)
    logits = torch.randn(6, 3)
    targets = (torch.rand(6, 3) < 0.5).float()
    if "multilabel" not in cls.tasks:
        targets = torch.tensor([0, 1, 2, 0, 1, 2])

    def slope(*pairs: str) -> torch.Tensor:
        settings = parse_set(f"loss.{pair}" for pair in pairs).get("loss", {})
        loss = cls(build(cls.Config, settings, where="loss"), counts, torch.full_like(counts, 75))
        x = logits.clone().requires_grad_()
        loss(x, targets).backward()
        return x.grad

    usual = slope()
    for line in given:
        assert (slope(*line.split()) - usual).abs().max() > 1e-3, line


@pytest.mark.parametrize("loss", CLASSES)
@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_a_head_learns_classes(make_store, tmp_path, loss, task):
    store = make_store(task, n=240)
    report = train(store, tmp_path / "run", config("linear", loss, lr=0.01))
    assert report.metrics["test"]["accuracy"] > 0.9


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_aam_makes_the_head_give_cosines(make_store, tmp_path, head):
    store = make_store(n=120)
    settings = ("loss.scale=12",) + (("head.hidden=16",) if head == "mlp" else ())
    report = train(store, tmp_path / "run", config(head, "aam", *settings, lr=0.01))
    assert report.run.head_config["output"] == "cosine"
    assert report.run.head_config["scale"] == 12
    built = Run.load(tmp_path / "run").build_head()
    assert isinstance(built.classifier, CosineOutput)
    rows = store.rows(features=list(store.features))
    scores = logits(report.run, store, rows) - built.classifier.bias
    assert scores.abs().max() <= 12.001
    assert scores.abs().max() > 3


def test_the_offsets_of_cosines_are_the_priors_that_the_loss_knows(make_store, tmp_path):
    from mmc.heads.losses.aam import AAM

    store = make_store(n=120)
    report = train(store, tmp_path / "run", config("linear", "aam", epochs=2))
    rows = store.rows(split="train", features=list(store.features), labelled=True)
    counts = torch.from_numpy(store.labels.counts(rows))
    loss = AAM(AAM.Config(), counts, torch.full_like(counts, len(rows)))
    assert torch.equal(report.run.state["classifier.bias"], loss.prior())


@pytest.mark.parametrize("head", ["router", "ensemble", "gat"])
def test_a_head_that_gives_no_cosines_is_refused_in_one_line(make_store, tmp_path, head):
    with pytest.raises(InputError, match=f"aam needs .* output=cosine, and {head} has no output"):
        train(make_store(), tmp_path / "run", config(head, "aam"))
    assert not (tmp_path / "run").exists()


def test_settings_against_the_loss_are_refused(make_store, tmp_path):
    store = make_store()
    for setting, needed in (("head.output=linear", "cosine"), ("head.scale=3", "15")):
        with pytest.raises(InputError, match=f"does not go with loss aam, which needs {needed}"):
            train(store, tmp_path / "run", config("linear", "aam", setting))
    train(store, tmp_path / "run", config("linear", "bce", "head.output=cosine", epochs=1))


def test_a_loss_of_the_other_kind_is_refused(make_store, tmp_path):
    with pytest.raises(InputError, match="loss focal_ce is for binary and multiclass tasks"):
        train(make_store(), tmp_path / "run", config("linear", "focal_ce"))
    with pytest.raises(InputError, match="loss asl is for multilabel tasks"):
        train(make_store("binary", name="b"), tmp_path / "run", config("linear", "asl"))


def test_a_cosine_output_is_the_cosine():
    torch.manual_seed(0)
    head = Linear({"image": (6,)}, 3, LinearConfig(output="cosine", scale=7.0, normalize="none"))
    head.set_prior(torch.tensor([-1.0, 0.0, 2.0]))
    x, w = torch.randn(4, 6), head.classifier.weight.detach().double().numpy()
    v = x.double().numpy()
    cosine = v @ w.T / np.linalg.norm(v, axis=1)[:, None] / np.linalg.norm(w, axis=1)
    np.testing.assert_allclose(
        head({"image": x}).detach().numpy(), 7 * cosine + [-1, 0, 2], rtol=1e-4, atol=1e-5
    )
    assert [name for name, _ in head.named_parameters()] == ["classifier.weight"]
    zero = head({"image": torch.zeros(1, 6)})
    assert zero.tolist() == [[-1, 0, 2]]
    with pytest.raises(InputError, match=r"head\.scale"):
        LinearConfig(scale=-math.inf)
