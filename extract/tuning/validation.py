"""What is measured after every epoch: loss, retrieval, zero-shot classification, a head.

Legend: n samples, D features (normalised), C labels.
"""

import math

import torch
from torch import Tensor, nn

from mmc.extract.plan import Rows
from mmc.extract.training.data import Batch, Loader, PairSet
from mmc.extract.training.evaluation import Evaluation
from mmc.extract.training.measure import zero_shot
from mmc.extract.tuning.joint import JointHead
from mmc.extract.tuning.options import TuneConfig
from mmc.extract.tuning.towers import LogitScale, Towers
from mmc.store.errors import InputError


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
        self._pairs, self._towers, self._config, self._head = pairs, towers, config, head
        self._evaluation = Evaluation(
            pairs,
            loader,
            lambda batch, part: encode(towers, batch, part),
            scale,
            rule=config.pairs,
            batch_size=batch_size,
            micro_batch=micro_batch,
        )
        self.embed = self._evaluation.embed

    @torch.no_grad()
    def measure(self, rows: Rows) -> dict[str, float]:
        """By name: loss, recalls (`retrieval` is their mean), `zero_shot` and `head`, if any.

        Raises:
            InputError: val has no labels that a head could be measured by.
            MmcError: not enough pictures can be used.
        """
        image, text, kept = self.embed(rows)
        found = self._evaluation.measure(image, text, kept)
        pairs = self._pairs
        if pairs.label_set:
            found |= zero_shot(image, self._label_texts(), pairs.labels_of(kept))
        if self._head is not None:
            found["head"] = self._head.measure(image, text, pairs.labels_of(kept))
            if math.isnan(found["head"]):
                raise InputError("the labels of val do not tell how good a head is; see --split-by")
        return found

    def _label_texts(self) -> Tensor:
        """(C, D) normalised texts of the labels, averaged over templates."""
        encoder, names = self._towers.encoder, self._pairs.label_set
        templates = self._config.label_template or (encoder.prompt_template,)
        tokens = encoder.tokenize([t.replace("{label}", name) for t in templates for name in names])
        places = torch.arange(len(tokens)).split(self._evaluation.micro_batch)
        texts = torch.cat([self._towers.text(tokens.take(some)) for some in places])
        mean = texts.view(len(templates), len(names), -1).mean(0)
        return nn.functional.normalize(mean, dim=-1)
