"""LoRA adapters on the weights of a model: W + (alpha / r) B A, while it is trained.

Low-Rank Adaptation, Hu et al. 2021 (arXiv:2106.09685). A layer that is wrapped, as peft does it,
has no effect at all where the layer is not called: ``nn.MultiheadAttention`` hands the weight of
its output projection on, and calls nothing. So the weight itself is parametrized
(``torch.nn.utils.parametrize``): whoever reads it gets the changed one.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmc.extract.backbones.lora import PREFIX
from mmc.extract.training.seeds import Use
from mmc.extract.tuning.options import LoraConfig
from mmc.extract.tuning.targets import Target


class LowRank(nn.Module):
    """Adds scale * B A to a weight of (out, in), or to some rows of it.

    A (r, in) is uniform as a linear layer's own weights are, B (out, r) zero, so that nothing
    changes at first. A convolution's weight (out, in, k, k) is taken as (out, in * k * k).
    """

    def __init__(
        self, weight: Tensor, rows: tuple[int, int] | None, rank: int, scale: float, draw: Tensor
    ) -> None:
        super().__init__()
        self.rows, self.scale = rows, scale
        self.kept: Tensor | None = None
        """(in,) what dropout left of the inputs, scaled; None: all of them."""
        out = len(weight) if rows is None else rows[1] - rows[0]
        inputs = weight[0].numel()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.A = nn.Parameter(draw.to(weight.device, dtype) / math.sqrt(inputs))
        self.B = nn.Parameter(torch.zeros(out, rank, dtype=dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight, in the precision of ``weight``."""
        with torch.autocast(weight.device.type, enabled=False):
            down = self.A if self.kept is None else self.A * self.kept
            change = self.scale * (self.B @ down)
            if self.rows is not None:
                first, last = self.rows
                change = F.pad(change, (0, 0, first, len(weight) - last))
            return weight + change.view_as(weight).to(weight.dtype)


class Adapters:
    """All adapters of a model; the model's own parameters are frozen and stay as they are."""

    def __init__(
        self, model: nn.Module, targets: Sequence[Target], config: LoraConfig, seed: int
    ) -> None:
        self._targets = list(targets)
        self._config, self._seed = config, seed
        self.alpha = 2 * config.rank if config.alpha is None else config.alpha
        self._parts: list[LowRank] = []
        model.requires_grad_(False)
        random = torch.Generator().manual_seed(seed)
        for target in self._targets:
            weight = _original(target)
            draw = torch.rand(config.rank, weight[0].numel(), generator=random) * 2 - 1
            scale = self.alpha / config.rank
            part = LowRank(weight, target.rows, config.rank, scale, draw)
            parametrize.register_parametrization(target.module, target.tensor, part)
            part.train()
            self._parts.append(part)

    def __iter__(self) -> Iterator[tuple[str, LowRank]]:
        """Module names and their adapters."""
        names = (target.name for target in self._targets)
        return iter(list(zip(names, self._parts, strict=True)))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every A and B."""
        return [parameter for part in self._parts for parameter in (part.A, part.B)]

    def drop(self, step: int | None) -> None:
        """Choose what dropout leaves out in a step; None: nothing, as when it is measured.

        It follows from the seed and the step, so that every part of a batch, every process and a
        resumed training leave out the same.
        """
        rate = self._config.dropout
        for place, part in enumerate(self._parts):
            part.kept = None
            if step is not None and rate:
                random = np.random.default_rng([self._seed, Use.ADAPTER, step, place])
                kept = torch.from_numpy(random.random(part.A.shape[1]) >= rate)
                part.kept = kept.to(part.A.device, part.A.dtype) / (1 - rate)

    def state(self) -> dict[str, Tensor]:
        """The tensors of an adapter's file; see :mod:`mmc.extract.backbones.lora`."""
        found = {}
        for target, part in zip(self._targets, self._parts, strict=True):
            shape = _original(target).shape[1:]
            down, up = part.A.detach().view(len(part.A), *shape), part.B.detach()
            up = up.view(*up.shape, *(1 for _ in shape[1:]))
            found[f"{PREFIX}{target.name}.lora_A.weight"] = down.float().cpu().clone()
            found[f"{PREFIX}{target.name}.lora_B.weight"] = up.float().cpu().clone()
        return found

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take the values that `state` gave."""
        for name, part in self:
            part.A.copy_(state[f"{PREFIX}{name}.lora_A.weight"].view_as(part.A))
            part.B.copy_(state[f"{PREFIX}{name}.lora_B.weight"].view_as(part.B))

    def remove(self) -> None:
        """Leave the model as it was, without adapters."""
        for target in {target.key: target for target in self._targets}.values():
            parametrize.remove_parametrizations(
                target.module, target.tensor, leave_parametrized=False
            )


def _original(target: Target) -> Tensor:
    """The weight without its adapters."""
    if parametrize.is_parametrized(target.module, target.tensor):
        original: Tensor = target.module.parametrizations[target.tensor].original  # type: ignore
        return original
    return target.weight
