"""Decoding: the pixels of the reference libraries, and a reason for every file that is refused."""

import csv
import io
import os
import random
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps
from torch import Tensor
from transformers import CLIPImageProcessor, SiglipImageProcessor

from mmc.extract import images
from mmc.extract.backbones.base import Normalizer
from mmc.extract.backbones.openclip import image_transform
from mmc.extract.images import ImageError, decode, decode_reference, read_image
from mmc.extract.transforms import ImageTransform
from mmc.store.errors import InputError

SMALL = ImageTransform(size=(32, 32))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coloured blotches with grain: smooth and sharp parts, as photographs have."""
    draw = np.random.default_rng(seed)
    cells = draw.integers(0, 255, (height // 8 + 2, width // 8 + 2, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))
    grain = draw.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def centred_cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(torch.cosine_similarity(a - a.mean(), b - b.mean(), dim=0))


def assert_near(fast: Tensor, reference: Tensor) -> None:
    assert fast.dtype == torch.uint8
    assert fast.shape == reference.shape
    difference = (fast.int() - reference.int()).abs()
    assert difference.max() <= 2
    assert (difference == 0).float().mean() >= 0.99
    assert centred_cosine(fast, reference) >= 0.9999


FORMS = {
    "rgb": {"quality": 90},
    "progressive": {"quality": 80, "progressive": True},
    "low quality": {"quality": 20},
    "full colour": {"quality": 95, "subsampling": 0},
    "restart markers": {"quality": 90, "restart_marker_blocks": 3},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("form", FORMS)
def test_fast_jpeg_equals_reference(form: str, mode: str):
    draw = random.Random(f"{form} {mode}")
    for seed in range(6):
        width, height = draw.randint(9, 400), draw.randint(9, 400)
        data = encoded(picture(width, height, seed).convert(mode), **FORMS[form])
        for size in (32, 224):
            transform = ImageTransform(size=(size, size))
            fast = decode(data, transform)
            assert fast.is_contiguous()
            assert_near(fast, decode_reference(data, transform))


@pytest.mark.parametrize("resize", ["shortest", "cover", "contain", "squash"])
@pytest.mark.parametrize(("width", "height"), [(97, 61), (61, 97), (60, 240), (240, 60), (20, 20)])
def test_resize_modes_equal_reference(resize: str, width: int, height: int):
    data = encoded(picture(width, height), quality=90)
    for size in ((48, 48), (40, 64)):
        transform = ImageTransform(size=size, resize=resize, fill=128)
        assert_near(decode(data, transform), decode_reference(data, transform))


@pytest.mark.parametrize(("width", "height"), [(112, 112), (97, 61), (271, 416), (61, 300)])
def test_bilinear_differs_by_rounding_only(width: int, height: int):
    data = encoded(picture(width, height), quality=90)
    transform = ImageTransform(size=(64, 64), interpolation="bilinear")
    fast, reference = decode(data, transform).int(), decode_reference(data, transform).int()
    assert (fast - reference).abs().max() <= 2
    assert centred_cosine(fast, reference) >= 0.9999


def test_the_fast_path_is_taken_for_plain_jpegs_only():
    def fast(data: bytes) -> bool:
        return images._jpeg_pixels(data, images._open(data, 10**6)) is not None

    jpeg = encoded(picture(40, 30))
    assert fast(jpeg)
    assert fast(encoded(picture(40, 30).convert("L")))
    assert not fast(encoded(picture(40, 30).convert("CMYK")))
    assert not fast(jpeg + b"trailing")
    assert not fast(encoded(picture(40, 30), "PNG"))


def test_without_the_operator_pillow_gives_the_same_pixels(monkeypatch: pytest.MonkeyPatch):
    data = encoded(picture(120, 90))
    with_operator = decode(data, SMALL)
    monkeypatch.setattr(images, "_JPEG_OPERATOR", None)
    assert torch.equal(decode(data, SMALL), with_operator)


@pytest.mark.parametrize("size", [32, (32, 32), (24, 40)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("width", "height"), [(97, 60), (53, 91), (31, 31), (500, 37)])
def test_reference_equals_open_clip(
    size: int | tuple[int, int], mode: str, interpolation: str, width: int, height: int
):
    cfg = PreprocessCfg(
        size=size, resize_mode=mode, interpolation=interpolation, mean=(0.5, 0.4, 0.3), fill_color=7
    )
    data = encoded(picture(width, height), "PNG")
    wanted = image_transform_v2(cfg, is_train=False)(Image.open(io.BytesIO(data)))
    transform = image_transform(vars(cfg))
    # For very long pictures Pillow resamples the crop alone, in another order of its passes.
    strip = images._is_strip(height, width, transform)
    pixels = decode_reference(data, transform)
    found = Normalizer(transform)(pixels[None], torch.float32)[0]
    step = 1 / 255 / min(cfg.std)
    torch.testing.assert_close(found, wanted, atol=2.1 * step if strip else 1e-5, rtol=0)


PROCESSORS = {
    "clip": lambda: CLIPImageProcessor(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    ),
    "clip, odd crop": lambda: CLIPImageProcessor(
        size={"shortest_edge": 41}, crop_size={"height": 32, "width": 34}
    ),
    "clip, crop larger": lambda: CLIPImageProcessor(
        size={"shortest_edge": 24}, crop_size={"height": 32, "width": 32}
    ),
    "siglip": lambda: SiglipImageProcessor(size={"height": 32, "width": 40}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_fast_path_equals_transformers(name: str, tmp_path: Path):
    from mmc.extract.backbones.hf_files import Files
    from mmc.extract.backbones.hf_files import image_transform as hf_transform

    processor = PROCESSORS[name]()
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    transform = hf_transform(Files(str(tmp_path)))
    normalize = Normalizer(transform)
    for seed, (width, height) in enumerate([(97, 60), (53, 91), (37, 90), (41, 41)]):
        data = encoded(picture(width, height, seed))
        wanted = processor(images=Image.open(io.BytesIO(data)), return_tensors="pt").pixel_values
        found = normalize(decode(data, transform)[None], torch.float32)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_same_result_from_many_threads():
    files = [
        encoded(picture(100 + n, 80 + 2 * n, n), "JPEG" if n % 3 else "PNG") for n in range(12)
    ]
    alone = [decode(data, SMALL) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decode(data, SMALL), files * 8))
    for n, pixels in enumerate(together):
        assert torch.equal(pixels, alone[n % len(files)])


def test_corrupt_jpegs_are_accepted_exactly_when_pillow_accepts_them(capfd: pytest.CaptureFixture):
    draw = random.Random(5)
    seeds = [
        encoded(picture(90, 70)),
        encoded(picture(61, 97), progressive=True),
        encoded(picture(64, 64), restart_marker_blocks=2),
    ]
    accepted = 0
    for _ in range(600):
        data = bytearray(draw.choice(seeds))
        kind = draw.random()
        if kind < 0.3:
            data = data[: draw.randrange(2, len(data))] + draw.choice([b"", b"\xff\xd9"])
        elif kind < 0.8:
            for _ in range(draw.choice([1, 2, 5])):
                data[draw.randrange(2, len(data))] = draw.randrange(256)
        else:
            start = draw.randrange(2, len(data) - 20)
            del data[start : start + draw.randrange(1, 20)]
        outcomes = []
        for function in (decode, decode_reference):
            try:
                outcomes.append(function(bytes(data), SMALL) is not None)
            except ImageError:
                outcomes.append(False)
        assert outcomes[0] == outcomes[1]
        accepted += outcomes[0]
    assert 50 < accepted < 550  # both kinds were there
    capfd.readouterr()  # libjpeg's remarks


def orientation_tag(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_applied_as_pillow_does(orientation: int, kind: str):
    stored = picture(60, 40)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(stored, kind, exif=orientation_tag(orientation), **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    size = (upright.height, upright.width)
    whole = ImageTransform(size=size, resize="squash")
    wanted = torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(decode(data, whole), wanted)
    assert torch.equal(decode_reference(data, whole), wanted)


def test_orientation_in_xmp_only():
    packet = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
        b'syntax-ns#"><rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    data = encoded(picture(60, 40), xmp=packet)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == (40, 60)
    whole = ImageTransform(size=(60, 40), resize="squash")
    wanted = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    assert torch.equal(decode(data, whole), wanted)


def test_sixteen_bit_gray_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    data = encoded(Image.fromarray(ramp), "PNG")
    pixels = decode(data, ImageTransform(size=(64, 64)))
    wanted = torch.from_numpy(np.rint(ramp / 257.0).astype(np.int32))
    assert torch.equal(pixels.int(), wanted.expand(3, 64, 64))


def test_modes_are_converted_as_pillow_converts_them():
    base = picture(40, 40)
    alpha = Image.linear_gradient("L").resize((40, 40))
    with_alpha = base.copy()
    with_alpha.putalpha(alpha)
    palette = base.quantize(16)
    files = {
        "RGBA": encoded(with_alpha, "PNG"),
        "LA": encoded(with_alpha.convert("LA"), "PNG"),
        "1": encoded(base.convert("1"), "PNG"),
        "P": encoded(palette, "PNG"),
        "P, one index transparent": encoded(palette, "PNG", transparency=3),
        "P, alpha per index": encoded(palette, "PNG", transparency=bytes(range(0, 160, 10))),
        "CMYK": encoded(base.convert("CMYK"), "TIFF"),
        "BMP": encoded(base, "BMP"),
        "WebP": encoded(base, "WEBP"),
    }
    whole = ImageTransform(size=(40, 40))
    for name, data in files.items():
        image = Image.open(io.BytesIO(data))
        image.load()
        image.info.pop("transparency", None)
        wanted = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(decode(data, whole), wanted), name


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind: str):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    means = decode(data, SMALL).float().mean((1, 2))
    assert means.tolist() == [255, 0, 0]


@pytest.mark.parametrize(("width", "height"), [(5000, 1), (1, 5000), (3000, 2), (2, 3000)])
def test_strips_are_bounded_and_keep_their_geometry(width: int, height: int):
    draw = np.random.default_rng(1)
    data = encoded(
        Image.fromarray(draw.integers(0, 255, (height, width, 3)).astype(np.uint8)), "PNG"
    )
    transform = ImageTransform(size=(24, 24))
    # What the libraries would do: 120,000 x 24 pixels and more, then the crop.
    new_height, new_width = transform.resized(height, width)
    whole = Image.open(io.BytesIO(data)).resize((new_width, new_height), Image.Resampling.BICUBIC)
    top, left = transform.crop_start(new_height, 24), transform.crop_start(new_width, 24)
    wanted = np.array(whole.crop((left, top, left + 24, top + 24))).astype(int)
    found = decode(data, transform).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - wanted).max() <= 2
    # At the size of a real model the whole would take 700 MB and more.
    assert decode(data, ImageTransform(size=(224, 224))).shape == (3, 224, 224)
    assert decode(data, ImageTransform(size=(224, 224), resize="contain")).shape == (3, 224, 224)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0"))


def test_size_is_checked_before_decoding():
    bomb = png_header(60_000, 60_000)
    with pytest.raises(ImageError, match="too large: 60000 x 60000 pixels, the limit is 89478485"):
        decode(bomb, SMALL)
    data = encoded(picture(50, 40))
    assert decode(data, SMALL, max_pixels=2000).shape == (3, 32, 32)
    with pytest.raises(ImageError, match="too large: 50 x 40 pixels, the limit is 1999"):
        decode(data, SMALL, max_pixels=1999)


JPEG = encoded(picture(80, 60))
PNG = encoded(picture(80, 60), "PNG")
REFUSED = {
    "an empty file": b"",
    "not an image in a known format": b"\x00\x01random",
    "HTML page": b"\n<!DOCTYPE html><html></html>",
    "an XML document": b"<?xml version='1.0'?><Error/>",
    "SVG": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>",
    "JSON text": b'{"error": "not found"}',
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "PDF": b"%PDF-1.7",
    "truncated or damaged header": JPEG[:20],
    "truncated JPEG": JPEG[: len(JPEG) // 2],
    "truncated PNG": PNG[: len(PNG) // 2],
    "damaged PNG": PNG[:400] + b"\0\0\0\0" + PNG[404:],
    # A PostScript file would start another program.
    "not an image in a known format ": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_reasons(reason: str):
    with pytest.raises(ImageError, match=reason.strip()) as found:
        decode(REFUSED[reason], SMALL)
    assert "\n" not in str(found.value)


def test_read_image(tmp_path: Path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "many.bin").write_bytes(b"0123456789")
    for name, reason in (
        ("none.jpg", "no such file"),
        ("folder.jpg", "a directory"),
        ("pipe.jpg", "not a regular file"),
        ("link.jpg", "a link to a file that does not exist"),
        ("many.bin/x.jpg", "cannot be read: Not a directory"),
    ):
        with pytest.raises(ImageError, match=reason):
            read_image(tmp_path / name)
    assert read_image(tmp_path / "many.bin") == b"0123456789"
    assert read_image(tmp_path / "many.bin", 3, 4) == b"3456"


def test_transform_is_checked_and_plain():
    transform = image_transform(vars(PreprocessCfg()))
    assert transform.as_dict()["mean"] == list(open_clip.OPENAI_DATASET_MEAN)
    assert transform.as_dict()["resize_to"] == [224, 224]
    assert hash(transform) == hash(image_transform(vars(PreprocessCfg())))
    for wrong in ({"size": (0, 3)}, {"std": (0, 1, 1)}, {"resize": "fit"}, {"crop": "up"}):
        with pytest.raises(InputError):
            ImageTransform(**{"size": (8, 8), **wrong})


def manifest(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["path"].startswith("images/")]


def outcome(path: Path) -> Tensor | str:
    """The pixels, or the reason why there are none."""
    try:
        return decode(read_image(path), SMALL)
    except ImageError as error:
        return str(error)


@pytest.mark.shared_data
def test_every_image_of_the_manifest(shared_data: Path):
    folder = shared_data / "bad_inputs"
    upright = decode((folder / "images/ok_reference.jpg").read_bytes(), SMALL).float()
    seen = 0
    for row in manifest(folder):
        path = folder / row["path"]
        handling = row["expected_handling"]
        loads = handling.startswith(("must load", "loads"))
        may_be_refused = "rejected" in handling or "skip" in handling
        pixels = outcome(path)
        if isinstance(pixels, str):
            assert may_be_refused, (path, pixels)
            continue
        assert loads, path
        if "orientation" in path.name and "invalid" not in path.name:
            assert (pixels.float() - upright).abs().mean() < 6, path
        if path.name == "gray16.png":
            assert 100 < pixels.float().mean() < 150
        seen += 1
    assert seen >= 40
