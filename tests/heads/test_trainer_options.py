"""Settings, the learning rate over time, and the small parts of the optimiser."""

import math
import re

import pytest
import torch

from mmc.heads.checkpoints import differences, pack_optimizer, unpack_optimizer
from mmc.heads.devices import pick_device, training_dtype
from mmc.heads.engine import Position
from mmc.heads.optim import (
    Average,
    lowered,
    lr_factor,
    make_optimizer,
    set_lr,
    trained_parameters,
)
from mmc.heads.options import OptimConfig, TrainConfig, parse_set
from mmc.heads.training import Setup
from mmc.store.config import build, field_docs
from mmc.store.errors import InputError

# -- settings --------------------------------------------------------------------------------------


def test_settings_are_grouped():
    pairs = ["optim.weight_decay=0.1", "head.hidden=64", "loss.x = a=b "]
    assert parse_set(pairs) == {
        "head": {"hidden": "64"},
        "optim": {"weight_decay": "0.1"},
        "loss": {"x": "a=b"},
    }


@pytest.mark.parametrize("pair", ["nonsense", "hidden=3", "head.=3", ".hidden=3", "head.hidden"])
def test_settings_of_another_form(pair):
    with pytest.raises(InputError, match=r"write group\.key=value"):
        parse_set([pair])


@pytest.mark.parametrize(
    ("head", "setting", "says"),
    [
        ("linear", "lr=0.1", "--set lr=0.1: did you mean the option --lr?"),
        ("linear", "batch_size=8", "did you mean the option --batch-size?"),
        ("linear", "weight_decay=0.1", "did you mean optim.weight_decay?"),
        ("mlp", "hidden=512", "--set hidden=512: did you mean head.hidden?"),
        ("linear", "hidden=512", "write group.key=value"),
    ],
)
def test_a_setting_without_its_group_is_found(head, setting, says):
    with pytest.raises(InputError, match=re.escape(says)):
        TrainConfig(head=head, settings=(setting,))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("optim.lr=0.1", "optim has no setting 'lr'; did you mean the option --lr?"),
        ("optim.hidden=8", "optim has no setting 'hidden'; did you mean head.hidden?"),
        ("head.weight_decay=8", "head mlp has no setting 'weight_decay'; did you mean optim.weig"),
        ("loss.normalize=none", "loss bce has no setting 'normalize'; did you mean head.normal"),
        ("head.hiden=8", "head mlp has no setting 'hiden'; did you mean hidden"),
    ],
)
def test_a_setting_of_another_part_is_found(make_store, setting, says):
    with pytest.raises(InputError, match=re.escape(says)):
        Setup(make_store(), TrainConfig(head="mlp", settings=(setting,)))


def test_a_setting_that_is_given_twice_is_refused():
    with pytest.raises(InputError, match=r"--set head\.hidden is given twice"):
        TrainConfig(head="mlp", settings=("head.hidden=8", "head.hidden=16"))


@pytest.mark.parametrize(
    ("head", "settings", "idle"),
    [
        ("linear", ("head.scale=20",), "head.scale=20.0 does nothing with head.output=linear"),
        ("linear", ("head.scale=20", "head.output=cosine"), ""),
        ("linear", ("loss.pos_weight_cap=5",), "loss.pos_weight_cap=5.0 does nothing with loss.po"),
        ("linear", ("loss.pos_weight_cap=5", "loss.pos_weight=cap"), ""),
        ("linear", ("optim.min_lr=1e-5",), "optim.min_lr=1e-05 does nothing with optim.schedule=c"),
        ("linear", ("optim.min_lr=1e-5", "optim.schedule=plateau"), ""),
        ("ensemble", ("head.dropout=0.5",), "head.dropout=0.5 does nothing with head.hidden=0"),
        ("ensemble", ("head.dropout=0.5", "head.hidden=8"), ""),
        ("router", ("head.dropout=0.5",), ""),  # its router has a hidden layer
        ("boost", ("head.kind=linear", "head.hidden=8"), "head.hidden=8 does nothing with head.ki"),
        ("boost", ("head.hidden=8",), ""),
    ],
)
def test_a_setting_that_does_nothing_is_told(make_store, head, settings, idle):
    notes = Setup(make_store(), TrainConfig(head=head, settings=settings)).notes
    found = [note.removeprefix("warning: ") for note in notes if "does nothing" in note]
    assert len(found) == bool(idle)
    assert all(line.startswith(idle) for line in found)


