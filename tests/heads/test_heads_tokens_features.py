"""Which token features a head reads: its needs, masks that come along, roles, error lines."""

import numpy as np
import pytest

from mmc.heads.features import resolve
from mmc.heads.models.dm_decoder import DMDecoder
from mmc.heads.models.fusion import Fusion
from mmc.heads.models.linear import Linear
from mmc.heads.models.ml_decoder import MLDecoder
from mmc.heads.models.vilbert import Vilbert
from mmc.heads.needs import mask_of
from mmc.store import EmbeddingStore, FieldSpec
from mmc.store.errors import InputError

SHAPES = {
    "image": (4,),
    "image_tokens": (3, 6),
    "image_class": (6,),
    "image_places": (3, 3),
    "text": (4,),
    "text_tokens": (5, 4),
    "text_mask": (5,),
    "fused_tokens": (5, 4),
    "fused_mask": (5,),
    "regions": (2, 8),
    "boxes": (2, 5),
    "region_mask": (2,),
}


def spec(name: str) -> FieldSpec:
    tower = "fused" if "fused" in name else "text" if "text" in name else "image"
    kind = "bool" if name.endswith("_mask") else "int16" if "places" in name else "float16"
    return FieldSpec(name=name, shape=SHAPES[name], dtype=kind, tower=tower)


@pytest.fixture
def with_fields(make_store):
    """A store whose aliases have the fields named; those in ``texts`` have label texts."""

    def make(aliases: dict[str, list[str]], texts: tuple[str, ...] = ()) -> EmbeddingStore:
        store = make_store()
        for alias, names in aliases.items():
            fields = [spec(name) for name in names]
            context = {"spec": f"hf:{alias}"}
            with store.writer(
                alias, fields=fields, identity={"a": alias}, context=context
            ) as writer:
                for shard in range(writer.num_shards):
                    rows = np.arange(*writer.bounds(shard))
                    for tower in {field.tower for field in fields}:
                        arrays = {
                            f.name: np.ones((len(rows), *f.shape), f.dtype)
                            for f in fields
                            if f.tower == tower
                        }
                        writer.commit(shard, tower, rows, arrays)
                if alias in texts:
                    array = np.ones((len(store.label_set), 4), np.float32)
                    writer.write_label_text(store.label_set, array, "a {label}")
        return EmbeddingStore.open(store.path)

    return make


def store_fields(store: EmbeddingStore, alias: str) -> list[str]:
    return [f.split("/")[1] for f in store.features if f.startswith(f"{alias}/")]


BLIP = ["image", "image_tokens", "text", "text_tokens", "text_mask", "fused_tokens", "fused_mask"]


@pytest.mark.parametrize(
    ("tokens", "mask"),
    [
        ("text_tokens", "text_mask"),
        ("text_ids", "text_mask"),
        ("left.fused_tokens", "left.fused_mask"),
        ("regions", "region_mask"),
        ("image_tokens", "image_mask"),
    ],
)
def test_a_field_names_its_mask(tokens, mask):
    assert mask_of(tokens) == mask


def test_an_alias_gives_what_the_head_reads_and_the_masks_of_that(with_fields):
    store = with_fields({"blip": BLIP})
    assert resolve(store, ["blip"], MLDecoder, "ml_decoder") == {
        "image_tokens": "blip/image_tokens",
        "fused_tokens": "blip/fused_tokens",
        "fused_mask": "blip/fused_mask",
    }


def test_nothing_said_is_every_alias(with_fields):
    store = with_fields({"bert": ["text_tokens", "text_mask"], "vit": ["image_tokens"]})
    roles = resolve(store, None, MLDecoder, "ml_decoder")
    assert roles == {
        "image_tokens": "vit/image_tokens",
        "text_tokens": "bert/text_tokens",
        "text_mask": "bert/text_mask",
    }


def test_fusion_takes_the_vector_where_there_are_no_tokens(with_fields):
    store = with_fields({"bert": ["text_tokens", "text_mask"], "vit": ["image"]})
    roles = resolve(store, ["bert", "vit"], Fusion, "fusion")
    assert set(roles) == {"text_tokens", "text_mask", "image"}


def test_a_vector_brings_no_mask(with_fields):
    store = with_fields({"blip": BLIP})
    assert resolve(store, ["blip/text"], Fusion, "fusion") == {"text": "blip/text"}


