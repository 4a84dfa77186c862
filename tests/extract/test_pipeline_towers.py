"""Towers beside the plain ones: fused fields, pyramids, pictures in their own size; and several
backbones of different kinds at once."""

import numpy as np
import pytest
import torch
from counting_backbone import CALLS, Fused, offsets
from PIL import Image
from pipeline_case import SPEC, Case, watch_decoding

from mmc.extract import ceiling
from mmc.extract.engines import Engine
from mmc.extract.images import decode
from mmc.extract.transforms import ImageTransform, OriginalSize
from mmc.store import EmbeddingStore
from mmc.store.errors import InputError, MmcError

FUSED, TEXTS, IMAGES, TILES, ORIGINALS = (
    f"python:counting_backbone:{name}"
    for name in ("Fused", "Texts", "Images", "Tiles", "Originals")
)


@pytest.fixture
def case(tmp_path) -> Case:
    return Case(tmp_path)


def opened(case: Case, store: str = "store") -> EmbeddingStore:
    return EmbeddingStore.open(case.folder / store)


def everything(store: EmbeddingStore, field: str) -> np.ndarray:
    """All rows of a field, NaN where there is none."""
    return store[f"fake/{field}"].take(np.arange(len(store)), missing="fill")


def captions(case: Case) -> None:
    """Two shards: repeated pictures, repeated pairs, rows that lack an image, a text, or both."""
    case.add(6)
    case.add(3, image="s1.png")  # other texts for one picture
    case.add(2, image="s2.png", text=case.rows[2]["text"])  # the same pair again
    case.add(1, image="", text="only text")
    case.add(2, text="")
    case.add(1, image="", text="")
    case.add(5)
    case.add(2, image="s3.png")
    case.add(1, image="s17.png", text=case.rows[17]["text"])


def test_fused_fields_are_made_from_both_contents_of_a_row(case):
    captions(case)
    report = case.extract(backbones=(FUSED,), strict=True)
    store = opened(case)
    status = store.status("fake", "fused").tolist()
    lacking = {11: "no image", 12: "no text", 13: "no text", 14: "no image"}
    assert [row for row in range(23) if status[row] != 1] == list(lacking)
    errors = store.errors("fake").filter(np.equal(store.errors("fake")["tower"], "fused"))
    assert dict(zip(errors["row"].to_pylist(), errors["reason"].to_pylist(), strict=True)) == (
        lacking
    )
    assert (report.failed, report.without_image, report.without_text) == (0, 2, 2)
    images, texts, fused = (everything(store, name) for name in ("image", "text", "fused"))
    np.testing.assert_array_equal(fused[0, :6], images[0])
    np.testing.assert_array_equal(fused[9], fused[2])
    np.testing.assert_array_equal(fused[22], fused[17])
    assert (fused[6] != fused[7]).any()
    assert len(np.unique(texts[6:9], axis=0)) == 3
    assert any("without a text, which have no fused features: 2" in line for line in case.said)


def test_a_row_of_fused_fields_depends_on_its_place_alone(case):
    """Each picture's first row is computed at the picture's place, other texts behind them."""
    captions(case)
    case.extract(backbones=(FUSED,))
    backbone = Fused(device="cpu", precision="float32", max_text_tokens=None)
    torch.set_num_threads(1)
    fused = everything(opened(case), "fused")
    # Places of the first shard: pictures 0 to 5, 12, 13, 15; then the other texts, 6 to 8.
    for row, slot in {0: 0, 3: 3, 5: 1, 15: 0, 6: 0, 8: 2}.items():
        data = (case.folder / case.rows[row]["image"]).read_bytes()
        pixels = decode(data, backbone.image_transform)[None]
        tokens = backbone.tokenize([case.rows[row]["text"]])
        expected = backbone.encode_fused(pixels, tokens, ["fused"])["fused"][0]
        expected[:6] += offsets(4)[slot] - offsets(1)[0]
        np.testing.assert_allclose(fused[row], expected, atol=1e-2)


def test_image_and_fused_share_one_pass_and_one_decoding(case, monkeypatch):
    case.add(20)
    reads, decodes = watch_decoding(monkeypatch)
    case.extract(backbones=(FUSED,))
    assert (CALLS["fused batches"], CALLS["image batches"], CALLS["text batches"]) == (5, 5, 6)
    assert (len(reads), len(decodes)) == (20, 20)
    case.extract("apart", backbones=(FUSED,), fields=("image", "text"))
    assert (CALLS["fused batches"], CALLS["image batches"]) == (0, 5)
    case.extract("apart", backbones=(FUSED,), fields=("fused",))
    assert (CALLS["fused batches"], CALLS["image batches"]) == (5, 5)  # the tower runs once more


def without_order(files: dict[str, bytes]) -> dict[str, bytes]:
    """What must be equal: arrays and status, not the record with the order of the fields."""
    return {name: data for name, data in files.items() if not name.endswith((".json", ".parquet"))}


