"""`extract` from a source to a filled store: what is computed, what is not, and what is said."""

import json
import shutil

import numpy as np
import pytest
import torch
from counting_backbone import CALLS, Counting, offsets
from PIL import Image
from pipeline_case import SPEC, Case, config, picture, watch_decoding

from mmc.extract.images import DEFAULT_MAX_PIXELS, decode
from mmc.store import EmbeddingStore
from mmc.store.errors import FingerprintMismatchError, InputError, MmcError, NotAStoreError


@pytest.fixture
def case(tmp_path) -> Case:
    return Case(tmp_path)


def opened(case: Case, store: str = "store") -> EmbeddingStore:
    return EmbeddingStore.open(case.folder / store)


def alone(case: Case, row: int) -> np.ndarray:
    """The picture's embedding without what batches add."""
    backbone = Counting(device="cpu", precision="float32", max_text_tokens=None)
    data = (case.folder / case.rows[row]["image"]).read_bytes()
    pixels = decode(data, backbone.image_transform)[None]
    torch.set_num_threads(1)
    return (backbone.encode_image(pixels, ["image"])["image"] - offsets(1)[:, None])[0].numpy()


def test_each_row_gets_its_own_embedding_at_its_own_place(case):
    case.add(39)
    report = case.extract()
    assert CALLS["image rows"] == 4 * (4 + 4 + 2)
    store = opened(case)
    images = store["fake/image"][:]
    for row in range(39):
        slot = row % 16 % 4
        expected = alone(case, row) + offsets(4)[slot].item()
        np.testing.assert_allclose(images[row], expected, atol=1e-3)
    assert (report.samples, report.embedded, report.failed, report.skipped) == (39, 39, 0, 0)
    assert store.status("fake", "image").tolist() == [1] * 39
    assert store.status("fake", "text").tolist() == [1] * 39
    assert len(np.unique(store["fake/text"][:], axis=0)) == 39
    assert report.rate > 0
    assert report.efficiency is None  # too short to say
    assert report.bottleneck in ("read", "decode", "encode", "write")


def test_an_unchanged_source_is_not_embedded_again(case):
    case.add(20)
    case.extract()
    before = case.files()
    report = case.extract()
    assert not any(name.endswith(("rows", "batches")) for name in CALLS)
    assert (report.embedded, report.skipped) == (0, 20)
    assert any("nothing to do" in line for line in case.said)
    assert any("20 unchanged" in line for line in case.said)
    assert case.files() == before


def test_settings_of_the_store_are_kept_when_none_are_given(case):
    case.add(6)
    case.extract(batch_size=2, max_text_tokens=16, shard_rows=None)
    case.add(1)
    case.extract(batch_size=None, precision=None, max_text_tokens=None, shard_rows=None)
    identity = opened(case).provenance("fake").identity
    assert identity["batch_size"] == {"image": 2, "text": 4}
    assert identity["max_text_tokens"] == 16
    assert CALLS["image rows"] == 2


def test_other_weights_or_batches_are_refused_and_nothing_changes(case):
    case.add(6)
    case.extract()
    before = case.files()
    case.add(1)
    with pytest.raises(FingerprintMismatchError, match=r'weights: the store has "a".*"b"'):
        case.extract(backbones=(f"{SPEC}[weights=b]",))
    with pytest.raises(FingerprintMismatchError, match="batch_size"):
        case.extract(batch_size=8)
    assert case.files() == before
    assert len(opened(case)) == 6
    case.extract(backbones=(f"{SPEC}[weights=b]",), overwrite=True)
    assert opened(case).provenance("fake").identity["weights"] == "b"
    assert CALLS["image rows"] == 8


