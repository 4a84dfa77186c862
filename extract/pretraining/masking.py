"""Which patches and which tokens are hidden.

Everything is drawn for all pairs of a step, whichever process has them, by seed and step: so a mask
does not depend on how many processes there are, or on whether a training was stopped.

Legend: N pairs, P = rows * columns patches of a picture, T tokens of a text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmc.extract.pretraining.options import MaskConfig
from mmc.store.errors import InputError

RULE = "round(share * number), at least 1"
"""How many patches (or units) are masked; it is kept in the record of a pretraining."""
_BLOCK = 16
"""Patches that a block has at least, in BEiT's 196."""
_ASPECT = 0.3
"""Smallest ratio of a block's sides, as in BEiT."""
_TRIES = 10


class PatchMasks:
    """Draws masks for pictures of one grid of patches; each hides the same number of them.

    ``patches`` hides them one by one; ``units`` squares of 32 pixels, as SimMIM does (Xie et al.
    2021, arXiv:2111.09886); ``blocks`` rectangles, as BEiT does (Bao et al. 2021,
    arXiv:2106.08254), and where no block fits any more the patches that are still due one by one.
    """

    def __init__(self, config: MaskConfig, grid: tuple[int, int], patch: tuple[int, int]) -> None:
        """
        Args:
            grid: rows and columns of patches.
            patch: their height and width in pixels.

        Raises:
            InputError: units that are not whole patches, or do not fill a picture.
        """
        self.grid, self._shape, self._side = grid, config.shape, (1, 1)
        self.patches = patches = grid[0] * grid[1]
        self.count = 0
        """Those of a picture that are hidden."""
        if not config.patches:
            return
        if config.shape == "units":
            self._side = _unit(config.unit, grid, patch)
            units = patches // (self._side[0] * self._side[1])
            self.count = _counted(config.patches, units) * self._side[0] * self._side[1]
        else:
            self.count = _counted(config.patches, patches)

    def draw(self, seed: Sequence[int], rows: slice, total: int) -> Tensor:
        """Masks of the pictures ``rows`` of ``total``, bool (n, P), True = hidden."""
        down, across = self.grid
        if self._shape == "blocks":
            places = range(total)[rows]
            masks = [self._blocks(np.random.default_rng([*seed, place])) for place in places]
            return torch.from_numpy(np.array(masks, np.bool_).reshape(-1, down * across))
        high, wide = self._side
        units = (down // high, across // wide)
        noise = np.random.default_rng(seed).random((total, units[0] * units[1]))[rows]
        ranks = noise.argsort(1).argsort(1)
        chosen = (ranks < self.count // (high * wide)).reshape(-1, *units)
        whole = chosen.repeat(high, 1).repeat(wide, 2)
        return torch.from_numpy(whole.reshape(-1, down * across))

    def _blocks(self, random: np.random.Generator) -> NDArray[np.bool_]:
        """(rows, columns); rectangles of random place, size and form until enough are hidden."""
        rows, columns = self.grid
        mask = np.zeros(self.grid, np.bool_)
        least = max(1, round(_BLOCK * rows * columns / 196))
        while (left := self.count - int(mask.sum())) > 0:
            for _ in range(_TRIES):
                area = random.uniform(min(least, left), left)
                ratio = math.exp(random.uniform(math.log(_ASPECT), -math.log(_ASPECT)))
                high = min(rows, max(1, round(math.sqrt(area * ratio))))
                wide = min(columns, max(1, round(math.sqrt(area / ratio))))
                top = int(random.integers(rows - high + 1))
                start = int(random.integers(columns - wide + 1))
                part = mask[top : top + high, start : start + wide]
                new = int((~part).sum())
                if 0 < new <= left:
                    part[:] = True
                    break
            else:  # only gaps that no block fits in
                gaps = np.flatnonzero(~mask)
                mask.reshape(-1)[random.choice(gaps, left, replace=False)] = True
        return mask


def _counted(share: float, number: int) -> int:
    return min(max(1, round(share * number)), number - 1)


def _unit(pixels: int, grid: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """Patches of a unit, down and across."""
    side = (pixels // patch[0], pixels // patch[1])
    whole = all(pixels % one == 0 for one in patch)
    if not whole or grid[0] % side[0] or grid[1] % side[1]:
        raise InputError(
            f"mask.unit={pixels}: units are squares of whole patches ({patch[0]} x {patch[1]} "
            f"pixels) that fill a picture of {grid[0]} x {grid[1]} patches; choose another "
            "mask.unit, or mask.shape=blocks"
        )
    if (grid[0] // side[0]) * (grid[1] // side[1]) < 2:
        raise InputError(f"mask.unit={pixels} is the whole picture; choose a smaller one")
    return side


@dataclass(frozen=True)
class Vocabulary:
    """What masking has to know of a tokenizer."""

    size: int
    """Ids are below it."""
    mask: int
    """Id of the token that stands for a hidden one."""
    special: tuple[int, ...]
    """Ids that are never hidden."""

    @classmethod
    def of(cls, tokenizer: Any, where: str) -> "Vocabulary":
        """That of a tokenizer of transformers.

        Raises:
            InputError: it has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise InputError(f"{where}: its tokenizer has no mask token, as BERT's has")
        return cls(len(tokenizer), tokenizer.mask_token_id, tuple(tokenizer.all_special_ids))


@dataclass(frozen=True)
class Hidden:
    """What is hidden of n pairs."""

    patches: Tensor
    """(n, P) bool."""
    ids: Tensor
    """int64 (n, T): texts with what stands in for hidden tokens."""
    tokens: Tensor
    """(n, T) bool: those that have to be told."""

    def take(self, rows: Tensor | slice) -> "Hidden":
        """Of some of the pairs."""
        return Hidden(self.patches[rows], self.ids[rows], self.tokens[rows])


def mask_tokens(
    ids: Tensor,
    lengths: Tensor,
    vocabulary: Vocabulary,
    config: MaskConfig,
    seed: Sequence[int],
    rows: slice,
    total: int,
) -> tuple[Tensor, Tensor]:
    """Hide tokens as BERT does (Devlin et al. 2018, arXiv:1810.04805), at least one in each text.

    Gives the ids with what stands in for them, and which are hidden, bool (n, T).

    Args:
        ids: int64 (n, T), the texts of ``rows``.
        lengths: int64 (n,): real tokens of each.
        seed: the same one gives the same masks.
        rows: which of all texts of the step these are.
        total: how many there are.
    """
    random = np.random.default_rng(seed)
    shape = (total, ids.shape[1])
    noise, fate = (torch.from_numpy(random.random(shape)[rows]) for _ in range(2))
    others = torch.from_numpy(random.integers(vocabulary.size, size=shape)[rows])
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    candidates = real & ~torch.isin(ids, torch.tensor(vocabulary.special))
    noise = noise.masked_fill(~candidates, 2.0)
    chosen = noise < config.tokens
    if config.tokens:
        first = torch.zeros_like(chosen).scatter_(1, noise.argmin(1, keepdim=True), True)
        chosen |= first & candidates
    masked = chosen & (fate < config.replaced)
    swapped = chosen & ~masked & (fate < config.replaced + config.random)
    new = torch.where(masked, vocabulary.mask, torch.where(swapped, others, ids))
    return new, chosen
