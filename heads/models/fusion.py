"""A transformer encoder over the tokens of all fields, with a class token that is read out.

One layer is the default: states of a backbone know their neighbours already, and of the last layer
only the class token is computed. On movies (128 text tokens; two seeds) it reached .559 to .560 val
and .584 to .594 test mAP in 77 CPU seconds (linear on the pooled text .552 and .579). With half the
width and a quarter of the feed-forward part it was .558 in 41 seconds; there 0.4 for
``token_dropout`` (.556) and twice the learning rate (.553) were no better.

Shapes: B samples, N tokens of all fields and the class token, W width, C labels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmc.heads.models.attention import attend, attention_heads
from mmc.heads.models.base import Batch, Need, check_least, check_shares
from mmc.heads.models.dropout import Dropout, InputDropoutLinear
from mmc.heads.models.inputs import Normalize
from mmc.heads.models.linear import output_layer, set_bias
from mmc.heads.models.tokens import Source, TokenHead, mask_for

LEVELS = 8
"""Levels of a pyramid that have an embedding; deeper ones share the last."""


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """Settings of the fusion head."""

    width: int = 256
    """Of every token within the encoder."""
    layers: int = 1
    """Encoder layers."""
    heads: int = 4
    """Attention heads (the largest number up to this that divides the width)."""
    feedforward: int = 1024
    """Hidden width of each layer's feed-forward part."""
    input_dropout: float = 0.4
    """Share of a field's values ignored in a training step, the same for the whole batch."""
    token_dropout: float = 0.1
    """Share of each sample's tokens left out of a training step."""
    dropout: float = 0.2
    """Share of values dropped while training, after attention and within the feed-forward part."""
    normalize: Normalize = "center"
    """Of tokens, per field: ``center`` = unit length, minus the training mean, one scale; ``l2`` =
    unit length times sqrt(D); ``standardize`` = unit length, then each value to mean 0 and variance
    1; ``zscore`` = that without unit length; ``none`` = as stored."""

    def __post_init__(self) -> None:
        check_least(self, 1, "width", "layers", "heads", "feedforward")
        check_shares(self, "input_dropout", "token_dropout", "dropout")


class Fusion(TokenHead):
    """Logits = linear layer on the class token after every token has looked at every other, plus
    one on the mean of each field's tokens: what a head on pooled fields sees is there from the
    first step.

    Each field has a projection of its own and an embedding that says
    which field a token is of.
    Backbones' tokens know their positions; boxes and pyramid places are added where there are any.
    """

    Config = FusionConfig
    needs = (
        Need(fields=("image_tokens", "regions", "image"), optional=True),
        Need(fields=("fused_tokens", "text_tokens", "text"), optional=True),
    )
    extras = ("image_class", "boxes", "image_places")
    learning_rate = 1e-3

    def __init__(
        self,
        inputs: Mapping[str, tuple[int, ...]],
        num_labels: int,
        config: FusionConfig,
        *,
        label_text: Tensor | None = None,
    ) -> None:
        super().__init__(inputs, num_labels, config, config.normalize, label_text)
        found = self.tokens.sources
        self.projections = nn.ModuleList(
            FieldProjection(source, inputs, config.width, config.input_dropout) for source in found
        )
        self.class_token = nn.Parameter(0.02 * torch.randn(config.width))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.classifier = output_layer(config.width, num_labels)
        self.direct = nn.Linear(sum(source.width for source in found), num_labels, bias=False)
        nn.init.zeros_(self.direct.weight)
        tokens = 1 + sum(source.tokens for source in found)
        heads = attention_heads(config.width, config.heads)
        layer = tokens * (8 * config.width + 3 * config.feedforward) + heads * tokens * 4
        # Of the last layer only the class token is used: keys and values of the others.
        last = tokens * (5 * config.width + heads)
        self.set_memory(sum(s.tokens * s.width for s in found) + (config.layers - 1) * layer + last)

    def preparation(self) -> tuple[str, nn.Module] | None:
        return f"tokens {self.tokens.mode}", self.tokens

    def set_prior(self, logits: Tensor) -> None:
        set_bias(self.classifier, logits)

    def _score(self, prepared: Batch) -> Tensor:
        found = self.tokens.sources
        parts = [
            projection(source, prepared)
            for source, projection in zip(found, self.projections, strict=True)
        ]
        x_BNW = torch.cat(parts, dim=1)
        mask_BN = None
        if any(source.mask for source in found):
            mask_BN = torch.cat([mask_for(source, prepared) for source in found], dim=1)
        if self.training and self.config.token_dropout:
            mask_BN = self._thinned(x_BNW, mask_BN)
        first_B1W = self.class_token + mean_of(x_BNW, mask_BN)
        x_BNW = torch.cat([first_B1W.to(x_BNW.dtype), x_BNW], dim=1)
        if mask_BN is not None:
            # The class token is always there, so no sample is without any.
            mask_BN = torch.cat([torch.ones_like(mask_BN[:, :1]), mask_BN], dim=1)
        for layer in self.layers[:-1]:
            x_BNW = layer(x_BNW, x_BNW, mask_BN)
        # Of the last layer only the class token is used.
        x_BNW = self.layers[-1](x_BNW[:, :1], x_BNW, mask_BN)
        logits: Tensor = self.classifier(self.norm(x_BNW[:, 0])) + self.direct(
            self._means(prepared)
        )
        return logits

    def _means(self, prepared: Batch) -> Tensor:
        """The mean of each field's real tokens, side by side."""
        means = [
            mean_of(prepared[source.role], prepared[source.mask] if source.mask else None)[:, 0]
            for source in self.tokens.sources
        ]
        return torch.cat(means, dim=-1)

    def _thinned(self, x_BNW: Tensor, mask_BN: Tensor | None) -> Tensor:
        """The mask without a random share of the tokens; fields of one token keep it."""
        kept_BN = torch.cat(
            [
                torch.rand(len(x_BNW), source.tokens, device=x_BNW.device)
                >= (0.0 if source.tokens == 1 else self.config.token_dropout)
                for source in self.tokens.sources
            ],
            dim=1,
        )
        return kept_BN if mask_BN is None else mask_BN & kept_BN


