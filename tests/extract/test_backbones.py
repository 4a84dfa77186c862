"""One suite over every family in the table, and what the spec strings accept."""

import dataclasses
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    tiny_bert,
    tiny_blip,
    tiny_dinov2,
    tiny_hf_clip,
    tiny_hf_siglip,
    tiny_open_clip,
    tiny_vit,
)
from tiny_vision import tiny_fasterrcnn, tiny_fasterrcnn_vg, tiny_timm, tiny_torchvision
from torch import Tensor

from mmc.extract.backbones import BACKBONES, BackboneSpec, load_backbone, parse_spec
from mmc.extract.backbones.base import (
    Backbone,
    default_precision,
    field_table,
    weights_sha256,
)
from mmc.store.errors import InputError

OWN = textwrap.dedent(
    '''
    """A backbone of one's own: mean colour of the four quarters, and letter counts."""

    import torch

    from mmc.extract.backbones.base import TokenBatch, check_fields, field_table
    from mmc.extract.transforms import ImageTransform


    class Colours:
        fields = field_table({"image": (12,), "text": (27,)})
        default_fields = ("image", "text")
        image_transform = ImageTransform(size=(16, 16), resize="squash")
        prompt_template = "{label}"

        def __init__(self, *, device, precision, max_text_tokens, gain="1"):
            self.gain = float(gain)
            self.length = max_text_tokens or 64
            self.identity = {"architecture": "colours", "gain": gain, "length": self.length,
                             "preprocessing": self.image_transform.as_dict(),
                             "precision": precision}
            self.context = {}

        def tokenize(self, texts):
            ids = torch.zeros(len(texts), self.length, dtype=torch.int64)
            for row, text in zip(ids, texts):
                letters = [ord(c) - 96 for c in text.lower() if "a" <= c <= "z"][: self.length]
                row[: len(letters)] = torch.tensor(letters)
            return TokenBatch(ids, (ids > 0).sum(1), torch.full((len(texts),), self.length))

        def encode_image(self, pixels, fields):
            check_fields(fields, self.fields, "image")
            quarters = torch.nn.functional.avg_pool2d(pixels.float(), 8)
            return {"image": quarters.flatten(1) * self.gain}

        def encode_text(self, tokens, fields):
            check_fields(fields, self.fields, "text")
            return {"text": torch.nn.functional.one_hot(tokens.ids, 27).sum(1).float()}
    '''
)


def own_class(folder: Path) -> str:
    folder.mkdir()
    (folder / "own_colours.py").write_text(OWN, encoding="utf-8")
    sys.path.append(str(folder))
    return "python:own_colours:Colours[gain=2]"


CASES: dict[str, Callable[[Path], str]] = {
    "open_clip": tiny_open_clip,
    "hf clip": tiny_hf_clip,
    "hf siglip": tiny_hf_siglip,
    "hf bert": tiny_bert,
    "hf blip": tiny_blip,
    "hf vit": tiny_vit,
    "hf dinov2": tiny_dinov2,
    "torchvision": tiny_torchvision,
    "timm": tiny_timm,
    "fasterrcnn": tiny_fasterrcnn,
    "fasterrcnn_vg": tiny_fasterrcnn_vg,
    "open_clip pyramid": lambda folder: f"{tiny_open_clip(folder)}[pyramid=2]",
    "python": own_class,
}
TEXTS = [
    "a photo of the dog",
    "two small green cars under the tree",
    "",
    "one",
    "house on house and horse under horse over cat " * 5,
    "Nothing of this is in any vocabulary: ünïcødé!",
]


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("models")
    path = [*sys.path]
    yield {name: build(folder / name.replace(" ", "_")) for name, build in CASES.items()}
    sys.path[:] = path


