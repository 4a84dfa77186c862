"""The demo's set and backbone, made small."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from mmc.extract.demo import backbone, dataset, pictures, run, words
from mmc.extract.demo.run import MARKER, run_demo
from mmc.store.errors import InputError, MmcError

SIZES = {"train": 40, "val": 10, "test": 20}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data-set"
    dataset.make_dataset(folder, seed=3, sizes=SIZES)
    return folder


def read(folder: Path, split: str) -> list[dict[str, str]]:
    with (folder / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def named_in(caption: str) -> set[str]:
    return set(re.findall(r"[a-z]+", caption)) & set(words.NUMBER_WORDS)


def test_every_row_has_its_own_picture_of_64_pixels(made):
    rows = [row for split in SIZES for row in read(made, split)]
    assert [len(read(made, split)) for split in SIZES] == list(SIZES.values())
    assert len({row["ImageID"] for row in rows}) == len(rows)
    for row in rows:
        with Image.open(made / "data" / row["ImageID"]) as picture:
            assert (picture.size, picture.mode, picture.format) == ((64, 64), "RGB", "JPEG")


def test_labels_are_what_the_picture_shows_and_what_the_caption_names(monkeypatch, tmp_path):
    seen: list[np.ndarray] = []
    draw = pictures.draw

    def watched(scans, chosen, *rest):
        seen.extend(np.where(row >= 0, scans.digit[row], -1) for row in chosen)
        return draw(scans, chosen, *rest)

    monkeypatch.setattr(pictures, "draw", watched)
    dataset.make_dataset(tmp_path, seed=3, sizes=SIZES)
    rows = [row for split in SIZES for row in read(tmp_path, split)]
    assert len(seen) == len(rows)
    for digits, row in zip(seen, rows, strict=True):
        shown = {words.NUMBER_WORDS[digit] for digit in digits if digit >= 0}
        told = named_in(row["Caption"])
        assert 1 <= len(shown) <= 3
        assert 1 <= len(told) <= 3
        assert not shown & told
        assert set(row["Labels"].split(" ")) == shown | told


def test_same_seed_same_files_other_seed_others(made, tmp_path):
    for name, seed in (("same", 3), ("other", 4)):
        dataset.make_dataset(tmp_path / name, seed=seed, sizes=SIZES)
    files = sorted(path.relative_to(made) for path in made.rglob("*.*"))
    assert len(files) == 3 + sum(SIZES.values())
    assert all((made / f).read_bytes() == (tmp_path / "same" / f).read_bytes() for f in files)
    assert all((made / f).read_bytes() != (tmp_path / "other" / f).read_bytes() for f in files)


def test_no_scan_is_in_two_parts_and_none_is_left_out():
    scans = pictures.load_scans()
    parts = pictures.split_scans(scans, seed=0)
    together = np.concatenate([pool for pools in parts.values() for pool in pools])
    assert sorted(together) == list(range(len(scans.digit)))
    for pools in parts.values():
        for digit, pool in enumerate(pools):
            assert (scans.digit[pool] == digit).all()
            assert len(pool) >= 15


def test_digits_are_where_they_are_put_and_do_not_overlap():
    rng = np.random.default_rng(0)
    used = pictures.random_digits(500, 3, rng) >= 0
    centre, side = pictures._places(used, 64, rng)
    low, high = centre - side[..., None] / 2, centre + side[..., None] / 2
    assert low[used].min() >= 0
    assert high[used].max() <= 64
    for a, b in ((0, 1), (0, 2), (1, 2)):
        both = used[:, a] & used[:, b]
        width = np.minimum(high[:, a], high[:, b]) - np.maximum(low[:, a], low[:, b])
        assert (width[both].min(1) <= 1e-9).all()


def test_a_drawn_digit_stands_out_and_an_empty_picture_does_not():
    scans, chosen = pictures.load_scans(), np.array([[0, 1, 2]] * 40)
    full = pictures.draw(scans, chosen, np.random.default_rng(5)).float()
    empty = pictures.draw(scans, chosen * 0 - 1, np.random.default_rng(5)).float()
    changed = (full - empty).abs().amax(1) > 40
    share = changed.float().mean((1, 2))
    assert share.min() > 0.02
    assert share.max() < 0.5


def test_training_captions_fit_the_context_and_the_vocabulary():
    config = backbone.CONFIG["text_cfg"]
    vocabulary = backbone._Vocabulary(config["context_length"])
    tokenizer = open_clip.SimpleTokenizer(context_length=config["context_length"])
    rng = np.random.default_rng(0)
    forms = (*words.LABELS, *words.DESCRIPTIONS, *words.NOTES)
    texts = [words.caption((3, 7, 8), (form,), rng) for form in forms for _ in range(40)]
    compact = vocabulary(texts)
    assert torch.equal(vocabulary.ids[compact], tokenizer(texts))
    assert (compact[:, -1] == 0).all()  # nothing was cut
    assert compact.max() == len(vocabulary.ids) - 1


def test_a_saved_backbone_loads_and_tells_inputs_apart(tmp_path):
    stages = tuple(replace(stage, steps=2, batch=8) for stage in backbone.STAGES)
    lines: list[str] = []
    backbone.train_backbone(tmp_path, seed=0, stages=stages, report=lines.append)
    assert any("step 2 of 2" in line for line in lines)
    name = f"local-dir:{tmp_path}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    rng = np.random.default_rng(0)
    scans = pictures.load_scans()
    drawn = pictures.draw(scans, np.array([[0, -1, -1], [1, 2, 3]]), rng)
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in drawn]
    model.eval()
    with torch.no_grad():
        image = model.encode_image(torch.stack([transform(picture) for picture in images]))
        text = model.encode_text(tokenizer(["a note about seven", "a note about two"]))
    assert image.shape == text.shape == (2, backbone.CONFIG["embed_dim"])
    assert (image[0] - image[1]).abs().max() > 1e-3 * image.abs().max()
    assert (text[0] - text[1]).abs().max() > 1e-3 * text.abs().max()
    assert torch.isfinite(torch.cat([image, text])).all()


def test_only_trained_embeddings_change(tmp_path):
    stages = tuple(replace(stage, steps=2, batch=8) for stage in backbone.STAGES)
    backbone.train_backbone(tmp_path, seed=0, stages=stages, report=lambda line: None)
    trained = open_clip.create_model(f"local-dir:{tmp_path}").token_embedding.weight
    torch.manual_seed(0)
    fresh = open_clip.CLIP(**backbone.CONFIG).token_embedding.weight
    changed = (trained != fresh).any(1).nonzero().flatten()
    ids = backbone._Vocabulary(backbone.CONFIG["text_cfg"]["context_length"]).ids
    assert set(changed.tolist()) <= set(ids.tolist())
    assert len(changed) > 30


def test_two_captions_that_name_the_same_digits_are_both_right():
    digits = np.array([[1, 2, -1], [2, 1, -1], [5, -1, -1]])
    embedding = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    scale = torch.tensor(3.0)
    loss, right = backbone._contrast(embedding, embedding, scale, digits)
    assert right == 1.0
    assert loss.item() == pytest.approx(2 / 3 * np.log(2), abs=1e-4)


def test_a_folder_with_other_content_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"other content \(thesis.txt\)"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="is a file"):
        run_demo(tmp_path / "thesis.txt")


def test_a_demo_with_another_seed_is_refused(tmp_path):
    (tmp_path / MARKER).write_text('{"recipe": 1, "seed": 0, "made": []}')
    with pytest.raises(InputError, match="with seed 0, not 1 with 5"):
        run_demo(tmp_path, seed=5)


def test_a_failing_command_shows_its_output_and_stops():
    lines: list[str] = []
    with pytest.raises(MmcError, match=r"`mmc info no-such\.store` failed with exit code 2"):
        run._mmc(["info", "no-such.store"], lines.append)
    assert "$ mmc info no-such.store" in lines
    assert any(line.startswith("  error: ") and "no-such.store" in line for line in lines)
