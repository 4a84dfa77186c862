"""Weights of other people's trainings: files of tensors, never of code."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmc.store.errors import InputError

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which trainings keep the tensors."""


def read_tensors(path: str) -> dict[str, Tensor]:
    """Name -> tensor of a ``.safetensors`` file or a torch checkpoint, on the CPU.

    Raises:
        InputError: not there, not such a file, or one that holds more than tensors.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"head.weights: {path} is not there")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # weights_only: unpickles tensors and plain containers, and refuses everything else.
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a library's loader on files of any kind: no type can be named
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"head.weights: {path} is not a file of tensors ({reason})") from None
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise InputError(
            f"head.weights: {path} holds a {type(content).__name__}, not named tensors"
        )
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def copy_all(
    wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], path: str, what: str
) -> None:
    """Copy every tensor of ``found`` into the one of its name in ``wanted``; all or nothing.

    Raises:
        InputError: one is missing or has another shape.
    """
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(
            f"head.weights: {path} lacks {len(missing)} of the {len(wanted)} tensors of {what}: "
            f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
        )
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise InputError(
                f"head.weights: {name} is {tuple(found[name].shape)} in {path} and "
                f"{tuple(tensor.shape)} in {what} with these settings and features"
            )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])
