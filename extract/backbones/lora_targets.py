"""Where in a model the weight is that an adapter's module name means."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_THIRDS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


def find_weight(model: nn.Module, name: str) -> Tensor | None:
    """The weight that a LoRA adapter of module ``name`` is added to; None where there is none.

    A view of (out, in), or of a convolution's or an embedding's shape, that can be changed in
    place. A name may begin with the model's own, as of models trained with a head on top.
    """
    trunk = f"{getattr(model, 'base_model_prefix', '')}."
    for each in dict.fromkeys((name, name.removeprefix(trunk))):
        found = _weight(dict(model.named_modules()), each)
        if found is not None:
            return found.detach()
    return None


def _weight(modules: dict[str, nn.Module], name: str) -> Tensor | None:
    module = modules.get(name)
    parent, _, last = name.rpartition(".")
    attention = modules.get(parent)
    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight
    if isinstance(attention, nn.MultiheadAttention) and module is None:
        return _projection(attention, last)
    if isinstance(module, Conv1D):
        return module.weight.T
    if isinstance(module, nn.Conv2d):
        return module.weight if module.groups == 1 else None
    return module.weight if isinstance(module, nn.Linear | nn.Embedding) else None


def _projection(attention: nn.MultiheadAttention, name: str) -> Tensor | None:
    """An input projection: a part of the common array, or of its own where sizes differ."""
    joined = attention.in_proj_weight
    if name == "in_proj":
        return joined
    if name not in _THIRDS:
        return None
    if joined is None:
        own: Tensor = getattr(attention, f"{name}_weight")
        return own
    return joined.chunk(3)[_THIRDS[name]]
