"""Temperature: it is found again, it never hurts, and it moves no decision of itself."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from torch import Tensor

from mmc.heads import metrics
from mmc.heads.artifact import Run
from mmc.heads.evaluate import evaluate, format_table
from mmc.heads.models.zero_shot import ZeroShot, ZeroShotConfig
from mmc.heads.options import PredictConfig, TrainConfig
from mmc.heads.predict import predict, predict_csv
from mmc.heads.temperature import fit_temperature, log_loss, probabilities
from mmc.heads.thresholds import Thresholds, decide
from mmc.heads.trainer import train
from mmc.store.errors import InputError

TASKS = ("multilabel", "binary", "multiclass")


def sample(task: str, n: int, labels: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and outcomes drawn from their probabilities: calibrated by construction."""
    random = np.random.default_rng(seed)
    labels = 2 if task == "binary" else labels
    logits = random.normal(-1, 2, (n, labels))
    if task == "multilabel":
        truth = (random.random((n, labels)) < scipy.special.expit(logits)).astype(np.int8)
    else:
        p = scipy.special.softmax(logits, axis=1)
        truth = (p.cumsum(1) < random.random((n, 1))).sum(1).clip(max=labels - 1)
    return torch.from_numpy(logits), torch.from_numpy(truth)


def reference_loss(logits: Tensor, targets: Tensor, task: str, t: float) -> float:
    """Mean log loss of the known, with NumPy."""
    x, y = logits.numpy() / t, targets.numpy()
    if task == "multilabel":
        signed = np.where(y == 1, x, -x)
        return float(-scipy.special.log_expit(signed)[y >= 0].mean())
    log_p = scipy.special.log_softmax(x[y >= 0], axis=1)
    return float(-log_p[np.arange(len(log_p)), y[y >= 0]].mean())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_a_known_factor_is_found_and_the_error_falls(task: str, factor: float) -> None:
    logits, targets = sample(task, 20_000)
    scaled = (logits * factor).float()
    found = fit_temperature(scaled, targets, task)
    assert found == pytest.approx(factor, rel=0.05)
    names = ["no", "yes"] if task == "binary" else list("abcde")
    result = metrics.evaluate(scaled, targets, task, label_set=names, temperature=found)
    assert result["temperature"] == found
    assert result["ece"] < 0.02 < result["ece_uncalibrated"]
    assert result["log_loss"] < result["log_loss_uncalibrated"]
    assert result["brier"] < result["brier_uncalibrated"]
    plain = metrics.evaluate(scaled, targets, task, label_set=names)
    for key in ("ece", "log_loss", "brier"):
        assert plain[key] == result[f"{key}_uncalibrated"]
    for key in ("mAP", "auroc", "auroc_macro"):
        assert plain.get(key) == result.get(key)


@pytest.mark.parametrize("task", TASKS)
def test_it_is_what_another_optimiser_finds(task: str) -> None:
    logits, targets = sample(task, 20_000, seed=3)
    logits = logits * 1.7
    targets[::7] = -1
    wanted = scipy.optimize.minimize(
        lambda b: reference_loss(logits, targets, task, 1 / b[0]), [1.0], method="Nelder-Mead"
    )
    # Smoothed outcomes move it a little, the less the more rows there are.
    assert fit_temperature(logits, targets, task) == pytest.approx(1 / wanted.x[0], rel=2e-3)
    for t in (1.0, 0.3, 2.5):
        ours = log_loss(logits, targets, task, t)
        assert ours == pytest.approx(reference_loss(logits, targets, task, t), abs=1e-9)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("n", [0, 1, 5, 12, 40, 300])
def test_it_never_hurts_where_it_was_fitted(task: str, n: int) -> None:
    for seed in range(5):
        logits, targets = sample(task, n, seed=seed)
        found = fit_temperature(logits, targets, task)
        assert 0.02 <= found <= 50
        if n:
            before, after = (log_loss(logits, targets, task, t) for t in (1.0, found))
            assert after <= before


def test_too_little_to_go_by_leaves_it_at_one() -> None:
    logits, targets = sample("multilabel", 4000)
    few = torch.where(targets == 1, -1, 0).to(torch.int8)
    few[:9, 0] = 1
    assert fit_temperature(logits * 4, few, "multilabel") == 1.0
    few[:10, 0] = 1
    assert fit_temperature(logits * 4, few, "multilabel") != 1.0
    logits, targets = sample("binary", 9)
    assert fit_temperature(logits * 4, targets, "binary") == 1.0
    one = torch.zeros(50, dtype=torch.int64)
    assert fit_temperature(torch.randn(50, 1), one, "multiclass") == 1.0
    assert math.isnan(log_loss(logits[:0], targets[:0], "binary"))


