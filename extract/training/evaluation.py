"""Features of a set's rows, by all processes together, and how well they find each other.

Legend: n samples, D features (normalised).
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmc.extract.plan import Rows
from mmc.extract.training.contrast import PairMask, contrastive_loss
from mmc.extract.training.data import Batch, Loader, PairSet
from mmc.extract.training.measure import alikeness, retrieval
from mmc.store.errors import MmcError

Encode = Callable[[Batch, slice], tuple[Tensor, Tensor]]
"""A part of a batch to its features: image and text, (n, D) each."""
Watch = Callable[[Batch, NDArray[np.int64]], None]
"""Takes a batch and the places of its rows among those that are measured; places behind these are
of rows that are there twice, so that every process has as many."""


class Evaluation:
    """Measures two towers, as they are; every process takes its share."""

    def __init__(
        self,
        pairs: PairSet,
        loader: Loader,
        encode: Encode,
        scale: Callable[[], Tensor],
        *,
        rule: str,
        batch_size: int,
        micro_batch: int,
    ) -> None:
        """
        Args:
            scale: gives the inverse temperature.
            rule: what rows of one class are to each other; see `PairMask.of`.
            batch_size: pairs of a step of training: the loss is of so many.
            micro_batch: pairs that go through the towers at once.
        """
        self._pairs, self._loader, self._encode, self._scale = pairs, loader, encode, scale
        self._rule, self._batch_size, self.micro_batch = rule, batch_size, micro_batch

    @torch.no_grad()
    def embed(self, rows: Rows, watch: Watch | None = None) -> tuple[Tensor, Tensor, Rows]:
        """Features (n, D), twice, of those of ``rows`` whose picture can be used, and which.

        Args:
            watch: called with each batch of this process.
        """
        padding = -len(rows) % self._loader.world.size
        padded = np.concatenate([rows, rows[:1].repeat(padding)])
        first = self._loader.world.slice(len(padded)).start
        images, texts, valid = [], [], []
        for batch in self._loader.share(padded, self.micro_batch):
            places = np.arange(first, first + len(batch.rows))
            first += len(places)
            if watch is not None:
                watch(batch, places)
            image, text = self._encode(batch, slice(0, len(batch.rows)))
            images.append(image)
            texts.append(text)
            valid.append(batch.valid.to(image.device))
        image, text, good = (
            self._loader.world.gather(torch.cat(parts))[: len(rows)]
            for parts in (images, texts, valid)
        )
        return image[good], text[good], rows[good.cpu().numpy()]

    def measure(self, image: Tensor, text: Tensor, rows: Rows) -> dict[str, float]:
        """By name, of features that `embed` gave: `loss`, recalls and their mean (`retrieval`), and
        the mean cosine between pictures and between texts (`image_cosine`, `text_cosine`).

        Raises:
            MmcError: not enough pictures could be used.
        """
        if len(rows) < 2:
            why = next(iter(self._loader.failed.values()), "")
            raise MmcError(
                "fewer than 2 pictures of val can be used; nothing tells what is best"
                + (f" (the first that cannot: {why})" if why else "")
            )
        found = {"loss": self._loss(image, text, rows)}
        found |= retrieval(image, text, self._pairs.images[rows], self._pairs.texts[rows])
        return found | {"image_cosine": alikeness(image), "text_cosine": alikeness(text)}

    @torch.no_grad()
    def _loss(self, image: Tensor, text: Tensor, rows: Rows) -> float:
        """Mean over batches as large as those of training."""
        size, total = self._batch_size, 0.0
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            here = slice(start, start + len(some))
            mask = PairMask.of(
                torch.ones(len(some), dtype=torch.bool, device=image.device),
                same=self._pairs.contents_of(some).to(image.device),
                groups=self._pairs.groups_of(some).to(image.device),
                rule=self._rule,
            )
            loss = contrastive_loss(image[here], text[here], self._scale(), mask)
            total += float(loss) * len(some)
        return total / len(rows)


def pair_mask(pairs: PairSet, loader: Loader, batch: Batch, rule: str) -> PairMask:
    """Which of the pairs in the batches of all processes belong together."""
    world = loader.world
    valid, contents, groups = (
        world.gather(values.to(world.device))
        for values in (batch.valid, pairs.contents_of(batch.rows), pairs.groups_of(batch.rows))
    )
    return PairMask.of(valid, same=contents, groups=groups, rule=rule)
