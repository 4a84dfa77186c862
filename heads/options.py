"""What a training is told: frozen settings, and ``--set group.key=value``. Imports no torch."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from mmc.store.config import build, nearest, settable
from mmc.store.errors import InputError
from mmc.store.registry import load, lookup

T = TypeVar("T")
Configs = Mapping[str, type]
"""Group of settings -> the class that holds them."""

GROUPS = ("head", "loss", "optim")
TRACKERS = ("tensorboard", "mlflow")
SWEPT = ("head", "loss", "lr", "batch_size", "epochs")
"""Options that ``--sweep`` takes, besides the keys of ``--set``."""
SEARCH = ("sweep", "seeds", "folds")
"""Options that ask for several trainings; one of them is told none of these."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How the parameters are found (AdamW); ``--set optim.KEY=VALUE``."""

    weight_decay: float = 1.0
    """Decoupled weight decay of matrices (biases and norms have none), per unit of learning
    rate."""
    schedule: Literal["cosine", "constant", "plateau"] = "cosine"
    """Learning rate after the warm-up: falling to zero along a cosine, constant, or lowered
    whenever validation has stopped improving (plateau)."""
    plateau_factor: float = 0.3
    """What the plateau schedule multiplies the learning rate by."""
    plateau_patience: int = 2
    """Validations in a row without a better one that the plateau schedule lets pass; the next one
    lowers the rate, as torch's ReduceLROnPlateau does."""
    min_lr: float = 0.0
    """The plateau schedule goes no lower."""
    warmup: float = 0.02
    """Share of all steps in which the learning rate rises from zero."""
    clip_norm: float = 1.0
    """Gradients longer than this are shortened to it; 0 = off."""
    accumulation: int = 1
    """Batches per step: the gradient is that of so many batches joined, in the memory of one. What
    is drawn for a batch (dropout, labels to score) is drawn for each of them."""
    ema: float = 0.0
    """Decay per step of a running average of the parameters, which is then what is validated and
    kept; 0 = off."""
    beta2: float = 0.999
    """Decay of AdamW's second moment."""
    patience: int = 8
    """Stop a stage after so many validations without a better one; 0 = never. There is one after
    every epoch, or after the epochs that 50 steps take where an epoch has fewer."""
    metric: str | None = None
    """Validation metric that decides which parameters are kept; default: mAP for multilabel,
    auroc for binary, macro_f1 for multiclass. The validation loss breaks ties."""
    checkpoint_seconds: float = 20.0
    """Least time between checkpoints; 0 = one after every validation. What a kill can cost. (Linear
    heads that a sweep trains side by side have none: those unfinished start again.)"""
    compile: bool = False
    """Compile what the head computes while training (torch.compile): takes from seconds to minutes
    per stage, and needs a compiler. Compare before relying on it: on two CPU cores no head became
    faster."""

    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside the others -> which others."""
        if self.schedule == "plateau":
            return {}
        names = ("plateau_factor", "plateau_patience", "min_lr")
        return dict.fromkeys(names, f"optim.schedule={self.schedule}")

    def __post_init__(self) -> None:
        for name in ("weight_decay", "clip_norm", "checkpoint_seconds", "min_lr"):
            if not getattr(self, name) >= 0:
                raise InputError(f"optim.{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("warmup", "ema", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optim.{name} must be in [0, 1), got {getattr(self, name)}")
        for name, least in (("patience", 0), ("plateau_patience", 0), ("accumulation", 1)):
            if getattr(self, name) < least:
                raise InputError(f"optim.{name} must be {least} or more, got {getattr(self, name)}")
        if not 0 < self.plateau_factor < 1:
            raise InputError(f"optim.plateau_factor must be in (0, 1), got {self.plateau_factor}")
        if self.schedule == "plateau" and 0 < self.patience <= self.plateau_patience + 1:
            raise InputError(
                f"optim.plateau_patience={self.plateau_patience} lowers the learning rate when "
                f"optim.patience={self.patience} has ended the training; make the one smaller or "
                "the other larger"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training of a head on a store."""

    head: str = "linear"
    """Name of the head (`mmc list heads`)."""
    features: tuple[str, ...] = ()
    """What it reads: ALIAS, alias/field or role=alias/field; none = all pooled fields."""
    loss: str | None = None
    """Name of the loss (`mmc list losses`); default: bce for multilabel, ce for one label per
    sample."""
    batch_size: int | None = None
    """Samples per batch, of all processes together; default: about 100 steps an epoch, between 32
    and 4,096 on a CPU or 65,536 on a GPU."""
    epochs: int | None = None
    """Most passes over the training rows, per stage; default: 30, and more where an epoch has
    fewer than 100 steps. Early stopping usually ends it before."""
    lr: float | None = None
    """Learning rate; default: the head's own, times the fourth root of the batch size over 256."""
    seed: int = 0
    """Order, initialisation and dropout; the same seed gives the same weights."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Of the inputs and matrix products while training; auto = bf16 where the device has it.
    Parameters, loss and validation are float32 always."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto = a GPU where there is one."""
    max_memory: str | None = None
    """Memory that training data may take in each process, such as 8G; what needs more is read from
    the store again in every epoch, shuffled by windows. Default: half of what is free (three
    quarters on a GPU)."""
    track: tuple[str, ...] = ()
    """Log to these: tensorboard (into RUN/tensorboard), mlflow (to $MLFLOW_TRACKING_URI, else into
    the folder mlruns beside the run). They need `pip install 'mmc[tracking]'`."""
    settings: tuple[str, ...] = ()
    """Settings of the head, the loss and the optimiser: ``group.key=value``, such as
    ``head.hidden=1024``, ``loss.pos_weight=auto`` or ``optim.weight_decay=0.1``."""
    sweep: tuple[str, ...] = ()
    """Train with each of these values and keep the best on validation: ``lr=1e-4,1e-3``,
    ``loss=bce,asl``, ``head.hidden=512,1024``; repeated, every combination."""
    seeds: int | None = None
    """Train so many times, with --seed, --seed + 1 ...; report mean and spread, keep the best on
    validation."""
    folds: int | None = None
    """Cross-validate besides: predictions for every train and val sample by a head that has not
    seen it, kept in the run; thresholds, temperature and the best setting of --sweep are chosen
    on them."""
    overwrite: bool = False
    """Train again where a run is already."""

    def __post_init__(self) -> None:
        for name in ("seeds", "folds"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise InputError(f"--{name} must be 2 or more, got {value}; leave it out for one")
        if self.seeds and self.folds:
            raise InputError(
                "--seeds and --folds both say how far results spread, over seeds or over samples; "
                "give one of them"
            )
        for name in ("batch_size", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise InputError(f"--lr must be above 0 and finite, got {self.lr}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed must be in [0, 2^63), got {self.seed}")
        if self.precision not in ("auto", "bf16", "float32"):
            raise InputError(f"--precision must be auto, bf16 or float32, got {self.precision!r}")
        for name in self.track:
            if name not in TRACKERS:
                raise InputError(f"--track {name}: choose from {', '.join(TRACKERS)}")
        if self.track and (self.sweep or self.seeds or self.folds):
            raise InputError(
                "--track follows one training: leave it out with --sweep, --seeds and --folds, "
                "whose tables are in the run's folder"
            )
        settings = parse_set(self.settings, self._configs)
        given = {f"{group}.{key}" for group, keys in settings.items() for key in keys}
        given |= {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        for key in parse_sweep(self.sweep, self._configs):
            if key in given:
                raise InputError(f"{key} is given and swept; leave one of the two out")

    def _configs(self) -> Configs:
        return configs_of(self.head, self.loss)


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """How predictions are made and written."""

    split: str | None = None
    """Samples of this split only, or `all`; default: test where there is one, else all."""
    form: Literal["auto", "default", "kaggle", "hateful-memes", "long", "wide"] = "auto"
    """Form of the CSV file; auto follows the source that was trained on."""
    scores: bool = False
    """Add a column score:LABEL for each label."""
    top_k: int | None = None
    """Exactly the K most probable labels of each sample, whatever the thresholds say."""
    at_least_one: bool = False
    """Give a sample that passes no threshold its most probable label."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto = a GPU where there is one."""

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"--top-k must be 1 or more, got {self.top_k}")
        if self.top_k is not None and self.at_least_one:
            raise InputError(
                "--top-k gives every sample its labels, whatever the thresholds say: leave "
                "--at-least-one out"
            )


def configs_of(head: str, loss: str | None) -> Configs:
    """The classes of the settings of a head, a loss (None: not known) and the optimiser.

    Imports torch, with the head.

    Raises:
        InputError: no such head or loss.
    """
    from mmc.heads.losses import GROUP as LOSS_GROUP
    from mmc.heads.losses import LOSSES
    from mmc.heads.models import GROUP as HEAD_GROUP
    from mmc.heads.models import HEADS

    found = {"head": load(lookup(HEADS, head, kind="head", group=HEAD_GROUP)).Config}
    if loss is not None:
        found["loss"] = load(lookup(LOSSES, loss, kind="loss", group=LOSS_GROUP)).Config
    return {**found, "optim": OptimConfig}


def check_names(config: TrainConfig) -> None:
    """Raise InputError unless its head and its loss are known; imports neither."""
    from mmc.heads.losses import GROUP as LOSS_GROUP
    from mmc.heads.losses import LOSSES
    from mmc.heads.models import GROUP as HEAD_GROUP
    from mmc.heads.models import HEADS

    lookup(HEADS, config.head, kind="head", group=HEAD_GROUP)
    if config.loss is not None:
        lookup(LOSSES, config.loss, kind="loss", group=LOSS_GROUP)


def parse_set(
    pairs: Iterable[str], configs: Callable[[], Configs] = lambda: {"optim": OptimConfig}
) -> dict[str, dict[str, str]]:
    """``["head.hidden=512", ...]`` -> ``{"head": {"hidden": "512"}}``.

    Keys are checked against the component's own settings when it is built.

    Args:
        configs: asked where a key names no group, for the one that it may be meant in.

    Raises:
        InputError: not of the form ``group.key=value``, an unknown group, or a key twice.
    """
    settings: dict[str, dict[str, str]] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        group, dot, key = name.strip().partition(".")
        if equals and group and not dot:
            raise InputError(f"--set {pair}: {elsewhere(group, configs) or _FORM}")
        if not (equals and group and key):
            raise InputError(f"--set {pair}: {_FORM}")
        if group not in GROUPS:
            raise InputError(f"--set {pair}: no group {group!r}; choose from {', '.join(GROUPS)}")
        if key in settings.setdefault(group, {}):
            raise InputError(f"--set {group}.{key} is given twice; leave one of the two out")
        settings[group][key] = value.strip()
    return settings


_FORM = "write group.key=value, such as optim.weight_decay=0.1"


def elsewhere(
    key: str, configs: Callable[[], Configs], *, option: str = "the option --{dashed}"
) -> str:
    """For an error: the option or the setting that is called ``key``; empty where there is none.

    Args:
        key: a name that is wrong where it stands.
        configs: asked where it is no option.
        option: how options are written where the user reads this.
    """
    name = key.strip().replace("-", "_")
    if name in {f.name for f in fields(TrainConfig)} - {"settings", "overwrite"}:
        return f"did you mean {option.format(name=name, dashed=name.replace('_', '-'))}?"
    found = [f"{group}.{name}" for group, config in configs().items() if name in settable(config)]
    return f"did you mean {' or '.join(found)}?" if found else ""


def build_part(
    config: type[T],
    settings: Mapping[str, Any],
    *,
    where: str,
    configs: Callable[[], Configs],
    option: str = "the option --{dashed}",
) -> T:
    """As `mmc.store.config.build`; an unknown key is also looked for in the other parts.

    Args:
        config: of a head, a loss or the optimiser.
        settings: for it.
        where: for messages: what the settings are of.
        configs: of all parts.
        option: as for `elsewhere`.

    Raises:
        InputError: an unknown key or a value of the wrong type.
    """
    known = settable(config)
    for key in settings:
        if key not in known:
            meant = elsewhere(key, configs, option=option) or nearest(key, known)
            raise InputError(f"{where} has no setting {key!r}; {meant}")
    return build(config, settings, where=where)


def without_effect(group: str, config: Any) -> list[str]:
    """Lines on the settings of a part that are set and do nothing beside its others."""
    idle: dict[str, str] = config.idle() if hasattr(config, "idle") else {}
    defaults = {f.name: f.default for f in fields(config)}
    return [
        f"warning: {group}.{name}={getattr(config, name)} does nothing with {others}"
        for name, others in idle.items()
        if getattr(config, name) != defaults[name]
    ]


def parse_sweep(
    items: Iterable[str], configs: Callable[[], Configs] = lambda: {"optim": OptimConfig}
) -> dict[str, list[str]]:
    """``["lr=1e-4,1e-3", "head.hidden=512,1024"]`` -> values by key, in the order given.

    Values are checked when the trainings are set up.

    Args:
        configs: as for `parse_set`.

    Raises:
        InputError: not of the form ``key=value,value``, a key that cannot be swept, or one key or
            value twice.
    """
    swept: dict[str, list[str]] = {}
    for item in items:
        name, equals, text = item.partition("=")
        key, values = name.strip().replace("-", "_"), [v.strip() for v in text.split(",")]
        if not equals or not key or not all(values):
            raise InputError(f"--sweep {item}: write key=value,value, such as lr=1e-4,3e-4,1e-3")
        if key == "seed":
            raise InputError("--sweep seed: give --seeds N, which tells the spread as well")
        if key not in SWEPT:
            group, dot, setting = key.partition(".")
            if not (dot and setting and group in GROUPS):
                meant = "" if dot else elsewhere(key, configs)
                raise InputError(
                    f"--sweep {item}: no key {key!r}; "
                    + (
                        meant
                        or f"choose from {', '.join(SWEPT)}, or a setting of a part, such as "
                        "head.hidden or optim.weight_decay"
                    )
                )
            if key == "optim.metric":
                raise InputError("--sweep optim.metric: settings are compared by it; use --set")
        if key in swept:
            raise InputError(f"--sweep {key} is given twice; write all its values in one")
        for index, value in enumerate(values):
            same = next((v for v in values[:index] if _number(v) == _number(value)), None)
            if same is not None:
                raise InputError(f"--sweep {item}: {value} is there twice")
        swept[key] = values
    return swept


def as_options(config: TrainConfig) -> list[str]:
    """Arguments of ``mmc train-head`` that give ``config``; what is at its default is left out."""
    arguments: list[str] = []
    for field in fields(config):
        value: Any = getattr(config, field.name)
        if value == field.default or field.name == "overwrite":
            continue
        name = {"settings": "--set"}.get(field.name, "--" + field.name.replace("_", "-"))
        if field.name in ("settings", "sweep"):
            arguments += [word for item in value for word in (name, item)]
        else:
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            arguments += [name, text]
    return arguments


def _number(text: str) -> float | str:
    """The number that a text is, so that 1e-3 and 0.001 are the same; else the text."""
    try:
        return float(text)
    except ValueError:
        return text