def test_a_changed_picture_runs_the_image_tower_for_its_row_alone(case):
    case.add(20)
    case.extract()
    store = opened(case)
    images, texts = store["fake/image"][:], store["fake/text"][:]
    picture(case.folder / "s7.png", seed=999, size=(30, 20))
    report = case.extract()
    assert (CALLS["image batches"], CALLS["text batches"]) == (1, 0)
    assert report.embedded == 1
    assert any("1 with another image" in line for line in case.said)
    store = opened(case)
    np.testing.assert_array_equal(store["fake/text"][:], texts)
    changed = (store["fake/image"][:] != images).any(axis=1)
    assert np.flatnonzero(changed).tolist() == [7]
    np.testing.assert_allclose(
        store["fake/image"][7], alone(case, 7) + offsets(4)[3].item(), atol=1e-3
    )


def test_an_edited_text_runs_the_text_tower_for_its_row_alone(case):
    case.add(20)
    case.extract()
    texts = opened(case)["fake/text"][:]
    case.rows[11]["text"] = "something else"
    case.extract()
    assert (CALLS["image batches"], CALLS["text batches"]) == (0, 1)
    changed = (opened(case)["fake/text"][:] != texts).any(axis=1)
    assert np.flatnonzero(changed).tolist() == [11]


def test_new_labels_embed_only_the_label_names(case):
    case.add(8)
    case.extract()
    labels, array = opened(case).label_text("fake")
    assert labels == ("cat", "dog")
    assert array.shape == (2, 4)
    case.rows[0]["labels"] = "owl"
    case.extract()
    assert (CALLS["image batches"], CALLS["text batches"]) == (0, 1)
    store = opened(case)
    assert store.label_text("fake")[0] == ("cat", "dog", "owl")
    np.testing.assert_array_equal(store.label_text("fake")[1][:2], array)


def test_label_names_and_prompts(case):
    case.add(8)
    case.extract()
    plain = opened(case).label_text("fake")[1]
    names = case.folder / "names.json"
    names.write_text(json.dumps({"cat": "a small feline"}))
    case.extract(label_names=names)
    named = opened(case).label_text("fake")[1]
    assert (named[0] != plain[0]).any()
    np.testing.assert_array_equal(named[1], plain[1])
    case.extract(label_names=names)
    assert CALLS["text batches"] == 0
    case.extract(label_template=("{label}",))
    assert opened(case).label_prompt("fake") == "{label}"
    names.write_text(json.dumps({"kat": "a small feline"}))
    with pytest.raises(InputError, match="none of the labels; the first are cat, dog"):
        case.extract(label_names=names)


def test_the_same_picture_is_embedded_once_and_written_to_every_row(case):
    case.add(5)
    case.add(2, image="s1.png")
    case.add(13)
    case.add(2, image="s1.png")
    case.add(3, text=case.rows[0]["text"])
    case.extract()
    store = opened(case)
    images, texts = store["fake/image"][:], store["fake/text"][:]
    for row in (5, 6, 20, 21):
        np.testing.assert_array_equal(images[row], images[1])
    for row in (22, 23, 24):
        np.testing.assert_array_equal(texts[row], texts[0])
    assert CALLS["image rows"] == 4 * (4 + 2)  # 14 pictures in the first shard, 7 in the second
    assert store.status("fake", "image").tolist() == [1] * 25


def test_five_captions_of_one_picture_fill_no_batch_with_copies(case):
    for number in range(8):
        case.add(5, image=f"p{number}.png")
    case.extract()
    assert CALLS["image batches"] == 3  # 4 + 3 + 1 pictures in shards of 16 rows
    assert len(np.unique(opened(case)["fake/image"][:], axis=0)) == 8


def test_bad_pictures_do_not_stop_the_run(case):
    case.add(10)
    (case.folder / "s3.png").write_bytes(b"<html>not found</html>")
    (case.folder / "s9.png").write_bytes(b"<html>not found</html>")
    (case.folder / "s5.png").unlink()
    report = case.extract()
    store = opened(case)
    assert store.status("fake", "image").tolist() == [1, 1, 1, 2, 1, 2, 1, 1, 1, 2]
    assert store.status("fake", "text").tolist() == [1] * 10
    assert report.failed == 3
    assert [failure.id for failure in report.failures] == ["s3", "s5", "s9"]
    assert "HTML" in report.failures[0].reason
    assert report.failures[2].reason == report.failures[0].reason
    assert "no such file" in report.failures[1].reason
    assert any("3 of 10 samples could not be embedded" in line for line in case.said)
    assert case.extract().failed == 0  # known to be bad: not tried again
    assert CALLS["image batches"] == 0