@pytest.mark.parametrize("first", ["image", "fused", "text"])
def test_the_same_bytes_whichever_field_is_asked_for_first(case, first):
    captions(case)
    case.extract("together", backbones=(FUSED,), fields=("image", "text", "fused", "itm"))
    case.extract(
        "apart", backbones=(FUSED,), fields=("fused", "itm") if first == "fused" else (first,)
    )
    case.extract("apart", backbones=(FUSED,), fields=("image", "text", "fused", "itm"), workers=1)
    together = without_order(case.files("together"))
    assert together == without_order(case.files("apart"))
    assert len(together) >= 8


def test_the_same_bytes_after_an_interruption(case, monkeypatch):
    captions(case)
    case.extract("whole", backbones=(FUSED,), workers=1)
    encode, calls = Fused.encode_fused, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the device fell off")
        return encode(self, *args)

    monkeypatch.setattr(Fused, "encode_fused", interrupted)
    with pytest.raises(RuntimeError, match="fell off"):
        case.extract(backbones=(FUSED,), workers=1)
    monkeypatch.setattr(Fused, "encode_fused", encode)
    # Whether the first shard is written by then is up to the threads; the second cannot be.
    assert (opened(case).status("fake", "fused") == 1).sum() < 19
    case.extract(backbones=(FUSED,), workers=2)
    assert without_order(case.files()) == without_order(case.files("whole"))


def test_a_changed_text_or_picture_makes_the_fused_row_again(case):
    case.add(20)
    case.extract(backbones=(FUSED,))
    before = opened(case)["fake/fused"][:]
    case.rows[7]["text"] = "another one"
    case.extract(backbones=(FUSED,))
    assert (CALLS["fused batches"], CALLS["text batches"], CALLS["image batches"]) == (1, 1, 1)
    after = opened(case)["fake/fused"][:]
    assert np.flatnonzero((before != after).any(axis=1)).tolist() == [7]
    (case.folder / "s3.png").write_bytes((case.folder / "s4.png").read_bytes())
    case.extract(backbones=(FUSED,))
    again = opened(case)["fake/fused"][:]
    assert np.flatnonzero((after != again).any(axis=1)).tolist() == [3]


def test_fused_needs_images_and_texts(case):
    case.add(4, text="")
    case.extract(backbones=(FUSED,))
    assert opened(case).features == ("fake/image",)
    assert any("no sample has a text, so its fused tower is left out" in line for line in case.said)
    with pytest.raises(InputError, match="gives fused, and no sample has text"):
        case.extract("other", backbones=(FUSED,), fields=("fused",))
    for row in case.rows:
        row["text"] = f"the text of {row['id']}"
    case.extract(backbones=(FUSED,))
    assert opened(case).status("fake", "fused").tolist() == [1] * 4


def test_a_picture_that_cannot_be_read_fails_in_both_towers(case):
    case.add(6)
    (case.folder / "s3.png").write_bytes(b"<html>not found</html>")
    report = case.extract(backbones=(FUSED,))
    store = opened(case)
    assert store.status("fake", "image").tolist() == [1, 1, 1, 2, 1, 1]
    assert store.status("fake", "fused").tolist() == [1, 1, 1, 2, 1, 1]
    assert report.failed == 1
    assert [failure.feature for failure in report.failures] == ["fake/image"]
    with pytest.raises(MmcError, match="1 of 6 samples"):
        case.extract(backbones=(FUSED,), strict=True)


def test_a_pyramid_gets_all_its_tiles(case):
    case.add(7)
    case.extract(backbones=(TILES,), batch_size=None)
    found = opened(case)["fake/image_tokens"][:]
    assert found.shape == (7, 5, 3)
    assert CALLS["image batches"] == 4  # the backbone's own batches of two
    for row in range(7):
        data = (case.folder / case.rows[row]["image"]).read_bytes()
        whole = decode(data, ImageTransform(size=(32, 32))).float()
        corner = whole[:, 16:, :16].mean(dim=(1, 2))
        np.testing.assert_allclose(found[row, 3], corner, atol=1e-3)


def test_pictures_in_their_own_size(case):
    sizes = [(10, 20), (31, 7), (5, 5), (40, 30), (8, 9)]
    case.add(5)
    for row, size in enumerate(sizes):
        Image.new("RGB", size, (row, row, row)).save(case.folder / f"s{row}.png")
    (case.folder / "s1.png").write_bytes(b"no picture")
    case.add(1, image="")
    report = case.extract(backbones=(ORIGINALS,))
    store = opened(case)
    assert store.status("fake", "image").tolist() == [1, 2, 1, 1, 1, 2]
    assert (report.failed, report.without_image) == (1, 1)
    rows = [0, 2, 3, 4]
    expected = [[sizes[row][1], sizes[row][0], row] for row in rows]
    assert store["fake/image"].take(rows).tolist() == expected
    assert CALLS["image rows"] == 4


