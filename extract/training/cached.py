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

from mmc.extract.training.distributed import World

Encode = Callable[[slice], tuple[Tensor, Tensor]]
"""Pairs of this process's batch to their normalised features, two of float (n, D)."""
Own = Callable[[slice], tuple[tuple[Tensor, Tensor], Tensor]]
"""Pairs of this process's batch to their features and to a loss of theirs alone, a scalar."""
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
    own: Own | None = None,
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
        own: where pairs have losses of their own: the same features as ``encode``, and the part's
            share of these losses; shares of all parts and processes are summed.
    """
    parts = [slice(i, min(i + micro_batch, pairs)) for i in range(0, pairs, micro_batch)]

    def learn(part: slice) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        return (encode(part), None) if own is None else own(part)

    if len(parts) == 1:
        learnt = [learn(parts[0])]
        encoded = [learnt[0][0]]
    else:
        learnt = []
        with torch.no_grad():
            encoded = [encode(part) for part in parts]
    every = [world.gather(torch.cat(side).detach()) for side in zip(*encoded, strict=True)]
    for side in every:
        side.requires_grad_()
    rows = world.slice(len(every[0]))
    value = loss(every[0], every[1], rows)
    factor(value).backward()
    gradients = [side.grad if side.grad is not None else torch.zeros_like(side) for side in every]
    world.sum_(gradients)
    total = value.detach().clone()
    for part in parts:
        features, share = learnt.pop() if learnt else learn(part)
        ends = [
            (side, gradient[rows][part])
            for side, gradient in zip(features, gradients, strict=True)
            if side.requires_grad  # a tower that nothing trains has no gradient to take back
        ]
        outputs, grads = [side for side, _ in ends], [grad for _, grad in ends]
        if share is None:
            torch.autograd.backward(outputs, grads)
            continue
        torch.autograd.backward([*outputs, factor(share)], [*grads, None])
        total += share.detach()
    for parameter in parameters:
        if parameter.grad is None:  # every process must have the same ones to sum
            parameter.grad = torch.zeros_like(parameter)
    world.sum_([parameter.grad for parameter in parameters if parameter.grad is not None])
    world.sum_([total])
    return total
