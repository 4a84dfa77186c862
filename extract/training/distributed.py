"""The processes of one training, as `torchrun` starts them; one process needs none of it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mmc.extract.settings import pick_device
from mmc.store.errors import InputError


@dataclass(frozen=True)
class World:
    """The processes of a training, and which of them this is."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes."""
        return self.rank == 0

    def gather(self, tensor: Tensor) -> Tensor:
        """(size * B, …): the tensors (B, …) of all processes, in the order of their ranks."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def slice(self, rows: int) -> slice:
        """This process's part of ``rows``, of which each has as many."""
        share = rows // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


@contextmanager
def world(device: str) -> Iterator[World]:
    """The processes that `torchrun` started with this one, joined for the time of a training.

    Raises:
        InputError: no such device; one device was named for several processes.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if size == 1:
        yield World(pick_device(device))
        return
    if device.startswith("cuda:"):
        raise InputError(f"--device {device}: say cuda, each process takes a GPU of its own")
    found = pick_device(device)
    if found.type == "cuda":
        found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(found)
    dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    try:
        yield World(found, rank, size)
    finally:
        dist.destroy_process_group()
