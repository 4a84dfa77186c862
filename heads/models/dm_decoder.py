"""The dual-modal decoder of ADDS: label texts read the image's tokens, and the tokens read them.

Xu et al. 2022, arXiv:2208.09562. No official code or weights are public: the layer is written from
the equations, the selection of labels while training is ours (`tokens_labels.selective`).

The logit of a label depends a little on which other labels are scored with it, since the tokens
read them all: predictions for the same labels need the same set of labels.

Shapes: B samples, N tokens, M labels that are scored, C labels, D width.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmc.heads.models.attention import MultiheadAttention, attention_heads
from mmc.heads.models.base import Batch, Need, check_least, check_shares
from mmc.heads.models.dropout import Dropout
from mmc.heads.models.fusion import FieldProjection
from mmc.heads.models.inputs import Normalize
from mmc.heads.models.tokens import TokenHead, joined_masks
from mmc.heads.models.tokens_labels import LabelTexts, selective
from mmc.store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DMDecoderConfig:
    """Settings of the dual-modal decoder."""

    layers: int = 2
    """Decoder layers; 0 = the cosine with the label texts alone."""
    width: int = 0
    """Of labels and tokens within the decoder; 0 = that of the label texts."""
    heads: int = 8
    """Attention heads (the largest number up to this that divides the width)."""
    feedforward: int = 4
    """Hidden width of the feed-forward part, in widths of the decoder."""
    input_dropout: float = 0.1
    """Share of a field's values ignored in a training step, the same for the whole batch."""
    dropout: float = 0.1
    """Share of values dropped while training: queries, attention and feed-forward part."""
    cosine: bool = True
    """Add the cosine of the pooled ``image`` field with the label text, times a number that is
    learned, where the field is there: what the backbone knows of a label without training."""
    label_budget: int = 512
    """Labels of a training step, the positive ones and others at random; 0 = all."""
    normalize: Normalize = "center"
    """Of tokens, per field: ``center`` = unit length, minus the training mean, one scale; ``l2`` =
    unit length times sqrt(D); ``standardize`` = unit length, then each value to mean 0 and variance
    1; ``zscore`` = that without unit length; ``none`` = as stored."""

    def __post_init__(self) -> None:
        check_least(self, 0, "layers", "width", "label_budget")
        check_least(self, 1, "heads", "feedforward")
        check_shares(self, "input_dropout", "dropout")
        if not self.layers and not self.cosine:
            raise InputError("head.layers=0 leaves nothing but the cosine: set head.cosine=true")