def test_strict_ends_with_an_error_when_all_else_is_done(case):
    case.add(10)
    (case.folder / "s3.png").write_bytes(b"no picture")
    for _ in range(2):
        with pytest.raises(MmcError, match="1 of 10 samples could not be embedded") as caught:
            case.extract(strict=True)
        assert caught.value.exit_code == 1
        assert opened(case).status("fake", "image").tolist().count(1) == 9


def test_a_repaired_picture_is_found_and_retry_failed_tries_again(case, monkeypatch):
    case.add(6)
    shutil.copy(case.folder / "s2.png", case.folder / "good.png")
    (case.folder / "s2.png").write_bytes(b"no picture")
    case.extract()
    shutil.copy(case.folder / "good.png", case.folder / "s2.png")
    assert case.extract().embedded == 1
    big = case.folder / "s4.png"
    Image.new("RGB", (300, 300)).save(big)
    case.extract(max_pixels=1000)
    assert opened(case).status("fake", "image")[4] == 2
    assert case.extract().embedded == 0
    assert case.extract(retry_failed=True).embedded == 1
    assert opened(case).status("fake", "image")[4] == 1
    assert opened(case).errors("fake").num_rows == 0


def test_samples_without_image_or_text(case):
    case.add(5)
    case.add(1, image="")
    case.add(2, text="")
    report = case.extract(strict=True)
    store = opened(case)
    assert store.status("fake", "image").tolist() == [1, 1, 1, 1, 1, 2, 1, 1]
    assert store.errors("fake")["reason"].to_pylist() == ["no image"]
    assert (report.failed, report.without_image, report.embedded) == (0, 1, 8)
    texts = store["fake/text"][:]
    np.testing.assert_array_equal(texts[6], texts[7])
    assert store.status("fake", "text").tolist() == [1] * 8


def test_a_source_without_texts_leaves_the_text_tower_out_until_there_are_some(case):
    case.add(4, text="")
    case.extract()
    assert opened(case).features == ("fake/image",)
    assert any("no sample has a text" in line for line in case.said)
    case.rows[1]["text"] = "now there is one"
    case.extract()
    store = opened(case)
    assert store.features == ("fake/image", "fake/text")
    assert store.status("fake", "text").tolist() == [1] * 4
    assert CALLS["image batches"] == 0


def test_a_source_with_nothing_for_the_backbone_makes_no_store(case):
    case.add(4, text="")
    with pytest.raises(InputError, match="gives text, and no sample has text"):
        case.extract(fields=("text",))
    assert not (case.folder / "store").exists()


def test_fields_are_chosen_by_name_and_kept(case):
    case.add(5)
    with pytest.raises(
        InputError, match="no field 'tokens'; choose from image, image_tokens, text"
    ):
        case.extract(fields=("tokens",))
    assert not (case.folder / "store").exists()
    case.extract(fields=("image_tokens",))
    assert opened(case).features == ("fake/image_tokens",)
    case.add(1)
    case.extract()
    assert opened(case).features == ("fake/image_tokens",)
    case.extract(fields=("text",))
    store = opened(case)
    assert set(store.features) == {"fake/image_tokens", "fake/text"}
    assert (store["fake/text"].done.all(), store["fake/image_tokens"].done.all()) == (True, True)
    with pytest.raises(InputError, match="ask for the same --fields"):
        case.extract(fields=("image",))


