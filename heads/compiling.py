"""``torch.compile`` for what a head computes while training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmc.heads.models.base import Batch
from mmc.store.errors import MmcError


def compiled(score: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
    """The same function; its first calls with a batch of another size take long.

    What was compiled before is forgotten: after some heads of one class torch would go on without
    compiling, and this one is what is needed now.
    """
    torch.compiler.reset()
    faster: Callable[[Batch], Tensor] = torch.compile(score)
    return faster


@contextmanager
def compiler_errors() -> Iterator[None]:
    """Turn what the compiler raises into one line.

    Raises:
        MmcError: the compiler failed, or there is none.
    """
    try:
        yield
    except RuntimeError as error:
        if not _of_the_compiler(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise MmcError(
            f"torch.compile failed ({reason}); it needs a C++ compiler such as g++ on a CPU and "
            "triton on a GPU: install it, or train without optim.compile"
        ) from error


def _of_the_compiler(error: Any) -> bool:
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)
