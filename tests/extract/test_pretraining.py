"""`mmc pretrain`, from a source to a model that `mmc extract` reads."""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bert, tiny_hf_clip, tiny_vision_text, tiny_vit

from mmc.extract.backbones import load_backbone
from mmc.extract.options import ExtractConfig
from mmc.extract.pipeline import extract
from mmc.extract.pretraining import saving
from mmc.extract.pretraining.forward import Forward
from mmc.extract.pretraining.idle import without_effect
from mmc.extract.pretraining.options import (
    AugmentConfig,
    LossConfig,
    MaskConfig,
    OptimConfig,
    PretrainConfig,
    PretrainReport,
    TextConfig,
    VisionConfig,
)
from mmc.extract.pretraining.pretrain import _Pretraining, pretrain
from mmc.extract.pretraining.reading import read_config
from mmc.extract.pretraining.setup import Setup
from mmc.extract.pretraining.validation import Validation
from mmc.extract.sources import SourceOptions
from mmc.extract.training.checkpoints import part
from mmc.extract.training.distributed import World
from mmc.extract.training.loop import silent
from mmc.extract.training.optim import lr_factor
from mmc.extract.tuning.options import TuneConfig
from mmc.extract.tuning.tune import tune
from mmc.store import EmbeddingStore
from mmc.store.errors import InputError, MmcError

HEADER = ["id", "image", "text", "split"]
SOURCE = SourceOptions(image_column="image", text_column="text", split_column="split")


def make_set(folder: Path, pairs: int = 32) -> Path:
    """Pictures whose colours fade across them, each its own way: what is hidden can be told.

    Each with a text whose words are of it alone. Train and val are the same.
    """
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    down, across = np.mgrid[-0.5:0.5:32j, -0.5:0.5:32j][..., None]
    rows = [HEADER]
    for number in range(pairs):
        slopes = draw.uniform(-120, 120, (2, 3))
        pixels = 128 + slopes[0] * down + slopes[1] * across
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        text = " ".join(f"{letter}{number}" for letter in "vwxyz")
        rows += [[f"{number}-{split}", f"{number}.png", text, split] for split in ("train", "val")]
    return write_table(folder / "pairs.csv", rows)


def write_table(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("set") / "set")


SIZES = {"width": 32, "layers": 1, "heads": 2}


def config(**settings: Any) -> PretrainConfig:
    """Small, short, in float32, on the CPU, unless ``settings`` say otherwise."""
    defaults: dict[str, Any] = {
        "precision": "float32",
        "device": "cpu",
        "batch_size": 16,
        "epochs": 2,
        "lr": 3e-3,
        "workers": 1,
        "projection": 16,
        "source": SOURCE,
        "vision": VisionConfig(**SIZES, image_size=32, patch_size=8),
        "text": TextConfig(**SIZES, tokens=16, vocabulary=300),
    }
    return PretrainConfig(**{**defaults, **settings})


def run(
    table: Any,
    out: Path,
    *,
    said: list[str] | None = None,
    progress: Callable = silent,
    **settings: Any,
) -> PretrainReport:
    report = [].append if said is None else said.append
    return pretrain(str(table), out, config(**settings), report=report, progress=progress)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def learn(table: Path, steps: int, lr: float, **settings: Any) -> tuple[dict[str, float], ...]:
    """Steps on one batch of 32 pairs, with new masks in each; what is measured before and after."""
    sizes: dict[str, Any] = {"width": 64, "layers": 2, "heads": 4}
    chosen = config(
        batch_size=32,
        vision=VisionConfig(**sizes, image_size=32, patch_size=8),
        text=TextConfig(**sizes, tokens=16, vocabulary=300, dropout=0),
        augment=AugmentConfig(crop=1),
        mask=MaskConfig(shape="patches"),
        optim=OptimConfig(weight_decay=0),
        **settings,
    )
    job = Setup(str(table), Path("out"), chosen, World(torch.device("cpu")), lambda line: None)
    training = _Pretraining(job)
    (batch,) = job.loader.batches(job.sampler.epoch(0), 32)
    before = training.measure()
    for step in range(steps):
        for group in training.optimizer.param_groups:
            group["lr"] = lr * lr_factor(step, steps, chosen.optim)
        training.step(batch)
        training.at.step += 1
    return before, training.measure()