def test_settings_of_an_unknown_group():
    with pytest.raises(InputError, match="no group 'data'; choose from head, loss, optim"):
        parse_set(["data.x=1"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_size": 0}, "--batch-size must be 1 or more, got 0"),
        ({"epochs": 0}, "--epochs must be 1 or more"),
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"lr": math.nan}, "--lr must be above 0"),
        ({"seed": -1}, "--seed"),
        ({"precision": "fp16"}, "auto, bf16 or float32"),
        ({"settings": ("nonsense",)}, "nonsense"),
    ],
)
def test_training_settings_are_checked(changes, says):
    with pytest.raises(InputError, match=says):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_decay": -1},
        {"warmup": 1.0},
        {"ema": 1.0},
        {"beta2": -0.1},
        {"patience": -1},
        {"clip_norm": math.nan},
        {"checkpoint_seconds": -1},
        {"accumulation": 0},
        {"plateau_factor": 1.0},
        {"plateau_patience": -1},
        {"min_lr": math.nan},
        {"plateau_patience": 2, "patience": 3, "schedule": "plateau"},
    ],
)
def test_optimiser_settings_are_checked(changes):
    with pytest.raises(InputError, match=rf"optim\.{next(iter(changes))}"):
        OptimConfig(**changes)


@pytest.mark.parametrize("config", [TrainConfig, OptimConfig])
def test_every_setting_says_what_it_does(config):
    assert set(field_docs(config)) == set(config.__dataclass_fields__)


# -- learning rate ---------------------------------------------------------------------------------


def test_the_learning_rate_rises_and_falls():
    config = OptimConfig(warmup=0.1)
    factors = [lr_factor(step, 100, config) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[9] < factors[10] == pytest.approx(1)
    assert factors[55] == pytest.approx(0.5)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[99] < 0.001


@pytest.mark.parametrize("schedule", ["constant", "plateau"])
def test_a_constant_learning_rate_stays(schedule):
    config = OptimConfig(schedule=schedule, warmup=0.0)
    assert [lr_factor(step, 10, config) for step in range(10)] == [1.0] * 10


@pytest.mark.parametrize("patience", [0, 1, 3])
@pytest.mark.parametrize("min_lr", [0.0, 0.004])
def test_a_plateau_lowers_the_rate_as_in_torch(patience, min_lr):
    """The reference is ReduceLROnPlateau without its threshold: ours knows what is better."""
    peak = 0.1
    config = OptimConfig(
        schedule="plateau",
        plateau_factor=0.2,
        plateau_patience=patience,
        min_lr=min_lr,
        patience=0,
    )
    torch.manual_seed(patience)
    metrics = (torch.rand(60) + torch.linspace(0, 0.5, 60)).tolist()
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        theirs,
        mode="max",
        factor=0.2,
        patience=patience,
        threshold=0.0,
        min_lr=min_lr,
        eps=0.0,
    )
    best, since, scale, rates = -math.inf, 0, 1.0, []
    for metric in metrics:
        since = 0 if metric > best else since + 1
        best = max(metric, best)
        scale = lowered(scale, since, peak, config)
        scheduler.step(metric)
        rates.append(theirs.param_groups[0]["lr"])
        assert peak * scale == pytest.approx(rates[-1])
    assert len(set(rates)) > 2


def test_other_schedules_have_no_plateaus():
    assert lowered(1.0, 3, 0.1, OptimConfig(schedule="constant", plateau_patience=2)) == 1.0


# -- optimiser -------------------------------------------------------------------------------------


def make_module() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 2, bias=False)
    )


