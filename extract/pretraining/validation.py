"""What is measured after every epoch: the three losses with fixed masks, and retrieval.

Features are those of clean pictures and texts, as `mmc extract` will give them.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmc.extract.pretraining.forward import Forward
from mmc.extract.pretraining.losses import patch_loss, token_loss
from mmc.extract.pretraining.setup import Setup
from mmc.extract.training.data import Batch
from mmc.extract.training.evaluation import Evaluation
from mmc.extract.training.seeds import Use


class Validation:
    """Measures a model, as it is, on val; every process takes its share."""

    def __init__(self, setup: Setup, forward: Forward) -> None:
        self._setup, self._forward = setup, forward
        self._evaluation = Evaluation(
            setup.pairs,
            setup.loader,
            self._encode,
            lambda: setup.model.scale,
            rule="own",
            batch_size=setup.batch_size,
            micro_batch=setup.micro_batch,
        )
        tokens = setup.inputs.tokenize(setup.texts(setup.val))
        count = len(setup.val)
        seed = (setup.config.seed, Use.MEASURE)
        self._hidden = setup.hide(tokens, seed, slice(0, count), count)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """By name: `loss` (the weighted sum), its three parts, recalls, share of tokens told right.

        Raises:
            MmcError: not enough pictures can be used.
        """
        setup = self._setup
        setup.model.eval()
        sums = torch.zeros(5, device=setup.world.device, dtype=torch.float64)
        weights = setup.config.loss

        def watch(batch: Batch, places: NDArray[np.int64]) -> None:
            if weights.image or weights.text:
                sums.add_(self._masked(batch, places))

        image, text, kept = self._evaluation.embed(setup.val, watch)
        setup.world.sum_([sums])
        patches, pixels, tokens, entropy, right = sums.tolist()
        found = self._evaluation.measure(image, text, kept)
        losses = {"contrastive": found.pop("loss")}
        if weights.image:
            losses["image"] = pixels / max(patches, 1)
        if weights.text:
            losses["text"] = entropy / max(tokens, 1)
        total = sum(getattr(weights, name) * value for name, value in losses.items())
        named = {f"{name}_loss": value for name, value in losses.items()}
        if weights.text:
            named["text_accuracy"] = right / max(tokens, 1)
        return {"loss": total, **named, **found}

    def _encode(self, batch: Batch, part: slice) -> tuple[Tensor, Tensor]:
        tokens = batch.tokens.take(range(part.start, part.stop))
        return self._forward.clean(self._forward.pixels(batch.pixels[part]), tokens)

    def _masked(self, batch: Batch, places: NDArray[np.int64]) -> Tensor:
        """Hidden patches, the sum of their losses, hidden tokens, the sum of theirs, those right.

        Pictures that cannot be used, and rows that are there twice, are left out.
        """
        setup = self._setup
        found = torch.zeros(5, device=setup.world.device, dtype=torch.float64)
        good = batch.valid & torch.from_numpy(places < len(setup.val))
        rows = good.nonzero().flatten()
        if not len(rows):
            return found
        hidden = self._hidden.take(torch.from_numpy(places)[rows])
        inputs = self._forward.pixels(batch.pixels[rows])
        told = self._forward.masked(inputs, batch.tokens.take(rows), hidden, both=False)
        one = torch.ones((), device=setup.world.device)
        if told.patches is not None:
            found[0] = len(told.patches[0])
            found[1] = patch_loss(*told.patches, one, setup.config.loss.pixels)
        if told.tokens is not None:
            scores, true = told.tokens
            found[2], found[3] = len(true), token_loss(scores, true, one)
            found[4] = (scores.argmax(1) == true).sum()
        return found
