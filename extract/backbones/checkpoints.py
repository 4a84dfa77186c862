"""Weights files: reading them without running anything in them, and fitting them to a model.

Safetensors, and PyTorch files of plain tensors. ``torch.load`` unpickles: with ``weights_only`` it
builds tensors and plain values and refuses the rest.
"""

import re
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmc.extract.backbones.base import one_line
from mmc.store.errors import InputError

_NESTS = ("state_dict", "model", "model_state_dict")
"""Keys under which training scripts keep a model beside their optimizer."""
_COUNTER = "num_batches_tracked"


def read_state(path: Path, where: str) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU.

    What training scripts put around a model is taken off: a dict that holds it beside the
    optimizer, and the ``module.`` that parallel training puts before every name.

    Args:
        path: a ``.safetensors`` file or what ``torch.save`` wrote.
        where: the backbone as typed, for messages.

    Raises:
        InputError: no such file, damaged, not weights, or more than tensors in it.
    """
    if not path.is_file():
        raise InputError(f"{where}: no such checkpoint file: {path}")
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            # A mapped file is read as far as the model needs it: not its optimizer's state.
            found = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # a library's loader on files of any kind: no type can be named
        if type(error).__name__ == "UnpicklingError":
            raise InputError(
                f"{where}: {path} is damaged or holds more than tensors, and is not unpickled; "
                "save its state_dict alone, or as safetensors"
            ) from None
        raise InputError(f"{where}: {path} cannot be read: {one_line(error)}") from None
    for key in _NESTS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    tensors = isinstance(found, Mapping) and all(isinstance(v, Tensor) for v in found.values())
    if not found or not tensors:
        raise InputError(f"{where}: {path} holds no state_dict (tensors by name)")
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def fit(
    model: nn.Module, state: Mapping[str, Tensor], where: str, *, spare: Collection[str] = ()
) -> None:
    """Load ``state`` into ``model``, every tensor of it and nothing else.

    Counters of batch norms, which evaluation does not read and old files lack, may be absent.

    Args:
        model: of any device but meta.
        state: tensors by name.
        where: the backbone as typed, for messages.
        spare: names that ``state`` may lack, or hold in any shape; they keep what they have then.

    Raises:
        InputError: names or shapes that do not match; the first few of each kind are given.
    """
    wanted = {name: value for name, value in model.state_dict().items() if _COUNTER not in name}
    given = {name: value for name, value in state.items() if _COUNTER not in name}
    shapes = [
        f"{name} is {list(given[name].shape)}, the model has {list(wanted[name].shape)}"
        for name in wanted
        if name in given and name not in spare and given[name].shape != wanted[name].shape
    ]
    reasons = [
        *_named("missing", [n for n in wanted if n not in given and n not in spare]),
        *_named("unexpected", [n for n in given if n not in wanted and n not in spare]),
        *shapes[:3],
    ]
    if reasons:
        raise InputError(f"{where}: the weights do not fit the model: {'; '.join(reasons)}")
    kept = OrderedDict((name, given[name]) for name in wanted if name not in spare)
    kept._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]  # MNASNet asks
    model.load_state_dict(kept, strict=False)


def _named(kind: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{kind} {', '.join(names[:3])}{more}"] if names else []


def without_counters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without what no number depends on, for its hash."""
    return {name: value for name, value in state.items() if _COUNTER not in name}


def misfit(error: Exception) -> str:
    """What ``load_state_dict`` says of names and shapes that do not match, on one line."""
    text = str(error)
    reasons = []
    for kind, keys in re.findall(r"(Missing|Unexpected) key\(s\) in state_dict: (.*)", text):
        reasons += _named(kind.lower(), re.findall(r'"([^"]+)"', keys))
    sizes = re.findall(
        r"size mismatch for ([^:]+): .*?torch.Size\((\[.*?\])\).*?torch.Size\((\[.*?\])\)", text
    )
    reasons += [f"{key} is {found}, the model has {wanted}" for key, found, wanted in sizes[:3]]
    return "; ".join(reasons) or one_line(error)
