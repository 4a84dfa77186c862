"""The settings of heads, losses and the optimiser, as `mmc list heads NAME` shows them."""

from dataclasses import fields
from typing import Any

from mmc.heads.options import OptimConfig
from mmc.store.config import field_docs
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
            "help": " ".join(docs[field.name].split()),
        }
        for prefix, config in ((group, load(entry).Config), ("optim", OptimConfig))
        for docs in [field_docs(config)]
        for field in fields(config)
    ]