@pytest.fixture(scope="module")
def loaded(specs: dict[str, str]) -> Callable[..., Backbone]:
    kept: dict[tuple[str, str], Backbone] = {}

    def get(case: str, precision: str = "float32") -> Backbone:
        if (case, precision) not in kept:
            kept[case, precision] = load_backbone(specs[case], device="cpu", precision=precision)
        return kept[case, precision]

    return get


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def pixels_for(backbone: Backbone, count: int = 5) -> Tensor | list[Tensor]:
    """Smooth random images: blocks of colour, so that resolution does not average them out."""
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)
    shape = backbone.image_transform.shape
    if shape is None:  # detectors: few, for they are slow, and each of its own size
        sizes = ((64, 80), (90, 60), (48, 48))
        return [
            torch.nn.functional.interpolate(block[None], size=size)[0]
            for block, size in zip(blocks, sizes, strict=False)
        ]
    if len(shape) == 4:  # tiles: all of them different
        tiles = torch.nn.functional.interpolate(blocks, size=shape[2:])
        turned = [tiles.roll(5 * at, dims=3).roll(at, dims=1) for at in range(shape[0])]
        return torch.stack(turned, dim=1)
    return torch.nn.functional.interpolate(blocks, size=shape[1:])


def tower_fields(backbone: Backbone, tower: str) -> list[str]:
    return [name for name, spec in backbone.fields.items() if spec.tower == tower]


def everything(backbone: Backbone) -> dict[str, Tensor]:
    """Every field of five images or six texts, and of the first five texts with the images."""
    found: dict[str, Tensor] = {}
    if fused := tower_fields(backbone, "fused"):
        five = backbone.tokenize(TEXTS[:5])
        found |= backbone.encode_fused(pixels_for(backbone), five, fused)
    if backbone.image_transform is not None:
        found |= backbone.encode_image(pixels_for(backbone), tower_fields(backbone, "image"))
    if tower_fields(backbone, "text"):
        tokens = backbone.tokenize(TEXTS)
        found |= backbone.encode_text(tokens, tower_fields(backbone, "text"))
    return found


def centred(features: Tensor) -> Tensor:
    features = features.double().flatten(1)
    return features - features.mean(0)


def test_every_family_of_the_table_is_tested():
    assert {entry.name for entry in BACKBONES} == {case.split()[0] for case in CASES}


def test_fields_are_what_is_promised(case: str, loaded: Callable[..., Backbone]):
    backbone = loaded(case)
    found = everything(backbone)
    assert set(found) == set(backbone.fields)
    assert backbone.default_fields
    for name in backbone.default_fields:  # the pooled ones; of detectors, which have none, all
        assert len(backbone.fields[name].shape) == 1 or "region_scores" in backbone.fields
    for name, array in found.items():
        spec = backbone.fields[name]
        assert array.shape[1:] == spec.shape
        kinds = {"bool": torch.bool, "int16": torch.int16, "int32": torch.int32}
        assert array.dtype == kinds.get(spec.dtype, torch.float32)
        assert not array.requires_grad
        if array.dtype == torch.float32:
            assert array.isfinite().all()
            assert array.abs().max() < 60000  # fits float16


def test_deterministic(case: str, loaded: Callable[..., Backbone]):
    first, second = everything(loaded(case)), everything(loaded(case))
    for name in first:
        assert torch.equal(first[name], second[name])


def test_different_inputs_give_different_outputs(case: str, loaded: Callable[..., Backbone]):
    for name, array in everything(loaded(case)).items():
        if array.shape[1:] == (1,):  # a probability: some may be alike
            assert array.std() > 0.05, name
        elif (array.ndim == 2 and name != "region_scores") or name == "regions":
            if array.dtype != torch.float32:
                continue
            spread = centred(array).norm(dim=1) / array.double().flatten(1).norm(dim=1)
            assert spread.min() > 0.05, name


