"""Which torchvision model and which weights a name stands for, and fetching them."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchvision import models

from mmc.extract.backbones.base import offline_hint, one_line
from mmc.extract.backbones.hub import reachable
from mmc.store.errors import InputError


@dataclass(frozen=True)
class Source:
    """Where a model's architecture, weights and preprocessing come from."""

    name: str
    """What followed the family in the spec."""
    model: str
    """The model's name in torchvision."""
    checkpoint: Path
    """The weights file."""
    preprocessing: Any
    """The member of torchvision's weights enum whose transform is used."""
    resolved: str
    """``name`` with its path made absolute and its tag named."""


def find_source(name: str, preprocessing: str | None) -> Source:
    """The classifier and the weights that ``name`` stands for; downloads the weights of a tag.

    Args:
        name: ``MODEL``, ``MODEL/TAG`` or ``MODEL/PATH``.
        preprocessing: the tag whose preprocessing a file takes, where the user says.

    Raises:
        InputError: unknown model or tag (nearest names are given), no such file, no network.
    """
    model, _, weights = name.partition("/")
    known = models.list_models(module=models)
    if model not in known:
        raise InputError(
            f"torchvision: no classification model {model!r}; {_nearest(model, known)}"
        )
    tags = models.get_model_weights(model)
    if not weights or weights in tags.__members__:
        if preprocessing is not None:
            raise InputError(
                f"torchvision:{name}: preprocessing is an option of weights files; "
                "a tag has its own"
            )
        tag = tags[weights or "DEFAULT"]
        return Source(name, model, fetch(tag.url, name), tag, f"{model}/{tag.name}")
    checkpoint = Path(weights).expanduser()
    if not checkpoint.is_file():
        if checkpoint.suffix or "/" in weights:
            raise InputError(f"torchvision:{name}: no such checkpoint file: {checkpoint}")
        choice = _nearest(weights, list(tags.__members__))
        raise InputError(f"torchvision: {model} has no weights {weights!r}; {choice}")
    if preprocessing is not None and preprocessing not in tags.__members__:
        choice = _nearest(preprocessing, list(tags.__members__))
        raise InputError(f"torchvision: {model} has no weights {preprocessing!r}; {choice}")
    by_file = {tag.url.rpartition("/")[2]: tag for tag in tags}
    tag = tags[preprocessing] if preprocessing else by_file.get(checkpoint.name, tags["DEFAULT"])
    return Source(name, model, checkpoint, tag, f"{model}/{checkpoint.absolute()}")


def _nearest(name: str, known: Sequence[str]) -> str:
    """What the user may have meant; with no near name, all of a short list."""
    folded = {item.lower(): item for item in known}
    near = difflib.get_close_matches(name.lower(), list(folded), n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(folded[item] for item in near)}?"
    listed = ", ".join(known) if len(known) <= 30 else "see torchvision.models.list_models()"
    return f"choose from: {listed}" if len(known) <= 30 else listed


def fetch(url: str, name: str, family: str = "torchvision") -> Path:
    """The path of published weights: in torch's cache, else downloaded and checked.

    Raises:
        InputError: not here, and the hub is switched off or cannot be reached.
    """
    file = url.rpartition("/")[2]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file
    if cached.is_file():
        return cached
    reason = offline_hint()
    if not reason and not reachable(url):  # the downloader itself waits for minutes
        reason = ": its host takes no connection"
    if not reason:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            # The last part of a published file's name is the start of its hash.
            digest = Path(file).stem.rpartition("-")[2]
            torch.hub.download_url_to_file(url, os.fspath(cached), digest, progress=False)
            return cached
        except (OSError, RuntimeError) as error:
            reason = f": {one_line(error, 160)}"
    raise InputError(
        f"{family}:{name}: weights {url} are not on this machine and cannot be fetched{reason}; "
        f"go online once, copy the file to {cached.parent}, or name a local file"
    ) from None
