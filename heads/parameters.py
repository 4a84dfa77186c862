"""The parameters of a scikit-learn classifier <-> the settings of a training."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.utils import check_random_state

from mmc.heads.options import GROUPS, TrainConfig
from mmc.store.config import build
from mmc.store.errors import InputError

if TYPE_CHECKING:
    from mmc.heads.artifact import Run

_NESTED = re.compile(rf"({'|'.join(GROUPS)})__(\w+)")


def nested(settings: Any) -> dict[str, Any]:
    """``{"head.hidden": 512}`` -> ``{"head__hidden": 512}``, as scikit-learn writes it."""
    if not isinstance(settings, Mapping):
        return {}
    return {str(key).replace(".", "__", 1): value for key, value in settings.items()}


def split_nested(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters proper, and those with two underscores as settings with a dot."""
    found = {name: _NESTED.fullmatch(name) for name in params}
    own = {name: value for name, value in params.items() if not found[name]}
    settings = {f"{m[1]}.{m[2]}": params[name] for name, m in found.items() if m}
    return own, settings


def config_of(params: Mapping[str, Any]) -> TrainConfig:
    """What ``HeadClassifier.get_params(deep=False)`` means to a training.

    Raises:
        InputError: a parameter that cannot be used.
    """
    settings = params["settings"] or {}
    if not isinstance(settings, Mapping):
        raise InputError('settings must be a dictionary, such as {"head.hidden": 512}')
    seed = params["random_state"]
    if not isinstance(seed, int | np.integer):
        seed = check_random_state(seed).randint(2**31)
    features = params["features"]
    given: Sequence[str] = [features] if isinstance(features, str) else features or ()
    given_here = {
        "features": tuple(part.strip() for item in given for part in item.split(",")),
        "seed": int(seed),
        "settings": tuple(f"{key}={_text(value)}" for key, value in settings.items()),
        **{name: _plain(params[name]) for name in _SAME},
    }
    return build(TrainConfig, given_here, where="HeadClassifier")


_SAME = ("head", "loss", "batch_size", "epochs", "lr", "precision", "device", "max_memory")
"""Parameters that a training knows by the same name."""


def params_of(run: "Run") -> dict[str, Any]:
    """Parameters that train as the run was trained, with all that followed from the data."""
    config = run.train_config
    groups = {
        "head": run.head_config,
        "loss": run.loss_config,
        "optim": config.get("settings", {}).get("optim", {}),
    }
    return {
        "head": run.head,
        "features": tuple(f"{role}={ref.feature}" for role, ref in run.features.items()),
        "loss": run.loss,
        "random_state": run.seed,
        "validation_fraction": run.source.get("validation_fraction", 0.1),
        **{name: config.get(name) for name in ("batch_size", "epochs", "lr")},
        "settings": {
            f"{group}.{key}": value for group, part in groups.items() for key, value in part.items()
        },
    }


def _text(value: Any) -> str:
    """A setting as it is typed on the command line."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)


def _plain(value: Any) -> Any:
    """NumPy's numbers, of which grids are made, as Python's."""
    return value.item() if isinstance(value, np.generic) else value
