"""`mmc pretrain`, then `mmc extract` with what it wrote."""

import json
from collections.abc import Callable

import pytest

SMALL = """
epochs: 4
projection: 16
vision: {image_size: 32, patch_size: 8, width: 32, layers: 1, heads: 2}
text: {tokens: 16, width: 32, layers: 1, heads: 2, vocabulary: 200}
"""


def test_pretrain_then_extract(mmc: Callable, dataset, tmp_path):
    out, config = tmp_path / "my.model", tmp_path / "small.yaml"
    config.write_text(SMALL, encoding="utf-8")
    result = mmc(
        *("pretrain", dataset, out, "--config", config, "--epochs", 1, "--batch-size", 20),
        *("--set", "mask.shape=units", "--set", "mask.unit=16", "--json"),
        *("--samples-per-epoch", 80),
    )
    assert result.code == 0, result.err
    report = result.json()
    assert (report["pairs"], report["val"], report["epochs"]) == (60, 20, 1)
    assert "of 1: loss" in result.err
    record = json.loads((out / "pretrain.json").read_text(encoding="utf-8"))
    assert record["patches"] == {
        "number": 16,
        "hidden": 8,
        "rule": "round(share * number), at least 1",
    }
    assert record["steps"] == 4
    command = ("extract", dataset, tmp_path / "s", "--backbone", f"hf:{out}", "--json")
    result = mmc(*command, "--fields", "image,text,image_tokens,text_tokens,text_mask")
    assert result.code == 0, result.err
    assert result.json()["embedded"] == 100
    again = mmc("pretrain", dataset, out, "--config", config)
    assert again.code == 2
    assert "is finished" in again.error


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--set", "mask.patchse=0.5"), "did you mean patches"),
        (("--set", "mask.patches=1.5"), "mask.patches must be in [0, 1)"),
        (("--set", "optim.val_samples=1"), "=1: optim.val_samples must be 2 or more"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
        (("--set", "vision.image_size=33"), "is not a multiple of vision.patch_size=16"),
        (("--tokenizer", "bert"), "write hf:NAME or hf:FOLDER"),
        (("--tokenizer", "hf:/nowhere"), "no such folder"),
        (("--text-column", "-"), "no sample with both a picture and a text"),
        (("--lr", "0"), "error: --lr must be above 0"),
        (("--track", "wandb"), "tensorboard"),
        (("--upsample", "2::1"), "--upsample has 2 factors for 1 sources"),
    ],
)
def test_what_is_wrong_is_one_line(mmc: Callable, dataset, tmp_path, args, says):
    result = mmc("pretrain", dataset, tmp_path / "out", *args)
    assert result.code == 2, result.err
    assert says in result.error
    assert not (tmp_path / "out").exists()
