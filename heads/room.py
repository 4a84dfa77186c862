"""Whether a head fits into memory, said before the system ends the process for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mmc.heads import memory
from mmc.store.errors import InputError, MmcError

COPIES = 4
"""Of the parameters while training: themselves, gradients and Adam's two moments."""
_NO_ROOM = ("can't allocate", "not enough memory", "out of memory", "overflow")
"""What is in the messages of torch's allocators, and of sizes that no number holds."""


def check_room(make: Callable[[], nn.Module], device: torch.device, what: str) -> None:
    """Make a module of shapes alone, and see whether the real one could be trained here.

    Raises:
        InputError: its parameters need more memory than is free.
    """
    with no_room(what, InputError), torch.device("meta"):
        size = sum(value.nbytes for value in make().parameters())
    share = memory.SHARE.get(device.type, memory.SHARE_ELSEWHERE)
    free = memory.allowed(device) / share
    if COPIES * size > free:
        raise InputError(
            f"{what} needs {memory.shown(COPIES * size)} to be trained (its parameters, their "
            f"gradients and averages), and {memory.shown(free)} are free; make it smaller"
        )


@contextmanager
def no_room(what: str, error: type[MmcError] = MmcError) -> Iterator[None]:
    """Turn what is raised where memory ends into one line.

    Args:
        what: is too large.
        error: to raise.

    Raises:
        MmcError: ``what`` does not fit.
    """
    try:
        yield
    except (RuntimeError, OverflowError, MemoryError, TypeError) as failure:
        text = " ".join(str(failure).split())
        known = isinstance(failure, OverflowError | MemoryError)
        if not known and not any(words in text.lower() for words in _NO_ROOM):
            raise
        raise error(f"{what} does not fit into memory ({text[:200]})") from failure
