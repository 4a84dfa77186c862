"""One contrastive step whose batch may be larger than what goes through the towers at once.

Legend: b pairs of this process, N of all processes, D features.

The features of the whole batch are computed without keeping what the towers computed; the loss of
all of them gives the gradient of each feature; then each part goes through the towers again and
takes its features' gradients back through them (Gao et al. 2021, arXiv:2101.06983). So the gradient
is that of one large batch: of the towers, and of the logit scale, which takes part once only and
not once for each part.

Across processes the same: every process has all features, takes the share of the loss of its own
rows, and the feature gradients are summed. Then so are those of the parameters.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mmc.extract.tuning.distributed import World

Encode = Callable[[slice], tuple[Tensor, Tensor]]
"""Pairs of this process's batch to their normalised features, two of float (n, D)."""
Loss = Callable[[Tensor, Tensor, slice], Tensor]
"""All features (N, D), twice, and this process's rows: its share of the loss."""


def contrastive_step(
    encode: Encode,
    loss: Loss,
    pairs: int,
    micro_batch: int,
    parameters: Sequence[nn.Parameter],
    world: World,
    factor: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """Add the gradient of one batch to ``parameters``; the loss of all processes, a scalar.

    Args:
        encode: the towers; twice the same part must give the same features.
        loss: of all features.
        pairs: b, the same in every process.
        micro_batch: so many pairs at once.
        parameters: all that is trained, in one order in every process; without gradients yet.
        world: the processes.
        factor: what the loss is multiplied by before the backward pass (for float16).
    """
    parts = [slice(i, min(i + micro_batch, pairs)) for i in range(0, pairs, micro_batch)]
    whole = len(parts) == 1
    # Not inference_mode: with autocast, CPUs then expand attention weights in every call.
    with torch.set_grad_enabled(whole):
        encoded = [encode(part) for part in parts]
    local = [torch.cat(side) for side in zip(*encoded, strict=True)]
    every = [world.gather(side.detach()).requires_grad_() for side in local]
    rows = world.slice(len(every[0]))
    value = loss(every[0], every[1], rows)
    factor(value).backward()
    gradients = [side.grad if side.grad is not None else torch.zeros_like(side) for side in every]
    world.sum_(gradients)
    wanted = [gradient[rows] for gradient in gradients]
    for part in parts:
        features = local if whole else encode(part)
        torch.autograd.backward(list(features), [gradient[part] for gradient in wanted])
    for parameter in parameters:
        if parameter.grad is None:  # every process must have the same ones to sum
            parameter.grad = torch.zeros_like(parameter)
    world.sum_([parameter.grad for parameter in parameters if parameter.grad is not None])
    total = value.detach().clone()
    world.sum_([total])
    return total
