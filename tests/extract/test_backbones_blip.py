"""BLIP for retrieval: the numbers of the library's own call in each of its modes, and its traps."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import draw_weights, tiny_blip, tiny_blip_captioner
from torch import Tensor

from mmc.extract.backbones import hf_blip, load_backbone
from mmc.extract.backbones.base import Backbone, TokenBatch
from mmc.extract.backbones.encoder import Encoder, FusedTower, ImageTower, TextTower
from mmc.extract.backbones.hf_files import Files
from mmc.extract.backbones.hf_parts import Options
from mmc.extract.images import decode
from mmc.extract.pipeline import ExtractConfig, extract
from mmc.extract.transforms import ImageTransform
from mmc.store import EmbeddingStore
from mmc.store.errors import InputError

TEXTS = ["a photo of the dog", "two cars", "a small green tree and a horse under the house", ""]
IMAGE = ["image", "image_tokens", "image_class"]
FUSED = ["fused", "fused_tokens", "fused_mask", "itm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("blip") / "model"
    tiny_blip(made)
    return made


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    kind = transformers.BlipForImageTextRetrieval
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def load(folder: Path, options: str = "", **settings: Any) -> Backbone:
    spec = f"hf:{folder}{options}"
    return load_backbone(spec, **{"device": "cpu", "precision": "float32", **settings})


def jpegs(count: int = 4) -> list[bytes]:
    files = []
    for seed in range(count):
        cells = np.random.default_rng(seed).integers(0, 255, (5, 6, 3)).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(cells).resize((57 + 9 * seed, 70), 3).save(file, "JPEG")
        files.append(file.getvalue())
    return files


def pixels(backbone: Backbone) -> Tensor:
    return torch.stack([decode(data, backbone.image_transform) for data in jpegs()])


def reference_inputs(folder: Path) -> dict[str, Tensor]:
    """What the library's own processor makes of the pictures and texts, padded to the longest."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    images = [Image.open(io.BytesIO(data)) for data in jpegs()]
    words = tokenizer(TEXTS, padding=True, truncation=True, max_length=35, return_tensors="pt")
    return {
        "input_ids": words["input_ids"],
        "attention_mask": words["attention_mask"],
        "pixel_values": processor(images=images, return_tensors="pt")["pixel_values"],
    }


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_apart_equals_the_library(backbone: Backbone, model: Any, folder: Path):
    inputs = reference_inputs(folder)
    wanted = model(**inputs, use_itm_head=False)
    found = backbone.encode_image(pixels(backbone), IMAGE)
    close(found["image_class"], wanted.last_hidden_state[:, 0])
    close(found["image_tokens"], wanted.last_hidden_state[:, 1:])
    tokens = backbone.tokenize(TEXTS)
    texts = backbone.encode_text(tokens, ["text", "text_tokens", "text_mask"])
    real = inputs["attention_mask"].bool()
    assert torch.equal(texts["text_mask"][:, : real.shape[1]], real)
    close(texts["text_tokens"][texts["text_mask"]], wanted.question_embeds[real])
    unit = [torch.nn.functional.normalize(a, dim=-1) for a in (found["image"], texts["text"])]
    assert wanted.itm_score.std() > 0.1
    close(unit[0] @ unit[1].T, wanted.itm_score)
    norms = found["image"].norm(dim=1)
    assert (norms - 1).abs().min() > 0.01  # kept as the projection gives it


@torch.no_grad()
def test_fused_equals_the_library(backbone: Backbone, model: Any, folder: Path):
    inputs = reference_inputs(folder)
    wanted = model(**inputs, use_itm_head=True)
    found = backbone.encode_fused(pixels(backbone), backbone.tokenize(TEXTS), FUSED)
    real = inputs["attention_mask"].bool()
    close(found["fused"], wanted.question_embeds[:, 0])
    close(found["fused_tokens"][found["fused_mask"]], wanted.question_embeds[real])
    assert (found["fused_tokens"][~found["fused_mask"]] == 0).all()
    close(found["itm"][:, 0], wanted.itm_score.softmax(1)[:, 1])
    assert found["itm"].std() > 0.05
    spread = wanted.question_embeds[:, 0]
    assert ((spread - spread.mean(0)).norm(dim=1) / spread.norm(dim=1)).min() > 0.05


