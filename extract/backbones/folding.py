"""Batch norms folded into the convolutions before them.

In evaluation a batch norm multiplies and adds per channel: so can the convolution itself. That
saves a pass over every feature map and, where weights are bfloat16, the rounding of one.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

_NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)
_TOLERANCE = 1e-3
"""Of the output's own scale: what folding may change in float32, deep networks included."""


@torch.no_grad()
def folded(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of ``model`` without the batch norms that read what a convolution returned.

    The pairs are seen in one forward, so that no model needs to name them; weights are multiplied
    in float64; a batch norm's own activation (as timm's has) stays. Where a convolution's output
    has other readers too the result would change: it is compared, and the model itself returned.

    Args:
        model: in evaluation mode, float32; it gives a tensor or several by name.
        example: an input of it.
    """
    copied = copy.deepcopy(model)
    pairs = _pairs(copied, example)
    for convolution, norm in pairs:
        _fold(copied, convolution, norm)
    same = all(
        (found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max()
        for found, wanted in zip(_outputs(copied, example), _outputs(model, example), strict=True)
    )
    return copied if pairs and same else model


def _outputs(model: nn.Module, example: Tensor) -> list[Tensor]:
    given = model(example)
    return [given] if isinstance(given, Tensor) else list(given.values())


def _pairs(model: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Names of convolutions and of the batch norms that read them, each in one place only."""
    made_by: dict[int, str] = {}
    kept: list[Tensor] = []  # alive, so that no id is used twice
    pairs: list[tuple[str, str]] = []

    def leave(name: str, output: Tensor) -> None:
        made_by[id(output)] = name
        kept.append(output)

    def enter(name: str, value: Tensor) -> None:
        if id(value) in made_by:
            pairs.append((made_by[id(value)], name))

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(
                module.register_forward_hook(lambda _, __, out, name=name: leave(name, out))
            )
        elif isinstance(module, _NORMS):
            hooks.append(
                module.register_forward_pre_hook(lambda _, args, name=name: enter(name, args[0]))
            )
    try:
        model(example)
    finally:
        for hook in hooks:
            hook.remove()
    used = [name for pair in pairs for name in pair]
    return [pair for pair in pairs if used.count(pair[0]) == used.count(pair[1]) == 1]


def _fold(model: nn.Module, convolution: str, norm: str) -> None:
    """Multiply the batch norm called ``norm`` into the convolution, and leave its activation."""
    conv: Any = model.get_submodule(convolution)
    batch_norm: Any = model.get_submodule(norm)
    dtype = conv.weight.dtype

    def exact(value: Tensor | None) -> Any:
        return None if value is None else value.detach().double()

    weight, bias = fuse_conv_bn_weights(
        exact(conv.weight),
        exact(conv.bias),
        exact(batch_norm.running_mean),
        exact(batch_norm.running_var),
        batch_norm.eps,
        exact(batch_norm.weight),
        exact(batch_norm.bias),
    )
    conv.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    after = [getattr(batch_norm, part) for part in ("drop", "act") if hasattr(batch_norm, part)]
    parent, _, last = norm.rpartition(".")
    setattr(model.get_submodule(parent), last, nn.Sequential(*after))
