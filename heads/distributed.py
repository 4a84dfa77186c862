"""The processes that train one head together: those of ``torchrun``, one per GPU, or some on CPUs.

``torchrun --nproc-per-node 4 --no-python mmc train-head …``. Each holds a share of the training
rows and takes its part of every batch; gradients are joined (`mmc.heads.gradients`). The first
process, the main one, validates, reports and writes.

Started in another way, there is one process, and nothing here costs anything.
"""

import atexit
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmc.heads.launch import launched, launched_here
from mmc.store.errors import InputError

if TYPE_CHECKING:
    from accelerate import PartialState


TIMEOUT = timedelta(hours=3)
"""How long processes wait for one another, such as while the main one validates."""


@dataclass(frozen=True)
class Processes:
    """Those that train together, seen from one of them."""

    index: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this one validates, reports and writes."""
        return self.index == 0

    def add(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by its sum over the processes."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Replace the tensors by those of the main process."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, src=0)

    def numbers(self, values: Iterable[float], device: torch.device) -> list[float]:
        """The numbers that the main process has."""
        values = list(values)
        if self.count > 1:
            tensor = torch.tensor(values, dtype=torch.float64, device=device)
            self.share([tensor])
            values = tensor.tolist()
        return values

    def wait(self) -> None:
        """Return when every process is here."""
        if self.count > 1:
            torch.distributed.barrier()


def join(device: torch.device) -> Processes:
    """Meet the other processes, all of which train on the same kind of device."""
    if launched() == 1:
        return Processes()
    state = _state(device.type == "cpu")
    return Processes(state.process_index, state.num_processes)


def own_device(name: str) -> torch.device:
    """The device of this one of several processes; ``name`` is auto, cpu or cuda.

    Raises:
        InputError: another name, or fewer GPUs than processes.
    """
    count, gpus = launched(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not gpus):
        raise InputError(
            f"--device {name}: {count} processes take a device each; choose auto or cpu"
            + (" or cuda" if gpus else "")
        )
    if name == "cpu" or not gpus:
        return torch.device("cpu")
    if launched_here() > gpus:
        raise InputError(
            f"{launched_here()} processes and {gpus} GPUs on this machine: start one for each GPU"
        )
    device: torch.device = _state(cpu=False).device
    return device


def _state(cpu: bool) -> "PartialState":
    """Accelerate's record of the processes; made once, with the process group."""
    from accelerate import PartialState

    first = not torch.distributed.is_initialized()
    state: Any = PartialState(cpu=cpu, timeout=TIMEOUT)
    if (state.device.type == "cpu") != cpu:
        raise InputError("these processes have trained on another kind of device; start new ones")
    if first:
        atexit.register(state.destroy_process_group)
    return state