def test_two_aliases_of_one_field_get_prefixes_and_their_own_masks(with_fields):
    store = with_fields({"a": ["text_tokens", "text_mask"], "b": ["text_tokens", "text_mask"]})
    assert resolve(store, ["a", "b"], Fusion, "fusion") == {
        "a.text_tokens": "a/text_tokens",
        "b.text_tokens": "b/text_tokens",
        "a.text_mask": "a/text_mask",
        "b.text_mask": "b/text_mask",
    }


def test_a_typed_field_is_all_that_is_read_and_brings_its_mask(with_fields):
    store = with_fields({"blip": BLIP})
    roles = resolve(store, ["blip/text_tokens"], Fusion, "fusion")
    assert roles == {"text_tokens": "blip/text_tokens", "text_mask": "blip/text_mask"}


def test_a_role_may_be_given(with_fields):
    store = with_fields({"blip": BLIP})
    roles = resolve(store, ["text_tokens=blip/fused_tokens"], MLDecoder, "ml_decoder")
    assert roles == {"text_tokens": "blip/fused_tokens", "text_mask": "blip/fused_mask"}
    roles = resolve(store, ["left.text_tokens=blip/text_tokens"], Fusion, "fusion")
    assert roles["left.text_mask"] == "blip/text_mask"


def test_extras_come_where_they_are(with_fields):
    store = with_fields({"vit": ["image_tokens", "image_class", "image_places"]})
    assert set(resolve(store, None, MLDecoder, "m")) == {"image_tokens", "image_class"}
    assert set(resolve(store, ["vit"], Fusion, "f")) == set(store_fields(store, "vit"))


def test_vilbert_finds_its_three_inputs_in_two_aliases(with_fields):
    store = with_fields(
        {"rcnn": ["regions", "boxes", "region_mask"], "bert": ["text_tokens", "text_mask"]}
    )
    for items in (None, ["rcnn"], ["rcnn", "bert"], ["rcnn/regions"]):
        assert set(resolve(store, items, Vilbert, "vilbert")) == {
            "regions",
            "boxes",
            "region_mask",
            "text_tokens",
            "text_mask",
        }


def test_a_head_of_one_such_input_asks_which(with_fields):
    store = with_fields({a: ["regions", "boxes", "region_mask"] for a in ("one", "two")})
    with pytest.raises(InputError, match=r"reads one regions, .*one/regions, two/regions: choose"):
        resolve(store, None, Vilbert, "vilbert")


def test_dm_decoder_needs_label_texts(with_fields):
    store = with_fields({"vit": ["image_tokens"], "dual": ["image", "image_tokens"]}, ("dual",))
    assert set(resolve(store, ["dual"], DMDecoder, "dm_decoder")) == {"image", "image_tokens"}
    with pytest.raises(InputError, match=r"dm_decoder needs label texts, and vit has none"):
        resolve(store, ["vit"], DMDecoder, "dm_decoder")


def test_a_store_without_tokens_is_told_what_to_extract(with_fields):
    store = with_fields({"bert": ["text"]})
    with pytest.raises(InputError) as error:
        resolve(store, ["bert"], Vilbert, "vilbert")
    assert "--fields regions,region_mask" in str(error.value)
    with pytest.raises(InputError) as error:
        resolve(store, ["bert"], MLDecoder, "ml_decoder")
    line = str(error.value)
    assert "ml_decoder reads image_tokens or fused_tokens" in line
    assert "--backbone hf:bert --name bert --fields" in line
    assert "\n" not in line


def test_tokens_without_their_mask_are_refused(with_fields):
    store = with_fields({"bert": ["text_tokens"]})
    with pytest.raises(InputError, match="--fields text_tokens,text_mask"):
        resolve(store, ["bert"], Fusion, "fusion")


@pytest.mark.parametrize(
    ("items", "line"),
    [
        (["nobody"], "no such alias"),
        (["clip/nothing"], "no feature 'clip/nothing'"),
        (["=clip/image"], "write role=alias/field"),
        (["clip/image", "clip/image"], "given twice"),
        (["image=clip/image", "image=clip/text"], "given twice"),
        (["left=clip/image"], "calls its inputs by their field"),
    ],
)
def test_what_is_typed_wrongly_is_said(make_store, items, line):
    with pytest.raises(InputError, match=line):
        resolve(make_store(), items, Fusion, "fusion")


def test_other_heads_are_as_before(with_fields):
    store = with_fields({"blip": BLIP})
    assert resolve(store, ["blip"], Linear, "linear") == {
        "image": "blip/image",
        "text": "blip/text",
    }