def test_a_batch_without_any_good_picture_runs_nothing(case):
    case.add(4)
    for row in range(4):
        (case.folder / f"s{row}.png").write_bytes(f"no picture {row}".encode())
    report = case.extract(backbones=(ORIGINALS,))
    assert report.failed == 4
    assert CALLS["image batches"] == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_backbones_of_every_kind_decode_each_picture_once(case, monkeypatch, ahead):
    captions(case)
    specs = {
        "clip": SPEC,
        "mini": TEXTS,
        "own": IMAGES,
        "tiles": TILES,
        "box": ORIGINALS,
        "f": FUSED,
    }
    for name, spec in specs.items():
        case.extract(name, backbones=(spec,), names=(name,), batch_size=None, shard_rows=16)
    reads, decodes = watch_decoding(monkeypatch)
    if ahead:  # as on a GPU: a pool that decodes, one thread that encodes
        monkeypatch.setattr(Engine, "_encode_here", Engine._encode_on_device)
    report = case.extract(
        backbones=tuple(specs.values()), names=tuple(specs), batch_size=None, shard_rows=16
    )
    pictures = {row["image"] for row in case.rows if row["image"]}
    other_texts = 5  # rows of the fused tower alone: 6 to 8, 20 and 21
    assert len(reads) == len(decodes) == len(pictures) + other_texts
    assert not any("more than once" in line for line in case.said)
    together = case.files()
    for name in specs:
        alone = case.files(name)
        del alone["zarr.json"]
        assert alone == {key: data for key, data in together.items() if key.split("/")[0] == name}
    assert report.embedded == 23


def test_text_only_and_image_only_backbones_at_once(case):
    case.add(5)
    case.extract(backbones=(TEXTS, IMAGES), names=("words", "pictures"))
    assert opened(case).features == ("pictures/image", "words/text")
    case.extract(
        "chosen", backbones=(TEXTS, SPEC), names=("words", "both"), fields=("text", "image_tokens")
    )
    assert set(opened(case, "chosen").features) == {
        *("both/image_tokens", "both/text", "words/text")
    }
    with pytest.raises(InputError, match="none of the backbones has a field 'tokens'; choose from"):
        case.extract("other", backbones=(TEXTS, SPEC), names=("a", "b"), fields=("text", "tokens"))
    with pytest.raises(InputError, match="Texts has no field 'image'; choose from text"):
        case.extract("other", backbones=(TEXTS, SPEC), names=("a", "b"), fields=("image",))
    assert not (case.folder / "other").exists()


def test_batches_without_a_common_multiple_decode_apart_and_say_so(case, monkeypatch):
    case.add(20)
    case.extract(batch_size=7)
    case.rows.clear()
    case.add(20)
    case.extract("other", batch_size=7, names=("sevens",))
    reads, _ = watch_decoding(monkeypatch)
    case.add(4)
    case.extract(
        "other", backbones=(SPEC, f"{SPEC}[size=8]"), names=("sevens", "fives"), batch_size=None
    )
    assert any("no small common multiple" in line for line in case.said)
    assert len(reads) == 4 + 24


@pytest.mark.parametrize("own", [0, "two"])
def test_a_batch_size_that_is_no_number(case, monkeypatch, own):
    import counting_backbone

    case.add(2)
    monkeypatch.setattr(counting_backbone.Images, "batch_size", own)
    with pytest.raises(InputError, match="batch_size must be 1 or more"):
        case.extract(backbones=(IMAGES,), batch_size=None)


def test_the_bare_forward_rate_of_every_kind(case, monkeypatch):
    monkeypatch.setattr(ceiling, "SHORTEST_RUN_SECONDS", 0.0)
    monkeypatch.setattr(ceiling, "FEWEST_BATCHES", 1)
    monkeypatch.setattr(ceiling, "BUDGET_SECONDS", 0.1)
    captions(case)
    report = case.extract(
        backbones=(TILES, ORIGINALS, FUSED), names=("tiles", "box", "f"), batch_size=None
    )
    assert 0 < report.ceiling < float("inf")
    assert report.efficiency == pytest.approx(report.rate / report.ceiling)


def test_fused_fields_without_the_method_or_a_size(case, monkeypatch):
    case.add(2)
    monkeypatch.setattr(Fused, "encode_fused", None)
    with pytest.raises(InputError, match="has fused fields and no encode_fused"):
        case.extract(backbones=(FUSED,))
    monkeypatch.setattr(Fused, "encode_fused", lambda *args: {})
    plain = Fused.__init__

    def without_size(self, **settings):
        plain(self, **settings)
        self.image_transform = OriginalSize()

    monkeypatch.setattr(Fused, "__init__", without_size)
    with pytest.raises(InputError, match="fused fields need pictures of one size"):
        case.extract(backbones=(FUSED,))
