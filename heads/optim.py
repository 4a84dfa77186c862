"""AdamW, its learning rate over time, and the running average of the parameters."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mmc.heads.options import OptimConfig

Named = dict[str, nn.Parameter]


def trained_parameters(head: nn.Module, trains: Mapping[str, float]) -> dict[float, Named]:
    """Learning rate share -> the parameters that have it; the longest prefix counts.

    Everything else is frozen. The modules named are put in training mode, the rest in evaluation
    mode (dropout of a frozen part would only add noise).
    """
    head.eval()
    for prefix in trains:
        head.get_submodule(prefix).train()
    groups: dict[float, Named] = {}
    for name, parameter in head.named_parameters():
        inside = [p for p in trains if not p or name == p or name.startswith(f"{p}.")]
        parameter.requires_grad_(bool(inside))
        if inside:
            groups.setdefault(trains[max(inside, key=len)], {})[name] = parameter
    return groups


def make_optimizer(groups: Mapping[float, Named], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, biases and other vectors do not."""
    param_groups = []
    for share, named in groups.items():
        for decays in (True, False):
            chosen = [p for p in named.values() if (p.ndim > 1) == decays]
            if chosen:
                decay = config.weight_decay if decays else 0.0
                param_groups.append({"params": chosen, "weight_decay": decay, "share": share})
    return torch.optim.AdamW(param_groups, lr=0.0, betas=(0.9, config.beta2), fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]


def lr_factor(step: int, total: int, config: OptimConfig) -> float:
    """Share of the peak learning rate at ``step`` of ``total``: warm-up, then the schedule.

    What a plateau takes off is not in it (see `lowered`).
    """
    warmup = config.warmup * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule != "cosine":
        return 1.0
    progress = (step - warmup) / max(total - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def lowered(scale: float, since: int, lr: float, config: OptimConfig) -> float:
    """What the plateau schedule multiplies the learning rate by after a validation.

    As torch's ReduceLROnPlateau: lowered after more than ``plateau_patience`` validations in a row
    without a better one, and counted anew.

    Args:
        scale: that of before.
        since: validations since the best one.
        lr: peak learning rate.
    """
    if config.schedule != "plateau" or not since or since % (config.plateau_patience + 1):
        return scale
    return min(scale, max(scale * config.plateau_factor, config.min_lr / lr))


def clip(parameters: list[nn.Parameter], limit: float) -> None:
    """Scale gradients whose norm is above ``limit`` down to it."""
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    # Most are not above it, and multiplying by one costs a thirtieth of a step on a CPU; other
    # devices would have to be waited for to know.
    if norm.device.type != "cpu" or not norm <= limit:
        clip_grads_with_norm_(parameters, limit, norm)


class Average:
    """Exponential running average of parameters, warmed up so that it starts near them."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.values: list[Tensor] = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after ``step``."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters and their average; call again to take it back."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.clone()
            parameter.copy_(value)
            value.copy_(kept)
