"""Masks, losses and the model of `mmc pretrain`, against transformers and by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from scipy.stats import chisquare
from tiny_models import tiny_bert, tiny_vit

from mmc.extract.pretraining.losses import patch_loss, patchify, token_loss
from mmc.extract.pretraining.masking import PatchMasks, Vocabulary, mask_tokens
from mmc.extract.pretraining.model import PairModel, build
from mmc.extract.pretraining.options import (
    AugmentConfig,
    LossConfig,
    MaskConfig,
    PretrainConfig,
    TextConfig,
    VisionConfig,
)
from mmc.extract.pretraining.starting import beginning
from mmc.extract.pretraining.views import cut, draw_views
from mmc.extract.pretraining.words import make
from mmc.store.errors import InputError

SMALL = {"width": 32, "layers": 2, "heads": 2}
CONFIG = PretrainConfig(
    projection=8,
    vision=VisionConfig(**SMALL, image_size=32, patch_size=8),
    text=TextConfig(**SMALL, tokens=16),
)


def model(config: PretrainConfig = CONFIG, vocabulary: int = 90) -> PairModel:
    torch.manual_seed(0)
    return build(config, beginning(config, vocabulary, 0)).eval()


def pictures(count: int = 4, side: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


class TestPatchMasks:
    @pytest.mark.parametrize(("shape", "wanted"), [("patches", 78), ("units", 80), ("blocks", 78)])
    def test_every_picture_hides_the_same_number(self, shape: str, wanted: int):
        """40 % of 196 are 78; of the 49 units of 32 pixels 20, which are 80 patches."""
        masks = PatchMasks(MaskConfig(shape=shape), (14, 14), (16, 16))
        drawn = masks.draw([0, 1], slice(0, 500), 500)
        assert drawn.shape == (500, 196)
        assert set(drawn.sum(1).tolist()) == {wanted}
        assert masks.count == wanted
        assert len({tuple(row.tolist()) for row in drawn}) > 490
        # 200 of 500 for each patch alone; blocks leave out corners more often than the middle.
        hidden = drawn.sum(0)
        if shape != "blocks":
            assert chisquare(hidden.numpy()).pvalue > 1e-3
        assert hidden.min() > 10

    def test_units_are_squares_and_blocks_are_larger_than_patches(self):
        units = PatchMasks(MaskConfig(shape="units"), (14, 14), (16, 16))
        squares = units.draw([3], slice(0, 50), 50).view(50, 7, 2, 7, 2).float().mean((2, 4))
        assert set(squares.unique().tolist()) == {0.0, 1.0}

        def alone(shape: str) -> float:
            """Hidden patches whose right neighbour is hidden, too."""
            mask = PatchMasks(MaskConfig(shape=shape), (14, 14), (16, 16))
            drawn = mask.draw([0], slice(0, 200), 200).view(200, 14, 14)
            return float((drawn[:, :, 1:] & drawn[:, :, :-1]).sum() / drawn[:, :, :-1].sum())

        assert alone("patches") == pytest.approx(77 / 195, abs=0.02)
        assert alone("blocks") > 0.7

    def test_a_mask_depends_on_seed_and_place_alone(self):
        for shape in ("patches", "units", "blocks"):
            masks = PatchMasks(MaskConfig(shape=shape), (8, 8), (8, 8))
            whole = masks.draw([5, 2], slice(0, 20), 20)
            assert torch.equal(masks.draw([5, 2], slice(7, 12), 20), whole[7:12])
            assert not torch.equal(masks.draw([5, 3], slice(0, 20), 20), whole)

    def test_small_grids_and_shares_hide_at_least_one_and_leave_one(self):
        for share, wanted in ((0.01, 1), (0.99, 3), (0, 0)):
            for shape in ("patches", "blocks"):
                masks = PatchMasks(MaskConfig(patches=share, shape=shape), (2, 2), (16, 16))
                assert set(masks.draw([0], slice(0, 9), 9).sum(1).tolist()) == {wanted}

    @pytest.mark.parametrize(
        ("unit", "said"),
        [(24, "squares of whole patches"), (48, "fill a picture"), (64, "whole picture")],
    )
    def test_units_that_do_not_fit(self, unit: int, said: str):
        with pytest.raises(InputError, match=said):
            PatchMasks(MaskConfig(shape="units", unit=unit), (4, 4), (16, 16))


class TestTokenMasks:
    VOCABULARY = Vocabulary(size=1000, mask=4, special=(0, 1, 2, 3, 4))

    def draw(self, ids: torch.Tensor, lengths: torch.Tensor, **settings: float):
        config = MaskConfig(**settings)
        rows = slice(0, len(ids))
        return mask_tokens(ids, lengths, self.VOCABULARY, config, [0], rows, len(ids))

    def texts(self, count: int, words: int) -> tuple[torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(5, 1000, (count, words + 4), generator=random)
        ids[:, 0], ids[:, words + 1] = 2, 3
        ids[:, words + 2 :] = 0
        return ids, torch.full((count,), words + 2)

    def test_shares_are_those_of_bert(self):
        """100,000 tokens: 15 % within half a percent, 80 / 10 / 10 by chi-square."""
        ids, lengths = self.texts(1000, 100)
        new, chosen = self.draw(ids, lengths)
        words = (ids > 4) & (torch.arange(ids.shape[1]) < lengths[:, None])
        assert int(words.sum()) == 100_000
        assert float(chosen.sum() / words.sum()) == pytest.approx(0.15, abs=0.005)
        assert not chosen[~words].any()
        assert torch.equal(new[~chosen], ids[~chosen])
        masked = (new == 4) & chosen
        kept = (new == ids) & chosen
        counts = [int(masked.sum()), int((chosen & ~masked & ~kept).sum()), int(kept.sum())]
        total = sum(counts)
        # One in a thousand random tokens is the one that was there.
        expected = np.array([0.8 + 1e-4, 0.1 - 2e-4, 0.1 + 1e-4]) * total
        assert chisquare(counts, expected).pvalue > 1e-3
        swapped = new[chosen & ~masked & ~kept]
        assert chisquare(np.bincount(swapped.numpy() // 100, minlength=10)).pvalue > 1e-3

    def test_a_short_text_hides_one_and_an_empty_one_none(self):
        ids, lengths = self.texts(400, 2)
        ids[0, 1:3], lengths[0] = torch.tensor([3, 0]), 2
        _, chosen = self.draw(ids, lengths)
        assert chosen[1:].sum(1).min() == 1
        assert not chosen[0].any()
        assert not chosen[:, [0, 3, 4, 5]].any()
        _, none = self.draw(ids, lengths, tokens=0)
        assert not none.any()

    def test_a_mask_depends_on_seed_and_place_alone(self):
        ids, lengths = self.texts(30, 9)
        whole, _ = self.draw(ids, lengths)
        part, _ = mask_tokens(
            ids[10:20], lengths[10:20], self.VOCABULARY, MaskConfig(), [0], slice(10, 20), 30
        )
        assert torch.equal(part, whole[10:20])


def unpatchify(
    patches: torch.Tensor, grid: tuple[int, int], patch: tuple[int, int], pixels: str
) -> torch.Tensor:
    """The images that `patchify` cut up."""
    batch, channels = len(patches), patches.shape[2] // (patch[0] * patch[1])
    if pixels == "simmim":
        parts = patches.reshape(batch, *grid, channels, *patch).permute(0, 3, 1, 4, 2, 5)
    else:
        parts = patches.reshape(batch, *grid, *patch, channels).permute(0, 5, 1, 3, 2, 4)
    return parts.reshape(batch, channels, grid[0] * patch[0], grid[1] * patch[1])


class TestLosses:
    def test_patch_loss_is_that_of_simmim(self):
        """transformers' ViTForMaskedImageModeling with the same weights and mask."""
        ours = model()
        config = ours.dual.vision_model.config
        config.encoder_stride = 8
        theirs = transformers.ViTForMaskedImageModeling(config).eval()
        state = {f"vit.{k}": v for k, v in ours.dual.vision_model.state_dict().items()}
        state = {k: v for k, v in state.items() if "pooler" not in k}
        state["decoder.0.weight"] = ours.pixels.weight[:, :, None, None]
        state["decoder.0.bias"] = ours.pixels.bias
        theirs.load_state_dict(state)
        images = pictures()
        mask = PatchMasks(MaskConfig(), ours.grid, ours.patch).draw([0], slice(0, 4), 4)
        with torch.no_grad():
            wanted = theirs(images, bool_masked_pos=mask).loss
            _, states = ours.image(images, mask)
            told, true = ours.pixels(states[mask]), patchify(images, ours.patch, "simmim")[mask]
            found = patch_loss(told, true, mask.sum(), "simmim")
        assert float(found) == pytest.approx(float(wanted), abs=1e-6)
        assert float(wanted) > 0.5

    @pytest.mark.parametrize("normalised", [False, True])
    def test_patch_loss_is_that_of_mae(self, normalised: bool):
        config = transformers.ViTMAEConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            norm_pix_loss=normalised,
            decoder_hidden_size=32,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=64,
        )
        theirs, images = transformers.ViTMAEForPreTraining(config).eval(), pictures()
        with torch.no_grad():
            out = theirs(images)
        mask = out.mask.bool()
        pixels = "mae_norm" if normalised else "mae"
        true = patchify(images, (8, 8), pixels)
        assert torch.equal(true, theirs.patchify(images))
        found = patch_loss(out.logits[mask], true[mask], mask.sum(), pixels)
        assert float(found) == pytest.approx(float(out.loss), abs=1e-6)

    def test_token_loss_is_that_of_bert(self):
        ours = model()
        theirs = transformers.BertForMaskedLM(ours.dual.text_model.config).eval()
        state = {f"bert.{k}": v for k, v in ours.dual.text_model.state_dict().items()}
        state |= {f"cls.{k}": v for k, v in ours.words.state_dict().items()}
        theirs.load_state_dict({k: v for k, v in state.items() if "pooler" not in k})
        ids = torch.randint(5, 90, (4, 12), generator=torch.Generator().manual_seed(0))
        lengths = torch.tensor([12, 5, 9, 3])
        vocabulary = Vocabulary(90, 4, (0, 1, 2, 3, 4))
        new, chosen = mask_tokens(ids, lengths, vocabulary, MaskConfig(), [0], slice(0, 4), 4)
        attention = (torch.arange(12) < lengths[:, None]).long()
        labels = ids.masked_fill(~chosen, -100)
        with torch.no_grad():
            wanted = theirs(new, attention_mask=attention, labels=labels).loss
            _, states = ours.text(new, lengths)
            found = token_loss(ours.words(states[chosen]), ids[chosen], chosen.sum())
        assert float(found) == pytest.approx(float(wanted), abs=1e-6)
        assert float(wanted) == pytest.approx(math.log(90), abs=0.5)

    @pytest.mark.parametrize("pixels", ["simmim", "mae", "mae_norm"])
    def test_patches_become_the_picture_again(self, pixels: str):
        images = pictures(2, 48)[:, :, :32]
        patches = patchify(images, (8, 16), pixels)
        assert patches.shape == (2, 4 * 3, 3 * 8 * 16)
        assert torch.equal(unpatchify(patches, (4, 3), (8, 16), pixels), images)
        impulse = torch.zeros(1, 3, 32, 48)
        impulse[0, 2, 9, 17] = 1  # second patch row, second column; inside: row 1, column 1
        place = patchify(impulse, (8, 16), pixels)[0].nonzero().tolist()
        inside = (2 * 8 + 1) * 16 + 1 if pixels == "simmim" else (1 * 16 + 1) * 3 + 2
        assert place == [[4, inside]]

    def test_shares_of_parts_add_up(self):
        told, true = torch.randn(10, 192), torch.randn(10, 192)
        for pixels in ("simmim", "mae", "mae_norm"):
            whole = patch_loss(told, true, torch.tensor(10), pixels)
            parts = [
                patch_loss(told[i], true[i], torch.tensor(10), pixels)
                for i in (slice(0, 3), slice(3, 10))
            ]
            assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)

    def test_nothing_hidden_is_no_loss(self):
        none = torch.zeros(0, 192, requires_grad=True)
        for pixels in ("simmim", "mae", "mae_norm"):
            loss = patch_loss(none, none, torch.tensor(0), pixels)
            assert float(loss.detach()) == 0
            loss.backward()
        assert float(token_loss(torch.zeros(0, 9), torch.zeros(0).long(), torch.tensor(0))) == 0


