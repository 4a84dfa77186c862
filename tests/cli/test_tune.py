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


def test_a_head_is_trained_along_and_taken_apart(mmc: Callable, dataset, backbone, tmp_path):
    """The run gives on new data what the head gave while it was trained."""
    out = tmp_path / "my.lora"
    result = mmc(
        *("tune", dataset, out, "--backbone", backbone, "--epochs", 6, "--batch-size", 20),
        *("--head", "fusion", "--set", "head.width=16", "--set", "head.layers=1", "--lr", 3e-3),
        *("--set", "optim.micro_batch=10", "--precision", "float32", "--json"),
    )
    assert result.code == 0, result.err
    report = result.json()
    assert report["after"]["head"] > report["before"]["head"] + 0.05
    record = json.loads((out / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["training"] == {"store": str((out / "store").absolute())}
    assert record["head"] == "fusion"
    assert record["head_config"]["width"] == 16
    assert record["metrics"]["val"]["mAP"] == pytest.approx(report["after"]["head"], abs=0.02)
    predictions = tmp_path / "predictions.csv"
    result = mmc("predict", out / "run", dataset / "test.csv", "--out", predictions)
    assert result.code == 0, result.err
    assert len(predictions.read_text(encoding="utf-8").splitlines()) == 21


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--set", "lora.rang=4"), "rank"),
        (("--set", "rank=4"), "lora.KEY=VALUE"),
        (("--targets", "attention"), "out, q, k, v, mlp, conv"),
        (("--upsample", "2::1"), "2 factors for 1 sources"),
        (("--pair-column", "valid"), "its columns are"),
        (("--head", "router"), "trained in stages"),
        (("--head", "zero_shot"), "label texts"),
        (("--head", "fuzion"), "fusion"),
        (("--head", "linear", "--set", "head.normalize=none"), "normalize=none"),
        (("--head", "linear", "--loss", "ce"), "this one is multilabel"),
        (("--head", "linear", "--label-column", "-"), "--head needs labels"),
        (("--loss", "bce"), "name it with --head"),
        (("--set", "head.width=3"), "name it with --head"),
        (("--set", "optim.metric=head"), "goes with --head"),
        (("--text-column", "-"), "no sample with both a picture and a text"),
        (("--backbone", "torchvision:resnet18/none"), "none"),
    ],
)
def test_what_is_wrong_is_one_line(mmc: Callable, dataset, backbone, tmp_path, args, says):
    result = mmc("tune", dataset, tmp_path / "out", "--backbone", backbone, *args)
    assert result.code == 2, result.err
    assert says in result.error
    assert not (tmp_path / "out").exists()
