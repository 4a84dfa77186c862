"""From the losses of batches to the gradient of a step.

A batch is usually a step. With ``optim.accumulation`` several batches are one, and with several
processes each has a part of every batch. A loss divides by what it counts (known labels, rows ...),
which differs from part to part, so parts are weighed by it: the gradient is that of the whole.
"""

import torch
from torch import Tensor, nn

from mmc.heads.distributed import Processes
from mmc.heads.losses.base import Loss


class Gradients:
    """Of steps of one batch, in one process."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self._total = torch.zeros((), device=parameters[0].device)
        self._rows: Tensor | int = 0

    def add(self, loss: Tensor, targets: Tensor) -> None:
        """Take in the loss of a part of a step; its gradients are added to the parameters'."""
        loss.backward()
        self._total += loss.detach() * len(targets)
        self._rows += len(targets)

    def join(self) -> None:
        """Make the gradients of the parameters those of the whole step."""

    def clear(self) -> None:
        """Forget them."""
        for parameter in self.parameters:
            parameter.grad = None

    def mean_loss(self) -> float:
        """Mean over the rows of the steps since it was last asked for."""
        mean = float(self._total / self._rows)
        self._total.zero_()
        self._rows = 0
        return mean


class JoinedGradients(Gradients):
    """Of steps in several parts, here and in other processes.

    All gradients lie in one tensor with what the parts count, so that a step is one message.
    """

    def __init__(self, parameters: list[nn.Parameter], loss: Loss, processes: Processes) -> None:
        super().__init__(parameters)
        self._loss, self._processes = loss, processes
        sizes = [parameter.numel() for parameter in parameters]
        self._all = torch.zeros(sum(sizes) + 3, device=parameters[0].device)
        *parts, self._counts = self._all.split([*sizes, 3])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def add(self, loss: Tensor, targets: Tensor) -> None:
        """See :class:`Gradients`."""
        divisor = self._loss.divisor(targets)
        value = loss if divisor is None else loss * divisor
        value.backward()
        self._counts[0] += value.detach()
        self._counts[1] += 0 if divisor is None else divisor
        self._counts[2] += len(targets)

    def join(self) -> None:
        """See :class:`Gradients`."""
        self._processes.add(self._all)
        total, divisor, rows = self._counts.clone()
        # 0: the loss is a sum, or nothing is known.
        divisor = torch.where(divisor > 0, divisor, 1.0)
        self._all /= divisor
        self._total += total / divisor * rows
        self._rows = self._rows + rows

    def clear(self) -> None:
        """See :class:`Gradients`."""
        self._all.zero_()
