"""A run of every released format still opens and gives the numbers that it gave.

``tests/golden/make_run.py`` made it. When this fails, mmc has changed, not the run: make the new
code read the old format, or raise the format number and keep this run beside the new one.
"""

import json
from pathlib import Path

import pytest
import torch

from mmc.heads.artifact import Run

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["run-v1"])
def test_a_released_run_still_answers_the_same(name: str) -> None:
    run = Run.load(GOLDEN / name)
    expected = json.loads((GOLDEN / f"{name}.expected.json").read_text())
    head = run.build_head()
    inputs = {role: torch.tensor(values) for role, values in expected["inputs"].items()}
    with torch.no_grad():
        logits = head(inputs)
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-5)
    # Inputs that all gave the same would prove little.
    assert logits.std(0).min() > 1e-3
    assert run.label_set == ("cat", "dog, large", "été")
    assert len(run.thresholds.values) == 3
    assert run.source["label_separator"] == "|"
    assert [entry["alias"] for entry in run.recipe()] == ["golden"]
    assert run.metrics["val"]["samples"] == 12
    assert run.history[0]["epoch"] == 3