def test_only_what_is_named_trains():
    module = make_module()
    groups = trained_parameters(module, {"2": 0.1})
    assert {share: list(named) for share, named in groups.items()} == {0.1: ["2.weight"]}
    assert [p.requires_grad for p in module.parameters()] == [False, False, True]
    assert not module[1].training
    trained_parameters(module, {"": 1.0})
    assert all(p.requires_grad for p in module.parameters())
    assert module[1].training


def test_matrices_decay_and_biases_do_not():
    groups = trained_parameters(make_module(), {"": 1.0, "2": 0.5})
    optimizer = make_optimizer(groups, OptimConfig(weight_decay=0.3))
    found = {
        tuple(group["params"][0].shape): (group["weight_decay"], group["share"])
        for group in optimizer.param_groups
    }
    assert found == {(4, 3): (0.3, 1.0), (4,): (0.0, 1.0), (2, 4): (0.3, 0.5)}
    set_lr(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.2, 0.1]


def test_adamw_takes_the_step_of_its_paper():
    """First step: parameter x (1 - lr x decay) - lr x sign(gradient)."""
    weight = torch.nn.Parameter(torch.tensor([[2.0, -1.0]]))
    optimizer = make_optimizer({1.0: {"w": weight}}, OptimConfig(weight_decay=0.5))
    set_lr(optimizer, 0.1)
    weight.grad = torch.tensor([[3.0, -0.5]])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[1.9 - 0.1, -0.95 + 0.1]]))


def test_the_optimiser_continues_from_its_packed_state():
    def run(interrupt: bool) -> list[torch.Tensor]:
        module = make_module()
        optimizer = make_optimizer(trained_parameters(module, {"": 1.0}), OptimConfig())
        for step in range(6):
            if interrupt and step == 3:
                packed = {key: value.clone() for key, value in pack_optimizer(optimizer).items()}
                optimizer = make_optimizer(trained_parameters(module, {"": 1.0}), OptimConfig())
                unpack_optimizer(optimizer, packed)
            set_lr(optimizer, 0.01)
            torch.manual_seed(step)
            module(torch.randn(5, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in module.parameters()]

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)


def test_the_average_follows_and_swaps():
    parameter = torch.nn.Parameter(torch.zeros(2))
    average = Average([parameter], decay=0.9)
    with torch.no_grad():
        parameter.fill_(1.0)
    average.update(step=1000)
    average.swap()
    torch.testing.assert_close(parameter.detach(), torch.full((2,), 0.1))
    average.swap()
    assert torch.equal(parameter.detach(), torch.ones(2))


# -- early stopping --------------------------------------------------------------------------------


def test_the_metric_decides_and_the_loss_breaks_ties():
    at = Position()
    assert at.improves(0.1, 9.0)
    at.best_metric, at.best_loss = 0.5, 1.0
    assert at.improves(0.6, 9.0)
    assert not at.improves(0.4, 0.1)
    assert at.improves(0.5, 0.9)
    assert not at.improves(0.5, 1.1)
    assert at.improves(math.nan, 0.9)
    assert not at.improves(math.nan, 1.0)
    assert at.improves(math.nan, math.nan)  # on no rows at all the latest is the best


def test_differences_name_the_leaf():
    before = {"a": {"b": 1, "c": 2}, "d": [1]}
    now = {"a": {"b": 1, "c": 3}, "d": [1], "e": None}
    assert differences(before, now) == ["a.c: 2 -> 3"]
    assert differences(before, before) == []


# -- devices ---------------------------------------------------------------------------------------


def test_devices_are_checked():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="--device tpu"):
        pick_device("tpu")


def test_precision_can_be_asked_for():
    cpu = torch.device("cpu")
    assert training_dtype("bf16", cpu) == torch.bfloat16
    assert training_dtype("float32", cpu) == torch.float32
    assert training_dtype("auto", cpu) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_settings_are_finite(value):
    with pytest.raises(InputError, match=r"optim setting clip_norm=.*finite"):
        build(OptimConfig, {"clip_norm": value}, where="optim")
