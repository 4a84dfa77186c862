"""Which open_clip model and which weights a name stands for, and loading them."""

import difflib
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import get_model_config
from open_clip.pretrained import download_pretrained, get_pretrained_cfg

from mmc.extract.backbones.base import offline_hint, one_line
from mmc.store.errors import InputError

CONFIG = "open_clip_config.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth")  # what open_clip looks for in a folder


@dataclass(frozen=True)
class Source:
    """Where a model's architecture and weights come from."""

    name: str
    """What followed ``open_clip:``."""
    model: str
    """The model as open_clip's factory takes it, with its schema."""
    checkpoint: Path | None
    """The weights file; None: open_clip finds it in the folder or on the hub."""
    preprocessing: dict[str, Any]
    """Preprocessing that belongs to a known tag."""
    resolved: str
    """``name`` with its path made absolute."""
    quick_gelu: bool = False
    """Whether the tag's weights were trained with QuickGELU."""


def find_source(name: str) -> Source:
    """The model and the weights that ``name`` stands for; downloads the weights of a tag.

    Raises:
        InputError: unknown model or tag (nearest names are given), no such file, no network.
    """
    if name.startswith("hf-hub:"):
        return Source(name, name, None, {}, name)
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if folder.is_dir() or name.startswith("local-dir:"):
        return _folder(name, folder)
    model, _, weights = name.partition("/")
    models = open_clip.list_models()
    if model not in models:
        near = _nearest(model, models)
        what = f"{name!r} is neither a folder nor a model" if not model else f"no model {model!r}"
        raise InputError(f"open_clip: {what}; {near or 'see open_clip.list_models()'}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if not weights:
        raise InputError(
            f"open_clip:{name} names no weights: add /TAG ({', '.join(tags) or 'none known'}) "
            "or /PATH to a checkpoint"
        )
    cfg = get_pretrained_cfg(model, weights)
    if cfg:
        keys = ("mean", "std", "interpolation", "resize_mode", "fill_color")
        preprocessing = {key: cfg[key] for key in keys if cfg.get(key) is not None}
        checkpoint = _download(name, cfg)
        return Source(name, model, checkpoint, preprocessing, name, bool(cfg.get("quick_gelu")))
    checkpoint = Path(weights).expanduser()
    if checkpoint.is_file():
        return Source(name, model, checkpoint, {}, f"{model}/{checkpoint.absolute()}")
    if checkpoint.suffix or "/" in weights:
        raise InputError(f"open_clip:{name}: no such checkpoint file: {checkpoint}")
    near = _nearest(weights, tags)
    raise InputError(f"open_clip: {model} has no weights {weights!r}; {near or 'none are known'}")


def _nearest(name: str, known: Sequence[str]) -> str:
    """What the user may have meant; with no near name, all of a short list."""
    folded = {item.lower(): item for item in known}
    near = difflib.get_close_matches(name.lower(), list(folded), n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(folded[item] for item in near)}?"
    return f"choose from: {', '.join(known)}" if 0 < len(known) <= 30 else ""


def _folder(name: str, folder: Path) -> Source:
    if not folder.is_dir():
        raise InputError(f"open_clip:{name}: no such folder: {folder}")
    if not (folder / CONFIG).is_file():
        raise InputError(f"open_clip:{name}: the folder holds no {CONFIG}")
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"open_clip:{name}: {CONFIG} is not JSON: {one_line(error)}") from None
    if not isinstance(settings, dict) or "model_cfg" not in settings:
        raise InputError(f"open_clip:{name}: {CONFIG} has no model_cfg")
    files = sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern))
    if not files:
        raise InputError(f"open_clip:{name}: the folder holds no weights ({', '.join(_WEIGHTS)})")
    return Source(name, f"local-dir:{folder}", None, {}, str(folder.absolute()))


def _download(name: str, cfg: dict[str, Any]) -> Path:
    """Path of a tag's weights: from the cache, else fetched."""
    where = cfg.get("hf_hub") or cfg.get("url")
    try:
        return Path(download_pretrained(cfg))
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"open_clip:{name}: weights {where} are not on this machine and cannot be fetched"
            f"{offline_hint()}: {one_line(error, 160)}; go online once, or give a local file: "
            f"open_clip:{name.partition('/')[0]}//path/to/weights"
        ) from None


def load_model(source: Source, *, quick_gelu: bool) -> tuple[Any, dict[str, Any]]:
    """The model with its weights, float32 on the CPU, and its architecture as plain values.

    Raises:
        InputError: weights that do not fit or hold more than tensors; a hub that is not reachable.
    """
    try:
        model_config = get_model_config(source.model)
        with warnings.catch_warnings():
            # The mismatch it warns about is settled by force_quick_gelu.
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            model = open_clip.create_model(
                source.model,
                pretrained=None if source.checkpoint is None else str(source.checkpoint),
                force_quick_gelu=quick_gelu or source.quick_gelu,
                force_preprocess_cfg=source.preprocessing,
                pretrained_text=False,
                require_pretrained=True,
                weights_only=True,
            )
    except Exception as error:  # a library's loader on files of any kind: no type can be named
        raise InputError(f"open_clip:{source.name}: {_why(source, error)}") from error
    model_config = dict(model_config)
    model_config["quick_gelu"] = bool(
        model_config.get("quick_gelu") or quick_gelu or source.quick_gelu
    )
    return model, model_config


def _why(source: Source, error: Exception) -> str:
    """The reason on one line; state dict mismatches name a few keys of each kind."""
    text = str(error)
    if type(error).__name__ == "UnpicklingError":
        return (
            "the checkpoint is damaged or holds more than tensors, and is not unpickled; "
            "save its state_dict alone, or as safetensors"
        )
    if "state_dict" not in text:
        if source.model.startswith("hf-hub:"):
            return (
                f"not on this machine and cannot be fetched{offline_hint()}; check the name, go "
                f"online once, or give a local folder: {one_line(error, 160)}"
            )
        return f"the weights cannot be read: {one_line(error)}"
    reasons = []
    for kind, keys in re.findall(r"(Missing|Unexpected) key\(s\) in state_dict: (.*)", text):
        names = re.findall(r'"([^"]+)"', keys)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        reasons.append(f"{kind.lower()} {', '.join(names[:3])}{more}")
    sizes = re.findall(
        r"size mismatch for ([^:]+): .*?(torch.Size\(\[.*?\]\)).*?(torch.Size\(.*?\))", text
    )
    for key, found, wanted in sizes[:3]:
        reasons.append(f"{key} is {found[11:-1]}, the model has {wanted[11:-1]}")
    return "the weights do not fit the model: " + "; ".join(reasons or [one_line(error)])
