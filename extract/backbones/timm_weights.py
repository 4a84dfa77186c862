"""Which timm model and which weights a name stands for, and loading them."""

import difflib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor

from mmc.extract.backbones.base import offline_hint, one_line
from mmc.extract.backbones.checkpoints import fit, misfit, read_state
from mmc.store.errors import InputError

CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Source:
    """Where a model's architecture and weights come from."""

    name: str
    """What followed ``timm:``."""
    model: str
    """The model as timm's factory takes it."""
    checkpoint: Path | None
    """The weights file; None: timm fetches those of the tag."""
    resolved: str
    """``name`` with its path made absolute."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What a folder's config says about building the model."""


def find_source(name: str) -> Source:
    """The model and the weights that ``name`` stands for.

    Raises:
        InputError: unknown model or tag (nearest names are given), no such file or folder.
    """
    if name.startswith("hf-hub:"):
        return _hub(name)
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if name.startswith("local-dir:") or folder.is_dir():
        return _folder(name, folder, str(folder.absolute()))
    model, _, weights = name.partition("/")
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        near = _nearest(architecture, timm.list_models())
        raise InputError(f"timm: no model {architecture!r} and no such folder; {near}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(architecture)]
    if tag and tag not in tags:
        raise InputError(f"timm: {architecture} has no weights {tag!r}; {_nearest(tag, tags)}")
    if weights:
        checkpoint = Path(weights).expanduser()
        if not checkpoint.is_file():
            raise InputError(f"timm:{name}: no such checkpoint file: {checkpoint}")
        return Source(name, model, checkpoint, f"{model}/{checkpoint.absolute()}")
    if not tags:
        raise InputError(f"timm:{name}: no weights of it are published; add /PATH to a checkpoint")
    return Source(name, model, None, name)


def _nearest(name: str, known: Sequence[str]) -> str:
    """What the user may have meant; with no near name, all of a short list."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"choose from: {', '.join(known)}" if 0 < len(known) <= 30 else "see timm.list_models()"


def _folder(name: str, folder: Path, resolved: str) -> Source:
    config = folder / CONFIG
    if not config.is_file():
        raise InputError(f"timm:{name}: no such folder, or it holds no {CONFIG}: {folder}")
    try:
        said = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"timm:{name}: {CONFIG} is not JSON: {one_line(error)}") from None
    if not isinstance(said, dict) or not timm.is_model(said.get("architecture", "")):
        raise InputError(f"timm:{name}: {CONFIG} names no architecture that timm has")
    weights = next((folder / file for file in _WEIGHTS if (folder / file).is_file()), None)
    if weights is None:
        raise InputError(f"timm:{name}: the folder holds no weights ({', '.join(_WEIGHTS)})")
    arguments = said.get("model_args") or {}
    return Source(name, f"local-dir:{folder}", weights, resolved, arguments)


def _hub(name: str) -> Source:
    """The cached folder of a hub repository, fetched where it is not here yet."""
    repository, _, revision = name.removeprefix("hf-hub:").partition("@")
    with _explained(name):
        config = hf_hub_download(repository, CONFIG, revision=revision or None)
        for file in _WEIGHTS:
            try:
                hf_hub_download(repository, file, revision=revision or None)
                break
            except EntryNotFoundError:
                continue
    return _folder(name, Path(config).parent, name)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what a hub's client raises into one line."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"timm:{name}: its weights are not on this machine and cannot be fetched"
            f"{offline_hint()}; check the name, go online once, or give a local file: "
            f"{one_line(error, 160)}"
        ) from error


def load_model(source: Source) -> Any:
    """The network with its weights, float32 on the CPU.

    Raises:
        InputError: weights that do not fit or hold more than tensors; a hub that is not reachable.
    """
    where = f"timm:{source.name}"
    # timm remarks on configs; what matters is raised.
    logging.getLogger("timm").setLevel(logging.ERROR)
    if source.checkpoint is None:
        with _explained(source.name):
            return timm.create_model(source.model, pretrained=True)
    state = read_state(source.checkpoint, where)
    if source.model.startswith("local-dir:"):
        try:
            model = timm.create_model(source.model, pretrained=False)
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise InputError(
                f"{where}: {CONFIG} does not describe a model: {one_line(error)}"
            ) from error
        fit(model, state, where)
        return model
    return _with_state(source.model, state, where)


def _with_state(name: str, state: dict[str, Tensor], where: str) -> Any:
    """The model called ``name`` with ``state``, whatever form timm knows its weights in."""
    cfg = timm.get_pretrained_cfg(name) or timm.get_pretrained_cfg(name.partition(".")[0])
    layers = (cfg.classifier if cfg else None) or ()
    layers = (layers,) if isinstance(layers, str) else layers
    # Other classes than ImageNet's, or none: the last layer is not used.
    scores = [state[f"{layer}.weight"] for layer in layers if f"{layer}.weight" in state]
    classes = len(scores[0]) if scores else 0
    try:
        model = timm.create_model(
            name,
            pretrained=True,
            num_classes=classes,
            pretrained_cfg_overlay={"state_dict": state, "num_classes": classes},
        )
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: the weights do not fit the model: {misfit(error)}") from error
    model.pretrained_cfg.pop("state_dict", None)
    return model
