"""ViLBERT: two streams, regions and text, that read each other; and its official weights.

Lu et al. 2019, arXiv:1908.02265. `vilbert_trunk` has the network; this file has what surrounds it.

The official network starts from token ids, WordPieces of uncased BERT. A store that has them
(``mmc extract ... --backbone hf:bert-base-uncased --fields text_ids,text_mask``, for which that
network does not run) is read so, and then all that the official weights compute is computed.
Without ids the states of a text backbone (``text_tokens``) stand where the word embeddings would:
through a projection that starts as the identity where the widths agree, before the position
embeddings, which then say again what the states know. With official weights the states of uncased
BERT are the nearest to what the layers were trained on; the word embeddings of the file are not
used, though it must have them.

Shapes: B samples, R regions, T tokens, C labels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmc.heads.models.base import Batch, Need, check_shares
from mmc.heads.models.inputs import Normalize
from mmc.heads.models.linear import output_layer, set_bias
from mmc.heads.models.tokens import Source, TokenHead, mask_for, never_empty
from mmc.heads.models.vilbert_trunk import OFFICIAL, SMALL, Sizes, Trunk, official_tensors
from mmc.heads.models.weights import copy_all, read_tensors
from mmc.store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class VilbertConfig:
    """Settings of the ViLBERT head."""

    weights: str = ""
    """File of an official checkpoint (Conceptual Captions; any of its known wrappings): all of its
    519 tensors must be there. Needs 2048 values per region, of the detector that it was trained
    with."""
    size: Literal["auto", "official", "small"] = "auto"
    """``official`` = 12 text and 6 region layers, 220 million parameters without words; ``small`` =
    4 and 2 of a quarter of the width; auto = official where weights are named."""
    global_region: bool = True
    """Put the mean of all regions, as the whole picture, before the first: what the official
    weights were trained with. Weights of MMF were tuned without."""
    fusion: Literal["mul", "sum"] = "mul"
    """How the vectors of the two streams become one."""
    dropout: float = 0.1
    """Share of values dropped while training, everywhere in the network."""
    normalize: Normalize = "none"
    """Of regions and text tokens: ``none`` = as stored (what official weights expect); ``center`` =
    unit length, minus the training mean, one scale; ``l2`` = unit length times sqrt(D);
    ``standardize`` = unit length, then each value to mean 0 and variance 1; ``zscore`` = that
    without unit length."""

    def __post_init__(self) -> None:
        check_shares(self, "dropout")
        if self.weights and self.size == "small":
            raise InputError("head.weights are of the official size: leave head.size out")

    @property
    def sizes(self) -> Sizes:
        """Widths and layers."""
        official = self.size == "official" or (self.size == "auto" and bool(self.weights))
        return OFFICIAL if official else SMALL


class Vilbert(TokenHead):
    """Logits = classifier(pooled text x pooled regions), both after six exchanges.

    The learning rate is the one for official weights (1e-5) where they are named.
    """

    Config = VilbertConfig
    needs = (
        Need(fields=("regions",), one=True),
        Need(fields=("boxes",), one=True),
        Need(fields=("text_ids", "text_tokens"), one=True),
    )
    learning_rate = 3e-4

    def __init__(
        self,
        inputs: Mapping[str, tuple[int, ...]],
        num_labels: int,
        config: VilbertConfig,
        *,
        label_text: Tensor | None = None,
    ) -> None:
        super().__init__(inputs, num_labels, config, config.normalize, label_text)
        self.roles = {role.rpartition(".")[2]: role for role in inputs}
        self.ids = "text_ids" in self.roles
        by_field = {source.field: source for source in self.tokens.sources}
        self.regions, self.states = by_field["regions"], by_field.get("text_tokens")
        self.text_mask = self.roles.get("text_mask")
        sizes = config.sizes
        length = inputs[self.roles["text_ids"]][0] if self.ids else self._state_source().tokens
        if length > sizes.positions:
            raise InputError(
                f"vilbert reads up to {sizes.positions} tokens of text and there are {length}; "
                "extract with --max-text-tokens"
            )
        self.trunk = Trunk(sizes, self.regions.width, config.dropout, words=self.ids)
        self.project = None if self.ids else self._projection(self._state_source().width, sizes)
        width = sizes.joint
        self.classifier = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), output_layer(width, num_labels)
        )
        if config.weights:
            self.learning_rate = 1e-5
        tokens = length + self.regions.tokens
        floats = self.trunk.floats(length, self.regions.tokens + 1)
        self.set_memory(floats + tokens * self.regions.width)

    def prepare(self, batch: Batch) -> Batch:
        prepared = super().prepare(batch)
        if self.ids:
            ids_BT = prepared[self.roles["text_ids"]].long()
            if self.text_mask is not None:
                ids_BT = ids_BT * prepared[self.text_mask]
            self._check(ids_BT)
            prepared[self.roles["text_ids"]] = ids_BT
        return prepared

    def set_prior(self, logits: Tensor) -> None:
        set_bias(self.classifier[-1], logits)  # type: ignore[arg-type]

    def load_weights(self) -> None:
        path = self.config.weights
        if not path:
            return
        found = official_tensors(read_tensors(path), self.config.sizes, path)
        copy_all(self.trunk.state_dict(keep_vars=True), found, path, "vilbert")

    def pooled(self, prepared: Batch) -> tuple[Tensor, Tensor]:
        """The pooled text and regions, (B, joint) each."""
        text_BTD, text_mask_BT = self._text(prepared)
        regions_BRD = prepared[self.regions.role]
        boxes_BRF = prepared[self.roles["boxes"]]
        mask_BR = mask_for(self.regions, prepared)
        if self.config.global_region:
            regions_BRD, boxes_BRF, mask_BR = with_global(regions_BRD, boxes_BRF, mask_BR)
        pooled: tuple[Tensor, Tensor] = self.trunk(
            text_BTD, never_empty(text_mask_BT), regions_BRD, boxes_BRF, never_empty(mask_BR)
        )
        return pooled

    def _score(self, prepared: Batch) -> Tensor:
        text, regions = self.pooled(prepared)
        joint = text * regions if self.config.fusion == "mul" else text + regions
        joint = F.dropout(joint, self.config.dropout, self.training)
        logits: Tensor = self.classifier(joint)
        return logits

    def _text(self, prepared: Batch) -> tuple[Tensor, Tensor]:
        """What stands for the words, (B, T, width), and which are real."""
        if self.ids:
            ids_BT = prepared[self.roles["text_ids"]]
            mask = torch.ones_like(ids_BT, dtype=torch.bool)
            if self.text_mask is not None:
                mask = prepared[self.text_mask]
            return self.trunk.words(ids_BT), mask
        assert self.project is not None
        source = self._state_source()
        return self.project(prepared[source.role]), mask_for(source, prepared)

    def _check(self, ids_BT: Tensor) -> None:
        """Raise InputError where ids (B, T), zero behind the mask, are of another vocabulary."""
        if torch.compiler.is_compiling():  # an exported graph has no errors of its own
            return
        sizes: Sizes = self.config.sizes
        fits = (ids_BT < sizes.vocabulary).all()
        if self.config.weights:  # 0: a text of which nothing is there
            first_B = ids_BT[:, 0]
            fits &= ((first_B == sizes.start) | (first_B == 0)).all()
        if not fits:
            raise InputError(
                f"{self.roles['text_ids']} are not ids of uncased BERT's WordPieces (whose texts "
                f"begin with [CLS], {sizes.start}, and whose largest is {sizes.vocabulary - 1}): "
                "extract them with hf:bert-base-uncased"
            )

    def _state_source(self) -> Source:
        if self.states is None:
            raise InputError("vilbert reads text_tokens or text_ids beside the regions")
        return self.states

    @staticmethod
    def _projection(width: int, sizes: Sizes) -> nn.Linear:
        layer = nn.Linear(width, sizes.text_width)
        if width == sizes.text_width:
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        return layer


def with_global(
    regions_BRD: Tensor, boxes_BRF: Tensor, mask_BR: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of the real regions, at the whole picture's box, before the first region."""
    real = mask_BR[..., None].to(regions_BRD.dtype)
    mean = (regions_BRD * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
    whole = boxes_BRF.new_tensor([0.0, 0.0, 1.0, 1.0, 1.0]).expand(boxes_BRF.shape[0], 1, -1)
    return (
        torch.cat([mean, regions_BRD], dim=1),
        torch.cat([whole, boxes_BRF], dim=1),
        torch.cat([torch.ones_like(mask_BR[:, :1]), mask_BR], dim=1),
    )
