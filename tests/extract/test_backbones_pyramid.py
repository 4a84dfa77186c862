"""Pyramid-Forwarding: tiles of several sizes through unchanged backbones."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_bert, tiny_blip, tiny_open_clip
from tiny_vision import blocks_of_colour, tiny_fasterrcnn_vg, tiny_timm
from torch import Tensor

from mmc.extract.backbones import load_backbone
from mmc.extract.backbones.base import Backbone
from mmc.extract.images import decode
from mmc.store.errors import InputError


def load(spec: str) -> Backbone:
    return load_backbone(spec, device="cpu", precision="float32")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_open_clip(tmp_path_factory.mktemp("clip") / "model")


def tiles_of(backbone: Backbone, count: int = 3) -> Tensor:
    """Tiles (count, K, 3, H, W) of photos, by the backbone's own transform."""
    files = []
    for picture in blocks_of_colour(count, (150, 200), cells=13):
        file = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "PNG")
        files.append(file.getvalue())
    return torch.stack([decode(file, backbone.image_transform) for file in files])


@pytest.mark.parametrize(("levels", "crops"), [(1, 1), (2, 5), (3, 21)])
def test_tokens_of_every_tile_are_the_plain_encoders(clip: str, levels: int, crops: int):
    plain, pyramid = load(clip), load(f"{clip}[pyramid={levels}]")
    assert pyramid.image_transform.shape == (crops, 3, 32, 32)
    assert pyramid.fields["image_tokens"].shape == (crops * 16, 32)
    assert pyramid.fields["image_class"].shape == (crops, 32)
    assert pyramid.fields["image_places"].shape == (crops * 16, 3)
    assert pyramid.default_fields == plain.default_fields
    tiles = tiles_of(pyramid)
    found = pyramid.encode_image(tiles, ["image", "image_tokens", "image_class", "image_places"])
    alone = plain.encode_image(tiles[:, 0], ["image", "image_tokens", "image_class"])
    assert torch.equal(found["image"], alone["image"])
    assert torch.equal(found["image_tokens"][:, :16], alone["image_tokens"])
    assert torch.equal(found["image_class"][:, 0], alone["image_class"])
    for tile in range(crops):
        one = plain.encode_image(tiles[:, tile], ["image_tokens", "image_class"])
        place = slice(16 * tile, 16 * (tile + 1))
        assert torch.equal(found["image_tokens"][:, place], one["image_tokens"])
        assert torch.equal(found["image_class"][:, tile], one["image_class"])
    places = [
        (level, row, column)
        for level in range(levels)
        for row in range(2**level)
        for column in range(2**level)
    ]
    assert found["image_places"].dtype == torch.int16
    for row in found["image_places"].tolist():
        assert [tuple(place) for place in row[::16]] == places
        assert all(row[16 * at : 16 * (at + 1)] == [list(p)] * 16 for at, p in enumerate(places))


def test_tiles_put_together_are_the_resized_picture(clip: str):
    transform = load(f"{clip}[pyramid=3]").image_transform
    file = io.BytesIO()
    draw = np.random.default_rng(0).integers(0, 255, (9, 12, 3)).astype(np.uint8)
    Image.fromarray(draw).resize((200, 150)).save(file, "PNG")
    tiles = decode(file.getvalue(), transform)
    for level in range(3):
        whole = decode(file.getvalue(), transform.level(level))
        assert whole.shape == (3, 32 * 2**level, 32 * 2**level)
        joined = torch.zeros_like(whole)
        for tile, (at, row, column) in zip(tiles, transform.places.tolist(), strict=True):
            if at == level:
                joined[:, 32 * row : 32 * (row + 1), 32 * column : 32 * (column + 1)] = tile
        assert torch.equal(joined, whole)


def test_texts_and_identity(clip: str):
    plain, pyramid = load(clip), load(f"{clip}[pyramid=2]")
    texts = ["a photo of the dog", "two cars"]
    tokens = pyramid.tokenize(texts)
    assert torch.equal(tokens.ids, plain.tokenize(texts).ids)
    found = pyramid.encode_text(tokens, ["text"])["text"]
    assert torch.equal(found, plain.encode_text(tokens, ["text"])["text"])
    assert pyramid.identity != plain.identity
    assert pyramid.identity["weights"] == plain.identity["weights"]
    assert load(f"{clip}[pyramid=3]").identity != pyramid.identity
    assert pyramid.context["spec"] == pyramid.context["resolved_spec"] == f"{clip}[pyramid=2]"


def test_only_level_0_is_run_for_its_own_fields(clip: str):
    pyramid = load(f"{clip}[pyramid=2]")
    tiles = tiles_of(pyramid)
    seen = []
    encode = pyramid._backbone.encode_image
    pyramid._backbone.encode_image = lambda p, f: seen.append(len(p)) or encode(p, f)
    pyramid.encode_image(tiles, ["image"])
    assert seen == [3]
    pyramid.encode_image(tiles, ["image_places"])
    assert seen == [3]
    pyramid.encode_image(tiles, ["image_class"])
    assert seen == [3] * 6


def test_grid_regions_stay_those_of_level_0(tmp_path: Path):
    spec = tiny_timm(tmp_path / "model")
    plain, pyramid = load(spec), load(f"{spec}[pyramid=2]")
    assert pyramid.fields["regions"].shape == (36, 96)
    assert pyramid.fields["image_tokens"].shape == (5 * 25, 96)
    assert "image_class" not in pyramid.fields
    tiles = tiles_of(pyramid, 1)
    fields = ["regions", "boxes", "region_mask"]
    found, wanted = pyramid.encode_image(tiles, fields), plain.encode_image(tiles[:, 0], fields)
    assert all(torch.equal(found[name], wanted[name]) for name in fields)


def test_joined_fields_are_those_of_level_0(tmp_path: Path):
    spec = tiny_blip(tmp_path / "model")
    plain, pyramid = load(spec), load(f"{spec}[pyramid=2]")
    tiles = tiles_of(pyramid, 2)
    tokens = pyramid.tokenize(["a red dog", "two cars under the tree"])
    found = pyramid.encode_fused(tiles, tokens, ["fused", "itm", "image", "image_tokens"])
    wanted = plain.encode_fused(tiles[:, 0], tokens, ["fused", "itm", "image"])
    for name in wanted:
        assert torch.equal(found[name], wanted[name])
    tokens_alone = pyramid.encode_image(tiles, ["image_tokens"])["image_tokens"]
    assert torch.equal(found["image_tokens"], tokens_alone)


def test_own_classes_work_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
    backbone = load("python:counting_backbone:Counting[pyramid=2]")
    assert backbone.fields["image_tokens"].shape == (10, 3)


def test_what_has_no_pyramid(tmp_path: Path, clip: str):
    for value in ("x", "-1", "1.5", "640px"):
        with pytest.raises(InputError, match=f"pyramid={value}: give a number of levels"):
            load(f"{clip}[pyramid={value}]")
    for value in ("0", "99"):
        with pytest.raises(InputError, match="a pyramid has 1 to 6 levels"):
            load(f"{clip}[pyramid={value}]")
    with pytest.raises(InputError, match="needs an image tower"):
        load(f"{tiny_bert(tmp_path / 'bert')}[pyramid=2]")
    detector = tiny_fasterrcnn_vg(tmp_path / "detector").replace("[", "[pyramid=2,")
    with pytest.raises(InputError, match="takes pictures of one size"):
        load(detector)
