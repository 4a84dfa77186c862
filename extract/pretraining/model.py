"""Two towers with a shared space, and what tells hidden patches and tokens from their states.

Legend: B pairs, P patches of p x p pixels, T tokens, W features of a token, D of the shared space.

Without any part between the towers the two masked losses see one modality each: only the
contrastive loss joins them.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertPooler

from mmc.extract.backbones.hf_files import quiet
from mmc.extract.backbones.hf_text import real_tokens
from mmc.extract.pretraining.options import LossConfig, PretrainConfig
from mmc.extract.pretraining.starting import Start
from mmc.extract.training.blocks import checkpoint_blocks
from mmc.extract.training.contrast import LARGEST_SCALE
from mmc.store.errors import InputError

_STD = 0.02
_TEMPERATURE = 0.07
_SHARED = (
    "dual.visual_projection.",
    "dual.text_projection.",
    "dual.logit_scale",
    "dual.vision_model.pooler.",
    "dual.text_model.pooler.",
)
"""What only the contrastive loss looks at."""
_UNDECAYED = ("position_embeddings", "token_type_embeddings", "cls_token", "mask_token")


class PairModel(nn.Module):
    """transformers' VisionTextDualEncoder of a ViT and a BERT, with their decoders."""

    def __init__(self, vision: Any, language: Any, projection: int, loss: LossConfig) -> None:
        """
        Args:
            vision: a ViTModel with a mask token and a pooler.
            language: a BertForMaskedLM.
            projection: D.
            loss: what is minimised: of its temperature, and of whether that is trained.
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
            projection_dim=projection,
            logit_scale_init_value=-math.log(loss.temperature or _TEMPERATURE),
        )
        self.dual = transformers.VisionTextDualEncoderModel(
            config=both, vision_model=vision, text_model=text
        )
        for layer in (self.dual.visual_projection, self.dual.text_projection):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.trunc_normal_(vision.embeddings.mask_token, std=_STD)
        self.dual.logit_scale.requires_grad_(loss.learn_temperature)
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

    def freeze(self, loss: LossConfig) -> None:
        """Leave out of training what no loss looks at: weight decay alone would change it."""
        masked = loss.contrastive and loss.views == "masked"
        idle = [
            *(() if loss.contrastive else _SHARED),
            *(() if loss.image else ("pixels.",)),
            *(() if loss.image or masked else ("dual.vision_model.embeddings.mask_token",)),
            *(() if loss.text else ("words.",)),
            *(() if loss.contrastive or loss.image else ("dual.vision_model.",)),
            *(() if loss.contrastive or loss.text else ("dual.text_model.",)),
        ]
        for name, parameter in self.named_parameters():
            if name.startswith(tuple(idle)):
                parameter.requires_grad_(False)

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


def build(config: PretrainConfig, start: Start) -> PairModel:
    """The model before its first step, in float32 on the CPU.

    Random numbers are torch's own.

    Args:
        config: of the pretraining.
        start: what it begins with.

    Raises:
        InputError: weights of another model.
    """
    vision = transformers.ViTModel(start.vision, use_mask_token=True)
    language: Any = transformers.BertForMaskedLM(start.text)
    if config.text.weights is None:
        with torch.no_grad():  # a norm follows; the decoder, tied to them, has to begin small
            for embeddings in language.bert.embeddings.children():
                if isinstance(embeddings, nn.Embedding):
                    embeddings.weight.mul_(_STD / start.text.initializer_range)
    for tower, group in ((vision, config.vision), (language, config.text)):
        _set_dropout(tower, group.dropout)
    model = PairModel(vision, language, start.projection, config.loss)
    drawn = model.state()
    for name, value in start.state.items():
        if name not in drawn or value.shape != drawn[name].shape:
            raise InputError(
                f"{name} does not fit the model that the pretraining begins with: its "
                "checkpoints/best.safetensors is of another one; remove it to begin with new "
                "decoders"
            )
    model.load(drawn | start.state)
    model.freeze(config.loss)
    return model


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