def test_rows_told_apart_without_error_do_not_ask_for_endless_sureness() -> None:
    targets = (torch.arange(60) % 2).long()
    margin = torch.where(targets == 1, 1.0, -1.0)
    logits = torch.stack([-margin, margin], 1)
    p = probabilities(logits, "binary", fit_temperature(logits, targets, "binary"))
    # As sure as Platt's targets of 60 rows: 61/62.
    torch.testing.assert_close(p.max(1).values, torch.full((60,), 61 / 62), rtol=1e-4, atol=0)


def test_large_sets_are_looked_at_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = sample("multilabel", 20_000)
    monkeypatch.setattr("mmc.heads.temperature.ENTRIES", 30_000)
    assert fit_temperature(logits * 3, targets, "multilabel") == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("task", TASKS)
def test_no_decision_moves_at_the_same_cut_of_the_logits(task: str) -> None:
    logits, _ = sample(task, 2000)
    t = 2.7
    cut = torch.tensor([0.5]) if task == "binary" else torch.tensor([0.5, 0.3, 0.9, 0.1, 0.62])
    moved = torch.special.logit(cut.double()).div(t).sigmoid()
    before, after = (
        Thresholds.default(task, 3) if task == "multiclass" else Thresholds(values=tuple(c))
        for c in (cut.double().tolist(), moved.tolist())
    )
    chosen = decide(probabilities(logits, task), task, before, at_least_one=True)
    again = decide(probabilities(logits, task, t), task, after, at_least_one=True)
    assert torch.equal(chosen, again)
    assert chosen.any()
    assert not chosen.all()


@pytest.mark.parametrize("task", TASKS)
def test_a_run_is_calibrated_everywhere(make_store: Callable, tmp_path: Path, task: str) -> None:
    store = make_store(task, n=400, noise=1.5)
    config = TrainConfig(head="linear", epochs=10, batch_size=32, lr=0.1, device="cpu")
    run = train(store, tmp_path / "run", config).run
    loaded = Run.load(tmp_path / "run")
    assert loaded.temperature == run.temperature != 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["temperature"] > 0
    for split in ("val", "test"):
        found = run.metrics[split]
        assert found["temperature"] == run.temperature
        assert evaluate(run, store, split, device="cpu")["ece"] == pytest.approx(found["ece"])
    assert run.metrics["val"]["log_loss"] < run.metrics["val"]["log_loss_uncalibrated"]
    said = predict(loaded, store, config=PredictConfig(split="test", device="cpu"))
    wanted = probabilities(said.logits, task, run.temperature)
    torch.testing.assert_close(said.probabilities, wanted, equal_nan=True)
    assert not torch.allclose(wanted.nan_to_num(), probabilities(said.logits, task).nan_to_num())
    report = predict_csv(
        loaded, store, tmp_path / "p.csv", PredictConfig(split="test", scores=True, form="wide")
    )
    assert report.ok
    line = (tmp_path / "p.csv").read_text().splitlines()[1].split(",")
    scores = [float(x) for x in line[1 + len(run.label_set) :]]
    assert scores == pytest.approx(wanted[0].tolist())
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"divided by {run.temperature:.4g}" in card
    assert "ECE without the temperature" in card
    assert "ECE without the temperature" in format_table(run.metrics)


def test_a_run_at_temperature_one_shows_each_figure_once(
    make_store: Callable, make_run: Callable, tmp_path: Path
) -> None:
    store = make_store()
    run = make_run(store)
    run.metrics["val"] = evaluate(run, store, "val")
    run.save(tmp_path / "run")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "without the temperature" not in card
    assert "as the head gives them: no temperature fits" in card


def test_new_labels_keep_the_temperature(make_store: Callable, make_run: Callable) -> None:
    """It is of the scale of the head's logits, which stays."""
    store = make_store()
    head = ZeroShot({"image": (8,)}, 5, ZeroShotConfig(), label_text=torch.eye(8)[:5])
    run = make_run(
        store, head="zero_shot", head_config={}, state=head.state_dict(), temperature=3.0
    )
    other = run.with_labels(["new", "bus"], np.eye(8)[[6, 0]])
    said = predict(other, store, config=PredictConfig(split="test", device="cpu"))
    wanted = (said.logits.double() / 3).sigmoid().float()
    torch.testing.assert_close(said.probabilities, wanted, equal_nan=True)


@pytest.mark.parametrize("value", [0, -1.0, "hot", None, [1]])
def test_a_damaged_temperature_is_named(
    make_store: Callable, make_run: Callable, tmp_path: Path, value: object
) -> None:
    make_run(make_store()).save(tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": value}))
    with pytest.raises(InputError, match="damaged at 'temperature'"):
        Run.load(tmp_path / "run")
