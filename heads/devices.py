"""Which device trains, and with which numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mmc.heads.distributed import own_device
from mmc.heads.launch import launched
from mmc.store.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is a GPU where there is one.

    Each of several processes that torchrun started gets its own GPU.

    Raises:
        InputError: no such device here.
    """
    if launched() > 1:
        return own_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: {reason}; choose auto, cpu or cuda") from None
    return device


def training_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bfloat16 where asked for, or where "auto" finds units for it; otherwise float32."""
    if precision == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run on units of their own, not emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def seed_all(seed: int, device: torch.device) -> None:
    """Seed what is drawn from on ``device``.

    Where CUDA has not been used yet, `torch.manual_seed` notes each call and where it came from, to
    make up for it later.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def precise(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Leave the precision to us: no autocast from outside, and float32 is float32 if asked for.

    TF32 and the bf16 parts that "high" and "medium" allow would round the factors of products.
    """
    before = torch.get_float32_matmul_precision()
    if dtype == torch.float32:
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