def test_a_row_does_not_depend_on_its_batch(case: str, loaded: Callable[..., Backbone]):
    backbone = loaded(case)
    together = everything(backbone)
    if backbone.image_transform is not None:
        fields = tower_fields(backbone, "image")
        for row, image in enumerate(pixels_for(backbone)):
            one = [image] if backbone.image_transform.shape is None else image[None]
            alone = backbone.encode_image(one, fields)
            for name in fields:
                torch.testing.assert_close(
                    alone[name][0], together[name][row], atol=1e-5, rtol=1e-5
                )
    fields = tower_fields(backbone, "text")
    if not fields:
        return
    tokens = backbone.tokenize(TEXTS)
    for row in range(len(TEXTS)):
        # Alone, the row is cut to its own bucket; together, to the longest row's.
        alone = backbone.encode_text(tokens.take([row]), fields)
        for name in fields:
            torch.testing.assert_close(alone[name][0], together[name][row], atol=1e-5, rtol=1e-5)


def test_tokens_are_a_function_of_the_text(case: str, loaded: Callable[..., Backbone]):
    backbone = loaded(case)
    if not tower_fields(backbone, "text"):
        return
    tokens = backbone.tokenize(TEXTS)
    assert tokens.ids.dtype == tokens.lengths.dtype == tokens.buckets.dtype == torch.int64
    assert (tokens.lengths <= tokens.buckets).all()
    assert (tokens.buckets <= tokens.ids.shape[1]).all()
    for row, text in enumerate(TEXTS):
        alone = backbone.tokenize([text])
        assert torch.equal(alone.ids[0], tokens.ids[row])
        assert alone.lengths[0] == tokens.lengths[row]
        assert alone.buckets[0] == tokens.buckets[row]
    assert len(backbone.tokenize([])) == 0


def test_masks_say_which_tokens_are_real(case: str, loaded: Callable[..., Backbone]):
    backbone = loaded(case)
    if "text_mask" not in backbone.fields:
        return
    found = everything(backbone)
    lengths = backbone.tokenize(TEXTS).lengths
    assert torch.equal(found["text_mask"].sum(1), lengths)
    assert (found["text_tokens"][~found["text_mask"]] == 0).all()
    assert (found["text_tokens"][found["text_mask"]].abs().amax(1) > 0).all()
    assert found["text_ids"].dtype == torch.int32
    assert (found["text_ids"][~found["text_mask"]] == 0).all()
    tokens = backbone.tokenize(TEXTS)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(found["text_ids"][row, :length].long(), tokens.ids[row, :length])


def test_ids_and_masks_alone_need_no_pass_through_the_network(
    case: str, loaded: Callable[..., Backbone], monkeypatch: Any
):
    backbone = loaded(case)
    if "text_mask" not in backbone.fields:
        return
    found = everything(backbone)

    def never(*inputs: Any) -> Any:
        raise AssertionError("the network ran")

    encoder = getattr(backbone, "_backbone", backbone)  # within a pyramid
    monkeypatch.setattr(encoder, "_text", dataclasses.replace(encoder._text, forward=never))
    cheap = backbone.encode_text(backbone.tokenize(TEXTS), ["text_ids", "text_mask"])
    assert torch.equal(cheap["text_ids"], found["text_ids"])
    assert torch.equal(cheap["text_mask"], found["text_mask"])
    with pytest.raises(AssertionError, match="the network ran"):
        backbone.encode_text(backbone.tokenize(TEXTS), ["text_ids", "text"])


def test_unknown_fields_are_refused(case: str, loaded: Callable[..., Backbone]):
    backbone = loaded(case)
    if tower_fields(backbone, "text"):
        with pytest.raises(InputError, match="no text field 'image'"):
            backbone.encode_text(backbone.tokenize(["a"]), ["image"])
    elif hasattr(backbone, "tokenize"):
        with pytest.raises(InputError, match="no text tower"):
            backbone.tokenize(["a"])
    if backbone.image_transform is not None:
        with pytest.raises(InputError, match=r"no image field 'hats'; it has: (image|regions)"):
            backbone.encode_image(pixels_for(backbone), ["hats"])
    else:
        with pytest.raises(InputError, match="no image field 'image'; it has: none"):
            backbone.encode_image(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["image"])


