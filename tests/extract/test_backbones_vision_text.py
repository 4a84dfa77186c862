"""transformers' VisionTextDualEncoder as a backbone, against transformers itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_models import tiny_vision_text as tiny

from mmc.extract.backbones import load_backbone
from mmc.extract.backbones.base import Backbone
from mmc.extract.images import decode
from mmc.store.errors import InputError

TEXTS = ["a red dog runs", "two cats", "a photo of the large blue house under one tree", ""]


def load(spec: str) -> Backbone:
    return load_backbone(spec, device="cpu", precision="float32")


@pytest.mark.parametrize(("vision", "text"), [("vit", "bert"), ("clip", "roberta")])
def test_fields_are_those_of_transformers(vision: str, text: str, tmp_path: Path):
    spec = tiny(tmp_path, vision, text)
    backbone = load(spec)
    assert set(backbone.fields) == {
        *("image", "image_tokens", "image_class"),
        *("text", "text_tokens", "text_mask", "text_ids"),
    }
    assert backbone.default_fields == ("image", "text")
    assert backbone.fields["image"].shape == backbone.fields["text"].shape == (16,)
    assert backbone.fields["image_tokens"].shape == (16, 32)

    model = transformers.VisionTextDualEncoderModel.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (3, 4, 3)).astype(np.uint8)).resize(size)
        for size in ((40, 50), (32, 32), (70, 20), (33, 35))
    ]
    for place, picture in enumerate(pictures):
        picture.save(tmp_path / f"{place}.png")
    words = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    words.pop("token_type_ids", None)
    with torch.no_grad():
        wanted = model(**words, pixel_values=processor(pictures, return_tensors="pt").pixel_values)
    assert backbone.image_transform is not None
    pixels = torch.stack(
        [
            decode(
                (tmp_path / f"{place}.png").read_bytes(),
                backbone.image_transform,
                max_pixels=10**6,
            )
            for place in range(4)
        ]
    )
    image = backbone.encode_image(pixels, ["image", "image_tokens", "image_class"])
    states = wanted.vision_model_output.last_hidden_state
    assert torch.allclose(image["image_tokens"], states[:, 1:], atol=2e-5)
    assert torch.allclose(image["image_class"], states[:, 0], atol=2e-5)
    unit = torch.nn.functional.normalize(image["image"], dim=1)
    assert torch.allclose(unit, wanted.image_embeds, atol=2e-5)

    tokens = backbone.tokenize(TEXTS)
    found = backbone.encode_text(tokens, ["text", "text_tokens", "text_mask"])
    unit = torch.nn.functional.normalize(found["text"], dim=1)
    assert torch.allclose(unit, wanted.text_embeds, atol=2e-5)
    mask = words["attention_mask"].bool()
    width = mask.shape[1]
    assert torch.equal(found["text_mask"][:, :width], mask)
    given = found["text_tokens"][:, :width][mask]
    assert torch.allclose(given, wanted.text_model_output.last_hidden_state[mask], atol=2e-5)
    assert (unit[0] - unit[1]).abs().max() > 0.05


@pytest.mark.parametrize(
    ("vision", "text", "said"),
    [
        ("siglip", "bert", "image tower is of type 'siglip_vision_model'; supported are vit"),
        ("vit", "distilbert", "text tower is of type 'distilbert'; supported are bert"),
    ],
)
def test_other_towers_are_refused(vision: str, text: str, said: str, tmp_path: Path):
    with pytest.raises(InputError, match=said):
        load(tiny(tmp_path, vision, text))