def test_thirty_two_pairs_are_learnt_by_heart(table: Path):
    before, after = learn(table, 200, 3e-3)
    assert before["contrastive_loss"] > 3
    assert after["retrieval"] == 1
    assert after["contrastive_loss"] < 0.7
    assert after["text_accuracy"] > 0.9 > 0.3 > before["text_accuracy"]
    assert after["image_loss"] < 0.2 * before["image_loss"]


def test_what_is_written_down(made: Path):
    record = json.loads((made / "pretrain.json").read_text(encoding="utf-8"))
    assert record["patches"]["hidden"] == 6
    assert record["patches"]["number"] == 16
    assert (record["train"], record["val"], record["failed"]) == (32, 32, 0)
    with (made / "history.csv").open(encoding="utf-8") as file:
        history = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in history] == [0, 1, 2]
    best = min(history[1:], key=lambda row: float(row["val_loss"]))
    assert int(best["epoch"]) == record["best_epoch"]
    assert float(best["val_loss"]) == record["after"]["loss"]
    parts = sum(float(best[f"train_{name}_loss"]) for name in ("contrastive", "image", "text"))
    assert float(best["train_loss"]) == pytest.approx(parts, rel=1e-4)
    names = {path.name for path in made.iterdir()}
    assert names <= set(saving.FILES)
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "checkpoints"}
    events = b"".join(path.read_bytes() for path in (made / "tensorboard").rglob("events.out.*"))
    assert b"val_image_loss" in events
    assert b"mask.patches" in events  # the settings


@pytest.fixture(scope="module")
def made(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "model"
    run(table, out, track=("tensorboard",))
    return out


def test_extract_reads_both_towers(table: Path, made: Path, tmp_path: Path):
    """As transformers itself gives them; without a mask, whatever was trained."""
    settings = ExtractConfig(
        backbones=(f"hf:{made}",),
        names=("own",),
        fields=("image", "image_tokens", "text", "text_tokens", "text_mask"),
        precision="float32",
        device="cpu",
        workers=1,
        source=SOURCE,
    )
    extract(str(table), str(tmp_path / "store"), settings, report=lambda line: None)
    store = EmbeddingStore.open(str(tmp_path / "store"))
    model = transformers.VisionTextDualEncoderModel.from_pretrained(made).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    processor = transformers.AutoImageProcessor.from_pretrained(made)
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:6]
    pictures = [Image.open(table.parent / row["image"]).convert("RGB") for row in rows]
    words = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    words.pop("token_type_ids", None)
    with torch.no_grad():
        wanted = model(**words, pixel_values=processor(pictures, return_tensors="pt").pixel_values)
    for name, given in (("image", wanted.image_embeds), ("text", wanted.text_embeds)):
        found = torch.from_numpy(store[f"own/{name}"].take(slice(0, 6))).float()
        found = torch.nn.functional.normalize(found, dim=1)
        assert (found - given).abs().max() < 2e-3  # float16 stores
    states = wanted.vision_model_output.last_hidden_state[:, 1:].numpy()
    assert np.abs(store["own/image_tokens"].take(slice(0, 6)) - states).max() < 2e-2
    assert not any("mask_token" in name for name in weights(made))


def test_it_can_be_tuned_further(table: Path, made: Path, tmp_path: Path):
    settings = TuneConfig(
        backbone=f"hf:{made}",
        epochs=1,
        batch_size=16,
        precision="float32",
        device="cpu",
        workers=1,
        source=SOURCE,
    )
    report = tune(str(table), tmp_path / "out", settings, report=lambda line: None)
    assert report.adapted == 2  # the output projection of one block in each tower
    load_backbone(f"hf:{made}[lora={tmp_path / 'out'}]", device="cpu", precision="float32")


def test_the_best_checkpoint_gives_the_losses_that_were_recorded(table: Path, made: Path):
    job = Setup(str(table), made, config(), World(torch.device("cpu")), lambda line: None)
    path = made / "checkpoints" / "best.safetensors"
    job.model.load(part(load_file(path), "model"))
    measured = Validation(job, Forward(job)).measure()
    record = json.loads((made / "pretrain.json").read_text(encoding="utf-8"))
    assert measured == pytest.approx(record["after"], abs=1e-6)
    with safe_open(path, framework="pt") as file:
        kept = json.loads(file.metadata()["mmc"])["record"]
        names = set(file.keys())
    assert kept["epoch"] == record["best_epoch"]
    assert kept["loss"] == record["after"]["loss"]
    assert any(name.startswith("optim.") for name in names)
    assert not (made / "checkpoints" / "last.safetensors").exists()


