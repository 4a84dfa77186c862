"""The towers on batches: features of clean pairs, and what they tell of hidden patches and tokens.

Legend: n pairs, D features (normalised), M masked patches, K masked tokens, V tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmc.extract.backbones.base import TokenBatch
from mmc.extract.pretraining.losses import patchify
from mmc.extract.pretraining.masking import Hidden
from mmc.extract.pretraining.setup import Setup
from mmc.extract.pretraining.views import cut


@dataclass(frozen=True)
class Told:
    """What the towers say of what is hidden."""

    features: tuple[Tensor, Tensor] | None
    """Image and text (n, D) of the pairs as they were seen; None where one was not looked at."""
    patches: tuple[Tensor, Tensor] | None
    """Told and true pixels, (M, 3 * p * p) float32 each."""
    tokens: tuple[Tensor, Tensor] | None
    """Scores (K, V) float32 and true ids int64 (K,)."""


class Forward:
    """Runs the model of a pretraining; weights and results are float32."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._model = setup, setup.model
        self._device = setup.world.device

    def pixels(self, pixels: Tensor, views: Tensor | None = None) -> Tensor:
        """uint8 (n, 3, H, W) normalised, float32, and cut where ``views`` say so."""
        moved = pixels.to(self._device, non_blocking=True)
        inputs = self._setup.normalize(moved, torch.float32)
        return inputs if views is None else cut(inputs, views)

    def clean(self, inputs: Tensor, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
        """Features (n, D) of pictures and texts as they are."""
        with self._setup.autocast():
            image, _ = self._model.image(inputs)
            text, _ = self._model.text(*self._moved(tokens, tokens.ids))
        return image, text

    def masked(self, inputs: Tensor, tokens: TokenBatch, hidden: Hidden, *, both: bool) -> Told:
        """Pairs with parts hidden, and what the towers tell of these.

        Args:
            inputs: (n, 3, H, W).
            tokens: as they are.
            hidden: of these pairs.
            both: look at both, also where a loss has no weight.
        """
        weights, model = self._setup.config.loss, self._model
        image = text = patches = told = None
        with self._setup.autocast():
            if weights.image or both:
                mask = hidden.patches.to(self._device)
                image, states = model.image(inputs, mask if self._setup.masks.count else None)
                if weights.image:
                    true = patchify(inputs, model.patch, weights.pixels)[mask]
                    patches = model.pixels(states[mask]).float(), true
            if weights.text or both:
                ids, lengths = self._moved(tokens, hidden.ids)
                text, states = model.text(ids, lengths)
                if weights.text:
                    chosen = hidden.tokens[:, : ids.shape[1]].to(self._device)
                    true = tokens.cut().to(self._device)[chosen]
                    told = model.words(states[chosen]).float(), true
        features = None if image is None or text is None else (image, text)
        return Told(features, patches, told)

    def _moved(self, tokens: TokenBatch, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As many columns of ``ids`` as the texts need, and the lengths, on the device."""
        width = int(tokens.buckets.max())
        seen = ids[:, :width].to(self._device, non_blocking=True)
        return seen, tokens.lengths.to(self._device, non_blocking=True)