class DMDecoder(TokenHead):
    """Logits = prior + one read-out of what each label's query has read + a learned cosine."""

    Config = DMDecoderConfig
    wants_label_text = True
    needs = (Need(fields=("image_tokens", "regions")), Need(fields=("image",), optional=True))
    extras = ("image_class", "boxes", "image_places")
    learning_rate = 2e-4
    card = (
        "Label texts and image tokens read each other, so the score of a label depends a little on "
        "which other labels are scored with it: compare scores of one set of labels only."
    )
    cosine_mean: Tensor
    cosine_scale: Tensor

    def __init__(
        self,
        inputs: Mapping[str, tuple[int, ...]],
        num_labels: int,
        config: DMDecoderConfig,
        *,
        label_text: Tensor | None = None,
    ) -> None:
        super().__init__(inputs, num_labels, config, config.normalize, label_text)
        self.sources = tuple(s for s in self.tokens.sources if s.field != "image")
        pooled = [s for s in self.tokens.sources if s.field == "image"]
        self.pooled = pooled[0].role if pooled and config.cosine else None
        if label_text is not None:
            text_width = label_text.shape[1]
        else:  # a saved head: its state tells, where it differs
            text_width = (pooled or self.tokens.sources)[0].width
        self.labels = LabelTexts(num_labels, text_width, label_text)
        self._build(text_width)
        self.register_buffer("cosine_mean", torch.zeros(()))
        self.register_buffer("cosine_scale", torch.ones(()))

    def _build(self, text_width: int) -> None:
        """The trained parts, for label texts of this width."""
        config = self.config
        width = config.width or text_width
        tokens = sum(source.tokens for source in self.sources)
        asked = min(self.num_labels, config.label_budget or self.num_labels)
        floats = tokens * sum(source.width for source in self.sources) + self.num_labels
        # Without gradients nothing is kept from layer to layer, but all labels are there.
        pass_floats = floats + (4 + config.feedforward) * width * self.num_labels
        self.cosine = self._cosine_gain(text_width)
        if config.layers:
            self.queries = nn.Identity() if width == text_width else nn.Linear(text_width, width)
            self.projections = nn.ModuleList(
                FieldProjection(source, self.inputs, width, config.input_dropout)
                for source in self.sources
            )
            self.layers = nn.ModuleList(
                DualModalLayer(config, width, last=index == config.layers - 1)
                for index in range(config.layers)
            )
            self.readout = nn.Linear(width, 1)
            nn.init.zeros_(self.readout.weight)
            nn.init.zeros_(self.readout.bias)
            per_label = (8 + 3 * config.feedforward) * width
            pairs = 2 * attention_heads(width, config.heads) * tokens * asked
            floats += config.layers * (asked * per_label + 8 * tokens * width + pairs)
            pass_floats += 8 * tokens * width
        self.set_memory(floats, pass_floats)

    def _cosine_gain(self, text_width: int) -> nn.Parameter | None:
        if self.pooled is None:
            if not self.config.layers:
                raise InputError("head.layers=0 compares the field `image`: extract it too")
            return None
        if self.inputs[self.pooled] != (text_width,):
            raise InputError(
                f"dm_decoder compares {self.pooled} with the label texts, and they have "
                f"{self.inputs[self.pooled][-1]} and {text_width} values: set head.cosine=false"
            )
        return nn.Parameter(torch.zeros(()))

    def prepare(self, batch: Batch) -> Batch:
        prepared = super().prepare(batch)
        if self.pooled is not None:
            prepared[self.pooled] = F.normalize(batch[self.pooled].to(self.labels.text), dim=-1)
        return prepared

    def fit_inputs(self, blocks: Iterable[Batch]) -> None:
        super().fit_inputs(self._seen(blocks))

    def set_prior(self, logits: Tensor) -> None:
        self.labels.prior.copy_(logits)

    def select_labels(self, targets: Tensor) -> Tensor | None:
        return selective(targets, self.num_labels, self.config.label_budget)

    @property
    def text_width(self) -> int:
        return self.labels.text.shape[1]

    def for_labels(self, label_text: Tensor, same: Tensor) -> dict[str, Tensor]:
        own = {f"labels.{key}": t for key, t in self.labels.other(label_text, same).items()}
        return {**self.state_dict(), **own}

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args) -> None:  # type: ignore[no-untyped-def]
        text = state_dict.get(f"{prefix}labels.text")
        if text is not None and text.shape[1] != self.labels.text.shape[1]:
            self.labels.set_width(text.shape[1])
            self._build(text.shape[1])
            self.train(self.training)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _score(self, prepared: Batch) -> Tensor:
        labels = prepared.get("labels")
        text_MW, prior_M = self.labels.choose(labels)
        logits_BM = prior_M
        if self.cosine is not None and self.pooled is not None:
            cosine_BM = prepared[self.pooled] @ text_MW.to(prepared[self.pooled].dtype).T
            standard_BM = (cosine_BM.float() - self.cosine_mean) * self.cosine_scale
            logits_BM = logits_BM + self.cosine * standard_BM
        if self.config.layers:
            logits_BM = logits_BM + self._read(text_MW, prepared).float()
        return self.labels.spread(logits_BM, labels)

    def _read(self, text_MW: Tensor, prepared: Batch) -> Tensor:
        """What the decoder adds, (B, M)."""
        parts = [
            projection(source, prepared)
            for source, projection in zip(self.sources, self.projections, strict=True)
        ]
        tokens_BND = torch.cat(parts, dim=1)
        mask_BN = joined_masks(self.sources, prepared)
        q_BMD = self.queries(text_MW)[None]
        for layer in self.layers:
            q_BMD, tokens_BND = layer(q_BMD, tokens_BND, mask_BN)
        out: Tensor = self.readout(q_BMD).squeeze(-1)
        return out

    def _seen(self, blocks: Iterable[Batch]) -> Iterable[Batch]:
        """The blocks, while the mean and spread of the cosines are taken."""
        moments = torch.zeros(3, dtype=torch.float64)
        for block in blocks:
            if self.pooled is not None:
                x_BW = F.normalize(block[self.pooled].to(self.labels.text), dim=-1)
                # Of at most some labels: two numbers are estimated.
                cosine = (x_BW @ self.labels.text[:1000].T).double()
                part = [cosine.new_tensor(cosine.numel()), cosine.sum(), cosine.square().sum()]
                moments += torch.stack(part).cpu()
            yield block
        count, total, squares = moments.tolist()
        if count:
            variance = max(squares / count - (total / count) ** 2, 1e-12)
            self.cosine_mean.fill_(total / count)
            self.cosine_scale.fill_(variance**-0.5)


class DualModalLayer(nn.Module):
    """Labels read tokens and are transformed, then tokens read labels; normalised after each.

    Equations 1 to 7 of the paper's layer as its public re-implementation has them. In the last
    layer nobody uses the tokens any more: it has no second half.
    """

    def __init__(self, config: DMDecoderConfig, width: int, *, last: bool) -> None:
        super().__init__()
        heads = attention_heads(width, config.heads)
        self.read_tokens = MultiheadAttention(width, heads, config.dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.linear1 = nn.Linear(width, config.feedforward * width)
        self.linear2 = nn.Linear(config.feedforward * width, width)
        self.dropout = Dropout(config.dropout)
        self.read_labels = None if last else MultiheadAttention(width, heads, config.dropout)
        self.norm4 = None if last else nn.LayerNorm(width)

    def forward(
        self, q_BMD: Tensor, tokens_BND: Tensor, mask_BN: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Labels (B or 1, M, D) and tokens (B, N, D) -> both, updated."""
        q1 = self.norm1(q_BMD + self.dropout(q_BMD))
        q2 = self.read_tokens(q1, tokens_BND, mask_BN)
        q3 = self.norm2(q2 + q1)
        q4 = self.dropout(self.linear2(F.relu(self.linear1(q3))))
        q5 = self.norm3(q4 + q3)
        if self.read_labels is not None and self.norm4 is not None:
            tokens_BND = self.norm4(self.read_labels(tokens_BND, q5) + tokens_BND)
        return q5, tokens_BND
