"""The head, the loss and the optimiser of a training by their names, their settings checked."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from mmc.heads import metrics
from mmc.heads.losses import GROUP as LOSS_GROUP
from mmc.heads.losses import LOSSES
from mmc.heads.losses.base import Loss
from mmc.heads.models import GROUP as HEAD_GROUP
from mmc.heads.models import HEADS
from mmc.heads.models.base import Head
from mmc.heads.options import OptimConfig, TrainConfig, build_part, parse_set, without_effect
from mmc.store.errors import InputError
from mmc.store.registry import load, lookup

T = TypeVar("T")


class Parts:
    """What a config names, for a task.

    Raises:
        InputError: no such head or loss, a loss of another task, an unknown setting or a value that
            is refused, or a metric of another task.
    """

    def __init__(self, config: TrainConfig, task: str) -> None:
        self.head = config.head
        self.head_class: type[Head] = load(
            lookup(HEADS, config.head, kind="head", group=HEAD_GROUP)
        )
        self.loss = config.loss or ("bce" if task == "multilabel" else "ce")
        self.loss_class = _loss_class(self.loss, task)
        settings = parse_set(config.settings)
        self.optim = self._built(OptimConfig, settings.get("optim", {}), "optim")
        self.loss_config: Any = self._built(
            self.loss_class.Config, settings.get("loss", {}), f"loss {self.loss}"
        )
        self.head_config = self._head_config(settings.get("head", {}))
        metric = self.optim.metric
        if metric is not None and metric not in metrics.METRICS[task]:
            raise InputError(
                f"optim.metric {metric!r} is not one of a {task} task: "
                f"{', '.join(metrics.METRICS[task])}"
            )

    def idle(self) -> list[str]:
        """A line on each setting that is given and does nothing beside the others."""
        parts = {"head": self.head_config, "loss": self.loss_config, "optim": self.optim}
        return [line for group, part in parts.items() for line in without_effect(group, part)]

    def _built(self, config: type[T], settings: Mapping[str, Any], where: str) -> T:
        return build_part(
            config,
            settings,
            where=where,
            configs=lambda: {
                "head": self.head_class.Config,
                "loss": self.loss_class.Config,
                "optim": OptimConfig,
            },
        )

    def _head_config(self, given: dict[str, str]) -> Any:
        """The head's settings: those given, and those that the loss needs."""
        head, loss = self.head, self.loss
        needed = self.loss_class.head_settings(self.loss_config)
        known = {f.name for f in fields(self.head_class.Config)}
        for key, value in needed.items():
            if key not in known:
                raise InputError(
                    f"loss {loss} needs a head with the setting {key}={value}, and {head} has no "
                    f"{key}; choose a head that `mmc list losses` names for it"
                )
        config: Any = self._built(self.head_class.Config, {**needed, **given}, f"head {head}")
        for key, value in needed.items():
            if getattr(config, key) != value:
                raise InputError(
                    f"head.{key}={getattr(config, key)} does not go with loss {loss}, which needs "
                    f"{value}; leave it out"
                )
        return config


def _loss_class(name: str, task: str) -> type[Loss]:
    loss: type[Loss] = load(lookup(LOSSES, name, kind="loss", group=LOSS_GROUP))
    if task not in loss.tasks:
        raise InputError(
            f"loss {name} is for {' and '.join(sorted(loss.tasks))} tasks, and this one is {task}"
        )
    return loss