class TestModel:
    def test_without_a_mask_the_tower_is_the_stock_one_bit_for_bit(self):
        ours, images = model(), pictures()
        stock = transformers.ViTModel(ours.dual.vision_model.config).eval()
        state = ours.dual.vision_model.state_dict()
        del state["embeddings.mask_token"]
        stock.load_state_dict(state)
        nothing = torch.zeros(4, 16, dtype=torch.bool)
        with torch.no_grad():
            wanted = stock(images).last_hidden_state[:, 1:]
            for mask in (None, nothing):
                _, states = ours.image(images, mask)
                assert torch.equal(states, wanted)

    def test_gradients_reach_what_is_hidden_and_nothing_else(self):
        ours, images = model(), pictures()
        mask = PatchMasks(MaskConfig(), ours.grid, ours.patch).draw([0], slice(0, 4), 4)
        _, states = ours.image(images, mask)
        told = ours.pixels(states)
        told.retain_grad()
        true = patchify(images, ours.patch, "simmim")
        patch_loss(told[mask], true[mask], mask.sum(), "simmim").backward()
        assert told.grad is not None
        assert not told.grad[~mask].any()
        assert told.grad[mask].any(1).all()
        token = ours.dual.vision_model.embeddings.mask_token
        assert token.grad.abs().max() > 0
        assert 0.005 < float(token.detach().std()) < 0.04

    def test_the_words_are_told_with_the_embeddings(self):
        ours = model()
        assert ours.words.predictions.decoder.weight is (
            ours.dual.text_model.embeddings.word_embeddings.weight
        )
        names = list(ours.state())
        assert not any("decoder.weight" in name for name in names)
        other = model(PretrainConfig(**{**vars(CONFIG), "seed": 1}))
        other.load({name: value + 1 for name, value in ours.state().items()})
        for name, value in other.state().items():
            assert torch.equal(value, ours.state()[name] + 1)

    def test_towers_begin_with_weights(self, tmp_path: Path):
        vit, bert = tiny_vit(tmp_path / "vit"), tiny_bert(tmp_path / "bert")
        config = PretrainConfig(
            vision=VisionConfig(weights=vit), text=TextConfig(weights=bert, tokens=20)
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
        ours = model(config, len(tokenizer))
        images, ids = pictures(), torch.arange(12).view(2, 6)
        theirs = transformers.ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False)
        words = transformers.BertModel.from_pretrained(tmp_path / "bert", add_pooling_layer=False)
        with torch.no_grad():
            _, states = ours.image(images)
            wanted = theirs.eval()(images).last_hidden_state[:, 1:]
            assert torch.equal(states, wanted)
            _, states = ours.text(ids, torch.tensor([6, 6]))
            mask = torch.ones_like(ids)
            wanted = words.eval()(ids, attention_mask=mask).last_hidden_state
            assert torch.allclose(states, wanted, atol=1e-6)
        poolers = load_file(tmp_path / "bert" / "model.safetensors")
        found = ours.dual.text_model.pooler.dense
        assert torch.equal(found.weight, poolers["pooler.dense.weight"])
        assert torch.equal(found.bias, poolers["pooler.dense.bias"])
        for spec, group in ((bert, "vision"), (vit, "text")):
            kind = {"vision": VisionConfig, "text": TextConfig}[group]
            with pytest.raises(InputError, match=rf"{group}.weights=.* is a model of type"):
                model(PretrainConfig(**{group: kind(weights=spec)}))

    def test_temperature(self):
        assert model().scale.item() == pytest.approx(1 / 0.07)
        fixed = model(PretrainConfig(**{**vars(CONFIG), "loss": LossConfig(temperature=0.5)}))
        assert fixed.scale.item() == pytest.approx(2)
        with torch.no_grad():
            fixed.dual.logit_scale.fill_(9.0)
            fixed.clamp_()
            assert fixed.scale.item() == pytest.approx(100, rel=1e-4)
            fixed.dual.logit_scale.fill_(-1.0)
            fixed.clamp_()
        assert fixed.scale.item() == 1
        fixed = model(
            PretrainConfig(**{**vars(CONFIG), "loss": LossConfig(learn_temperature=False)})
        )
        assert not fixed.dual.logit_scale.requires_grad


