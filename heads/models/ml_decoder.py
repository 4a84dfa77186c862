"""ML-Decoder: label queries look at the tokens, each decoded into a group of labels.

Ridnik et al. 2021, arXiv:2111.12933. Names of parameters are those of the official head, so that
its weights load (``head.weights=FILE``). The official class needs a torch of 2022; this one is
written from the equations.

A width of 192 is the default without official weights. On movies (128 text tokens, 18 labels) it
reached .572 val and .579 to .594 test mAP with two seeds in 95 to 101 CPU seconds (linear on the
pooled text .552 and .579); a ``dropout`` of 0.3 (.572) and less than half the learning rate (.556)
were no better.

Shapes: B samples, N tokens of all fields, D width, K queries, G labels of a group, C labels.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmc.heads.models.attention import MultiheadAttention, attention_heads
from mmc.heads.models.base import Batch, Need, check_least, check_shares
from mmc.heads.models.dropout import Dropout, InputDropoutLinear
from mmc.heads.models.inputs import Normalize
from mmc.heads.models.tokens import TokenHead, joined_masks
from mmc.heads.models.tokens_labels import LabelTexts, selective
from mmc.heads.models.weights import copy_all, read_tensors
from mmc.store.errors import InputError

PREFIXES = ("module.", "model.", "head.", "fc.")
"""What stands before the names of the head in the files of whole models."""
OFFICIAL_WIDTH, OFFICIAL_HIDDEN = 768, 2048
QUERIES_AT_ONCE = 1024
"""Label-text queries in a pass without gradients; labels do not see each other."""


@dataclass(frozen=True, kw_only=True)
class MLDecoderConfig:
    """Settings of ML-Decoder."""

    queries: Literal["fixed", "label_text"] = "fixed"
    """``fixed`` = random queries that never train, each for a group of labels; ``label_text`` = one
    query per label, made from its text, with one read-out for all: labels that were not there in
    training get scores too."""
    groups: int = 100
    """Fixed queries; one per label where there are fewer labels. Neighbours in the label set share
    a query."""
    width: int = 0
    """Of queries and tokens within the decoder; 0 = 192, and 768 with ``weights``."""
    heads: int = 8
    """Attention heads (the largest number up to this that divides the width)."""
    feedforward: int = 0
    """Hidden width of the layer's feed-forward part; 0 = 384, and 2048 with ``weights``."""
    input_dropout: float = 0.4
    """Share of a field's values ignored in a training step, the same for the whole batch."""
    dropout: float = 0.1
    """Share of values dropped while training: queries, attention and feed-forward part."""
    label_budget: int = 512
    """With ``label_text``: labels of a training step, the positive ones and others at random; 0 =
    all."""
    normalize: Literal["auto", "center", "l2", "standardize", "none"] = "auto"
    """Of tokens, per field: ``center`` = unit length, minus the training mean, one scale; ``l2`` =
    unit length times sqrt(D); ``standardize`` = unit length, then each value to mean 0 and variance
    1; ``none`` = as stored; auto = center, and none with ``weights``, which expect it."""
    weights: str = ""
    """File of an official head to start from (.safetensors, .pth); every tensor of it must fit,
    the output layer included where the number of labels is the same."""

    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside the others -> which others."""
        name = "groups" if self.queries == "label_text" else "label_budget"
        return {name: f"head.queries={self.queries}"}

    def __post_init__(self) -> None:
        check_least(self, 1, "groups", "heads")
        check_least(self, 0, "width", "feedforward", "label_budget")
        check_shares(self, "input_dropout", "dropout")

    @property
    def scale(self) -> Normalize:
        """How tokens are normalised."""
        if self.normalize == "auto":
            return "none" if self.weights else "center"
        return self.normalize

    @property
    def inner(self) -> int:
        """The width that there is."""
        return self.width or (OFFICIAL_WIDTH if self.weights else 192)

    @property
    def hidden(self) -> int:
        """The hidden width that there is."""
        return self.feedforward or (OFFICIAL_HIDDEN if self.weights else 384)


class MLDecoder(TokenHead):
    """Logits of label l = the vector that query l // G read from the tokens, times its weights.

    Several fields are tokens side by side, each through a projection of its own. The output layer
    starts at zero, where the official one is random: the label priors are then the first answer.
    """

    Config = MLDecoderConfig
    takes_label_text = True
    needs = (
        Need(fields=("image_tokens", "regions"), optional=True),
        Need(fields=("fused_tokens", "text_tokens"), optional=True),
    )
    extras = ("image_class",)
    learning_rate = 1.2e-3
    card = (
        "Queries look at the tokens of a sample, and each is decoded into a group of neighbouring "
        "labels (with label texts: into one), so the order of the labels is part of the head."
    )

    def __init__(
        self,
        inputs: Mapping[str, tuple[int, ...]],
        num_labels: int,
        config: MLDecoderConfig,
        *,
        label_text: Tensor | None = None,
    ) -> None:
        super().__init__(inputs, num_labels, config, config.scale, label_text)
        widths = [source.width for source in self.tokens.sources]
        self.by_text = config.queries == "label_text"
        self.queries = num_labels if self.by_text else min(config.groups, num_labels)
        self.decoder = _Decoder(widths, self.queries, num_labels, config)
        if self.by_text:
            width = widths[0] if label_text is None else label_text.shape[1]
            self.labels = LabelTexts(num_labels, width, label_text)
            self.wordvec_proj = nn.Linear(width, config.inner)
        tokens = sum(source.tokens for source in self.tokens.sources)
        each = 8 * config.inner + 3 * config.hidden + 2 * config.heads * tokens
        asked = min(self.queries, config.label_budget) if config.label_budget else self.queries
        at_once = min(self.queries, QUERIES_AT_ONCE)
        if not self.by_text:
            asked = at_once = self.queries
        memory = tokens * (sum(widths) + 3 * config.inner)
        self.set_memory(memory + asked * each + num_labels, memory + at_once * each + num_labels)

    def fit_inputs(self, blocks: Iterable[Batch]) -> None:
        if self.by_text and not self.labels.given:
            raise InputError(
                "head.queries=label_text needs label texts, and the store has none for these "
                "features; extract with a backbone that reads texts, such as CLIP"
            )
        super().fit_inputs(blocks)

    def set_prior(self, logits: Tensor) -> None:
        if self.by_text:
            self.labels.prior.copy_(logits)
        else:
            with torch.no_grad():
                self.decoder.duplicate_pooling_bias.copy_(logits)

    def load_weights(self) -> None:
        if not self.config.weights:
            return
        path = self.config.weights
        found = {_official(name): tensor for name, tensor in read_tensors(path).items()}
        wanted = {
            name: tensor
            for name, tensor in self.state_dict(keep_vars=True).items()
            if name.startswith(("decoder.", "wordvec_proj."))
        }
        outputs = [name for name in wanted if "duplicate_pooling" in name]
        if any(found.get(name, wanted[name]).shape != wanted[name].shape for name in outputs):
            # Other labels: the queries and the layer are worth having all the same.
            wanted = {name: tensor for name, tensor in wanted.items() if name not in outputs}
        copy_all(wanted, found, path, "ml_decoder")

    def select_labels(self, targets: Tensor) -> Tensor | None:
        if not self.by_text:
            return None
        return selective(targets, self.num_labels, self.config.label_budget)

    @property
    def text_width(self) -> int | None:
        return self.labels.text.shape[1] if self.by_text else None

    def for_labels(self, label_text: Tensor, same: Tensor) -> dict[str, Tensor]:
        if not self.by_text:
            return super().for_labels(label_text, same)
        own = {f"labels.{key}": t for key, t in self.labels.other(label_text, same).items()}
        return {**self.state_dict(), **own}

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args) -> None:  # type: ignore[no-untyped-def]
        text = state_dict.get(f"{prefix}labels.text")
        if self.by_text and text is not None and text.shape[1] != self.wordvec_proj.in_features:
            self.labels.set_width(text.shape[1])
            self.wordvec_proj = nn.Linear(text.shape[1], self.config.inner)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _score(self, prepared: Batch) -> Tensor:
        fields = [prepared[source.role] for source in self.tokens.sources]
        memory_BND = self.decoder.embed(fields)
        mask_BN = joined_masks(self.tokens.sources, prepared)
        if not self.by_text:
            return self.decoder.grouped(memory_BND, mask_BN)[:, : self.num_labels]
        labels = prepared.get("labels")
        text_CW, prior_C = self.labels.choose(labels)
        step = len(text_CW) if torch.is_grad_enabled() else QUERIES_AT_ONCE
        evidence_BC = torch.cat(
            [
                self.decoder.shared(F.relu(self.wordvec_proj(part)), memory_BND, mask_BN)
                for part in text_CW.split(step)
            ],
            dim=1,
        )
        return self.labels.spread(evidence_BC.float() + prior_C, labels)


class _Decoder(nn.Module):
    """The layer, the queries and the output layer, under their official names."""

    def __init__(
        self, widths: list[int], queries: int, num_labels: int, config: MLDecoderConfig
    ) -> None:
        super().__init__()
        embeds = [InputDropoutLinear(w, config.inner, config.input_dropout) for w in widths]
        self.embed_standart, self.embed_more = embeds[0], nn.ModuleList(embeds[1:])
        self.layers = nn.ModuleList([DecoderLayer(config)])
        if config.queries == "fixed":
            self.query_embed = FixedQueries(queries, config.inner)
            group = math.ceil(num_labels / queries)
            self.duplicate_pooling = nn.Parameter(torch.zeros(queries, config.inner, group))
            self.duplicate_pooling_bias = nn.Parameter(torch.zeros(num_labels))
        else:
            self.duplicate_pooling = nn.Parameter(torch.zeros(config.inner, 1))
            self.duplicate_pooling_bias = nn.Parameter(torch.zeros(1))

    def embed(self, fields: list[Tensor]) -> Tensor:
        """Normalised tokens of each field -> what the queries read, (B, N, D)."""
        layers = [self.embed_standart, *self.embed_more]
        return torch.cat([F.relu(m(x)) for m, x in zip(layers, fields, strict=True)], dim=1)

    def grouped(self, memory_BND: Tensor, mask_BN: Tensor | None) -> Tensor:
        """Logits (B, C) of fixed queries."""
        u_BKD = self.layers[0](self.query_embed.weight, memory_BND, mask_BN)
        logits_BKG = torch.einsum("bkd,kdg->bkg", u_BKD, self.duplicate_pooling)
        bias_C = self.duplicate_pooling_bias
        return logits_BKG.flatten(1)[:, : len(bias_C)].float() + bias_C

    def shared(self, queries_MD: Tensor, memory_BND: Tensor, mask_BN: Tensor | None) -> Tensor:
        """Logits (B, M) of one query per label, read out alike."""
        u_BMD = self.layers[0](queries_MD, memory_BND, mask_BN)
        return (u_BMD @ self.duplicate_pooling + self.duplicate_pooling_bias).squeeze(-1)


class FixedQueries(nn.Module):
    """Random constants: part of the state, since the weights rely on them, but no parameters."""

    weight: Tensor

    def __init__(self, queries: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(queries, width))


class DecoderLayer(nn.Module):
    """Cross-attention and a feed-forward part, normalised after each; no self-attention."""

    def __init__(self, config: MLDecoderConfig) -> None:
        super().__init__()
        width = config.inner
        heads = attention_heads(width, config.heads)
        self.multihead_attn = MultiheadAttention(width, heads, config.dropout)
        self.linear1 = nn.Linear(width, config.hidden)
        self.linear2 = nn.Linear(config.hidden, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = Dropout(config.dropout)

    def forward(self, queries_KD: Tensor, memory_BND: Tensor, mask_BN: Tensor | None) -> Tensor:
        """(K, D) queries of all samples read (B, N, D) -> (B, K, D)."""
        # Dropped alike for the whole batch, so that the queries are projected once.
        u_KD = self.norm1(queries_KD + self.dropout(queries_KD))[None]
        u_BKD = u_KD + self.dropout(self.multihead_attn(u_KD, memory_BND, mask_BN))
        u_BKD = self.norm2(u_BKD)
        hidden = self.dropout(F.relu(self.linear1(u_BKD)))
        out: Tensor = self.norm3(u_BKD + self.dropout(self.linear2(hidden)))
        return out


def _official(name: str) -> str:
    """A name in a file of a whole model -> the name within the head."""
    changed = True
    while changed:
        changed = False
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name, changed = name.removeprefix(prefix), True
    return name