def test_pictures_change_what_is_fused_and_not_the_text(backbone: Backbone):
    tokens, pictures = backbone.tokenize(TEXTS), pixels(backbone)
    here = backbone.encode_fused(pictures, tokens, FUSED)
    swapped = backbone.encode_fused(pictures.flip(0), tokens, FUSED)
    moved = (here["fused"] - swapped["fused"]).norm(dim=1) / here["fused"].norm(dim=1)
    assert moved.min() > 0.05
    assert torch.equal(here["fused_mask"], swapped["fused_mask"])
    alone = backbone.encode_text(tokens, ["text_tokens"])["text_tokens"]
    assert (alone - here["fused_tokens"]).abs().amax((1, 2)).min() > 0.1


def test_a_row_of_a_pair_does_not_depend_on_the_batch(backbone: Backbone):
    tokens, pictures = backbone.tokenize(TEXTS), pixels(backbone)
    together = backbone.encode_fused(pictures, tokens, [*IMAGE, *FUSED])
    for row in range(len(TEXTS)):
        alone = backbone.encode_fused(pictures[[row]], tokens.take([row]), [*IMAGE, *FUSED])
        for name, array in alone.items():
            torch.testing.assert_close(array[0], together[name][row], atol=1e-5, rtol=1e-5)


def test_the_image_tower_runs_once_for_both(backbone: Backbone, monkeypatch: Any):
    calls = []
    forward = transformers.BlipVisionModel.forward

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return forward(self, *arguments, **named)

    monkeypatch.setattr(transformers.BlipVisionModel, "forward", counted)
    tokens, pictures = backbone.tokenize(TEXTS), pixels(backbone)
    both = backbone.encode_fused(pictures, tokens, [*FUSED, *IMAGE])
    assert len(calls) == 1
    assert list(both) == [*FUSED, *IMAGE]
    apart = backbone.encode_image(pictures, IMAGE)
    for name in IMAGE:
        assert torch.equal(both[name], apart[name])
    only = backbone.encode_fused(pictures, tokens, ["fused"])
    assert torch.equal(only["fused"], both["fused"])
    images = backbone.encode_fused(pictures, tokens, ["image"])
    assert torch.equal(images["image"], apart["image"])
    with pytest.raises(InputError, match="no fused field 'text'; it has: fused"):
        backbone.encode_fused(pictures, tokens, ["fused", "text"])


def test_texts_are_of_35_tokens_unless_told(backbone: Backbone, folder: Path):
    assert backbone.fields["fused_tokens"].shape == (35, 32)
    assert backbone.identity["max_text_tokens"] == 35
    long = backbone.tokenize(["dog " * 60])
    assert long.lengths.tolist() == [35]
    assert backbone.tokenize(TEXTS).ids.shape == (4, 35)
    longer = load(folder, max_text_tokens=60)
    assert longer.tokenize(["dog " * 60]).lengths.tolist() == [60]
    with pytest.raises(InputError, match="more than the model's context of 64"):
        load(folder, max_text_tokens=65)
    # More room for padding changes nothing for what is short.
    tokens, pictures = backbone.tokenize(TEXTS), pixels(backbone)
    near = backbone.encode_fused(pictures, tokens, ["fused", "itm"])
    far = longer.encode_fused(pictures, longer.tokenize(TEXTS), ["fused", "itm"])
    for name in near:
        close(far[name], near[name])


@torch.no_grad()
def test_the_enc_token(backbone: Backbone, model: Any, folder: Path):
    enc = load(folder, "[enc_token=enc]")
    tokens, pictures = enc.tokenize(TEXTS), pixels(enc)
    kept = tokens.ids.clone()
    found = enc.encode_fused(pictures, tokens, ["fused", "itm"])
    assert torch.equal(tokens.ids, kept)
    inputs = reference_inputs(folder)
    inputs["input_ids"][:, 0] = model.config.text_config.vocab_size - 1
    wanted = model(**inputs, use_itm_head=True)
    close(found["fused"], wanted.question_embeds[:, 0])
    plain = backbone.encode_fused(pictures, tokens, ["fused"])
    assert (plain["fused"] - found["fused"]).norm(dim=1).min() > 0.1
    texts = [one.encode_text(tokens, ["text"])["text"] for one in (enc, backbone)]
    assert torch.equal(*texts)  # alone, a text begins with [CLS] in both
    assert backbone.identity["enc_token"] == "cls"
    assert {k for k in enc.identity if enc.identity[k] != backbone.identity[k]} == {"enc_token"}
    with pytest.raises(InputError, match="choose from cls, enc"):
        load(folder, "[enc_token=dec]")


