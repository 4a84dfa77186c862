"""Attention over padded tokens.

Shapes: B samples, Q queries, N tokens, D width, H attention heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmc.heads.models.dropout import Dropout


def attention_heads(width: int, most: int) -> int:
    """How many heads of equal width: ``most``, or the largest number below that divides both."""
    return math.gcd(width, most)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    heads: int,
    dropout: Dropout | None = None,
) -> Tensor:
    """Scaled dot products of (B or 1, Q, D) with (B, N, D), softmax over tokens -> (B, Q, D).

    Args:
        mask: bool (B, N), True where there is a token; each sample must have one.
        dropout: of the weights.
    """
    B = key.shape[0]
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    shape = None if mask is None else mask[:, None, None, :]
    if key.device.type == "cpu" and torch.is_grad_enabled():
        out_BHQd = _products(q, k, v, shape, dropout)
    else:
        q = q.expand(B, -1, -1, -1)
        share = dropout.share if dropout is not None and dropout.training else 0.0
        out_BHQd = F.scaled_dot_product_attention(q, k, v, shape, dropout_p=share)
    return out_BHQd.transpose(1, 2).flatten(2)


def _products(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: Dropout | None
) -> Tensor:
    """The same in plain steps, for training on a CPU.

    There the backward pass of the fused kernel takes four times as long in bf16 (36 samples of 64
    tokens: 92 ms of a step's 230), and its dropout draws one number after the other.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).to(v.dtype)
    return (weights if dropout is None else dropout(weights)) @ v


class MultiheadAttention(nn.Module):
    """Multi-head attention with the parameters of :class:`torch.nn.MultiheadAttention`.

    Unlike that class it takes queries that are the same for all samples without repeating their
    projection.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = Dropout(dropout)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B or 1, Q, D) reads (B, N, D), bool (B, N) of it -> (B, Q, D)."""
        width = query.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        q = F.linear(query, weight[:width], bias[:width])
        k, v = F.linear(memory, weight[width:], bias[width:]).chunk(2, dim=-1)
        out = attend(q, k, v, mask, self.heads, self.dropout)
        mixed: Tensor = self.out_proj(out)
        return mixed
