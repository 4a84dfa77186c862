"""`mmc tune`, then `mmc extract` with what it wrote."""

import json
from collections.abc import Callable

import pytest


def test_tune_then_extract(mmc: Callable, dataset, backbone, tmp_path):
    out = tmp_path / "my.lora"
    result = mmc(
        *("tune", dataset, out, "--backbone", backbone, "--epochs", 1, "--batch-size", 20),
        *("--targets", "out,v", "--set", "lora.rank=2", "--set", "optim.micro_batch=10"),
        *("--pairs", "exclude", "--samples-per-epoch", 40, "--json"),
    )
    assert result.code == 0, result.err
    report = result.json()
    assert (report["adapted"], report["pairs"], report["val"]) == (8, 60, 20)
    assert "of 1: loss" in result.err
    record = json.loads((out / "tune.json").read_text(encoding="utf-8"))
    assert record["config"]["lora"]["rank"] == 2
    assert record["steps"] == 2
    spec = f"{backbone}[lora={out}]"
    result = mmc("extract", dataset, tmp_path / "s", "--backbone", spec, "--name", "a", "--json")
    assert result.code == 0, result.err
    assert result.json()["embedded"] == 100
    again = mmc("tune", dataset, out, "--backbone", backbone)
    assert again.code == 2
    assert "is finished" in again.error


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--set", "lora.rang=4"), "rank"),
        (("--set", "rank=4"), "lora.KEY=VALUE"),
        (("--targets", "attention"), "out, q, k, v, mlp, conv"),
        (("--upsample", "2::1"), "2 factors for 1 sources"),
        (("--pair-column", "valid"), "its columns are"),
        (("--text-column", "-"), "no sample with both a picture and a text"),
        (("--backbone", "torchvision:resnet18/none"), "none"),
    ],
)
def test_what_is_wrong_is_one_line(mmc: Callable, dataset, backbone, tmp_path, args, says):
    result = mmc("tune", dataset, tmp_path / "out", "--backbone", backbone, *args)
    assert result.code == 2, result.err
    assert says in result.error
    assert not (tmp_path / "out").exists()