def onward(made: Path, **settings: Any) -> dict[str, Any]:
    """Settings of a pretraining that begins with another."""
    return {
        "projection": None,
        "vision": VisionConfig(weights=f"hf:{made}"),
        "text": TextConfig(weights=f"hf:{made}"),
        "epochs": 1,
        **settings,
    }


def first_row(out: Path) -> dict[str, float]:
    """What was measured before the first step."""
    with (out / "history.csv").open(encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    return {
        name.removeprefix("val_"): float(value)
        for name, value in row.items()
        if name.startswith("val_")
    }


class TestGoingOnFromAPretraining:
    def test_it_begins_where_the_other_ended(self, table: Path, made: Path, tmp_path: Path):
        """Decoders and mask token, too: all losses are those of the epoch that was kept."""
        said: list[str] = []
        run(table, tmp_path / "out", said=said, **onward(made))
        kept = json.loads((made / "pretrain.json").read_text(encoding="utf-8"))["after"]
        assert first_row(tmp_path / "out") == pytest.approx(kept, abs=1e-6)
        assert any("their shared space and its temperature are of hf:" in line for line in said)
        assert not any("anew" in line for line in said)

    def test_its_features_are_those_of_the_folder(self, table: Path, made: Path):
        job = Setup(
            str(table),
            Path("x"),
            config(**onward(made)),
            World(torch.device("cpu")),
            lambda line: None,
        )
        model = transformers.VisionTextDualEncoderModel.from_pretrained(made).eval()
        pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        tokens = job.inputs.tokenize(job.texts(job.val[:3]))
        ids, mask = tokens.cut(), (tokens.cut() != 0).long()
        with torch.no_grad():
            wanted = model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
            image, _ = job.model.eval().image(pixels)
            text, _ = job.model.text(ids, tokens.lengths)
        torch.testing.assert_close(image, wanted.image_embeds)
        torch.testing.assert_close(text, wanted.text_embeds)
        assert job.model.scale.item() == pytest.approx(model.logit_scale.exp().item())
        assert job.context == 16  # as many tokens as it was made for

    def test_without_its_checkpoint_only_what_tells_begins_anew(
        self, table: Path, made: Path, tmp_path: Path
    ):
        bare = tmp_path / "bare"
        shutil.copytree(made, bare, ignore=shutil.ignore_patterns("checkpoints"))
        said: list[str] = []
        run(table, tmp_path / "out", said=said, **onward(bare))
        kept = json.loads((made / "pretrain.json").read_text(encoding="utf-8"))["after"]
        found = first_row(tmp_path / "out")
        for name in ("contrastive_loss", "retrieval"):
            assert found[name] == pytest.approx(kept[name], abs=1e-6)
        for name in ("image_loss", "text_loss"):
            assert abs(found[name] - kept[name]) > 1e-3
        assert sum("begin anew" in line for line in said) == 2

    def test_other_targets_of_patches(self, table: Path, made: Path):
        said: list[str] = []
        chosen = config(**onward(made, loss=LossConfig(pixels="mae", temperature=0.5)))
        job = Setup(str(table), Path("x"), chosen, World(torch.device("cpu")), said.append)
        assert any("learnt to tell loss.pixels=simmim, not mae" in line for line in said)
        kept = part(load_file(made / "checkpoints" / "best.safetensors"), "model")
        state = job.model.state()
        token = "dual.vision_model.embeddings.mask_token"
        assert torch.equal(state[token], kept[token])
        assert not torch.equal(state["pixels.weight"], kept["pixels.weight"])
        assert job.model.scale.item() == pytest.approx(2)

    def test_one_tower_alone(self, table: Path, made: Path, tmp_path: Path):
        said: list[str] = []
        chosen = config(vision=VisionConfig(weights=f"hf:{made}"))
        job = Setup(str(table), Path("x"), chosen, World(torch.device("cpu")), said.append)
        kept, state = weights(made), job.model.state()
        name = "vision_model.layernorm.weight"
        assert torch.equal(state[f"dual.{name}"], kept[name])
        name = "visual_projection.weight"
        assert not torch.equal(state[f"dual.{name}"], kept[name])
        assert any("the shared space begins anew" in line for line in said)

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"projection": 8}, "has 16 features; leave projection out"),
            ({"text": {"tokens": 17}}, "is more than the 16 that"),
        ],
    )
    def test_what_the_folder_decides(
        self, settings: dict, said: str, table: Path, made: Path, tmp_path: Path
    ):
        text = TextConfig(weights=f"hf:{made}", **settings.pop("text", {}))
        with pytest.raises(InputError, match=said):
            run(table, tmp_path / "out", **onward(made, text=text, **settings))

    def test_it_does_not_overwrite_what_it_begins_with(self, table: Path, made: Path):
        before = weights(made)
        with pytest.raises(InputError, match="is what the pretraining begins with"):
            run(table, made, **onward(made), overwrite=True)
        assert weights(made).keys() == before.keys()

    def test_a_damaged_checkpoint(self, table: Path, made: Path, tmp_path: Path):
        shutil.copytree(made, tmp_path / "bad")
        (tmp_path / "bad" / "checkpoints" / "best.safetensors").write_bytes(b"no tensors")
        with pytest.raises(InputError, match=r"is not a checkpoint .*; remove it to begin with"):
            run(table, tmp_path / "out", **onward(tmp_path / "bad"))

    @pytest.mark.parametrize(
        ("name", "size", "pixels", "said"),
        [
            ("model.pixels.weight", (192, 8), "simmim", r"pixels\.weight does not fit the model"),
            ("model.words.other", (3,), "simmim", r"words\.other does not fit the model"),
            ("model.words.other", (3,), None, r"best\.safetensors is not of a pretraining; remove"),
        ],
    )
    def test_a_checkpoint_of_another_training(
        self,
        table: Path,
        made: Path,
        tmp_path: Path,
        name: str,
        size: tuple,
        pixels: Any,
        said: str,
    ):
        shutil.copytree(made, tmp_path / "bad")
        settings = {"loss": {"pixels": pixels}} if pixels else {}
        text = json.dumps({"identity": {"config": settings}, "record": {}})
        path = tmp_path / "bad" / "checkpoints" / "best.safetensors"
        save_file({name: torch.zeros(size)}, path, metadata={"mmc": text})
        with pytest.raises(InputError, match=said):
            run(table, tmp_path / "out", **onward(tmp_path / "bad"))

    def test_towers_of_other_kinds(self, table: Path, tmp_path: Path):
        clip = tiny_vision_text(tmp_path / "clip", vision="clip")
        with pytest.raises(InputError, match="is a model of type 'clip_vision_model'; a ViT"):
            run(table, tmp_path / "out", vision=VisionConfig(weights=clip))