class TestViews:
    def test_the_whole_picture_is_left_as_it_is(self):
        config = AugmentConfig(crop=1)
        views = draw_views(config, [0], slice(0, 4), 4)
        assert torch.allclose(cut(pictures(), views), pictures(), atol=1e-5)
        mirrored = draw_views(AugmentConfig(crop=1, flip=True), [0], slice(0, 400), 400)
        signs = mirrored[:, 0, 0].sign()
        assert 150 < int((signs < 0).sum()) < 250
        flipped = cut(pictures(1), mirrored[signs < 0][:1])
        assert torch.allclose(flipped, pictures(1).flip(3), atol=1e-5)

    def test_cuts_are_inside_and_as_large_as_they_should_be(self):
        views = draw_views(AugmentConfig(crop=0.5), [0], slice(0, 2000), 2000)
        wide, high = views[:, 0, 0], views[:, 1, 1]
        for side, shift in ((wide, views[:, 0, 2]), (high, views[:, 1, 2])):
            assert (side + shift.abs()).max() <= 1 + 1e-6
        area = wide * high
        assert 0.49 < area.min() < 0.55
        assert area.max() <= 1
        assert (wide / high).log().abs().max() <= math.log(4 / 3) + 1e-5
        part = draw_views(AugmentConfig(crop=0.5), [0], slice(5, 9), 2000)
        assert torch.equal(part, views[5:9])

    def test_a_cut_is_enlarged(self):
        image = torch.arange(64.0).view(1, 1, 8, 8).expand(1, 3, 8, 8)
        quarter = torch.tensor([[[0.5, 0, -0.5], [0, 0.5, -0.5]]])
        found = cut(image, quarter)
        wanted = torch.nn.functional.interpolate(
            image[:, :, :4, :4], scale_factor=2, mode="bilinear", align_corners=False
        )
        assert torch.allclose(found[:, :, :-1, :-1], wanted[:, :, :-1, :-1], atol=1e-4)


def test_a_vocabulary_is_made_from_texts():
    texts = ["A red house", "a Réd dog", "red houses", "the dogs bark"] * 5
    tokenizer = make(texts, 100, lower=True)
    assert tokenizer.tokenize("RED house") == ["red", "house"]
    ids = tokenizer("red house")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id) == (2, 3)
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 4)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "red house"
    assert len(tokenizer) <= 100
    assert make(texts, 100, lower=True).get_vocab() == tokenizer.get_vocab()
    assert "R" in make(texts, 100, lower=False).get_vocab()
