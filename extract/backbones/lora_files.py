"""The files of a LoRA adapter, and which kinds are read; ``lora.py`` says what is in them."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmc.extract.backbones.base import one_line
from mmc.store.errors import InputError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""Settings that decide how much of the factors is added."""

_HARMLESS = frozenset(
    (
        *(*SCALING, "peft_type", "peft_version", "base_weights", "base_model_name_or_path"),
        *("auto_mapping", "revision", "task_type", "inference_mode", "lora_dropout", "bias"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        # Orientation is a matter of the module's class, as peft itself decides in the end.
        *("fan_in_fan_out", "init_lora_weights", "modules_to_save", "ensure_weight_tying"),
        *("megatron_core", "qalora_group_size", "runtime_config"),
    )
)
"""Settings that need nothing more than the tensors; any other one that is set changes the sums."""
_PLAIN_INITS = (True, False, None, "gaussian")
"""Ways to begin a training that leave the base weights as they are."""


def read_config(path: Path, where: str) -> dict[str, Any]:
    """The settings of the adapter in folder ``path``.

    Raises:
        InputError: no adapter there, or one of a kind that is not supported.
    """
    file = path / CONFIG
    if not file.is_file():
        what = f"holds no {CONFIG}" if path.is_dir() else "is no folder"
        raise InputError(f"{where} {what}; give the folder that `mmc tune` or peft saved")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{where}: {CONFIG} is not JSON: {one_line(error)}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise InputError(f"{where} is of the kind {kind!r}; only LORA is supported")
    others = [key for key, value in config.items() if value and key not in _HARMLESS]
    if config.get("init_lora_weights") not in _PLAIN_INITS:
        # These begin by changing the base weights; peft can convert them into plain adapters.
        others.append(f"init_lora_weights={config['init_lora_weights']}")
    if others:
        raise InputError(f"{where} uses {', '.join(others)}, which is not supported")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise InputError(f"{where}: {CONFIG} gives no usable {key} ({config.get(key)!r})")
    for key in ("rank_pattern", "alpha_pattern"):
        _check_patterns(config.get(key) or {}, f"{where}: {CONFIG} gives no usable {key}")
    return config


def _check_patterns(patterns: Any, complaint: str) -> None:
    """Raises InputError where they are not {regular expression: positive number}."""
    try:
        usable = all(re.compile(pattern) and value > 0 for pattern, value in patterns.items())
    except (AttributeError, TypeError, re.error):
        usable = False
    if not usable:
        raise InputError(f"{complaint} ({json.dumps(patterns)})")


def read_tensors(path: Path, where: str) -> dict[str, Tensor]:
    """The tensors of the adapter in folder ``path``, by their names in the file.

    Raises:
        InputError: there are none, or they cannot be read.
    """
    file = path / WEIGHTS
    if not file.is_file():
        raise InputError(f"{where} holds no {WEIGHTS}; save it as safetensors")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{where}: {WEIGHTS} cannot be read: {one_line(error)}") from None
    if not tensors:
        raise InputError(f"{where}: {WEIGHTS} holds no tensors")
    return tensors
