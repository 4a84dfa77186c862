"""AdamW and its learning rate over time."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mmc.extract.training.options import OptimConfig


def make_optimizer(
    groups: Iterable[tuple[float, list[nn.Parameter]]],
    config: OptimConfig,
    undecayed: Iterable[nn.Parameter] = (),
) -> torch.optim.AdamW:
    """AdamW; matrices decay; biases, norms and scalars do not.

    Args:
        groups: share of the learning rate (`share` of its groups), and the parameters that have it.
        undecayed: matrices without decay.
    """
    made = []
    left_out = {id(parameter) for parameter in undecayed}
    for share, parameters in groups:
        for decays, decay in ((True, config.weight_decay), (False, 0.0)):
            chosen = [p for p in parameters if (p.ndim > 1 and id(p) not in left_out) == decays]
            if chosen:
                made.append({"params": chosen, "weight_decay": decay, "share": share})
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(made, lr=0.0, betas=betas, eps=config.eps, fused=True)


def lr_factor(step: int, total: int, config: OptimConfig) -> float:
    """Share of the peak learning rate at ``step`` of ``total``: warm-up, then the schedule."""
    warmup = config.warmup * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(total - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments and step counts by ``<index>.<name>``."""
    return {
        f"{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, packed: dict[str, Tensor]) -> None:
    """Give the optimiser the state that `pack_optimizer` took from one of the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in packed.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
