"""Which weights of a model are adapted: attention projections, MLPs, convolutions, by module name.

Whether a module is called, as most are, or has its weight read by another, as the output projection
of an ``nn.MultiheadAttention`` has, makes no difference: adapters change weights, not calls.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

_LAYERS = {
    "out": r"out_proj|o_proj|attn\.proj|attn_pool\.proj|attnpool\.c_proj|self_attn\.projection"
    r"|attention\.output\.dense|out_lin|attn\.Wo",
    "q": r"q_proj|query|query_proj|q_lin",
    "k": r"k_proj|key|key_proj|k_lin",
    "v": r"v_proj|value|value_proj|v_lin",
    "mlp": r"mlp\.(?:fc1|fc2|c_fc|c_proj|Wi|Wo)|intermediate\.dense"
    r"|(?<!attention\.)output\.dense|ffn\.lin1|ffn\.lin2",
}
"""Linear layers by the end of their names in open_clip, timm and transformers."""
_JOINED = r"qkv|Wqkv"
"""Layers that are query, key and value in one."""


@dataclass(frozen=True)
class Target:
    """One weight, or the rows of it that are a projection of its own."""

    name: str
    """The module's name in an adapter's file."""
    module: nn.Module
    tensor: str
    """Name of the parameter in ``module``."""
    rows: tuple[int, int] | None = None
    """First and last + 1 row of the part; None: all of it."""

    @property
    def weight(self) -> Tensor:
        """The parameter, or what stands in its place."""
        weight: Tensor = getattr(self.module, self.tensor)
        return weight

    @property
    def key(self) -> tuple[int, str]:
        """The same for all parts of one parameter."""
        return id(self.module), self.tensor


def find_targets(model: nn.Module, kinds: Collection[str]) -> list[Target]:
    """All weights of the ``kinds`` in ``model``, used or not, in the order of its modules."""
    return [
        target
        for name, module in model.named_modules()
        for target in _of_module(name, module, kinds)
    ]


def within_multihead(model: nn.Module, target: Target) -> bool:
    """Whether the weight is one of an nn.MultiheadAttention, which peft cannot adapt by itself."""
    parent = model.get_submodule(target.name.rpartition(".")[0])
    return isinstance(parent, nn.MultiheadAttention)


def _of_module(name: str, module: nn.Module, kinds: Collection[str]) -> Iterator[Target]:
    if isinstance(module, nn.MultiheadAttention):
        yield from _inputs(name, module, kinds)
    elif isinstance(module, nn.Linear):
        ways = [kind for kind in _LAYERS if kind in kinds and _ends(name, _LAYERS[kind])]
        if ways or (set(kinds) & {"q", "k", "v"} and _ends(name, _JOINED)):
            yield Target(name, module, "weight")
    elif isinstance(module, nn.Conv2d) and module.groups == 1 and "conv" in kinds:
        yield Target(name, module, "weight")


def _inputs(name: str, attention: nn.MultiheadAttention, kinds: Collection[str]) -> list[Target]:
    """The input projections of an nn.MultiheadAttention: thirds of one array, or three arrays."""
    width = attention.embed_dim
    found = []
    for place, kind in enumerate("qkv"):
        part, own = f"{name}.{kind}_proj", f"{kind}_proj_weight"
        if kind not in kinds:
            continue
        if attention.in_proj_weight is None:
            found.append(Target(part, attention, own))
        else:
            rows = (place * width, (place + 1) * width)
            found.append(Target(part, attention, "in_proj_weight", rows))
    return found


def _ends(name: str, pattern: str) -> bool:
    return re.search(rf"(?:^|\.)(?:{pattern})$", name) is not None