def test_what_a_tower_pools_is_said(table: Path, tmp_path: Path):
    """A pooler that is not there, and a model that was made to be pooled otherwise."""
    vit, bert = tiny_vit(tmp_path / "vit"), tiny_bert(tmp_path / "bert")
    pooling = tmp_path / "bert" / "1_Pooling"
    pooling.mkdir()
    (pooling / "config.json").write_text('{"pooling_mode_mean_tokens": true}', encoding="utf-8")
    towers = {"vision": VisionConfig(weights=vit), "text": TextConfig(weights=bert)}

    def told(**settings: Any) -> list[str]:
        said: list[str] = []
        chosen = config(**towers, **settings)
        Setup(str(table), Path("x"), chosen, World(torch.device("cpu")), said.append)
        return [line for line in said if "weights=" in line]

    assert [line.split(" ")[1:4] for line in told()] == [
        ["has", "no", "pooler"],
        [f"text.weights={bert}", "was", "made"],
    ]
    assert not told(loss=LossConfig(contrastive=0))


def test_what_no_loss_looks_at_stays_as_it_is(table: Path, tmp_path: Path):
    """Weight decay included: with texts alone the other tower keeps its weights."""
    vit = tiny_vit(tmp_path / "vit")
    chosen = {
        "vision": VisionConfig(weights=vit),
        "loss": LossConfig(contrastive=0, image=0),
        "optim": OptimConfig(weight_decay=0.5, pretrained=1.0, micro_batch=5),
        "epochs": 1,
    }
    run(table, tmp_path / "out", **chosen)
    job = Setup(
        str(table), Path("x"), config(**chosen), World(torch.device("cpu")), lambda line: None
    )
    start = job.model.state()
    end = part(load_file(tmp_path / "out" / "checkpoints" / "best.safetensors"), "model")
    for name, value in end.items():
        learnt = name.startswith(("dual.text_model.", "words.")) and "pooler" not in name
        assert torch.equal(value, start[name]) != learnt, name