def test_bf16_is_near_float32(case: str, loaded: Callable[..., Backbone]):
    exact, rounded = everything(loaded(case)), everything(loaded(case, "bf16"))
    if "region_scores" in exact:  # a rounding may change which regions are chosen, and their order
        assert torch.equal(exact["region_mask"], rounded["region_mask"])
        near = torch.cosine_similarity(exact["region_scores"], rounded["region_scores"])
        assert near.min() > 0.99
        return
    for name, array in exact.items():
        if array.dtype != torch.float32 or name == "boxes":
            assert torch.equal(array, rounded[name])
            continue
        assert rounded[name].dtype == torch.float32
        a, b = array.double().flatten(1), rounded[name].double().flatten(1)
        assert torch.cosine_similarity(a, b).min() > 0.999, name
        together = centred(array).flatten(), centred(rounded[name]).flatten()
        assert torch.cosine_similarity(*together, dim=0) > 0.999, name


def test_from_several_threads_at_once(case: str, loaded: Callable[..., Backbone]):
    backbone = loaded(case)
    alone = everything(backbone)
    rounds = 6 if "region_scores" in alone else 18
    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(lambda _: everything(backbone), range(rounds)):
            for name in alone:
                assert torch.equal(found[name], alone[name])


def test_identity_is_json_and_the_same_again(
    case: str, specs: dict[str, str], loaded: Callable[..., Backbone]
):
    first = loaded(case)
    again = load_backbone(specs[case], device="cpu", precision="float32")
    assert json.loads(json.dumps(first.identity)) == json.loads(json.dumps(again.identity))
    context = json.loads(json.dumps(first.context))
    assert context["spec"] == context["resolved_spec"] == specs[case]
    assert loaded(case, "bf16").identity != first.identity
    shorter = load_backbone(specs[case], device="cpu", precision="float32", max_text_tokens=12)
    assert (shorter.identity != first.identity) == bool(tower_fields(first, "text"))
    assert "{label}" in first.prompt_template


def test_max_text_tokens_cuts_texts(case: str, specs: dict[str, str]):
    backbone = load_backbone(specs[case], device="cpu", precision="float32", max_text_tokens=12)
    if not tower_fields(backbone, "text"):
        return
    tokens = backbone.tokenize(TEXTS)
    assert tokens.lengths.max() == 12
    if "text_tokens" in backbone.fields:
        assert backbone.fields["text_tokens"].shape[0] == 12
        found = backbone.encode_text(tokens, ["text_tokens", "text_mask"])
        assert torch.equal(found["text_mask"].sum(1), tokens.lengths)


def test_spec_round_trip():
    text = "open_clip:ViT-B-32//some where/weights.pt[quick_gelu=true]"
    spec = parse_spec(text)
    assert spec == BackboneSpec(
        "open_clip", "ViT-B-32//some where/weights.pt", {"quick_gelu": "true"}
    )
    assert str(spec) == text
    assert parse_spec(str(spec)) == spec
    assert str(parse_spec("hf:a/b[]")) == "hf:a/b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ViT-B-32", "not of the form family:name"),
        ("open_clip:", "not of the form family:name"),
        ("openclip:ViT-B-32/x", "unknown backbone 'openclip'; did you mean open_clip"),
        ("caffe:resnet152", "unknown backbone 'caffe'; choose from: open_clip, hf, torchvision"),
        ("hf:x[pooling]", "option 'pooling' must be key=value"),
        ("hf:x[pooling=mean,pooling=cls]", "option 'pooling' is given twice"),
    ],
)
def test_wrong_specs(text: str, message: str):
    with pytest.raises(InputError, match=message):
        parse_spec(text)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("open_clip:x[pyramids=2]", r"pyramids.*quick_gelu"),
        ("open_clip:x[quick_gelu=perhaps]", "quick_gelu"),
        ("hf:x[pooling=median]", r"pooling.*mean, cls, max"),
        ("python:json", "not of the form python:package.module:Class"),
        ("python:no.such.module:Class", "no module 'no'"),
        ("python:json:Backbone", "json has no 'Backbone'"),
        ("python:json:JSONDecoder", "cannot be built with device, precision, max_text_tokens"),
    ],
)
def test_what_cannot_be_loaded(spec: str, message: str):
    with pytest.raises(InputError, match=message) as found:
        load_backbone(spec, device="cpu", precision="float32")
    assert "\n" not in str(found.value)


