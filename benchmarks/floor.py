"""The floor of a training step: its matrix products alone, or its bytes, whichever is slower.

Every product that a step really asks for (forward and backward, with its shapes, strides and
precision) is written down once, and then done again by itself, into memory that is there already.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmc.heads.batches import Batches, ResidentData
from mmc.heads.models.base import Batch

aten = torch.ops.aten
_PRODUCTS = {
    aten.mm.default: (torch.mm, 0),
    aten.bmm.default: (torch.bmm, 0),
    # The bias is no product: it is left out.
    aten.addmm.default: (torch.mm, 1),
    aten.baddbmm.default: (torch.bmm, 1),
}
_ATTENTION = "scaled_dot_product"


class Products(TorchDispatchMode):
    """Writes down the products of the training steps of the data that it watches.

    They are grouped by stage: `stage` names the one that comes next.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_stage: dict[int, list[Callable[[], Any]]] = {}
        self.floats: dict[int, int] = {}
        """Multiplications and additions of each stage's products."""
        self._stage: int | None = None

    def watch(self, data: ResidentData) -> "_Watched":
        """``data``, whose batches tell when a training step begins and ends."""
        return _Watched(self, data)

    def step(self, stage: int | None) -> None:
        """A step of this stage begins; None: it has ended."""
        self._stage = stage
        if stage is not None:
            self.by_stage[stage] = []
            self.floats[stage] = 0

    def seconds(self, stage: int, times: int, device: torch.device) -> float:
        """Seconds of the products of one of the stage's steps."""

        def step() -> None:
            for work in self.by_stage[stage]:
                work()

        return seconds_of(step, times, device)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._stage is None:
            return result
        if func in _PRODUCTS:
            product, skipped = _PRODUCTS[func]
            first, second = (value.detach() for value in args[skipped : skipped + 2])
            self._note(product, first, second)
        elif _ATTENTION in str(func):
            # A fused kernel is repeated as it was: nothing does its products faster.
            self.by_stage[self._stage].append(lambda: func(*args, **(kwargs or {})))
        return result

    def _note(self, product: Callable[..., Tensor], first: Tensor, second: Tensor) -> None:
        assert self._stage is not None
        out = product(first, second)
        self.by_stage[self._stage].append(lambda: product(first, second, out=out))
        self.floats[self._stage] += 2 * out.numel() * first.shape[-1]


class _Watched:
    """`ResidentData` that tells `Products` of its steps."""

    def __init__(self, products: Products, data: ResidentData) -> None:
        self._products, self._data = products, data
        self.targets = data.targets

    def __len__(self) -> int:
        return len(self._data)

    def batches(
        self, batch_size: int, *, seed: int, reads: Sequence[str] | None = None
    ) -> "_WatchedBatches":
        return _WatchedBatches(
            self._products, self._data.batches(batch_size, seed=seed, reads=reads)
        )

    def blocks(self) -> Iterator[Batch]:
        return self._data.blocks()


class _WatchedBatches:
    def __init__(self, products: Products, batches: Batches) -> None:
        self._products, self._batches = products, batches

    def epoch(self, stage: int, epoch: int) -> Iterator[tuple[Batch, Tensor]]:
        for batch in self._batches.epoch(stage, epoch):
            self._products.step(stage)
            yield batch
            self._products.step(None)


def seconds_of(work: Callable[[], Any], times: int, device: torch.device) -> float:
    """Seconds of one call, of so many in a row, after a first one."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    work()
    wait()
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - started) / times


def copy_seconds(batch: Batch, times: int, device: torch.device) -> float:
    """Seconds to copy a batch's inputs once: no step reads and keeps its rows in less."""
    copies = {key: values.clone() for key, values in batch.items()}

    def copy() -> None:
        for key, values in batch.items():
            copies[key].copy_(values)

    return seconds_of(copy, times, device)