def test_a_pretraining_that_was_stopped_ends_in_the_same_bits(table: Path, tmp_path: Path):
    settings = {
        "epochs": 3,
        "text": TextConfig(**SIZES, tokens=16, vocabulary=300, dropout=0.2),
        "augment": AugmentConfig(crop=0.5, flip=True),
        "optim": OptimConfig(micro_batch=6, checkpoint_epochs=2),
    }
    run(table, tmp_path / "whole", **settings)

    def stop(stage: str, done: int, total: int) -> None:
        if done == 5:  # of 6: in the third epoch
            raise KeyboardInterrupt

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(table, tmp_path / "stopped", progress=stop, said=said, **settings)
    assert "goes on from the checkpoint" in said[-1]
    with pytest.raises(InputError, match=r"other settings \(config.mask.patches: 0.4 -> 0.5\)"):
        run(table, tmp_path / "stopped", mask=MaskConfig(patches=0.5), **settings)
    report = run(table, tmp_path / "stopped", **settings)
    assert report.resumed
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "stopped" / name).read_bytes() == whole
    records = [
        json.loads((tmp_path / n / "pretrain.json").read_text()) for n in ("whole", "stopped")
    ]
    assert records[0]["after"] == records[1]["after"]
    with pytest.raises(InputError, match="is finished; name another folder, or --overwrite"):
        run(table, tmp_path / "stopped", **settings)
    with pytest.raises(InputError, match="there is no file"):
        run(tmp_path / "absent.csv", tmp_path / "stopped", overwrite=True, **settings)
    assert weights(tmp_path / "stopped")
    assert run(table, tmp_path / "stopped", overwrite=True, epochs=1).epochs == 1