def mean_of(x_BNW: Tensor, mask_BN: Tensor | None) -> Tensor:
    """The mean (B, 1, W) of the real tokens; zero where there are none."""
    if mask_BN is None:
        return x_BNW.mean(1, keepdim=True)
    real = mask_BN[..., None].to(x_BNW.dtype)
    return (x_BNW * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)


class FieldProjection(nn.Module):
    """One field's tokens (B, N, D) -> (B, N, W)."""

    def __init__(
        self, source: Source, inputs: Mapping[str, tuple[int, ...]], width: int, dropout: float
    ) -> None:
        super().__init__()
        self.values = InputDropoutLinear(source.width, width, dropout)
        self.kind = nn.Parameter(0.02 * torch.randn(width))
        boxes, places = (source.extras.get(name) for name in ("boxes", "image_places"))
        self.box = nn.Linear(inputs[boxes][-1], width) if boxes else None
        # Starts at zero: where a token lies is said on top of what the backbone knows.
        self.level = nn.Parameter(torch.zeros(LEVELS, width)) if places else None

    def forward(self, source: Source, prepared: Batch) -> Tensor:
        x_BNW = self.values(prepared[source.role]) + self.kind
        if self.box is not None:
            x_BNW = x_BNW + self.box(prepared[source.extras["boxes"]])
        if self.level is not None:
            level_BN = token_levels(prepared[source.extras["image_places"]], x_BNW.shape[1])
            x_BNW = x_BNW + F.embedding(level_BN, self.level)
        out: Tensor = x_BNW
        return out


def token_levels(places: Tensor, tokens: int) -> Tensor:
    """Pyramid level (B, N) of each token from (B, P, 3) places: of a tile, or of a token each."""
    level_BP = places[..., 0].long().clamp(0, LEVELS - 1)
    return level_BP.repeat_interleave(tokens // level_BP.shape[1], dim=1)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward part, each normalised before."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = attention_heads(width, config.heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.feedforward = nn.Sequential(
            nn.Linear(width, config.feedforward),
            nn.GELU(),
            Dropout(config.dropout),
            nn.Linear(config.feedforward, width),
        )
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BQW: Tensor, all_BNW: Tensor, mask_BN: Tensor | None) -> Tensor:
        """Tokens (B, Q, W) look at all (B, N, W) -> (B, Q, W)."""
        key, value = self.key_value(self.norm1(all_BNW)).chunk(2, dim=-1)
        read = attend(self.query(self.norm1(x_BQW)), key, value, mask_BN, self.heads)
        x_BQW = x_BQW + self.dropout(self.out(read))
        return x_BQW + self.dropout(self.feedforward(self.norm2(x_BQW)))
