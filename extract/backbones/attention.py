"""``nn.MultiheadAttention`` without copies of its weights.

It takes (B, L, D), transposes to (L, B, D), and multiplies with its weights what is then no matrix
any more. Where no gradient of the weights is wanted, torch does that as L products, for which a CPU
copies low-precision weights L times: of ViT-B/32's text tower in bfloat16, with 16 texts of 77
tokens, five sixths of the time. Torch's fused path, which has no such step, is taken for
self-attention without a mask, gradients and autocast alone.
"""

from typing import Any

import torch
from torch import Tensor, nn


def lay_out_inputs(model: nn.Module) -> None:
    """Give every ``nn.MultiheadAttention`` of ``model`` its inputs as it will read them."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and module.batch_first:
            module.register_forward_pre_hook(_sequence_first, with_kwargs=True)


def _sequence_first(
    attention: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The same inputs, those of (B, L, D) with the memory of (L, B, D); None: as they are."""
    mixed = torch.is_autocast_enabled(inputs[0].device.type) if inputs else True
    itself = len(inputs) == 3 and inputs[0] is inputs[1] is inputs[2]
    if itself and named.get("attn_mask") is None and not (mixed or torch.is_grad_enabled()):
        return None
    copies: dict[int, Tensor] = {}  # what is one tensor has to stay one: attention asks for it
    for value in inputs[:3]:
        plain = isinstance(value, Tensor) and value.ndim == 3 and not value.is_nested
        if plain and id(value) not in copies:
            copies[id(value)] = value.transpose(0, 1).contiguous().transpose(0, 1)
    return (*(copies.get(id(value), value) for value in inputs[:3]), *inputs[3:]), named
