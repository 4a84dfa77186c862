"""Detectors, grids of regions and pyramids from files to a store."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_open_clip
from tiny_vision import blocks_of_colour, tiny_fasterrcnn_vg, tiny_timm

from mmc.extract.backbones import load_backbone
from mmc.extract.images import decode
from mmc.extract.options import ExtractConfig, default_alias
from mmc.extract.pipeline import extract
from mmc.store import EmbeddingStore


def test_pictures_of_all_sizes_through_three_backbones_at_once(tmp_path: Path):
    specs = {
        "detector": tiny_fasterrcnn_vg(tmp_path / "detector"),
        "grid": tiny_timm(tmp_path / "grid"),
        "pyramid": f"{tiny_open_clip(tmp_path / 'clip')}[pyramid=2]",
    }
    rows = ["id,image,labels"]
    sizes = ((64, 90), (120, 50), (70, 70), (3, 200), (96, 64))
    for at, size in enumerate(sizes):
        picture = blocks_of_colour(1, size, seed=at)[0]
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{at}.png")
        rows.append(f"{at},{at}.png,{'cat' if at % 2 else 'dog'}")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    rows.insert(3, "bad,bad.png,cat")
    (tmp_path / "photos.csv").write_text("\n".join(rows), encoding="utf-8")
    fields = ("regions", "boxes", "region_mask", "image_tokens", "image_places", "image")
    report = extract(
        str(tmp_path / "photos.csv"),
        str(tmp_path / "photos.store"),
        ExtractConfig(
            backbones=tuple(specs.values()),
            names=tuple(specs),
            fields=None,
            precision="float32",
            device="cpu",
            workers=2,
        ),
        report=lambda _: None,
    )
    assert {failure.id for failure in report.failures} == {"bad"}
    store = EmbeddingStore.open(tmp_path / "photos.store")
    ids = store.column("id").to_pylist()
    rows_of = [ids.index(str(at)) for at in range(len(sizes))]
    for alias, spec in specs.items():
        backbone = load_backbone(spec, device="cpu", precision="float32")
        names = [name.partition("/")[2] for name in store.features if name.startswith(f"{alias}/")]
        assert set(names) == {n for n in backbone.default_fields if n != "text"}
        assert set(names) <= {*fields, "region_scores", "region_classes"}
        for at, row in enumerate(rows_of):
            data = (tmp_path / f"{at}.png").read_bytes()
            pixels = decode(data, backbone.image_transform)
            batch = [pixels] if alias == "detector" else pixels[None]
            wanted = backbone.encode_image(batch, names)
            for name in names:
                stored = store[f"{alias}/{name}"][[row]]
                np.testing.assert_allclose(
                    stored.astype(np.float32),
                    wanted[name].numpy().astype(np.float32),
                    atol=2e-3,
                    rtol=2e-3,
                )
    assert store["detector/boxes"].dtype == np.float32
    assert store["detector/region_classes"].dtype == np.int16


@pytest.mark.parametrize(
    ("spec", "alias"),
    [
        ("torchvision:resnet152", "resnet152"),
        ("torchvision:resnet152/IMAGENET1K_V2", "resnet152"),
        ("torchvision:resnet50//models/mine.pth", "resnet50"),
        ("timm:resnet50.a1_in1k", "resnet50.a1_in1k"),
        ("timm:hf-hub:timm/vit_small", "vit_small"),
        ("timm:/models/net", "net"),
        ("fasterrcnn:coco", "fasterrcnn"),
        ("fasterrcnn_vg:/models/faster_rcnn_res101_vg.pth", "fasterrcnn_vg"),
        ("python:small_resnet:SmallResNet[weights=x.pth]", "SmallResNet"),
    ],
)
def test_names_in_the_store(spec: str, alias: str):
    assert default_alias(spec) == alias


def test_all_tokens_of_a_pyramid_are_stored_with_their_places(tmp_path: Path):
    spec = f"{tiny_open_clip(tmp_path / 'clip')}[pyramid=3]"
    picture = blocks_of_colour(1, (90, 120), cells=11)[0]
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    (tmp_path / "photos.csv").write_text("id,image,labels\n1,a.png,cat\n", encoding="utf-8")
    extract(
        str(tmp_path / "photos.csv"),
        str(tmp_path / "photos.store"),
        ExtractConfig(
            backbones=(spec,),
            names=("clip",),
            fields=("image_tokens", "image_class", "image_places"),
            precision="float32",
            device="cpu",
        ),
        report=lambda _: None,
    )
    store = EmbeddingStore.open(tmp_path / "photos.store")
    assert store["clip/image_tokens"].shape == (1, 21 * 16, 32)
    assert store["clip/image_class"].shape == (1, 21, 32)
    places = store["clip/image_places"][:]
    assert places.dtype == np.int16
    assert places[0, 0].tolist() == [0, 0, 0]
    assert places[0, -1].tolist() == [2, 3, 3]
    backbone = load_backbone(spec, device="cpu", precision="float32")
    tiles = decode((tmp_path / "a.png").read_bytes(), backbone.image_transform)[None]
    wanted = backbone.encode_image(tiles, ["image_tokens"])["image_tokens"]
    found = torch.from_numpy(store["clip/image_tokens"][:].astype(np.float32))
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)
