"""Embeddings of the label names: one prompt, several, and those of labels that come later."""

import json

import numpy as np
import pytest
from counting_backbone import CALLS, Counting
from pipeline_case import SPEC, Case

from mmc.extract.label_text import embed_labels, embed_labels_like, embed_texts
from mmc.extract.recipe import embed_like
from mmc.extract.sources import SourceOptions
from mmc.store import EmbeddingStore
from mmc.store.errors import InputError

TEMPLATES = ("a photo of a {label}", "art, with a {label} in it")


@pytest.fixture
def case(tmp_path) -> Case:
    case = Case(tmp_path)
    case.add(8)
    return case


def opened(case: Case, store: str = "store") -> EmbeddingStore:
    return EmbeddingStore.open(case.folder / store)


def counting() -> Counting:
    return Counting(device="cpu", precision="float32", max_text_tokens=None)


def recipe(case: Case) -> dict[str, object]:
    """As a run keeps it."""
    provenance = opened(case).provenance("fake")
    return {
        "alias": "fake",
        "fields": ["image", "text"],
        "identity": dict(provenance.identity),
        "context": dict(provenance.context),
    }


def test_one_template_is_kept_as_the_backbone_gives_it(case):
    case.extract(label_template=TEMPLATES[:1])
    labels, array = opened(case).label_text("fake")
    expected = embed_texts(counting(), [f"a photo of a {label}" for label in labels])
    np.testing.assert_array_equal(array, expected)
    assert opened(case).label_prompt("fake") == TEMPLATES[0]


def test_several_templates_are_averaged_after_normalising(case):
    case.extract(label_template=TEMPLATES)
    labels, array = opened(case).label_text("fake")
    assert labels == ("cat", "dog")
    texts = [template.replace("{label}", label) for template in TEMPLATES for label in labels]
    each = embed_texts(counting(), texts).reshape(2, 2, -1)
    units = each / np.linalg.norm(each, axis=2, keepdims=True)
    np.testing.assert_allclose(array, (units[0] + units[1]) / 2, rtol=1e-6)
    assert (np.linalg.norm(array, axis=1) <= 1 + 1e-6).all()
    assert json.loads(opened(case).label_prompt("fake")) == list(TEMPLATES)
    case.extract(label_template=TEMPLATES)
    assert CALLS["text batches"] == 0
    case.extract(label_template=TEMPLATES[:1])
    assert CALLS["text batches"] == 1


def test_labels_that_come_later(case):
    case.extract()
    found = embed_labels_like(recipe(case), ["cat", "owl"], TEMPLATES, device="cpu")
    np.testing.assert_array_equal(found, embed_labels(counting(), ["cat", "owl"], TEMPLATES))
    default = embed_labels_like(recipe(case), ["cat", "dog"], device="cpu")
    np.testing.assert_array_equal(default, opened(case).label_text("fake")[1])


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("context", {"spec": f"{SPEC}[weights=b]"}, 'is not what made .fake.: .*weights.*"a".*"b"'),
        ("context", {"spec": "python:counting_backbone:Images"}, "no text tower"),
        ("context", None, "does not say which backbone made 'fake'"),
    ],
)
def test_labels_of_a_backbone_that_is_not_the_run_s(case, part, change, message):
    case.extract()
    wrong = recipe(case)
    wrong[part] = change or {}
    with pytest.raises(InputError, match=message):
        embed_labels_like(wrong, ["cat"], device="cpu")


def test_predicting_on_a_raw_source_embeds_no_label_names(case):
    case.extract()
    CALLS.clear()
    store, rows = embed_like(
        [recipe(case)],
        str(case.table),
        str(case.folder / "other"),
        SourceOptions(label_column="labels"),
        device="cpu",
        report=lambda line: None,
        progress=lambda *step: None,
    )
    assert rows.tolist() == list(range(8))
    assert store.label_text("fake") is None
    assert CALLS["loaded"] == 1
    np.testing.assert_array_equal(store["fake/text"][:], opened(case)["fake/text"][:])


def test_predicting_with_backbones_of_their_own_fields_and_batches(case, monkeypatch):
    """Each as it was made, all in one extraction: every picture is decoded once."""
    from pipeline_case import watch_decoding

    fused, originals = (f"python:counting_backbone:{name}" for name in ("Fused", "Originals"))
    case.extract(backbones=(fused,), names=("f",), fields=("fused", "image"), batch_size=4)
    case.extract(backbones=(originals,), names=("box",), batch_size=None)
    store = opened(case)
    recipes = [
        {
            "alias": alias,
            "fields": fields,
            "identity": store.provenance(alias).identity,
            "context": store.provenance(alias).context,
        }
        for alias, fields in (("f", ["fused", "image"]), ("box", ["image"]))
    ]
    reads, decodes = watch_decoding(monkeypatch)
    other, _ = embed_like(
        recipes,
        str(case.table),
        str(case.folder / "other"),
        SourceOptions(label_column="labels"),
        device="cpu",
        report=lambda line: None,
        progress=lambda *step: None,
    )
    assert len(reads) == len(decodes) == 8
    for name in ("f/fused", "f/image", "box/image"):
        np.testing.assert_array_equal(other[name][:], store[name][:])
        assert other[name].fingerprint == store[name].fingerprint
