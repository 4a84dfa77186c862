"""`mmc tune`, from a source to an adapter that `mmc extract` uses: what it trains and refuses."""

import csv
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tars import jpeg, write_tar
from tiny_models import tiny_bert, tiny_hf_clip, tiny_open_clip, tiny_vit
from torch import nn

from mmc.extract.backbones import load_backbone
from mmc.extract.options import ExtractConfig
from mmc.extract.pipeline import extract
from mmc.extract.sources import SourceOptions
from mmc.extract.training.data import PairSet, Sampler, read_pairs
from mmc.extract.training.loop import Position, silent
from mmc.extract.training.measure import alikeness, chance, retrieval, zero_shot
from mmc.extract.tuning.options import LoraConfig, OptimConfig, TuneConfig, TuneReport, groups
from mmc.extract.tuning.tune import _Tuning, tune
from mmc.store import EmbeddingStore
from mmc.store.errors import InputError, MmcError

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "small": (9, 9, 9)}
HEADER = ["id", "image", "text", "label", "split", "pair", "kind"]


def make_set(folder: Path, each: int = 5, bad: bool = False) -> Path:
    """Pictures of a left and a right colour, captions that name both: 16 kinds of pairs."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    rows = [HEADER]
    for number in range(each):
        for left, one in COLOURS.items():
            for right, other in COLOURS.items():
                name = f"{left}-{right}-{number}"
                pixels = np.empty((32, 32, 3))
                pixels[:, :16], pixels[:, 16:] = one, other
                pixels += draw.integers(-25, 26, pixels.shape)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")
                split = ("val", "test", "train")[min(number, 2)]
                caption = f"a {left} and a {right} {('car', 'dog', 'tree', 'house')[number % 4]}"
                rows.append([name, f"{name}.png", caption, left, split, "1", left])
    if bad:
        (folder / "green-red-3.png").write_bytes(b"not a picture")
    return write_table(folder / "pairs.csv", rows)


def read_table(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def write_table(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("set") / "set")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_hf_clip(tmp_path_factory.mktemp("model") / "clip")


SOURCE = SourceOptions(
    image_column="image", text_column="text", label_column="label", split_column="split"
)


def config(backbone: str, **settings: Any) -> TuneConfig:
    """Short, in float32, on the CPU, unless ``settings`` say otherwise."""
    defaults = {
        "precision": "float32",
        "device": "cpu",
        "batch_size": 16,
        "epochs": 2,
        "lr": 3e-3,
        "workers": 2,
        "source": SOURCE,
    }
    return TuneConfig(backbone=backbone, **{**defaults, **settings})


def run(
    table: Any,
    out: Path,
    backbone: str,
    *,
    said: list[str] | None = None,
    progress: Callable = silent,
    head: Any = None,
    **settings: Any,
) -> TuneReport:
    return tune(
        str(table),
        out,
        config(backbone, **settings),
        head=head,
        report=[].append if said is None else said.append,
        progress=progress,
    )


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


def embed(table: Path, store: Path, spec: str) -> np.ndarray:
    settings = ExtractConfig(
        backbones=(spec,),
        names=("clip",),
        precision="float32",
        device="cpu",
        workers=1,
        source=SOURCE,
    )
    extract(str(table), str(store), settings, report=lambda line: None)
    opened = EmbeddingStore.open(str(store))
    rows = slice(0, len(opened))
    return np.concatenate([opened[f"clip/{name}"].take(rows) for name in ("image", "text")])


def test_a_domain_that_the_backbone_does_not_know(table: Path, clip: str, tmp_path: Path):
    """Random towers find one text in sixteen; tuned ones most; the head of the work is real."""
    said: list[str] = []
    report = run(
        table,
        tmp_path / "out",
        clip,
        targets=("out", "q", "k", "v", "mlp"),
        epochs=25,
        lr=1e-2,
        said=said,
        lora=LoraConfig(logit_scale=True),
    )
    assert report.before["image_to_text_R@1"] < 0.3
    assert report.after["image_to_text_R@1"] > 0.6
    assert report.after["text_to_image_R@1"] > 0.6
    assert report.after["zero_shot"] > report.before["zero_shot"] + 0.3
    assert (report.pairs, report.val, report.failed) == (48, 16, 0)
    assert any(line.startswith("before: ") for line in said)
    assert not any(line.startswith("warning: ") for line in said)
    record = json.loads((tmp_path / "out" / "tune.json").read_text(encoding="utf-8"))
    assert record["after"] == report.after
    assert record["config"]["lr"] == 1e-2
    with (tmp_path / "out" / "history.csv").open(encoding="utf-8") as file:
        history = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in history] == list(range(26))
    best, highest = history[1], 0.0
    for row in history[1:]:
        share, loss = float(row["val_retrieval"]), float(row["val_loss"])
        highest = max(highest, share)
        least = highest - math.sqrt(share * (1 - share) / report.val)
        lower = loss < float(best["val_loss"])
        if share >= least and (lower or float(best["val_retrieval"]) < least):
            best = row
    assert int(best["epoch"]) == report.best_epoch == record["best_epoch"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "tune.json", "history.csv"}


@pytest.mark.parametrize("lr", [1e-2, 3.0])
def test_features_that_become_alike_are_said_once(
    lr: float, table: Path, clip: str, tmp_path: Path
):
    said: list[str] = []
    targets = ("out", "q", "k", "v", "mlp")
    run(table, tmp_path / "out", clip, targets=targets, epochs=3, lr=lr, said=said)
    with (tmp_path / "out" / "history.csv").open(encoding="utf-8") as file:
        history = list(csv.DictReader(file))
    least = min(
        min(1 - float(row[name]) for row in history[1:]) / (1 - float(history[0][name]))
        for name in ("val_image_cosine", "val_text_cosine")
    )
    assert (least < 0.1) == (lr == 3.0)
    assert len([line for line in said if "become alike" in line]) == (lr == 3.0)


def test_alikeness_is_the_mean_cosine_of_different_rows():
    features = torch.nn.functional.normalize(torch.randn(7, 5), dim=1)
    cosines = features @ features.T
    wanted = (cosines.sum() - cosines.trace()) / (7 * 6)
    assert alikeness(features) == pytest.approx(float(wanted), abs=1e-6)
    assert alikeness(features[:1].repeat(3, 1)) == pytest.approx(1)


def test_a_recall_that_is_better_by_luck_does_not_replace_an_epoch_of_lower_loss():
    at = Position(best_score=0.0144, best_loss=4.76)
    assert not at.improves(0.0152, 5.79, noise=0.0044)
    assert at.improves(0.0139, 4.70, noise=0.0044)
    assert at.improves(0.0300, 5.79, noise=0.0061)
    assert not at.improves(0.0050, 4.70, noise=0.0025)
    assert Position().improves(0.0, 9.0, noise=0.1)


def test_many_small_steps_down_are_a_large_one():
    at = Position(highest=0.80, best_score=0.78, best_loss=0.9)
    assert not at.improves(0.76, 0.8, noise=0.025)  # as good as the kept one, not as the highest
    assert at.improves(0.79, 0.8, noise=0.025)
    at = Position(highest=0.52, best_score=0.50, best_loss=1.0)
    assert at.improves(0.54, 1.1, noise=0.025)  # small steps up are a large one, too


@pytest.mark.parametrize("build", [tiny_hf_clip, tiny_open_clip])
def test_extract_uses_the_adapter_and_the_merged_model_alike(
    build: Callable, table: Path, tmp_path: Path
):
    spec = build(tmp_path / "model")
    report = run(table, tmp_path / "out", spec, merge=True, lr=1e-2)
    family = spec.partition(":")[0]
    plain = embed(table, tmp_path / "plain", spec)
    tuned = embed(table, tmp_path / "tuned", f"{spec}[lora={report.out}]")
    merged = embed(table, tmp_path / "merged", f"{family}:{report.merged}")
    assert np.abs(tuned - merged).max() <= 1e-3  # float16 stores
    assert np.abs(tuned - plain).max() > 0.05
    base = load_backbone(spec, device="cpu", precision="float32").identity["weights"]
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["base_weights"] == base


def test_an_adapter_of_another_model_is_refused(table: Path, clip: str, tmp_path: Path):
    run(table, tmp_path / "out", clip, epochs=1)
    other = tiny_hf_clip(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="was trained on other weights"):
        load_backbone(f"{other}[lora={tmp_path / 'out'}]", device="cpu", precision="float32")


class Linear:
    """A head as `tune` takes it: one layer on both embeddings, with dropout."""

    identity: ClassVar = {"head": "linear"}
    lr = 0.01

    def build(self, image, text, labels, label_set, task):
        assert len(image) == len(text) == len(labels)
        assert task == "multiclass"
        width = image.shape[1] + text.shape[1]
        self.module = nn.Sequential(nn.Dropout(0.3), nn.Linear(width, len(label_set)))
        nn.init.zeros_(self.module[1].weight)
        nn.init.zeros_(self.module[1].bias)
        return self.module

    def _logits(self, image, text, training):
        return self.module.train(training)(torch.cat([image, text], 1))

    def loss(self, image, text, labels):
        rows = [row for row, some in enumerate(labels) if some is not None]
        targets = torch.tensor([labels[row][0] for row in rows])
        return nn.functional.cross_entropy(self._logits(image, text, True)[rows], targets)

    def measure(self, image, text, labels):
        right = self._logits(image, text, False).argmax(1) == torch.tensor([a for (a,) in labels])
        return float(right.double().mean())

    def finish(self, folder):
        assert (folder / "adapter_model.safetensors").exists()
        self.kept = {name: value.clone() for name, value in self.module.state_dict().items()}


def test_a_tuning_that_was_stopped_ends_in_the_same_bits(table: Path, clip: str, tmp_path: Path):
    settings = {
        "epochs": 4,
        "lora": LoraConfig(dropout=0.3, logit_scale=True),
        "optim": OptimConfig(checkpoint_epochs=2, micro_batch=6, weight_decay=0.1, metric="head"),
    }
    heads = Linear(), Linear(), Linear()
    first = run(table, tmp_path / "whole", clip, head=heads[0], **settings)
    assert first.after["head"] > first.before["head"]

    def stop(stage: str, done: int, total: int) -> None:
        if done == 8:  # of 12: in the third epoch
            raise KeyboardInterrupt

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(table, tmp_path / "stopped", clip, head=heads[1], progress=stop, said=said, **settings)
    assert "goes on from the checkpoint" in said[-1]
    assert (tmp_path / "stopped" / "checkpoints" / "last.safetensors").exists()
    assert not (tmp_path / "stopped" / "tune.json").exists()
    with pytest.raises(InputError, match=r"other settings \(config.lr: 0.003 -> 0.5\)"):
        run(table, tmp_path / "stopped", clip, head=heads[1], lr=0.5, **settings)
    steps: list[int] = []
    report = run(
        table,
        tmp_path / "stopped",
        clip,
        head=heads[2],
        progress=lambda stage, done, total: steps.append(done),
        **settings,
    )
    assert report.resumed
    assert steps == list(range(7, 13))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "stopped" / name).read_bytes() == whole
    whole, stopped = (read_table(tmp_path / n / "history.csv") for n in ("whole", "stopped"))
    assert whole[0][-1] == "seconds"
    assert [row[:-1] for row in whole] == [row[:-1] for row in stopped]
    assert not (tmp_path / "stopped" / "checkpoints").exists()
    for name, value in heads[0].kept.items():
        assert torch.equal(heads[2].kept[name], value)
        assert value.any()


def test_what_is_finished_is_kept(table: Path, clip: str, tmp_path: Path):
    run(table, tmp_path / "out", clip)
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(InputError, match="is finished; name another folder, or --overwrite"):
        run(table, tmp_path / "out", clip, epochs=3)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    record = (tmp_path / "out" / "tune.json").read_bytes()
    for source, backbone, said in (
        (tmp_path / "absent.csv", clip, "there is no file"),
        (table, f"hf:{tmp_path}/absent", "no such folder"),
    ):
        with pytest.raises(InputError, match=said):
            run(source, tmp_path / "out", backbone, overwrite=True)
        assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
        assert (tmp_path / "out" / "tune.json").read_bytes() == record
    run(table, tmp_path / "out", clip, epochs=3, overwrite=True, merge=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != before
    merged = tmp_path / "out" / "merged"
    with pytest.raises(InputError, match="holds what the tuning begins with"):
        run(table, tmp_path / "out", f"hf:{merged}", overwrite=True)
    assert (merged / "model.safetensors").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds other content"):
        run(table, tmp_path / "other", clip)


def test_pairs_with_one_text_everywhere_are_told(table: Path):
    header, *rows = read_table(table)
    same = table.parent / "same.csv"
    write_table(same, [header, *([*row[:2], "one", *row[3:]] for row in rows)])

    def notes(path: Path) -> list[str]:
        return read_pairs(str(path), SOURCE, None, workers=1, report=lambda line: None).notes

    assert notes(table) == []
    assert notes(same) == ["warning: all pairs of train have one text: nothing tells them apart"]


def test_pairs_that_the_mask_leaves_out_add_nothing(table: Path, clip: str, tmp_path: Path):
    """The adapter is that of a table without them, whatever their pictures and texts are."""
    rows = read_table(table)
    keep = [place % 3 != 0 for place in range(len(rows))]
    masked = [
        [*row[:5], "1" if kept else "0", row[6]] for row, kept in zip(rows, keep, strict=True)
    ]
    masked[0] = HEADER
    wrong = [[*row[:2], row[2] if row[5] == "1" else "green green", *row[3:]] for row in masked[1:]]
    write_table(table.parent / "masked.csv", [HEADER, *wrong])
    write_table(
        table.parent / "without.csv",
        [HEADER, *(row for row, kept in zip(rows[1:], keep[1:], strict=True) if kept)],
    )
    said: list[str] = []
    first = run(
        table.parent / "masked.csv", tmp_path / "masked", clip, pair_column="pair", said=said
    )
    apart = sum(not kept for kept in keep[1:])
    assert f"pair: {apart} of {len(rows) - 1} pairs do not belong together" in said
    second = run(table.parent / "without.csv", tmp_path / "without", clip)
    assert first.pairs == second.pairs == 32
    ours, theirs = adapter(tmp_path / "masked"), adapter(tmp_path / "without")
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("rule", ["positives", "exclude"])
def test_labels_decide_who_is_a_negative(rule: str, table: Path, clip: str, tmp_path: Path):
    run(table, tmp_path / "own", clip, epochs=1)
    run(table, tmp_path / rule, clip, epochs=1, pairs=rule)
    own, other = adapter(tmp_path / "own"), adapter(tmp_path / rule)
    assert not all(torch.equal(own[name], other[name]) for name in own)
    unlabelled = SourceOptions(
        image_column="image", text_column="text", label_column="-", split_column="split"
    )
    with pytest.raises(InputError, match=f"--pairs {rule} goes by labels"):
        run(table, tmp_path / "none", clip, pairs=rule, source=unlabelled)


def test_pictures_that_cannot_be_used_are_counted(clip: str, tmp_path: Path):
    said: list[str] = []
    report = run(make_set(tmp_path / "bad", bad=True), tmp_path / "out", clip, said=said)
    assert report.failed == 1
    assert any(line.strip().startswith("green-red-3: ") for line in said)
    assert all(torch.isfinite(value).all() for value in adapter(tmp_path / "out").values())


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_precision_and_memory_are_a_matter_of_cost(
    precision: str, table: Path, clip: str, tmp_path: Path
):
    """Parts and checkpointed blocks compute the same; bfloat16 nearly the same."""
    run(table, tmp_path / "plain", clip, batch_size=48, epochs=3)
    small = OptimConfig(micro_batch=7, gradient_checkpointing=True)
    run(table, tmp_path / "small", clip, batch_size=48, epochs=3, optim=small, precision=precision)
    wanted, found = adapter(tmp_path / "plain"), adapter(tmp_path / "small")
    for name, value in wanted.items():
        close = 2e-4 if precision == "float32" else 0.2
        assert (found[name] - value).norm() <= close * value.norm(), name
        assert found[name].dtype == torch.float32


SECOND = """
import sys
from mmc.extract.sources import SourceOptions
from mmc.extract.tuning.options import LoraConfig, OptimConfig, TuneConfig
from mmc.extract.tuning.tune import _Tuning, tune
tune(sys.argv[1], sys.argv[2], eval(sys.argv[3]), report=print)
"""


def test_two_processes_train_as_one(clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As `torchrun` starts them: this process and another; one picture cannot be used."""
    table = make_set(tmp_path / "set", bad=True)
    settings = {
        "seed": 3,
        "lora": LoraConfig(dropout=0.2, logit_scale=True),
        "optim": OptimConfig(micro_batch=5, val_samples=15),
    }
    run(table, tmp_path / "one", clip, **settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    told = repr(config(clip, **settings))
    command = [sys.executable, "-c", SECOND, str(table), str(tmp_path / "two"), told]
    other = subprocess.Popen(
        command, env=os.environ | world | {"RANK": "1"}, stdout=subprocess.PIPE, text=True
    )
    for name, value in (world | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    report = run(table, tmp_path / "two", clip, **settings)
    assert other.communicate(timeout=180) == ("", None)  # the first alone speaks
    assert other.returncode == 0
    assert report.after["retrieval"] > 0
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-6)
    records = [json.loads((tmp_path / out / "tune.json").read_text()) for out in ("one", "two")]
    for name, value in records[0]["after"].items():
        assert records[1]["after"][name] == pytest.approx(value, abs=1e-4)
    assert [record["processes"] for record in records] == [1, 2]
    assert [record["failed"] for record in records] == [1, 1]


def tars(folder: Path, name: str, count: int) -> Path:
    members: dict[str, Any] = {}
    for number in range(count):
        key = f"{number:03d}"
        members |= {f"{key}.jpg": jpeg(number), f"{key}.txt": f"{name} {number}"}
        members[f"{key}.json"] = {"split": "val" if number % 4 == 0 else "train"}
    return write_tar(folder / f"{name}.tar", members)


def test_streams_of_tars_drawn_with_replacement(clip: str, tmp_path: Path):
    source = f"{tars(tmp_path, 'first', 24)}::{tars(tmp_path, 'second', 12)}"
    pairs = read_pairs(source, SourceOptions(), None, workers=1, report=lambda line: None)
    assert (len(pairs.splits["train"]), len(pairs.splits["val"])) == (27, 9)
    sampler = Sampler(pairs, factors=(1, 4), samples=6000, seed=0)
    drawn = sampler.epoch(0)
    assert len(drawn) == 6000
    assert set(drawn) == set(pairs.splits["train"])
    assert np.array_equal(drawn, sampler.epoch(0))
    assert not np.array_equal(drawn, sampler.epoch(1))
    counts = Counter(pairs.source[drawn].tolist())
    # 18 pairs of the first, 9 of the second, four times as often: 18 to 36.
    assert counts[1] / 6000 == pytest.approx(36 / 54, abs=0.03)
    once = Sampler(pairs, seed=0).epoch(0)
    assert sorted(once) == sorted(pairs.splits["train"])

    steps: list[int] = []
    run(
        source,
        tmp_path / "out",
        clip,
        upsample="1::4",
        samples_per_epoch=40,
        batch_size=8,
        source=SourceOptions(),
        progress=lambda stage, done, total: steps.append(total),
    )
    assert len(steps) == 10
    assert set(steps) == {10}
    with pytest.raises(InputError, match="3 factors for 2 sources"):
        run(source, tmp_path / "no", clip, upsample="1::2::3", source=SourceOptions())


def test_without_val_a_tenth_of_train_is_held_out(table: Path, clip: str, tmp_path: Path):
    rows = read_table(table)
    write_table(
        tmp_path / "train.csv",
        [HEADER[:4], *([row[0], str(table.parent / row[1]), *row[2:4]] for row in rows[1:])],
    )
    options = SourceOptions(allow_absolute_paths=True, label_column="label")
    pairs = read_pairs(
        str(tmp_path / "train.csv"), options, None, workers=1, report=lambda line: None
    )
    assert "held out" in pairs.notes[0]
    assert len(pairs.splits["train"]) + len(pairs.splits["val"]) == 80
    assert 2 <= len(pairs.splits["val"]) <= 16
    assert not set(pairs.splits["train"]) & set(pairs.splits["val"])


def test_captions_of_one_picture_are_held_out_together(tmp_path: Path):
    """Forty pictures with five captions each; every other caption has a copy of its picture."""
    rows = [HEADER[:4]]
    for number in range(200):
        picture, name = number // 5, f"{number // 5}{'-copy' if number % 2 else ''}.jpg"
        (tmp_path / name).write_bytes(jpeg(picture))
        rows.append([f"s{number}", name, f"caption {number}", "train"])
    table = write_table(tmp_path / "train.csv", rows)
    pairs = read_pairs(str(table), SourceOptions(), None, workers=1, report=lambda line: None)
    sides = {name: {row // 5 for row in rows.tolist()} for name, rows in pairs.splits.items()}
    assert sides["val"]
    assert not sides["train"] & sides["val"]
    assert len(sides["train"]) + len(sides["val"]) == 40
    # The copies were read to hold them out: they are no negatives of each other either.
    assert len(set(pairs.images.tolist())) == 40
    assert all(len(set(pairs.images[at : at + 5].tolist())) == 1 for at in range(0, 200, 5))


@pytest.mark.parametrize("pictures", [1, 3, 4, 5, 20])
def test_few_pictures_are_divided_or_refused(pictures: int, tmp_path: Path):
    """Two to train on and two to measure by, each with two captions."""
    rows = [HEADER[:4]]
    for number in range(2 * pictures):
        (tmp_path / f"{number // 2}.jpg").write_bytes(jpeg(number // 2))
        rows.append([f"s{number}", f"{number // 2}.jpg", f"caption {number}", "train"])
    table, options = str(write_table(tmp_path / "train.csv", rows)), SourceOptions()

    def read() -> PairSet:
        return read_pairs(table, options, None, workers=1, report=lambda line: None)

    if pictures < 4:
        with pytest.raises(InputError, match=rf"in its pairs \({pictures}\): at least 4"):
            read()
        return
    pairs = read()
    found = {name: len(set(pairs.images[rows].tolist())) for name, rows in pairs.splits.items()}
    assert sum(found.values()) == pictures
    assert min(found.values()) >= 2
    assert sum(map(len, pairs.splits.values())) == 2 * pictures


def test_a_loss_that_is_not_finite_says_what_helps(
    table: Path, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    broken = torch.tensor(torch.nan)
    monkeypatch.setattr(_Tuning, "step", lambda self, batch: broken)
    with pytest.raises(MmcError, match="in epoch 1; lower --lr, or choose --precision float32"):
        run(table, tmp_path / "out", clip, precision="bf16")
    with pytest.raises(MmcError, match=r"lower --lr, or raise optim\.warmup"):
        run(table, tmp_path / "out", clip, precision="float32")


def test_weights_that_are_no_numbers_at_the_end_of_an_epoch_are_not_kept(
    table: Path, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    step = _Tuning.step

    def break_last(self, batch):
        loss = step(self, batch)
        if self.at.step == 5:  # of 6: the losses of the last epoch are still numbers
            with torch.no_grad():
                self.job.adapters.parameters[0].fill_(torch.nan)
        return loss

    monkeypatch.setattr(_Tuning, "step", break_last)
    with pytest.raises(MmcError, match="not finite in epoch 2; lower --lr"):
        run(table, tmp_path / "out", clip)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_backbone_whose_weights_are_no_numbers(table: Path, clip: str, tmp_path: Path):
    shutil.copytree(clip.removeprefix("hf:"), tmp_path / "broken")
    path = tmp_path / "broken" / "model.safetensors"
    state = load_file(path)
    state["visual_projection.weight"][0, 0] = torch.nan
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="image features that are not finite: its weights are"):
        run(table, tmp_path / "out", f"hf:{tmp_path / 'broken'}")


def test_nothing_to_train_on(clip: str, tmp_path: Path):
    table = make_set(tmp_path / "set")
    for row in read_table(table)[1:]:
        if row[HEADER.index("split")] == "train":
            (table.parent / row[1]).write_bytes(b"no picture")
    with pytest.raises(MmcError, match=r"no picture of train can be used .*known format"):
        run(table, tmp_path / "out", clip)


def test_halves_that_a_killed_tuning_left_are_removed(table: Path, clip: str, tmp_path: Path):
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    for name in ("adapter_model.safetensors.77.partial", "checkpoints/last.safetensors.77.partial"):
        (out / name).write_bytes(b"half")
    (out / "thesis.tex.77.partial").write_bytes(b"not ours")
    run(table, out, clip)
    assert [path.name for path in out.rglob("*.partial")] == ["thesis.tex.77.partial"]


def test_factors_of_any_size_draw_from_all_sources():
    pairs: Any = SimpleNamespace(
        splits={"train": np.arange(200)}, source=np.repeat([0, 1], 100).astype(np.int64)
    )
    rows = Sampler(pairs, factors=(1e308, 1e308), seed=0).epoch(0)
    assert 60 < (rows < 100).sum() < 140


def test_pairs_without_labels_and_splits_train(tmp_path: Path):
    members: dict[str, Any] = {}
    for number in range(60):
        members |= {f"{number}.jpg": jpeg(number), f"{number}.txt": f"text {number}"}
    tar, said = str(write_tar(tmp_path / "pairs.tar", members)), list[str]()
    pairs = read_pairs(tar, SourceOptions(), None, workers=1, report=said.append)
    assert sum(map(len, pairs.splits.values())) == 60
    assert "all rows are train" in said[-1]
    divided = SourceOptions(split_by="hash:0.6,0.4")
    pairs = read_pairs(tar, divided, None, workers=1, report=said.append)
    assert {name: len(rows) > 3 for name, rows in pairs.splits.items()} == {
        "train": True,
        "val": True,
    }
    assert not pairs.notes


def test_retrieval_by_hand():
    """Three pictures; the first has two captions; one caption is shared by two pictures."""
    image = torch.eye(3)[torch.tensor([0, 0, 1, 2])]
    text = torch.tensor([[0.9, 0, 0], [0.1, 0.8, 0], [0, 0.2, 0.7], [0, 0.2, 0.7]])
    images, texts = np.array([5, 5, 7, 9]), np.array([0, 1, 2, 2])
    found = retrieval(image, text, images, texts)
    # Picture 5 finds its text 0; 7 finds text 1 before its own text 2; 9 finds text 2.
    assert found["image_to_text_R@1"] == pytest.approx(2 / 3)
    # Text 0 finds picture 5, text 1 picture 7 (wrong), text 2 picture 9, which is one of its own.
    assert found["text_to_image_R@1"] == pytest.approx(2 / 3)
    assert found["image_to_text_R@5"] == found["text_to_image_R@10"] == 1
    assert found["retrieval"] == pytest.approx((4 / 3 + 4) / 6)


def test_recalls_by_chance():
    each = np.arange(120)
    assert chance(each, each) == pytest.approx((1 + 5 + 10) / 3 / 120)
    assert chance(each[:4], each[:4]) == pytest.approx((1 / 4 + 1 + 1) / 3)
    # As above: one picture of three has two of the three texts, one text two of the pictures.
    images, texts = np.array([5, 5, 7, 9]), np.array([0, 1, 2, 2])
    assert chance(images, texts) == pytest.approx((2 * (2 / 3 + 1 / 3 + 1 / 3) / 3 + 4) / 6)
    assert chance(images.repeat(2), texts.repeat(2)) == pytest.approx(chance(images, texts))


def test_a_tuning_that_brings_nothing_is_not_praised(table: Path, clip: str, tmp_path: Path):
    said: list[str] = []
    report = run(table, tmp_path / "out", clip, epochs=1, lr=1e-9, batch_size=29, said=said)
    assert any(
        line.startswith("batches of 29: 1 an epoch, and 19 of the 48 pairs") for line in said
    )
    warnings = [line for line in said if line.startswith("warning: on val ")]
    assert "better than it was" in warnings[0]
    assert "hardly better than by chance" in warnings[1]
    guess = (1 + 5 + 10) / 3 / 16
    found = f"-> {report.after['retrieval']:.4f} on 16 val samples ({guess:.4f} by chance)"
    assert said[-2].endswith(found)


def test_features_that_are_all_alike_find_nothing():
    alike = torch.ones(12, 3)
    found = retrieval(alike, alike, np.arange(12), np.arange(12))
    assert set(found.values()) == {0.0}
    assert set(zero_shot(alike, alike[:7], [[0]] * 12).values()) == {0.0}


def test_features_that_are_no_numbers_find_nothing():
    rows, lost = np.arange(20), torch.full((20, 4), torch.nan)
    assert set(retrieval(lost, lost, rows, rows).values()) == {0.0}
    assert set(zero_shot(lost, lost[:7], [[0]] * 20).values()) == {0.0}


def test_zero_shot_by_hand():
    image = torch.eye(6)[:3]
    labels = torch.eye(6)[torch.tensor([0, 2, 1, 3, 4, 5])]
    found = zero_shot(image, labels, [[0], None, [1]])
    assert found == {"zero_shot": 1.0, "zero_shot_top5": 1.0}
    assert zero_shot(image, labels, [[1], [], None])["zero_shot"] == 0
    assert zero_shot(image, labels, [None, [], None]) == {}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pair_column": "pairs"}, "no column 'pairs' for --pair-column; its columns are"),
        ({"pair_column": "kind"}, r"kind is 'red'; a mask of pairs holds 1 and 0"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"batch_size": 1}, "a pair alone has no negatives"),
        ({"epochs": 0}, "--epochs must be 1 or more"),
        ({"lr": float("nan")}, "--lr must be above 0"),
        ({"targets": ("out", "attn")}, "--targets 'attn': choose from out, q, k, v, mlp, conv"),
        ({"pairs": "all"}, "--pairs 'all': choose from own, positives, exclude"),
        ({"upsample": "2::x"}, "write one number a source"),
        ({"upsample": "2::0"}, "factors must be above 0"),
        ({"upsample": "2::1"}, "2 factors for 1 sources"),
        ({"label_template": ("a photo",)}, "no {label} in it"),
        ({"source": SourceOptions(text_column="-")}, "no sample with both a picture and a text"),
        ({"source": SourceOptions(image_column="-")}, "no sample with both a picture and a text"),
    ],
)
def test_bad_settings(settings: dict, said: str, table: Path, clip: str, tmp_path: Path):
    with pytest.raises(InputError, match=said):
        run(table, tmp_path / "out", clip, **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("build", "options", "said"),
    [
        (tiny_vit, "", "has no text tower"),
        (tiny_bert, "", "has no image tower"),
        (tiny_hf_clip, "[lora=somewhere]", "mmc tune begins with the plain model"),
        (lambda folder: "torchvision:resnet18", "", "cannot be tuned"),
    ],
)
def test_backbones_that_cannot_be_tuned(
    build: Callable,
    options: str,
    said: str,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    spec = build(tmp_path / "model")
    if spec.startswith("torchvision"):
        monkeypatch.setattr("mmc.extract.tuning.towers.load_backbone", lambda *a, **k: object())
    with pytest.raises(InputError, match=said):
        run(table, tmp_path / "out", spec + options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_no_spec_can_name(table: Path, clip: str, tmp_path: Path):
    with pytest.raises(InputError, match="cannot stand in a spec"):
        run(table, tmp_path / "a,b", clip)


def test_two_tunings_do_not_share_a_folder(table: Path, clip: str, tmp_path: Path):
    def second(stage: str, done: int, total: int) -> None:
        with pytest.raises(MmcError, match="in use by another training"):
            run(table, tmp_path / "out", clip)

    run(table, tmp_path / "out", clip, epochs=1, progress=second)


def test_settings_of_parts():
    found = groups(["lora.rank=16", "lora.logit_scale=true", "optim.weight_decay=0.1"])
    assert found["lora"] == LoraConfig(rank=16, logit_scale=True)
    assert found["optim"] == OptimConfig(weight_decay=0.1)
    for pair, said in (
        ("lora.rang=3", "did you mean rank"),
        ("rank=3", "write lora.KEY=VALUE"),
        ("lora.rank=0", "lora.rank must be 1"),
        ("lora.dropout=1", r"lora.dropout must be in \[0, 1\)"),
        ("optim.metric=loss", "optim setting metric='loss'"),
    ):
        with pytest.raises(InputError, match=said):
            groups([pair])
