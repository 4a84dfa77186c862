"""What every registered head and loss must do; a new one is tested by being in the table."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from mmc.heads.batches import ResidentBatches, ResidentData
from mmc.heads.engine import Engine
from mmc.heads.losses import GROUP as LOSS_GROUP
from mmc.heads.losses import LOSSES
from mmc.heads.models import GROUP as HEAD_GROUP
from mmc.heads.models import HEADS
from mmc.heads.models.base import Head
from mmc.heads.needs import EXTRA_OF, MASKED, mask_of
from mmc.heads.options import OptimConfig
from mmc.store.config import field_docs
from mmc.store.registry import entries
from mmc.store.registry import load as load_entry

WIDTHS = {"image": (12,), "text": (8,)}
TOKENS = {
    **WIDTHS,
    "image_tokens": (6, 12),
    "image_class": (12,),
    "image_places": (6, 3),
    "text_tokens": (5, 8),
    "text_ids": (5,),
    "fused_tokens": (5, 8),
    "regions": (4, 12),
    "boxes": (4, 5),
}
SMALL: dict[str, dict[str, Any]] = {
    "ml_decoder": {"width": 16, "feedforward": 24, "groups": 3},
    "fusion": {"width": 16, "feedforward": 24},
}
"""Settings of heads that are large unless told."""
ROWS, LABELS = 40, 5

heads = pytest.mark.parametrize("entry", entries(HEADS, HEAD_GROUP), ids=lambda e: e.name)
pooled_heads = pytest.mark.parametrize(
    "entry",
    [e for e in entries(HEADS, HEAD_GROUP) if not load_entry(e).needs],
    ids=lambda e: e.name,
)
losses = pytest.mark.parametrize("entry", entries(LOSSES, LOSS_GROUP), ids=lambda e: e.name)


def make_head(entry, num_labels: int = LABELS, *, seed: int = 0, **settings) -> Head:
    """The head with every parameter moved away from zero, so that gradients pass."""
    torch.manual_seed(seed)
    cls = load_entry(entry)
    roles = list(WIDTHS)[: cls.max_inputs or max(cls.min_inputs, 2)]
    inputs = {role: WIDTHS[role] for role in roles}
    if cls.needs:
        fields = [need.fields[0] for need in cls.needs] + list(cls.extras)
        inputs = {field: TOKENS[field] for field in fields if field in TOKENS}
        inputs |= {mask_of(f): TOKENS[f][:1] for f in list(inputs) if f in MASKED}
    wants_text = cls.wants_label_text or cls.takes_label_text
    text = torch.randn(num_labels, *TOKENS["image"]) if wants_text else None
    config = cls.Config(**{**SMALL.get(entry.name, {}), **settings})
    head: Head = cls(inputs, num_labels, config, label_text=text)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    # Nine rows in which all labels, the first two, and none occur together.
    rows = 3 * [list(range(num_labels)), list(range(min(2, num_labels))), []]
    indptr = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    indices = torch.tensor([label for row in rows for label in row], dtype=torch.int64)
    head.fit_labels(indptr, indices)
    return head.eval()


def make_batch(head: Head, rows: int = ROWS, seed: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    batch = {
        role: 3 + torch.randn(rows, *shape, generator=g) for role, shape in head.inputs.items()
    }
    for role, values in batch.items():
        if role.endswith("_mask"):
            batch[role] = values > 3
            batch[role][0] = False  # a sample without any token
        elif role == "text_ids":
            batch[role] = torch.randint(30, values.shape, generator=g)
        elif role == "image_places":
            batch[role] = torch.randint(3, values.shape, generator=g).to(torch.int16)
        elif role == "boxes":
            batch[role] = values.sigmoid()
    return batch


def train(
    head: Head, entry_loss: Any, steps: int = 6, rows: int = ROWS, batch_size: int = 16
) -> Head:
    """A few epochs of the real engine on fixed data."""
    batch = make_batch(head, rows)
    head.fit_inputs([batch])
    with torch.no_grad():
        prepared = {key: value.clone() for key, value in head.prepare(batch).items()}
    g = torch.Generator().manual_seed(2)
    multilabel = "multilabel" in entry_loss.tasks
    if multilabel:
        targets = (torch.rand(rows, head.num_labels, generator=g) < 0.4).to(torch.int8)
        counts = targets.sum(0).double()
    else:
        targets = torch.randint(head.num_labels, (rows,), generator=g)
        counts = torch.bincount(targets, minlength=head.num_labels).double()
    loss = entry_loss(entry_loss.Config(), counts, torch.full_like(counts, rows))
    data = ResidentData(inputs=prepared, targets=targets)
    Engine(
        head,
        loss,
        train=data,
        val=data,
        task="multilabel" if multilabel else "multiclass",
        batch_size=batch_size,
        epochs=steps,
        lr=0.01,
        optim=OptimConfig(),
        seed=0,
        dtype=torch.float32,
    ).run()
    return head


def bce_class() -> Any:
    return load_entry(next(e for e in LOSSES if e.name == "bce"))


# -- heads -----------------------------------------------------------------------------------------


@heads
def test_logits_have_a_column_per_label(entry):
    head = make_head(entry)
    logits = head(make_batch(head))
    assert logits.shape == (ROWS, LABELS)
    assert logits.isfinite().all()
    assert logits.std(0).min() > 0  # different samples get different answers


@heads
def test_a_sample_does_not_depend_on_its_batch(entry):
    head = make_head(entry)
    batch = make_batch(head)
    one = head({role: values[7:8] for role, values in batch.items()})
    torch.testing.assert_close(one, head(batch)[7:8], rtol=1e-4, atol=1e-5)


@heads
def test_one_label(entry):
    head = make_head(entry, num_labels=1)
    assert head(make_batch(head)).shape == (ROWS, 1)


@heads
def test_forward_is_score_after_prepare(entry):
    head = make_head(entry)
    batch = make_batch(head)
    assert torch.equal(head(batch), head.score(head.prepare(batch)))


@heads
def test_float16_as_it_is_stored_gives_float32_logits(entry):
    head = make_head(entry)
    batch = {
        role: values.half() if values.is_floating_point() else values
        for role, values in make_batch(head).items()
    }
    logits = head(batch)
    assert logits.dtype == torch.float32
    wide = head({r: v.float() if v.is_floating_point() else v for r, v in batch.items()})
    torch.testing.assert_close(logits, wide)


@heads
def test_the_gradient_reaches_every_parameter(entry):
    head = make_head(entry)
    if not head.stages():
        assert not list(head.parameters())  # nothing to train, and so it says
        return
    head(make_batch(head)).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@heads
def test_the_stages_train_every_parameter(entry):
    head = make_head(entry)
    names = {name for name, _ in head.named_parameters()}
    prefixes = [prefix for stage in head.stages() for prefix in stage.trains]
    covered = {n for n in names if any(not p or n.startswith(f"{p}.") for p in prefixes)}
    assert covered == names
    assert len({stage.name for stage in head.stages()}) == len(head.stages())


@heads
def test_a_stage_scores_from_what_it_says_it_reads(entry):
    head = make_head(entry)
    prepared = head.prepare(make_batch(head))
    for stage in head.stages():
        read = {k: v for k, v in prepared.items() if stage.reads is None or k in stage.reads}
        assert (stage.score or head.score)(read).shape == (ROWS, LABELS)


@heads
def test_what_is_prepared_is_per_sample(entry):
    """The trainer keeps it by row, so its first axis must be the samples."""
    head = make_head(entry)
    batch = make_batch(head)
    some = head.prepare({role: values[5:9] for role, values in batch.items()})
    for key, values in head.prepare(batch).items():
        torch.testing.assert_close(values[5:9], some[key], rtol=1e-5, atol=1e-6)


@heads
def test_the_prior_is_the_answer_of_a_new_head(entry):
    cls = load_entry(entry)
    head = make_head(entry)
    if not head.stages():
        pytest.skip("nothing is trained")
    new = cls(head.inputs, LABELS, head.config, label_text=None).eval()
    prior = torch.linspace(-3, 1, LABELS)
    new.set_prior(prior)
    torch.testing.assert_close(new(make_batch(new)), prior.expand(ROWS, -1))


@heads
def test_the_same_seed_gives_the_same_weights(entry):
    first, second = (train(make_head(entry), bce_class()).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    if not make_head(entry).stages():
        return
    untrained = make_head(entry).state_dict()
    assert any(not torch.equal(first[key], untrained[key]) for key in first)


@pooled_heads
def test_a_batch_of_65536_trains(entry):
    """What it learns is finite, and not what it started from."""
    untrained = make_head(entry).state_dict()
    head = train(make_head(entry), bce_class(), steps=1, rows=70_000, batch_size=65_536)
    assert all(v.isfinite().all() for v in head.state_dict().values() if v.is_floating_point())
    if head.stages():
        assert any(not torch.equal(v, untrained[k]) for k, v in head.state_dict().items())


@heads
@pytest.mark.parametrize("num_labels", [1, LABELS])
def test_saved_and_loaded_it_gives_equal_logits(entry, num_labels):
    head = train(make_head(entry, num_labels), bce_class())
    cls = load_entry(entry)
    again = cls(head.inputs, num_labels, head.config, label_text=None)
    again.load_state_dict(load(save(head.state_dict())))
    batch = make_batch(head, seed=3)
    assert torch.equal(again.eval()(batch), head.eval()(batch))


token_heads = pytest.mark.parametrize(
    "entry", [e for e in entries(HEADS, HEAD_GROUP) if load_entry(e).needs], ids=lambda e: e.name
)


@token_heads
def test_what_is_behind_a_mask_changes_nothing(entry):
    head = make_head(entry)
    batch = make_batch(head)
    masked = [role for role in batch if role.endswith("_mask")]
    if not masked:
        pytest.skip("none of its fields has a mask")
    noisy = {role: values.clone() for role, values in batch.items()}
    for role in noisy:
        for mask in masked:
            if mask_of(EXTRA_OF.get(role, role)) == mask:
                fill = 7 if role == "text_ids" else torch.nan
                noisy[role][~batch[mask]] = fill
    expected = head(batch)
    assert torch.equal(head(noisy), expected)
    assert expected.isfinite().all()
    shown = {role: torch.ones_like(v) if role in masked else v for role, v in batch.items()}
    assert not torch.equal(head(shown), expected)  # what is not behind it counts


@token_heads
def test_a_pass_without_gradients_gives_the_same_logits(entry, monkeypatch):
    """It takes some samples at a time, so that its memory is bounded."""
    head = make_head(entry)
    batch = make_batch(head)
    expected = head(batch)
    monkeypatch.setattr("mmc.heads.models.tokens.PASS_FLOATS", 1)
    with torch.no_grad():
        torch.testing.assert_close(head(batch), expected, rtol=1e-4, atol=1e-5)


@token_heads
def test_bf16_autocast_is_close(entry):
    head = make_head(entry)
    batch = make_batch(head)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head.score(head.prepare(batch))
    expected = head(batch)
    assert (logits.float() - expected).abs().mean() < 0.05 * expected.std()


@token_heads
def test_ten_thousand_labels(entry):
    head = make_head(entry, num_labels=10_000)
    batch = make_batch(head, rows=3)
    targets = torch.zeros(3, 10_000)
    targets[:, :5] = 1
    labels = head.select_labels(targets)
    prepared = head.prepare(batch)
    if labels is not None:
        assert set(range(5)) <= set(labels.tolist())
        prepared["labels"] = labels
    head.score(prepared).sum().backward()
    with torch.no_grad():
        assert head(batch).shape == (3, 10_000)
    assert 1 <= head.largest_batch < 2**20


@heads
def test_every_setting_of_a_head_says_what_it_does(entry):
    config = load_entry(entry).Config
    assert {field.name for field in fields(config)} == set(field_docs(config))


# -- losses ----------------------------------------------------------------------------------------


def make_loss(entry, positives: list[float] | None = None, known: float = 100.0, **settings):
    cls = load_entry(entry)
    counts = torch.tensor(positives or [50.0, 20.0, 10.0, 5.0, 15.0])
    return cls(cls.Config(**settings), counts, torch.full_like(counts, known))


def make_targets(loss, rows: int, num_labels: int = LABELS, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    if "multilabel" in loss.tasks:
        return (torch.rand(rows, num_labels, generator=g) < 0.3).float()
    return torch.randint(num_labels, (rows,), generator=g)


@losses
def test_a_loss_is_one_float32_number(entry):
    loss = make_loss(entry)
    for rows in (1, 9):
        value = loss(torch.randn(rows, LABELS), make_targets(loss, rows))
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert value > 0


@losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_loss_is_stable_at_large_logits(entry, dtype):
    loss = make_loss(entry)
    targets = make_targets(loss, 8)
    for sign in (-100.0, 100.0):
        logits = torch.full((8, LABELS), sign, dtype=dtype)
        logits[:, 0] = -sign
        logits.requires_grad_()
        value = loss(logits, targets)
        value.backward()
        assert value.isfinite()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


@losses
def test_a_loss_has_the_gradient_that_finite_differences_have(entry):
    loss = make_loss(entry)
    targets = make_targets(loss, 6)
    logits = torch.randn(6, LABELS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), (logits,))


@losses
def test_unknown_targets_count_for_nothing(entry):
    loss = make_loss(entry)
    logits, targets = torch.randn(9, LABELS), make_targets(loss, 9)
    with_unknown = torch.cat([targets, torch.full_like(targets[:3], -1)])
    more = torch.cat([logits, 50 * torch.randn(3, LABELS)]).requires_grad_()
    value = loss(more, with_unknown)
    torch.testing.assert_close(value, loss(logits, targets))
    value.backward()
    assert more.grad is not None
    assert more.grad[9:].abs().max() == 0
    nothing = loss(more[9:], with_unknown[9:])
    assert nothing == 0


@losses
def test_a_loss_does_not_depend_on_the_order_of_samples(entry):
    loss = make_loss(entry)
    logits, targets = torch.randn(9, LABELS), make_targets(loss, 9)
    order = torch.randperm(9)
    torch.testing.assert_close(loss(logits, targets), loss(logits[order], targets[order]))


@losses
def test_the_mean_of_equal_halves(entry):
    loss = make_loss(entry)
    logits, targets = torch.randn(8, LABELS), make_targets(loss, 8)
    halves = [loss(logits[i : i + 4], targets[i : i + 4]) for i in (0, 4)]
    torch.testing.assert_close(loss(logits, targets), sum(halves) / 2)


@losses
@pytest.mark.parametrize("weight", ["none", "auto", "cap"])
def test_the_prior_minimises_the_loss(entry, weight):
    settings = {"pos_weight": weight, "pos_weight_cap": 3.0}
    cls = load_entry(entry)
    if not {field.name for field in fields(cls.Config)} >= set(settings):
        pytest.skip("the loss has no weights")
    rows = 20_000
    probe = cls(cls.Config(), torch.ones(LABELS), torch.ones(LABELS))
    targets = make_targets(probe, rows)
    multi_hot = targets if targets.ndim == 2 else torch.nn.functional.one_hot(targets, LABELS)
    counts = multi_hot.double().sum(0)
    loss = cls(cls.Config(**settings), counts, torch.full_like(counts, rows))
    constant = loss.prior().double().requires_grad_()
    loss(constant.expand(rows, -1), targets).backward()
    assert constant.grad is not None
    assert constant.grad.abs().max() < 1e-4


@losses
def test_one_class(entry):
    loss = make_loss(entry, positives=[30.0])
    value = loss(torch.randn(4, 1), make_targets(loss, 4, num_labels=1))
    assert value.isfinite()
    assert loss.prior().isfinite().all()


@losses
def test_a_label_that_never_or_always_occurs_has_a_finite_prior(entry):
    loss = make_loss(entry, positives=[0.0, 100.0])
    assert loss.prior().isfinite().all()
    assert loss.prior()[0] < loss.prior()[1]


@losses
def test_a_head_learns_with_it(entry):
    """The engine, a linear head and this loss bring the training loss down."""
    linear = next(e for e in HEADS if e.name == "linear")
    cls = load_entry(entry)
    head = train(make_head(linear, **cls.head_settings(cls.Config())), cls, steps=40)
    batch = make_batch(head)
    g = torch.Generator().manual_seed(2)
    multilabel = "multilabel" in cls.tasks
    if multilabel:
        targets: Tensor = (torch.rand(ROWS, LABELS, generator=g) < 0.4).float()
    else:
        targets = torch.randint(LABELS, (ROWS,), generator=g)
    loss = make_loss(entry)
    assert loss(head(batch), targets) < 0.9 * loss(torch.zeros(ROWS, LABELS), targets)


@losses
def test_every_setting_of_a_loss_says_what_it_does(entry):
    config = load_entry(entry).Config
    assert {field.name for field in fields(config)} == set(field_docs(config))


def test_the_engine_gets_every_row_once_per_epoch():
    """Here because every head's training rests on it."""
    rows = torch.arange(23).float()[:, None]
    batches = ResidentBatches({"x": rows}, torch.zeros(23, 2, dtype=torch.int8), 5, seed=1)
    seen = torch.cat([batch["x"].clone() for batch, _ in batches.epoch(0, 0)])
    assert sorted(seen[:, 0].tolist()) == list(range(23))