def test_own_class_must_have_the_interface(specs: dict[str, str]):
    import own_colours

    class Nameless(own_colours.Colours):
        default_fields = ("picture",)

    own_colours.Nameless = Nameless
    own_colours.Thing = type("Thing", (), {"__init__": lambda self, **options: None})
    with pytest.raises(InputError, match="default_fields"):
        load_backbone("python:own_colours:Nameless", device="cpu", precision="float32")
    with pytest.raises(InputError, match="has no fields, default_fields"):
        load_backbone("python:own_colours:Thing", device="cpu", precision="float32")
    with pytest.raises(InputError, match="colour"):
        load_backbone("python:own_colours:Colours[colour=1]", device="cpu", precision="float32")


def test_arguments_are_checked(specs: dict[str, str]):
    with pytest.raises(InputError, match="choose bf16 or float32"):
        load_backbone(specs["hf bert"], device="cpu", precision="fp16")
    with pytest.raises(InputError, match="at least 2"):
        load_backbone(specs["hf bert"], device="cpu", precision="float32", max_text_tokens=1)
    for name, context in (("hf bert", 40), ("hf siglip", 16), ("open_clip", 77)):
        with pytest.raises(InputError, match=f"more than the model's context of {context}"):
            load_backbone(specs[name], device="cpu", precision="float32", max_text_tokens=78)


def test_devices_are_checked(specs: dict[str, str]):
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(InputError, match=f"device '{device}' cannot be used") as found:
            load_backbone(specs["hf bert"], device=device, precision="float32")
        assert "\n" not in str(found.value)


def test_relative_paths_are_remembered_in_full(specs: dict[str, str], monkeypatch: Any):
    for case in ("open_clip", "hf bert"):
        family, _, folder = specs[case].partition(":")
        monkeypatch.chdir(Path(folder).parent)
        relative = f"{family}:./{Path(folder).name}"
        context = load_backbone(relative, device="cpu", precision="float32").context
        assert context["spec"] == relative
        assert context["resolved_spec"] == specs[case]


def test_default_precision_is_one_of_the_two():
    assert default_precision("cpu") in ("bf16", "float32")
    assert default_precision("mps") == "float32"


def test_field_table_knows_the_names_of_all_fields():
    towers = {
        "image": "image image_tokens image_class image_places regions boxes region_scores "
        "region_classes region_mask",
        "text": "text text_ids text_tokens text_mask",
        "fused": "fused fused_tokens fused_mask itm",
    }
    names = {name: tower for tower, some in towers.items() for name in some.split()}
    table = field_table(dict.fromkeys(names, (3,)))
    assert {name: spec.tower for name, spec in table.items()} == names
    dtypes = {name: spec.dtype for name, spec in table.items() if spec.dtype != "float16"}
    assert dtypes == {
        **dict.fromkeys(("text_mask", "fused_mask", "region_mask"), "bool"),
        **dict.fromkeys(("region_classes", "image_places"), "int16"),
        "boxes": "float32",
        "text_ids": "int32",
    }


def test_weights_hash_sees_every_difference():
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.0)}
    same = {"b": torch.tensor(1.0), "a": torch.arange(6.0).view(3, 2).T.contiguous().view(2, 3)}
    same["a"] = state["a"].clone()
    assert weights_sha256(same) == weights_sha256(state)
    for other in (
        {**state, "a": state["a"].view(3, 2)},
        {**state, "a": state["a"].int()},
        {**state, "c": torch.tensor(1.0)},
        {"a": state["a"], "B": state["b"]},
        {**state, "b": torch.tensor(1.0000001)},
    ):
        assert weights_sha256(other) != weights_sha256(state)
