"""The settings of heads, losses and the optimiser, as `mmc list heads NAME` shows them."""

from dataclasses import MISSING, fields
from typing import Any

from mmc.heads.options import OptimConfig
from mmc.store.config import choices, field_docs
from mmc.store.registry import Entry, load


def settings(group: str, entry: Entry) -> list[dict[str, Any]]:
    """What ``--set`` can say to a component and to the optimiser: key, default and help of each.

    Args:
        group: what its keys start with, ``head`` or ``loss``.
        entry: the component.
    """
    return [
        {
            "key": f"{prefix}.{field.name}",
            "default": field.default,
            "choices": choices(config, field.name),
            "help": " ".join(docs[field.name].split()),
        }
        for prefix, config in ((group, load(entry).Config), ("optim", OptimConfig))
        for docs in [field_docs(config)]
        for field in fields(config)
        if field.default is not MISSING  # what has none is filled in by the training
    ]


def as_typed(value: Any) -> str:
    """A value as ``--set`` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
