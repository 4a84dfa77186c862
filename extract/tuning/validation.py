"""What is measured after every epoch: loss, retrieval, zero-shot classification, a head.

Legend: n samples, D features (normalised), C labels.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from mmc.extract.plan import Rows
from mmc.extract.tuning.contrast import PairMask, contrastive_loss
from mmc.extract.tuning.data import Batch, Loader, PairSet
from mmc.extract.tuning.joint import JointHead
from mmc.extract.tuning.measure import retrieval, zero_shot
from mmc.extract.tuning.options import TuneConfig
from mmc.extract.tuning.towers import LogitScale, Towers
from mmc.store.errors import InputError, MmcError


def encode(towers: Towers, batch: Batch, part: slice) -> tuple[Tensor, Tensor]:
    """Features of a part of a batch: image and text, (n, D) each."""
    tokens = batch.tokens.take(range(part.start, part.stop))
    return towers.image(batch.pixels[part]), towers.text(tokens)


class Validation:
    """Measures the towers, as they are, on rows of a set; every process takes its share."""

    def __init__(
        self,
        pairs: PairSet,
        towers: Towers,
        loader: Loader,
        scale: LogitScale,
        config: TuneConfig,
        head: JointHead | None,
        *,
        batch_size: int,
        micro_batch: int,
    ) -> None:
        self._pairs, self._towers, self._loader = pairs, towers, loader
        self._scale, self._config, self._head = scale, config, head
        self._batch_size, self._micro_batch = batch_size, micro_batch

    @torch.no_grad()
    def embed(self, rows: Rows) -> tuple[Tensor, Tensor, Rows]:
        """Features (n, D), twice, of those of ``rows`` whose picture can be used, and which."""
        padding = -len(rows) % self._loader.world.size
        padded = np.concatenate([rows, rows[:1].repeat(padding)])
        images, texts, valid = [], [], []
        for batch in self._loader.share(padded, self._micro_batch):
            image, text = encode(self._towers, batch, slice(0, len(batch.rows)))
            images.append(image)
            texts.append(text)
            valid.append(batch.valid.to(image.device))
        image, text, good = (
            self._loader.world.gather(torch.cat(parts))[: len(rows)]
            for parts in (images, texts, valid)
        )
        return image[good], text[good], rows[good.cpu().numpy()]

    @torch.no_grad()
    def measure(self, rows: Rows) -> dict[str, float]:
        """By name: loss, recalls (`retrieval` is their mean), `zero_shot` and `head`, if any.

        Raises:
            InputError: val has no labels that a head could be measured by.
            MmcError: not enough pictures can be used.
        """
        image, text, kept = self.embed(rows)
        if len(kept) < 2:
            raise MmcError("fewer than 2 pictures of val can be used; nothing tells what is best")
        pairs = self._pairs
        found = {"loss": self._loss(image, text, kept)}
        found |= retrieval(image, text, pairs.images[kept], pairs.texts[kept])
        if pairs.label_set:
            found |= zero_shot(image, self._label_texts(), pairs.labels_of(kept))
        if self._head is not None:
            found["head"] = self._head.measure(image, text, pairs.labels_of(kept))
            if math.isnan(found["head"]):
                raise InputError("the labels of val do not tell how good a head is; see --split-by")
        return found

    def _loss(self, image: Tensor, text: Tensor, rows: Rows) -> float:
        """Mean over batches as large as those of training."""
        pairs, size = self._pairs, self._batch_size
        total = 0.0
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            here = slice(start, start + len(some))
            mask = PairMask.of(
                torch.ones(len(some), dtype=torch.bool, device=image.device),
                same=pairs.contents_of(some).to(image.device),
                groups=pairs.groups_of(some).to(image.device),
                rule=self._config.pairs,
            )
            loss = contrastive_loss(image[here], text[here], self._scale(), mask)
            total += float(loss) * len(some)
        return total / len(rows)

    def _label_texts(self) -> Tensor:
        """(C, D) normalised texts of the labels, averaged over templates."""
        encoder, names = self._towers.encoder, self._pairs.label_set
        templates = self._config.label_template or (encoder.prompt_template,)
        tokens = encoder.tokenize([t.replace("{label}", name) for t in templates for name in names])
        places = torch.arange(len(tokens)).split(self._micro_batch)
        texts = torch.cat([self._towers.text(tokens.take(some)) for some in places])
        mean = texts.view(len(templates), len(names), -1).mean(0)
        return nn.functional.normalize(mean, dim=-1)
