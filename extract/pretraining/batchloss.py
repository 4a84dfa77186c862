"""The three losses of one batch and their gradients, whole or in parts, of one process or several.

Legend: n pairs of a part.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmc.extract.backbones.base import TokenBatch
from mmc.extract.pretraining.forward import Forward, Told
from mmc.extract.pretraining.losses import patch_loss, token_loss
from mmc.extract.pretraining.masking import Hidden
from mmc.extract.pretraining.setup import Setup
from mmc.extract.pretraining.views import draw_views, varies
from mmc.extract.training.cached import contrastive_step
from mmc.extract.training.contrast import contrastive_loss
from mmc.extract.training.data import Batch
from mmc.extract.training.evaluation import pair_mask
from mmc.extract.training.seeds import Use, derived

_Part = tuple[Tensor, TokenBatch, Hidden]
"""Pictures as the towers take them, texts, and what is hidden."""


class BatchLosses:
    """What is drawn for a batch (masks, crops, dropout), and the losses that follow."""

    def __init__(self, setup: Setup, forward: Forward, batch: Batch, step: int) -> None:
        """
        Args:
            batch: this process's pairs.
            step: number of the step; with the config's seed it decides all that is random.
        """
        self._setup, self._forward, self._batch, self._step = setup, forward, batch, step
        self._weights, self._world = setup.config.loss, setup.world
        total = len(batch.rows) * self._world.size
        self._rows = self._world.slice(total)
        usable = batch.valid[:, None]
        drawn = setup.hide(batch.tokens, self._seed(Use.MASK), self._rows, total)
        self._hidden = Hidden(drawn.patches & usable, drawn.ids, drawn.tokens & usable)
        augment = setup.config.augment
        self._views = None
        if varies(augment):
            self._views = draw_views(augment, self._seed(Use.VIEW), self._rows, total)
        self._masked = self._weights.views == "masked" or not self._weights.contrastive
        counts = torch.stack([self._hidden.patches.sum(), self._hidden.tokens.sum()])
        self._counts = counts.to(self._world.device, torch.float32)
        self._world.sum_([self._counts])
        self._shares = torch.zeros(3, device=self._world.device)

    def backward(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Add the gradients; the weighted sum, contrastive, image and text loss, (4,).

        Args:
            parameters: all that is trained, without gradients yet.
        """
        setup, weights = self._setup, self._weights
        mask = pair_mask(setup.pairs, setup.loader, self._batch, "own")

        def shared(image: Tensor, text: Tensor, rows: slice) -> Tensor:
            value = contrastive_loss(image, text, setup.model.scale, mask, rows)
            self._shares[0] += value.detach()
            return weights.contrastive * value

        total = contrastive_step(
            self._encode,
            shared,
            len(self._batch.rows),
            setup.micro_batch,
            parameters,
            self._world,
            own=self._own if weights.image or weights.text else None,
        )
        self._world.sum_([self._shares])
        return torch.cat([total[None], self._shares])

    def _encode(self, some: slice) -> tuple[Tensor, Tensor]:
        part = self._part(some)
        with self._dropout(some):
            return self._features(part)[0]

    def _own(self, some: slice) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Features, and the part's share of the masked losses."""
        part, weights = self._part(some), self._weights
        with self._dropout(some):
            features, told = self._features(part)
            if told is None:
                told = self._forward.masked(*part, both=False)
        image = text = features[0].new_zeros(())
        if told.patches is not None:
            image = patch_loss(*told.patches, self._counts[0], weights.pixels)
        if told.tokens is not None:
            text = token_loss(*told.tokens, self._counts[1])
        self._shares[1:] += torch.stack([image, text]).detach()
        return features, weights.image * image + weights.text * text

    def _part(self, some: slice) -> _Part:
        views = None if self._views is None else self._views[some]
        tokens = self._batch.tokens.take(range(some.start, some.stop))
        pixels = self._forward.pixels(self._batch.pixels[some], views)
        return pixels, tokens, self._hidden.take(some)

    def _features(self, part: _Part) -> tuple[tuple[Tensor, Tensor], Told | None]:
        """Features of a part, and what was told, where they are of the masked pairs."""
        if not self._masked:
            return self._forward.clean(*part[:2]), None
        told = self._forward.masked(*part, both=True)
        assert told.features is not None
        return told.features, told

    @contextmanager
    def _dropout(self, some: slice) -> Iterator[None]:
        """The same dropout whenever a part goes through the towers."""
        devices = [self._world.device] if self._world.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(derived(*self._seed(Use.TOWER), self._rows.start + some.start))
            yield

    def _seed(self, use: Use) -> tuple[int, int, int]:
        return self._setup.config.seed, use, self._step
