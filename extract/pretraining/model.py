"""Two towers with a shared space, and what tells hidden patches and tokens from their states.

Legend: B pairs, P patches of p x p pixels, T tokens, W features of a token, D of the shared space.

Without any part between the towers the two masked losses see one modality each: only the
contrastive loss joins them.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertPooler

from mmc.extract.backbones import parse_spec
from mmc.extract.backbones.hf_files import Files, load_config, load_model, load_processor, quiet
from mmc.extract.backbones.hf_text import real_tokens
from mmc.extract.pretraining.options import PretrainConfig, TextConfig, VisionConfig
from mmc.extract.training.blocks import checkpoint_blocks
from mmc.extract.training.contrast import LARGEST_SCALE
from mmc.store.errors import InputError

_STD = 0.02
_UNDECAYED = ("position_embeddings", "token_type_embeddings", "cls_token", "mask_token")


class PairModel(nn.Module):
    """transformers' VisionTextDualEncoder of a ViT and a BERT, with their decoders."""

    def __init__(self, vision: Any, language: Any, config: PretrainConfig) -> None:
        """
        Args:
            vision: a ViTModel with a mask token and a pooler.
            language: a BertForMaskedLM.
        """
        super().__init__()
        text = language.bert
        if text.pooler is None:
            text.pooler = BertPooler(text.config)
            nn.init.trunc_normal_(text.pooler.dense.weight, std=_STD)
            nn.init.zeros_(text.pooler.dense.bias)
        both = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
            vision.config,
            text.config,
            projection_dim=config.projection,
            logit_scale_init_value=-float(torch.tensor(config.loss.temperature).log()),
        )
        self.dual = transformers.VisionTextDualEncoderModel(
            config=both, vision_model=vision, text_model=text
        )
        for layer in (self.dual.visual_projection, self.dual.text_projection):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.trunc_normal_(vision.embeddings.mask_token, std=_STD)
        self.dual.logit_scale.requires_grad_(config.loss.learn_temperature)
        embeddings = vision.embeddings.patch_embeddings
        self.patch: tuple[int, int] = tuple(embeddings.patch_size)
        high, wide = embeddings.image_size
        self.grid = (high // self.patch[0], wide // self.patch[1])
        width, area = vision.config.hidden_size, self.patch[0] * self.patch[1]
        self.pixels = nn.Linear(width, 3 * area)
        nn.init.trunc_normal_(self.pixels.weight, std=_STD)
        nn.init.zeros_(self.pixels.bias)
        self.words = language.cls
        """BERT's head, tied to the word embeddings."""

    @property
    def scale(self) -> Tensor:
        """The inverse temperature, a scalar."""
        scale: Tensor = self.dual.logit_scale.exp()
        return scale

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep the inverse temperature between 1 and 100."""
        self.dual.logit_scale.clamp_(0.0, LARGEST_SCALE)

    def image(self, inputs: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalised features (B, D) float32 and patch states (B, P, W) of pictures (B, 3, H, W).

        Args:
            inputs: float32, normalised.
            hidden: (B, P) bool: patches that the mask token stands in for.
        """
        out = self.dual.vision_model(pixel_values=inputs, bool_masked_pos=hidden)
        features = self.dual.visual_projection(out.pooler_output).float()
        return F.normalize(features, dim=-1), out.last_hidden_state[:, 1:]

    def text(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised features (B, D) float32 and token states (B, T, W) of ids (B, T)."""
        mask = real_tokens(ids, lengths)
        out = self.dual.text_model(input_ids=ids, attention_mask=mask)
        features = self.dual.text_projection(out.pooler_output).float()
        return F.normalize(features, dim=-1), out.last_hidden_state

    def checkpoint_blocks(self) -> None:
        """Compute the blocks of both towers again in the backward pass."""
        blocks = [*self.dual.vision_model.layers, *self.dual.text_model.encoder.layer]
        checkpoint_blocks(blocks, dropout=True)

    def state(self) -> dict[str, Tensor]:
        """Every tensor once: tied ones have one name."""
        return {name: value.detach() for name, value in self.named_parameters()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take what `state` gave."""
        for name, parameter in self.named_parameters():
            parameter.copy_(state[name])

    def undecayed(self) -> Iterator[nn.Parameter]:
        """What has several dimensions and is no matrix: positions, class and mask token."""
        for name, parameter in self.named_parameters():
            if any(part in name for part in _UNDECAYED):
                yield parameter

    def stock(self) -> Any:
        """The towers alone, without mask token and decoders, as transformers saves them."""
        with quiet():
            config = copy.deepcopy(self.dual.config)
            config.logit_scale_init_value = self.dual.logit_scale.item()
            plain = transformers.VisionTextDualEncoderModel(config)
        state = self.dual.state_dict()
        del state["vision_model.embeddings.mask_token"]
        plain.load_state_dict(state)
        return plain.eval()


def build(config: PretrainConfig, vocabulary: int, padding: int) -> tuple[PairModel, Any]:
    """The model before its first step, in float32 on the CPU, and its image processor.

    Random numbers are torch's own.

    Args:
        config: of the pretraining.
        vocabulary: tokens of the text tower.
        padding: id of the padding token.

    Raises:
        InputError: weights that cannot be loaded or are of another kind.
    """
    vision, processor = _vision(config.vision)
    language = _language(config.text, vocabulary, padding)
    for tower, group in ((vision, config.vision), (language, config.text)):
        _set_dropout(tower, group.dropout)
    return PairModel(vision, language, config), processor


def _vision(config: VisionConfig) -> tuple[Any, Any]:
    if config.weights is not None:
        files = _files(config.weights, "vision.weights", "vit")
        drawn = ("pooler.", "embeddings.mask_token")
        processor = load_processor(files)
        found = load_model(files, transformers.ViTModel, drawn, use_mask_token=True)
        return found, processor
    sizes = config.sizes
    side = {"height": sizes["image_size"], "width": sizes["image_size"]}
    processor = transformers.ViTImageProcessor(size=side, resample=3)
    made = transformers.ViTConfig(
        image_size=sizes["image_size"], patch_size=sizes["patch_size"], **_sizes(sizes)
    )
    return transformers.ViTModel(made, use_mask_token=True), processor


def _language(config: TextConfig, vocabulary: int, padding: int) -> Any:
    if config.weights is not None:
        files = _files(config.weights, "text.weights", "bert")
        found: Any = load_model(files, transformers.BertForMaskedLM, ("cls.",))
        context = found.config.max_position_embeddings
        if config.tokens > context:
            raise InputError(
                f"text.tokens={config.tokens} is more than the {context} that {config.weights} "
                "takes"
            )
        if vocabulary > found.config.vocab_size:
            raise InputError(
                f"{config.weights} has {found.config.vocab_size:,} tokens, its tokenizer "
                f"{vocabulary:,}"
            )
        return found
    made = transformers.BertConfig(
        vocab_size=vocabulary,
        max_position_embeddings=config.tokens,
        pad_token_id=padding,
        **_sizes(config.sizes),
    )
    found = transformers.BertForMaskedLM(made)
    with torch.no_grad():  # a norm follows; the decoder, which is tied to them, has to begin small
        for embeddings in found.bert.embeddings.children():
            if isinstance(embeddings, nn.Embedding):
                embeddings.weight.mul_(_STD / made.initializer_range)
    return found


def _sizes(sizes: dict[str, int]) -> dict[str, Any]:
    return {
        # As CLIP's towers begin. With the 0.02 of towers 768 wide, narrow ones hardly mix their
        # tokens: all texts then have one feature, and the contrastive loss stays where it is.
        "initializer_range": sizes["width"] ** -0.5,
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "intermediate_size": sizes["mlp"],
    }


def _files(spec: str, setting: str, kind: str) -> Files:
    """The files of a tower's weights, which are of a kind that can be pretrained."""
    files = Files(parse_spec(spec).name)
    found = load_config(files).model_type
    if found != kind:
        what = {"vit": "a ViT", "bert": "a BERT"}[kind]
        raise InputError(f"{setting}={spec} is a model of type {found!r}; {what} is needed")
    return files


def _set_dropout(tower: nn.Module, rate: float) -> None:
    """Of all that is dropped while training, in the modules and in the config that is saved."""
    for module in tower.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        for name in ("attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, rate)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(tower.config, name, rate)
