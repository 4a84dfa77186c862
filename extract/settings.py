"""What was not said on the command line: taken from the store's record, else from the device."""

import os
from dataclasses import dataclass

import torch

from mmc.extract.backbones.base import Backbone, default_precision
from mmc.extract.options import ExtractConfig
from mmc.store import EmbeddingStore, Provenance
from mmc.store.errors import InputError

TEXTS_PER_IMAGE = 2
"""Texts in a batch for each image. On a CPU 32 short texts are within 4 % of the best rate; larger
batches waste more places in the last one of each length."""
_BATCH_SIZES = {"cpu": 16, "mps": 64, "cuda": 256}
"""Measured on CPUs (8 to 32 are equally good there); GPUs need more to fill them."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a backbone is loaded."""

    precision: str
    max_text_tokens: int | None


def choose_settings(
    config: ExtractConfig, provenance: Provenance | None, device: torch.device
) -> Settings:
    """What the user said, else what the features were made with, else the device's defaults.

    Args:
        config: of the run.
        provenance: of the features that are to be continued; None when there are none.
        device: where the backbone runs.
    """
    identity = provenance.identity if provenance else {}
    return Settings(
        precision=config.precision or identity.get("precision") or default_precision(str(device)),
        max_text_tokens=config.max_text_tokens or identity.get("max_text_tokens"),
    )


def choose_batch_size(
    config: ExtractConfig,
    provenance: Provenance | None,
    backbone: Backbone,
    device: torch.device,
) -> int:
    """Images in a batch: as `choose_settings`, and the backbone's own default before the device's.

    Raises:
        InputError: the backbone's own is not a positive number.
    """
    identity = provenance.identity if provenance else {}
    own = getattr(backbone, "batch_size", None)
    if own is not None and (not isinstance(own, int) or own < 1):
        raise InputError(f"{backbone.context['spec']}: batch_size must be 1 or more, got {own!r}")
    default = own or _BATCH_SIZES.get(device.type, 64)
    size: int = config.batch_size or identity.get("batch_size", {}).get("image", default)
    return size


def recorded(store: EmbeddingStore | None, alias: str, config: ExtractConfig) -> Provenance | None:
    """Where the features come from that the run would continue; None when it starts anew."""
    if store is None or config.overwrite or alias not in store.aliases:
        return None
    return store.provenance(alias)


def choose_fields(
    backbone: Backbone,
    alias: str,
    store: EmbeddingStore | None,
    config: ExtractConfig,
) -> tuple[str, ...]:
    """What the user said, else the fields of the last run, else the backbone's pooled ones.

    A tower that the store has keeps all fields it has there: they share one status.

    Raises:
        InputError: the backbone has no such field.
    """
    provenance = recorded(store, alias, config)
    asked = config.fields or backbone.default_fields
    there: list[str] = []
    if store is not None and provenance is not None:
        there = [name for name in store.record(alias).fields if name in backbone.fields]
        asked = config.fields or tuple(provenance.context.get("fields", there))
        lacking = [name for name in asked if name not in backbone.fields]
        if lacking and not config.fields:
            raise InputError(
                f"{alias!r} in {store.path} was made by {provenance.context.get('spec')}, and "
                f"{backbone.context['spec']} gives no {', '.join(lacking)}; choose another --name, "
                "or replace it with --overwrite"
            )
    for name in asked:
        if name not in backbone.fields:
            raise InputError(
                f"{backbone.context['spec']} has no field {name!r}; "
                f"choose from {', '.join(backbone.fields)}"
            )
    towers = {backbone.fields[name].tower for name in asked}
    kept = [name for name in there if backbone.fields[name].tower in towers]
    return tuple(dict.fromkeys([*kept, *asked]))


def pick_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` takes the best there is.

    Raises:
        InputError: no such device on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: not usable on this machine ({reason})") from None
    return device


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
