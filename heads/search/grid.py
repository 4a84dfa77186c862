"""The settings of a sweep: every combination of the values of ``--sweep``. Imports no torch."""

import itertools
from dataclasses import dataclass, fields
from typing import Any

from mmc.heads.options import SEARCH, SWEPT, TrainConfig, parse_sweep
from mmc.store.config import build


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One combination."""

    number: int
    """From 1, in the order of the grid."""
    values: dict[str, str]
    """Swept key -> value, as the user wrote it; empty without a sweep."""
    config: TrainConfig
    """A single training."""

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items())


def settings(config: TrainConfig) -> list[Setting]:
    """The settings that ``config`` asks for, the last key changing fastest; one without a sweep.

    Raises:
        InputError: a value that its key cannot take.
    """
    swept = parse_sweep(config.sweep)
    base = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in SEARCH}
    found = []
    for number, combination in enumerate(itertools.product(*swept.values()), 1):
        values = dict(zip(swept, combination, strict=True))
        given: dict[str, Any] = {key: value for key, value in values.items() if key in SWEPT}
        others = tuple(f"{key}={value}" for key, value in values.items() if key not in SWEPT)
        given = {**base, **given, "settings": (*config.settings, *others)}
        single = build(TrainConfig, given, where="--sweep")
        found.append(Setting(number=number, values=values, config=single))
    return found