def test_several_backbones_read_and_decode_each_picture_once(case, monkeypatch):
    case.add(21)
    reads, decodes = watch_decoding(monkeypatch)
    specs = (SPEC, f"{SPEC}[weights=b]", f"{SPEC}[size=8]")
    report = case.extract(backbones=specs, names=("a", "b", "small"))
    assert sorted(reads) == list(range(21))
    assert len(decodes) == 21  # though one of them takes another size
    assert report.embedded == 21
    store = opened(case)
    np.testing.assert_array_equal(store["a/image"][:], store["b/image"][:])
    reads.clear()
    case.extract(backbones=(SPEC, f"{SPEC}[weights=c]"), names=("a", "c"))
    assert sorted(reads) == list(range(21))
    np.testing.assert_array_equal(opened(case)["c/image"][:], store["a/image"][:])


def test_numbers_that_are_not_finite_are_failures(case, monkeypatch):
    case.add(5)
    case.add(1, text="!")
    encode = Counting.encode_text

    def overflowing(self, tokens, fields):
        values = encode(self, tokens, fields)["text"]
        values[tokens.ids[:, 1] == ord("!")] = 1e6  # beyond float16
        return {"text": values}

    monkeypatch.setattr(Counting, "encode_text", overflowing)
    report = case.extract()
    assert [failure.id for failure in report.failures] == ["s5"]
    assert "not finite" in report.failures[0].reason
    assert report.failures[0].feature == "fake/text"


def test_threads_of_torch_are_given_back(case):
    torch.set_num_threads(3)
    try:
        case.add(4)
        case.extract()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_an_error_in_a_thread_reaches_the_caller(case, monkeypatch):
    case.add(40)

    def broken(self, pixels, fields):
        raise RuntimeError("the device fell off")

    monkeypatch.setattr(Counting, "encode_image", broken)
    with pytest.raises(RuntimeError, match="the device fell off"):
        case.extract()


def test_the_pixel_limit_is_that_of_the_decoder():
    assert config().max_pixels == DEFAULT_MAX_PIXELS


def test_progress_counts_rows(case):
    case.add(20)
    seen = []
    case.extract(progress=lambda *step: seen.append(step))
    assert ("images", 20, 20) in seen
    assert ("texts", 20, 20) in seen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be 1 or more, got 0"),
        ({"workers": 0}, "--workers must be 1 or more"),
        ({"names": ("a", "b")}, "1 backbones but 2 names"),
        ({"names": ("a/b",)}, "a/b"),
        ({"backbones": (SPEC, SPEC), "names": None}, "two backbones would be called 'Counting'"),
        ({"backbones": ()}, "no backbone was given"),
        ({"backbones": ("opn_clip:x",)}, "did you mean open_clip"),
        ({"backbones": ("python:nowhere:X",)}, "no module 'nowhere'"),
        ({"label_template": ("{label}", "a photo")}, r"'a photo' has no \{label\} in it"),
        ({"device": "cuda:77"}, "--device cuda:77: not usable"),
    ],
)
def test_what_the_user_got_wrong_is_said_before_anything_is_made(case, settings, message):
    case.add(2)
    with pytest.raises(InputError, match=message):
        case.extract(**settings)
    assert not (case.folder / "store").exists()


def test_a_folder_with_other_content_is_left_alone(case):
    case.add(2)
    (case.folder / "store").mkdir()
    (case.folder / "store" / "thesis.txt").write_text("precious")
    with pytest.raises(NotAStoreError):
        case.extract()
    assert CALLS["loaded"] == 0
    assert [path.name for path in (case.folder / "store").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("spec", "alias"),
    [
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "ViT-B-32"),
        ("open_clip:ViT-B-32/weights/clip.pt", "ViT-B-32"),
        ("open_clip:/models/my clip[quick_gelu=true]", "my-clip"),
        ("hf:sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"),
        ("hf:/models/minilm/", "minilm"),
        ("python:package.module:Class", "Class"),
    ],
)
def test_names_made_from_specs(spec, alias):
    assert config(backbones=(spec,), names=None).aliases() == (alias,)


def test_a_device_without_room_names_the_way_out(case, monkeypatch):
    case.add(8)

    def too_large(self, pixels, fields):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(Counting, "encode_image", too_large)
    with pytest.raises(MmcError, match="ran out of memory; give a smaller --batch-size"):
        case.extract()