def test_a_pretraining_stopped_before_it_was_written_ends_in_the_same_bits(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run(table, tmp_path / "whole", epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(_Pretraining, "finish", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(table, tmp_path / "stopped", epochs=1)
    assert run(table, tmp_path / "stopped", epochs=1).resumed
    for name in saving.MODEL:
        whole, stopped = tmp_path / "whole" / name, tmp_path / "stopped" / name
        assert whole.exists() == stopped.exists()
        if whole.exists():
            assert whole.read_bytes() == stopped.read_bytes(), name


@pytest.mark.parametrize("views", ["clean", "masked"])
def test_a_batch_in_parts_is_the_whole_batch(views: str, table: Path, tmp_path: Path):
    """Two steps on all negatives, at once and in uneven parts."""
    settings = {
        "epochs": 1,
        "loss": LossConfig(views=views, pixels="mae_norm"),
        "text": TextConfig(**SIZES, tokens=16, vocabulary=300, dropout=0),
    }
    # AdamW's first steps are signs: with its usual epsilon, rounding decides some of them.
    run(table, tmp_path / "whole", **settings, optim=OptimConfig(eps=1e-4))
    run(table, tmp_path / "parts", **settings, optim=OptimConfig(micro_batch=7, eps=1e-4))
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-5, msg=name)


SECOND = """
import sys
from mmc.extract.pretraining.options import *
from mmc.extract.pretraining.pretrain import _Pretraining, pretrain
from mmc.extract.sources import SourceOptions
pretrain(sys.argv[1], sys.argv[2], eval(sys.argv[3]), report=print)
"""


def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As `torchrun` starts them: this process and another; one picture cannot be used."""
    first = make_set(tmp_path / "set", pairs=20)
    (tmp_path / "set" / "7.png").write_bytes(b"not a picture")
    table = f"{first}::{make_set(tmp_path / 'other', pairs=6)}"
    settings = {
        "upsample": "2::1",
        "samples_per_epoch": 30,
        "batch_size": 10,
        "text": TextConfig(**SIZES, tokens=16, vocabulary=300, dropout=0),
        "optim": OptimConfig(micro_batch=3, val_samples=15),
        "augment": AugmentConfig(crop=0.7),
    }
    run(table, tmp_path / "one", **settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", SECOND, table, str(tmp_path / "two")]
    other = subprocess.Popen(
        [*command, repr(config(**settings))],
        env=os.environ | world | {"RANK": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    for name, value in (world | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    run(table, tmp_path / "two", **settings)
    assert other.communicate(timeout=180) == ("", None)  # the first alone speaks
    assert other.returncode == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-5, msg=name)
    records = [json.loads((tmp_path / n / "pretrain.json").read_text()) for n in ("one", "two")]
    assert records[1]["after"] == pytest.approx(records[0]["after"], abs=1e-4)
    assert [record["processes"] for record in records] == [1, 2]
    assert [record["failed"] for record in records] == [2, 2]  # of train and of val
    assert [record["steps"] for record in records] == [6, 6]


def test_towers_that_begin_with_weights(table: Path, tmp_path: Path):
    """They keep their tokenizer and preprocessing, and learn more slowly than what is new."""
    vit, bert = tiny_vit(tmp_path / "vit"), tiny_bert(tmp_path / "bert")
    start = load_backbone(vit, device="cpu", precision="float32")
    settings = {
        "vision": VisionConfig(weights=vit),
        "text": TextConfig(weights=bert, tokens=20),
        "epochs": 1,
    }
    report = run(table, tmp_path / "out", **settings, optim=OptimConfig(pretrained=0.0))
    made = load_backbone(f"hf:{tmp_path / 'out'}", device="cpu", precision="float32")
    assert made.image_transform == start.image_transform
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for name in ("image_tokens", "image_class"):
        given = made.encode_image(pixels, [name])[name]
        assert torch.allclose(given, start.encode_image(pixels, [name])[name], atol=1e-6)
    assert report.vocabulary == len(transformers.AutoTokenizer.from_pretrained(tmp_path / "bert"))
    run(table, tmp_path / "moved", **settings)
    moved = load_backbone(f"hf:{tmp_path / 'moved'}", device="cpu", precision="float32")
    given = moved.encode_image(pixels, ["image_tokens"])["image_tokens"]
    wanted = start.encode_image(pixels, ["image_tokens"])["image_tokens"]
    assert (given - wanted).abs().max() > 1e-3


def test_only_what_has_a_weight_is_trained(table: Path, tmp_path: Path):
    """Without a contrastive loss the projections stay, without masked losses the mask token."""
    plain = {"epochs": 1, "optim": OptimConfig(weight_decay=0, patience=1)}
    run(table, tmp_path / "masked", **plain, loss=LossConfig(contrastive=0))
    run(table, tmp_path / "contrast", **plain, loss=LossConfig(image=0, text=0))
    masked, contrast = (
        load_file(tmp_path / name / "checkpoints" / "best.safetensors")
        for name in ("masked", "contrast")
    )
    projection = "model.dual.visual_projection.weight"
    token = "model.dual.vision_model.embeddings.mask_token"
    job = Setup(str(table), tmp_path / "x", config(), World(torch.device("cpu")), lambda line: None)
    start = job.model.state()
    for found, moved, stays in ((masked, token, projection), (contrast, projection, token)):
        assert not torch.equal(found[moved], start[moved.removeprefix("model.")])
        assert torch.equal(found[stays], start[stays.removeprefix("model.")])
    record = json.loads((tmp_path / "contrast" / "pretrain.json").read_text())
    assert record["after"]["loss"] == record["after"]["contrastive_loss"]
    assert "image_loss" not in record["after"]


def test_it_stops_when_nothing_gets_better(table: Path, tmp_path: Path):
    """Steps too small for float32: every epoch is as the first."""
    report = run(table, tmp_path / "out", epochs=30, lr=1e-14, optim=OptimConfig(patience=2))
    assert (report.best_epoch, report.epochs) == (1, 3)


def test_gradient_checkpointing_gives_the_same(table: Path, tmp_path: Path):
    settings = {"epochs": 1, "text": TextConfig(**SIZES, tokens=16, vocabulary=300, dropout=0.1)}
    run(table, tmp_path / "plain", **settings)
    optim = OptimConfig(gradient_checkpointing=True)
    run(table, tmp_path / "blocks", **settings, optim=optim)
    one, two = weights(tmp_path / "plain"), weights(tmp_path / "blocks")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("width", [32, 192])
def test_narrow_towers_tell_texts_apart_from_the_start(table: Path, width: int):
    """Their features at the first step are not all one, which no contrastive loss gets out of."""
    sizes: dict[str, Any] = {"width": width, "layers": 2, "heads": 2}
    chosen = config(
        vision=VisionConfig(**sizes, image_size=32, patch_size=8),
        text=TextConfig(**sizes, tokens=16, vocabulary=300),
    )
    job = Setup(str(table), Path("out"), chosen, World(torch.device("cpu")), lambda line: None)
    tokens = job.inputs.tokenize(job.texts(job.val))
    with torch.no_grad():
        text, _ = job.model.eval().text(tokens.cut(), tokens.lengths)
    same = text @ text.T
    assert float(same.sum() - same.trace()) / (len(text) * (len(text) - 1)) < 0.99


def test_bf16(table: Path, tmp_path: Path):
    report = run(table, tmp_path / "out", precision="bf16", epochs=1)
    assert np.isfinite(report.after["loss"])
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.float32}


class TestBadInput:
    def test_no_texts(self, table: Path, tmp_path: Path):
        with pytest.raises(InputError, match="no sample with both a picture and a text"):
            run(table, tmp_path / "out", source=SourceOptions(text_column="-"))
        assert not (tmp_path / "out").exists()

    def test_pictures_that_are_missing(self, tmp_path: Path):
        table = make_set(tmp_path / "set")
        for picture in (tmp_path / "set").glob("*.png"):
            picture.write_bytes(b"not a picture")
        with pytest.raises(
            MmcError, match=r"fewer than 2 pictures of val can be used.*\(the first"
        ):
            run(table, tmp_path / "out")
        for picture in (tmp_path / "set").glob("*.png"):
            picture.unlink()
        with pytest.raises(InputError, match="none of the 64 images is there"):
            run(table, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_tokenizer_without_mask_token(self, table: Path, tmp_path: Path):
        clip = tiny_hf_clip(tmp_path / "clip")
        text = TextConfig(tokenizer=clip, **SIZES, tokens=16)
        with pytest.raises(InputError, match="clip: its tokenizer has no mask token"):
            run(table, tmp_path / "out", text=text)

    def test_vocabularies_that_differ(self, table: Path, made: Path, tmp_path: Path):
        bert = tiny_bert(tmp_path / "bert")
        text = TextConfig(weights=bert, tokenizer=f"hf:{made}", tokens=20)
        with pytest.raises(InputError, match=r"the vocabulary of .* is not that of"):
            run(table, tmp_path / "out", text=text)
        report = run(
            table,
            tmp_path / "other",
            text=TextConfig(**SIZES, tokens=16, tokenizer=f"hf:{made}"),
            epochs=1,
        )
        assert report.vocabulary == len(transformers.AutoTokenizer.from_pretrained(made))

    def test_a_text_longer_than_the_tower_takes(self, table: Path, tmp_path: Path):
        text = TextConfig(weights=tiny_bert(tmp_path / "bert"), tokens=99)
        with pytest.raises(InputError, match="is more than the 40 that"):
            run(table, tmp_path / "out", text=text)

    @pytest.mark.parametrize(
        ("pairs", "said"),
        [
            (["vision.image_size=30", "vision.patch_size=8"], "is not a multiple of"),
            (["vision.width=50"], "vision.width=50 is not a multiple of vision.heads=6"),
            (["vision.weights=vit"], "write hf:NAME or hf:FOLDER"),
            (["vision.weights=hf:x", "vision.width=6"], "vision.width comes from vision.weights"),
            (
                ["vision.weights=hf:x", "vision.width=6", "vision.layers=2"],
                "vision.width, vision.layers come from vision.weights; leave them out",
            ),
            (["text.tokenizer=hf:x", "text.vocabulary=500"], "come from text.tokenizer"),
            (["mask.patches=1"], r"mask.patches must be in \[0, 1\)"),
            (["mask.random=0.3"], "more than 1 together"),
            (["mask.patches=0"], "leaves nothing to be told; set loss.image=0"),
            (["loss.temperature=3"], r"loss.temperature must be in \[0.01, 1\]"),
            (["loss.image=0", "loss.text=0", "loss.contrastive=0"], "are all 0"),
            (["mask.shpae=units"], "mask has no key 'shpae'; did you mean shape"),
            (["vission.width=50"], "mmc pretrain has no key 'vission'; did you mean vision"),
            (["vision.width=wide"], "vision setting width='wide' is not a whole number"),
            (["upsample=2::x"], "write one number a source"),
            (["upsample=2::0"], "factors must be above 0"),
            (["samples_per_epoch=0"], "--samples-per-epoch must be 1 or more"),
            (["vision"], "write key.key=value, such as vision.width=384"),
        ],
    )
    def test_settings(self, pairs: list[str], said: str):
        with pytest.raises(InputError, match=said):
            read_config(None, pairs, {}, SOURCE)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([], []),
        (["mask.unit=16"], ["mask.unit is without effect on the training: mask.shape=blocks"]),
        (["mask.unit=16", "mask.shape=units"], []),
        (
            ["loss.contrastive=0", "loss.views=masked", "loss.temperature=0.1"],
            [
                "loss.views is without effect on the training: loss.contrastive is 0",
                "loss.temperature is without effect on the training: loss.contrastive is 0",
            ],
        ),
        (["optim.pretrained=0.5"], ["optim.pretrained is .*: no tower begins with weights"]),
        (["optim.pretrained=0.5", "text.weights=hf:x"], []),
        (["loss.image=0", "loss.pixels=mae"], ["loss.pixels is .*: loss.image is 0"]),
        (["loss.image=0", "mask.patches=0.6"], ["mask.patches .* 0 and loss.views=clean"]),
        (["loss.image=0", "mask.patches=0"], []),
        (["loss.image=0", "mask.patches=0.6", "loss.views=masked"], []),
        (["loss.text=0", "mask.random=0"], ["mask.random .* 0 and loss.views=clean"]),
        (
            ["loss.contrastive=0", "loss.image=0", "augment.flip=true"],
            ["augment.flip is .*: no loss looks at pictures"],
        ),
        (["loss.contrastive=0", "loss.text=0", "text.dropout=0"], ["text.dropout is .* at texts"]),
    ],
)
def test_settings_without_effect_are_told(pairs: list[str], said: list[str]):
    found = without_effect(read_config(None, pairs, {}, SOURCE))
    assert len(found) == len(said), found
    for line, wanted in zip(found, said, strict=True):
        assert re.search(wanted, line)


def test_settings_from_a_file(tmp_path: Path):
    """Flags win over --set, and that over the file."""
    file = tmp_path / "small.yaml"
    file.write_text(
        "epochs: 50\nlr: 1e-3\nvision:\n  width: 192\n  heads: 3\nmask: {patches: 0.6}\n",
        encoding="utf-8",
    )
    with file.open("a", encoding="utf-8") as more:
        more.write("upsample: 2::1\nsamples_per_epoch: 900\n")
    found = read_config(file, ["mask.patches=0.5", "epochs=40"], {"epochs": 9}, SOURCE)
    assert found == PretrainConfig(
        upsample="2::1",
        samples_per_epoch=900,
        epochs=9,
        lr=1e-3,
        vision=VisionConfig(width=192, heads=3),
        mask=MaskConfig(patches=0.5),
        source=SOURCE,
    )
    for text, said in (
        ("epochs: 3\nmask:\n  shpae: units\n", "small.yaml:3: mask has no key 'shpae'"),
        ("epohcs: 3\n", "small.yaml:1: mmc pretrain has no key 'epohcs'; did you mean epochs"),
        ("epochs: many\n", "small.yaml:1: .* is not a whole number"),
        ("vision: {width: 50}\n", "small.yaml:1: vision.width=50 is not a multiple"),
        ("text: {width: 32, heads: 2, weights: 'hf:x'}\n", "text.width, text.heads come from"),
        ("- epochs\n", "keys and values are expected"),
        ("source: x.csv\n", "has no key 'source'"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=said):
            read_config(file, [], {}, SOURCE)
    with pytest.raises(InputError, match="--config"):
        read_config(tmp_path / "none.yaml", [], {}, SOURCE)


def test_the_settings_in_the_documentation(tmp_path: Path):
    text = (Path(__file__).parents[2] / "docs" / "pretraining.md").read_text(encoding="utf-8")
    file = tmp_path / "small.yaml"
    file.write_text(text.split("```yaml")[1].split("```")[0], encoding="utf-8")
    found = read_config(file, [], {}, SOURCE)
    assert found.vision.sizes["mlp"] == 4 * 192
    assert found.loss.pixels == "mae_norm"
