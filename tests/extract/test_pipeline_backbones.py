"""`extract` with real model families (tiny weights), against their own libraries' calls."""

import csv

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from pipeline_case import Case, config
from tiny_models import tiny_bert, tiny_blip, tiny_hf_siglip, tiny_open_clip

from mmc.extract import ceiling
from mmc.extract.pipeline import extract
from mmc.extract.sources import SourceOptions
from mmc.store import EmbeddingStore


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return tiny_open_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> str:
    return tiny_hf_siglip(tmp_path_factory.mktemp("models") / "siglip")


@pytest.fixture
def case(tmp_path) -> Case:
    case = Case(tmp_path)
    for number in range(22):
        words = ("a photo of the red dog", "two", "a small house under the green tree and a cat")
        case.add(1, text=f"{words[number % 3]} {number}")
    return case


def centred(a: np.ndarray) -> np.ndarray:
    a = a.astype(np.float64)
    return a - a.mean(axis=0)


def test_open_clip_features_are_those_of_the_library(case, clip):
    case.extract(backbones=(clip,), names=("clip",))
    store = EmbeddingStore.open(case.folder / "store")
    folder = clip.partition(":")[2]
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        pictures = [Image.open(case.folder / row["image"]).convert("RGB") for row in case.rows]
        images = torch.cat([model.encode_image(transform(one)[None]) for one in pictures]).numpy()
        texts = torch.cat([model.encode_text(tokenizer([r["text"]])) for r in case.rows]).numpy()
        labels = model.encode_text(tokenizer(["a photo of a cat", "a photo of a dog"])).numpy()
    for name, expected in (("image", images), ("text", texts)):
        found = store[f"clip/{name}"][:]
        spread = np.abs(centred(expected)).max()
        assert spread > 0.1  # different inputs, different outputs
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * spread)
    np.testing.assert_allclose(store.label_text("clip")[1], labels, atol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_workers_and_interruptions_change_no_byte(case, clip, precision):
    def interrupt(stage, done, count):
        if stage == "images" and done:
            raise KeyboardInterrupt

    settings = {
        "backbones": (clip,),
        "names": ("clip",),
        "fields": ("image", "image_tokens", "text", "text_tokens", "text_mask"),
        "precision": precision,
    }
    case.extract("one", workers=1, **settings)
    case.extract("three", workers=3, **settings)
    assert case.files("one") == case.files("three")
    with pytest.raises(KeyboardInterrupt):
        case.extract("broken", workers=1, progress=interrupt, **settings)
    case.extract("broken", **settings)
    rows = case.rows
    case.rows = rows[:9]
    case.extract("grown", **settings)
    case.rows = rows
    case.extract("grown", **settings)
    assert case.files("grown") == case.files("one") == case.files("broken")


def test_three_families_at_once(case, clip, bert, siglip):
    case.extract(backbones=(clip, bert, siglip), names=("clip", "words", "siglip"))
    store = EmbeddingStore.open(case.folder / "store")
    assert set(store.features) == {
        *("clip/image", "clip/text", "words/text", "siglip/image", "siglip/text")
    }
    for alias, spec in (("clip", clip), ("words", bert), ("siglip", siglip)):
        case.extract("alone", backbones=(spec,), names=(alias,))
        alone = EmbeddingStore.open(case.folder / "alone")
        for name in (name for name in store.features if name.startswith(alias)):
            np.testing.assert_array_equal(store[name][:], alone[name][:])
        assert store.label_text(alias)[0] == ("cat", "dog")
    assert len(store.rows(features=store.features)) == 22


def test_a_text_encoder_leaves_pictures_alone(case, bert):
    case.extract(backbones=(bert,), names=("words",))
    store = EmbeddingStore.open(case.folder / "store")
    assert store.features == ("words/text",)
    assert store["words/text"].done.all()


def test_token_ids_are_those_of_the_library(case, bert):
    fields = ("text_ids", "text_mask")
    case.extract(backbones=(bert,), names=("words",), fields=fields, max_text_tokens=9)
    store = EmbeddingStore.open(case.folder / "store")
    assert store.features == ("words/text_ids", "words/text_mask")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert.partition(":")[2])
    expected = tokenizer(
        [row["text"] for row in case.rows],
        padding="max_length",
        truncation=True,
        max_length=9,
        return_tensors="np",
    )
    assert store["words/text_ids"].dtype == np.int32
    np.testing.assert_array_equal(store["words/text_ids"][:], expected["input_ids"])
    np.testing.assert_array_equal(store["words/text_mask"][:], expected["attention_mask"] > 0)
    assert not expected["attention_mask"].all()


def test_the_share_of_the_bare_forward_rate(case, clip, monkeypatch):
    monkeypatch.setattr(ceiling, "SHORTEST_RUN_SECONDS", 0.0)
    monkeypatch.setattr(ceiling, "FEWEST_BATCHES", 2)
    monkeypatch.setattr(ceiling, "BUDGET_SECONDS", 0.2)
    report = case.extract(backbones=(clip,), names=("clip",))
    assert report.rate > 0
    assert report.efficiency == pytest.approx(report.rate / report.ceiling)
    assert any("bare forward" in line and "not measured" not in line for line in case.said)


@pytest.mark.shared_data
def test_every_kind_of_bad_picture(shared_data, tmp_path, clip):
    folder = shared_data / "bad_inputs"
    with (folder / "manifest.csv").open(newline="", encoding="utf-8") as file:
        expected = {
            row["path"].removeprefix("images/"): row["expected_handling"]
            for row in csv.DictReader(file)
        }
    said: list[str] = []
    report = extract(
        str(folder / "csv" / "bad_images.csv"),
        str(tmp_path / "store"),
        config(
            backbones=(clip,),
            names=("clip",),
            shard_rows=None,
            source=SourceOptions(image_root=str(folder / "images")),
        ),
        report=said.append,
    )
    store = EmbeddingStore.open(tmp_path / "store")
    status = store.status("clip", "image")
    reasons = {error["id"]: error["reason"] for error in store.errors("clip").to_pylist()}
    assert set(status.tolist()) == {1, 2}
    for row, name in enumerate(store.column("image").to_pylist()):
        wish = expected[name]
        if wish.startswith(("must load", "loads in Pillow")):
            assert status[row] == 1, (name, reasons)
        elif wish.startswith("must be rejected") and "or load" not in wish:
            assert status[row] == 2, name
    assert report.failed == len(reasons) == int((status == 2).sum())
    assert all(0 < len(reason) < 120 and "\n" not in reason for reason in reasons.values())
    assert any(f"{report.failed} of 63 samples could not be embedded" in line for line in said)


def test_blip_gives_the_same_bytes_together_and_apart(case, tmp_path):
    blip = tiny_blip(tmp_path / "blip")
    case.rows[4]["text"] = ""
    fused = ("fused", "fused_tokens", "fused_mask", "itm")
    case.extract("together", backbones=(blip,), fields=("image", "text", *fused))
    for fields in (("image",), fused, ("text",)):
        case.extract("apart", backbones=(blip,), fields=fields, workers=1)
    together, apart = case.files("together"), case.files("apart")
    arrays = [name for name in together if "/c" in name and "status" not in name]
    assert len(arrays) >= 6
    assert all(together[name] == apart[name] for name in together if "/c" in name)
    store = EmbeddingStore.open(case.folder / "together")
    assert store.status("fake", "fused")[4] == 2
    match = store["fake/itm"].take(store.rows(features=["fake/itm"]))
    assert ((match > 0) & (match < 1)).all()
