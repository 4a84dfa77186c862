"""What a step is made of: schedules, precision, compiling, and going on from a checkpoint."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mmc.heads import devices
from mmc.heads.artifact import Run
from mmc.heads.batches import ResidentBatches
from mmc.heads.devices import training_dtype
from mmc.heads.metrics import score
from mmc.heads.models.linear import Linear
from mmc.heads.options import TrainConfig
from mmc.heads.splits import targets as targets_of
from mmc.heads.trainer import train
from mmc.store import EmbeddingStore
from mmc.store.errors import MmcError


class Stopped(Exception):
    """Raised by a test to end a training early."""


def config(head: str, *settings: str, **changes) -> TrainConfig:
    values = {"epochs": 40, "batch_size": 8, "device": "cpu", "precision": "float32", **changes}
    return TrainConfig(head=head, settings=settings, **values)


def stop_after(rounds: int) -> Callable[..., None]:
    seen = []

    def stop(*args: object) -> None:
        seen.append(args)
        if len(seen) == rounds:
            raise Stopped

    return stop


def same_bits(a: Path, b: Path) -> bool:
    first, second = Run.load(a).state, Run.load(b).state
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# -- schedules and stages --------------------------------------------------------------------------


def test_a_plateau_lowers_the_rate_of_its_stage(make_store: Callable, tmp_path):
    """Labels of noise soon stop improving; each stage starts at the full rate."""
    settings = ("optim.schedule=plateau", "optim.plateau_patience=0", "optim.plateau_factor=0.5")
    more = ("optim.patience=3", "optim.warmup=0")
    wanted = config("router", *settings, *more, epochs=2000, lr=0.02)
    history = train(make_store(noise=40.0), tmp_path / "run", wanted).run.history
    stages = list(dict.fromkeys(row["stage"] for row in history))
    assert len(stages) == 3
    for stage in stages:
        rows = [row for row in history if row["stage"] == stage]
        scale, since = 1.0, 0
        for row in rows:
            assert row["lr"] == pytest.approx(0.02 * scale)
            since = 0 if row["best"] else since + 1
            scale *= 0.5 if since else 1.0
        # Trained until it stopped improving, not until the epochs were over.
        assert since == 3
        assert rows[-1]["epoch"] < 2000


@pytest.mark.parametrize("head", ["router", "ensemble"])
def test_a_stage_ends_with_its_best_parameters(make_store: Callable, tmp_path, head):
    """A classifier is not touched after its stage where the later ones do not train it."""
    store = make_store(n=120, noise=2.0)
    settings = ("head.classifier_lr=0",) if head == "router" else ()
    run = train(store, tmp_path / "run", config(head, *settings, epochs=200, lr=0.03)).run
    model = run.build_head()
    model.load_state_dict(run.state)
    rows = store.rows(split="val", features=["clip/image", "clip/text"])
    rows = np.array([row for row in rows if row != 3])  # which has no labels
    targets = targets_of(store, rows)
    batch = {
        role: torch.from_numpy(store[f"clip/{role}"].take(rows)).float()
        for role in ("image", "text")
    }
    with torch.no_grad():
        prepared = model.eval().prepare(batch)
        for index, role in enumerate(("image", "text")):
            logits = model.classifiers[index](prepared[role])
            best = max(r["val_mAP"] for r in run.history if r["stage"] == f"classifier {role}")
            assert score(logits, targets, "multilabel", "mAP") == pytest.approx(best, abs=1e-6)


# -- going on --------------------------------------------------------------------------------------

EVERYTHING = (
    "head.hidden=8",
    "optim.ema=0.9",
    "optim.accumulation=3",
    "optim.schedule=plateau",
    "optim.plateau_patience=0",
    "optim.patience=3",
    "optim.checkpoint_seconds=0",
)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_stopped_and_continued_it_ends_in_the_same_bits(make_store: Callable, tmp_path, precision):
    store = make_store(noise=5.0)
    wanted = config("mlp", *EVERYTHING, epochs=120, lr=0.02, precision=precision)
    whole = train(store, tmp_path / "whole", wanted).run.history
    rates = [row["lr"] for row in whole]
    assert min(rates) == pytest.approx(0.02 * 0.3**2), "lowered twice"
    lowest = rates.index(min(rates))
    for stop in {2, lowest + 1, len(whole)}:
        folder = tmp_path / f"stopped{stop}"
        with pytest.raises(Stopped):
            train(store, folder, wanted, progress=stop_after(stop))
        report = train(store, folder, wanted)
        assert report.resumed
        assert same_bits(tmp_path / "whole", folder)
        for before, after in zip(whole, report.run.history, strict=True):
            assert before | {"seconds": 0} == after | {"seconds": 0}


def test_the_average_is_taken_per_step(make_store: Callable, tmp_path):
    """Eight batches a step: with a decay of 0 the average is the parameters, of each step."""
    store = make_store()
    plain = config("linear", "optim.accumulation=2")
    train(store, tmp_path / "plain", plain)
    train(store, tmp_path / "average", config("linear", "optim.accumulation=2", "optim.ema=1e-30"))
    assert same_bits(tmp_path / "plain", tmp_path / "average")


# -- precision -------------------------------------------------------------------------------------


def watch(monkeypatch) -> list[tuple]:
    """What each score of a linear head computes with."""
    seen: list[tuple] = []
    own = Linear.score

    def watched(self, prepared):
        logits = own(self, prepared)
        kinds = {values.dtype for values in prepared.values()}
        how = torch.get_float32_matmul_precision()
        seen.append((self.training, kinds, logits.dtype, torch.is_autocast_enabled("cpu"), how))
        return logits

    monkeypatch.setattr(Linear, "score", watched)
    return seen


def test_float32_is_float32(make_store: Callable, tmp_path, monkeypatch):
    """Whatever the process has set; and what it has set is left."""
    store = make_store()
    train(store, tmp_path / "plain", config("linear"))
    seen = watch(monkeypatch)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            train(store, tmp_path / "run", config("linear"))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    steps = [what for what in seen if what[0]]
    assert set(map(str, steps)) == {str((True, {torch.float32}, torch.float32, False, "highest"))}
    assert same_bits(tmp_path / "plain", tmp_path / "run")


def test_bf16_is_the_same_inside_another_autocast(make_store: Callable, tmp_path):
    """Whose cache of rounded weights would outlive the steps that change them."""
    store, wanted = make_store(), config("mlp", "head.hidden=8", precision="bf16")
    train(store, tmp_path / "plain", wanted)
    with torch.autocast("cpu", torch.bfloat16):
        train(store, tmp_path / "run", wanted)
    assert same_bits(tmp_path / "plain", tmp_path / "run")


def test_bf16_multiplies_in_bf16_and_keeps_float32(make_store: Callable, tmp_path, monkeypatch):
    seen = watch(monkeypatch)
    run = train(make_store(), tmp_path / "run", config("linear", precision="bf16")).run
    assert {str(what[1:4]) for what in seen if what[0]} == {
        str(({torch.bfloat16}, torch.bfloat16, True))
    }
    assert {str(what[1:4]) for what in seen if not what[0]} == {
        str(({torch.float32}, torch.float32, False))
    }
    assert {v.dtype for v in run.state.values() if v.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(("there", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_is_the_default_where_there_are_units_for_it(monkeypatch, there, dtype):
    monkeypatch.setattr(devices, "has_bf16", lambda device: there)
    assert training_dtype("auto", torch.device("cpu")) == dtype
    assert training_dtype("float32", torch.device("cpu")) == torch.float32


# -- compiling -------------------------------------------------------------------------------------


def trained(store: EmbeddingStore, folder: Path, *settings: str) -> Run:
    return train(store, folder, config("linear", *settings, batch_size=9)).run


@pytest.fixture
def no_trace_of_compiling(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("default")  # what a compiler warns of is no concern of ours
def test_a_compiled_head_learns_the_same(
    make_store: Callable, tmp_path, monkeypatch, no_trace_of_compiling
):
    """Without the C++ compiler, which takes ten seconds; the next test shows that it is called."""
    import torch._dynamo.utils as dynamo

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda score: whole(score, backend="aot_eager"))
    store = make_store()
    plain = trained(store, tmp_path / "plain")
    dynamo.counters.clear()
    compiled = trained(store, tmp_path / "compiled", "optim.compile=true")
    assert dynamo.counters["stats"]["unique_graphs"] >= 1
    for key, value in plain.state.items():
        torch.testing.assert_close(compiled.state[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("default")
def test_a_missing_compiler_is_said(
    make_store: Callable, tmp_path, monkeypatch, no_trace_of_compiling
):
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("/no/such/compiler",))
    with pytest.raises(MmcError, match=r"torch\.compile failed .*optim\.compile"):
        trained(make_store(), tmp_path / "run", "optim.compile=true")


def test_other_errors_are_left_as_they_are():
    from mmc.heads.compiling import compiler_errors

    with pytest.raises(RuntimeError, match="shapes"), compiler_errors():
        raise RuntimeError("shapes")


def test_an_empty_part_of_a_batch_still_chooses_labels(make_store: Callable, tmp_path, monkeypatch):
    """Choosing is joint: a process that left it out would leave the others waiting."""
    asked: list[int] = []

    def choose(self, targets):
        asked.append(len(targets))

    def empty_first(self, stage, epoch):
        batch, targets = self._gather.batch(0)
        yield batch, targets
        yield from epochs(self, stage, epoch)

    epochs = ResidentBatches.epoch
    monkeypatch.setattr(Linear, "select_labels", choose)
    monkeypatch.setattr(ResidentBatches, "epoch", empty_first)
    settings = config("linear", "optim.accumulation=2", epochs=1, batch_size=64)
    train(make_store(), tmp_path / "run", settings)
    assert asked[0] == 0
    assert asked[1] > 0