def test_a_vocabulary_without_enc(folder: Path, tmp_path: Path):
    other = Path(shutil.copytree(folder, tmp_path / "model"))
    settings = json.loads((other / "config.json").read_text(encoding="utf-8"))
    settings["text_config"]["bos_token_id"] = 2
    (other / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(InputError, match="no \\[ENC\\] token"):
        load(other, "[enc_token=enc]")
    assert load(other).identity["enc_token"] == "cls"


@torch.no_grad()
def test_the_traps_of_the_library_are_still_there(model: Any, folder: Path):
    """What `hf_blip` works around; when one of these fails, the library was mended."""
    inputs = reference_inputs(folder)
    vision = model.vision_model(pixel_values=inputs["pixel_values"])
    assert (vision.pooler_output - vision.last_hidden_state[:, 0]).abs().max() > 0.1
    states = vision.last_hidden_state
    mask = torch.ones(states.shape[:2], dtype=torch.long)
    mask[:, 5:] = 0
    words = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    seen = [
        model.text_encoder(**words, encoder_hidden_states=states, encoder_attention_mask=one)
        for one in (mask, torch.ones_like(mask))
    ]
    assert torch.equal(seen[0].last_hidden_state, seen[1].last_hidden_state)
    assert transformers.BlipVisionConfig().initializer_range == 1e-10


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("BlipForConditionalGeneration", "writes captions: `mmc caption SOURCE OUT --backbone hf:"),
        ("BlipForQuestionAnswering", "answers questions"),
        ("BlipModel", "projections are not trained"),
        ("BlipSomething", "not for retrieval"),
    ],
)
def test_checkpoints_of_other_classes(kind: str, message: str, folder: Path, tmp_path: Path):
    other = Path(shutil.copytree(folder, tmp_path / "model"))
    settings = json.loads((other / "config.json").read_text(encoding="utf-8"))
    settings["architectures"] = [kind]
    (other / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(InputError, match=message) as found:
        load(other)
    assert kind in str(found.value)
    assert "blip-itm-base-coco" in str(found.value)
    assert "\n" not in str(found.value)


def test_a_captioning_model_says_what_it_is_for(tmp_path: Path):
    tiny_blip_captioner(tmp_path / "model")
    with pytest.raises(InputError, match="mmc caption"):
        load(tmp_path / "model")


def test_weights_that_do_not_fit(folder: Path, tmp_path: Path):
    other = Path(shutil.copytree(folder, tmp_path / "model"))
    state = load_file(other / "model.safetensors")
    del state["itm_head.weight"]
    state["text_proj.weight"] = state["text_proj.weight"][:4].contiguous()
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as found:
        load(other)
    assert "text_proj.weight is [4, 32], the model has [16, 32]" in str(found.value)
    assert "itm_head.weight is missing" in str(found.value)


def test_a_processor_of_another_size(folder: Path, tmp_path: Path):
    other = Path(shutil.copytree(folder, tmp_path / "model"))
    transformers.BlipImageProcessor(size={"height": 48, "width": 48}).save_pretrained(other)
    with pytest.raises(InputError, match="gives 48 x 48 pixels, the model takes 32 x 32"):
        load(other)


# vision width, layers, heads, FFN; millions of parameters (retrieval, captioning)
SIZES = {"base": (768, 12, 12, 3072, 223.7, 224.0), "large": (1024, 24, 16, 4096, 446.1, 446.3)}


def real_config(size: str) -> Any:
    """The values of the published configs."""
    width, layers, heads, inner, _, _ = SIZES[size]
    return transformers.BlipConfig(
        text_config={
            "vocab_size": 30524,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "bos_token_id": 30522,
            "max_position_embeddings": 512,
            "encoder_hidden_size": width,
        },
        vision_config={
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": inner,
            "image_size": 384,
            "patch_size": 16,
        },
        image_text_hidden_size=256,
    )


@pytest.mark.parametrize("size", SIZES)
def test_real_sizes(size: str, monkeypatch: Any):
    """The very functions that run, on a model without memory."""
    config = real_config(size)
    with torch.device("meta"):
        model = transformers.BlipForImageTextRetrieval(config)
        captioner = transformers.BlipForConditionalGeneration(config)
    counts = [sum(p.numel() for p in one.parameters()) / 1e6 for one in (model, captioner)]
    assert counts == pytest.approx(SIZES[size][-2:], abs=0.06)
    monkeypatch.setattr(hf_blip, "load_model", lambda *_: model.eval())
    # The library looks into masks, and here they hold no values.
    monkeypatch.setattr(hf_blip, "real_tokens", lambda *_: None)
    parts = hf_blip.blip(Files("me/blip"), config, Options())
    assert parts.image_size == 384
    assert parts.rules.default == 35
    empty = TokenBatch(torch.zeros(1, 35, dtype=torch.int64), torch.tensor([2]), torch.tensor([8]))
    encoder = Encoder(
        image=ImageTower(transform=ImageTransform(size=(384, 384)), forward=parts.image),
        text=TextTower(tokenize=lambda _: empty, forward=parts.text, length=35),
        fused=FusedTower(forward=parts.fused),
        device="meta",
        dtype=torch.float32,
        identity={},
        context={},
    )
    width = SIZES[size][0]
    assert {name: spec.shape for name, spec in encoder.fields.items()} == {
        "image": (256,),
        "image_tokens": (576, width),
        "image_class": (width,),
        "text": (256,),
        "text_tokens": (35, 768),
        "text_ids": (35,),
        "text_mask": (35,),
        "fused": (768,),
        "fused_tokens": (35, 768),
        "fused_mask": (35,),
        "itm": (1,),
    }
    assert {spec.tower for name, spec in encoder.fields.items() if name in FUSED} == {"fused"}
    assert encoder.default_fields == ("image", "text")


def test_bf16_is_near_float32(backbone: Backbone, folder: Path):
    rounded = load(folder, precision="bf16")
    tokens, pictures = backbone.tokenize(TEXTS), pixels(backbone)
    fields = ["fused", "fused_tokens", "image", "image_tokens"]
    wanted, found = (one.encode_fused(pictures, tokens, fields) for one in (backbone, rounded))
    for name in fields:
        a, b = (x[name].double().flatten(1) for x in (wanted, found))
        assert torch.cosine_similarity(a, b).min() > 0.999, name
        centred = [(x - x.mean(0)).flatten() for x in (a, b)]
        assert torch.cosine_similarity(*centred, dim=0) > 0.999, name


def test_weights_decide_the_identity(folder: Path, tmp_path: Path, backbone: Backbone):
    tiny_blip(tmp_path / "other", seed=1)
    other = load(tmp_path / "other")
    assert {k for k in other.identity if other.identity[k] != backbone.identity[k]} == {"weights"}


@torch.no_grad()
def test_the_drawn_weights_tell_pictures_apart():
    """As the library initialises it, all pictures have one output and tests would mean nothing."""
    fresh = transformers.BlipForImageTextRetrieval(real_small())
    states = [
        fresh.vision_model(pixel_values=torch.full((1, 3, 32, 32), value)).last_hidden_state
        for value in (-1.0, 1.0)
    ]
    assert (states[0] - states[1]).abs().max() < 1e-3
    draw_weights(fresh)
    states = [
        fresh.vision_model(pixel_values=torch.full((1, 3, 32, 32), value)).last_hidden_state
        for value in (-1.0, 1.0)
    ]
    assert (states[0] - states[1]).abs().max() > 0.1


def real_small() -> Any:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BlipConfig(
        text_config={**small, "vocab_size": 40, "intermediate_size": 32},
        vision_config={**small, "intermediate_size": 32, "image_size": 32, "patch_size": 16},
    )


@torch.no_grad()
def test_a_store_is_filled_with_what_the_library_gives(folder: Path, model: Any, tmp_path: Path):
    """Fused fields need both contents; a sample without one of them has the other's."""
    lines = ["id,image,text,label"]
    for number, (data, text) in enumerate(zip(jpegs(), TEXTS, strict=True)):
        (tmp_path / f"{number}.jpg").write_bytes(data)
        lines.append(f"s{number},{number}.jpg,{text},{'ab'[number % 2]}")
    lines.append("s4,,no picture,a")
    (tmp_path / "samples.csv").write_text("\n".join(lines), encoding="utf-8")
    config = ExtractConfig(
        backbones=(f"hf:{folder}",),
        names=("blip",),
        fields=("image", "text", "fused", "fused_tokens", "fused_mask", "itm"),
        device="cpu",
        precision="float32",
        batch_size=3,
    )
    source, path = str(tmp_path / "samples.csv"), str(tmp_path / "store")
    extract(source, path, config, report=lambda _: None)
    store = EmbeddingStore.open(path)
    wanted = model(**reference_inputs(folder), use_itm_head=True)
    assert store["blip/fused"].done[:3].all()
    near = {"rtol": 2e-3, "atol": 2e-3}  # float16
    np.testing.assert_allclose(store["blip/fused"][:3], wanted.question_embeds[:3, 0], **near)
    match = wanted.itm_score.softmax(1)[:3, 1:]
    np.testing.assert_allclose(store["blip/itm"][:3], match, **near)
    assert store["blip/itm"].shape == (5, 1)
    assert store["blip/fused_mask"][:3].sum(1).tolist() == [7, 5, 12]
    assert store["blip/text"].done[4]
    assert not store["blip/fused"].done[4]
    labels, vectors = store.label_text("blip")
    assert (labels, vectors.shape) == (("a", "b"), (2, 16))
