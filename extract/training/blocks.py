"""Blocks that are computed again in the backward pass: less memory for more work.

The same for every library: their own switches ask for training mode, do nothing in silence, or have
another name in the next version.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: Iterable[nn.Module], *, dropout: bool) -> int:
    """Keep only the inputs of ``blocks`` (Chen et al. 2016, arXiv:1604.06174); how many they are.

    Args:
        dropout: they have any, which must be the same both times.
    """
    changed = list(blocks)
    for block in changed:
        block.forward = partial(_checkpointed, block.forward, dropout)
    return len(changed)


def _checkpointed(forward: Any, dropout: bool, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=dropout, **kwargs)
