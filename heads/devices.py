"""Which device trains, and with which numbers."""

import torch

from mmc.store.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is a GPU where there is one.

    Raises:
        InputError: no such device here.
    """
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
