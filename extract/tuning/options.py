"""What `mmc tune` can be told and what it reports. Nothing here imports torch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mmc.extract.backbones import parse_spec
from mmc.extract.sources import SourceOptions
from mmc.extract.training import options as training
from mmc.extract.training.options import (
    check_amounts,
    check_choices,
    check_draws,
    check_run,
)
from mmc.store.config import build
from mmc.store.errors import InputError

Target = Literal["out", "q", "k", "v", "mlp", "conv"]
PairRule = Literal["own", "positives", "exclude"]
Metric = Literal["retrieval", "zero_shot", "head"]
RECORD = "tune.json"
"""In the folder of a tuning; it is written last."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapters; ``--set lora.KEY=VALUE``."""

    rank: int = 8
    """Rank of the change of each adapted weight."""
    alpha: float | None = None
    """The change is multiplied by alpha / rank; default: twice the rank."""
    dropout: float = 0.0
    """Share of the inputs of each adapted weight that its adapter does not see in a step. They are
    the same for the whole batch: an adapter that is added to the weight knows no samples."""
    logit_scale: bool = False
    """Train the logit scale (the inverse temperature), too."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"lora.rank must be 1 or more, got {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise InputError(f"lora.alpha must be above 0 and finite, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(training.OptimConfig):
    """How the parameters are found (AdamW); ``--set optim.KEY=VALUE``."""

    metric: Metric = "retrieval"
    """What decides which epoch is kept: retrieval (the mean of R@1, R@5 and R@10, both ways),
    zero_shot (the label texts, by accuracy) or head (with --head: mAP, AUROC or macro-F1); of
    epochs within a standard error (retrieval, zero_shot) that of the lowest validation loss."""
    head_weight: float = 1.0
    """Weight of the head's loss beside the contrastive one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amounts(self, "optim.", ("head_weight",))
        check_choices(self, "optim.", {"metric": get_args(Metric)})


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Everything that one tuning can be told."""

    backbone: str
    """The model that is tuned, of image and text towers: open_clip:... or hf:..."""
    targets: tuple[Target, ...] = ("out",)
    """What of the towers is adapted: out (the output projection of every attention layer), q, k, v
    (its inputs), mlp, conv; such as out,q,v."""
    pairs: PairRule = "own"
    """What samples of the same labels are to each other: own (nothing: a picture belongs to its
    own text), positives (their pictures and texts belong together) or exclude (not negatives)."""
    pair_column: str | None = None
    """Column of 1 and 0: whether the picture and the text of a row belong together; rows with 0
    add nothing. Default: all do."""
    upsample: str | None = None
    """How often samples of each source are drawn, beside the others: 2::1::1 for a::b::c. Drawn
    with replacement."""
    samples_per_epoch: int | None = None
    """Draw so many pairs with replacement in an epoch; default: each pair of train once."""
    epochs: int = 10
    """Passes over the training pairs."""
    batch_size: int = 256
    """Pairs in a step, of all processes together: each is a negative of all others."""
    lr: float = 3e-4
    """Peak learning rate."""
    precision: Literal["bf16", "fp16", "float32"] | None = None
    """Of the matrix products while training; default: bf16 where the device has units for it.
    Adapters and loss are float32 always."""
    label_template: tuple[str, ...] | None = None
    """Sentence in which label names are compared with pictures, with {label} in it; default: the
    backbone's."""
    seed: int = 0
    """Order, initialisation and dropout; the same seed gives the same adapter."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps; with torchrun: one GPU for each process."""
    workers: int | None = None
    """Threads that read and decode pictures; default: one per core."""
    max_pixels: int = 89_478_485
    """Pictures with more pixels than this are refused as decompression bombs."""
    merge: bool = False
    """Write the whole tuned model, too, into OUT/merged."""
    overwrite: bool = False
    """Tune again where an adapter is already."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapters."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser, and how a step is computed."""
    source: SourceOptions = field(default_factory=SourceOptions)
    """How the sources are read."""

    def __post_init__(self) -> None:
        if set(parse_spec(self.backbone).options) & {"lora", "pyramid"}:
            raise InputError(
                f"{self.backbone}: mmc tune begins with the plain model, without lora or pyramid; "
                "to go on from an adapter, tune with --merge and give OUT/merged"
            )
        for name, values, choices in (
            ("targets", self.targets, get_args(Target)),
            ("pairs", (self.pairs,), get_args(PairRule)),
        ):
            wrong = [value for value in values if value not in choices]
            if wrong or not values:
                given = wrong[0] if wrong else ""
                raise InputError(f"--{name} {given!r}: choose from {', '.join(choices)}")
        check_draws(self)
        check_run(self)
        for template in self.label_template or ():
            if "{label}" not in template:
                raise InputError(f"--label-template {template!r} has no {{label}} in it")


@dataclass(frozen=True, kw_only=True)
class TuneReport:
    """What one tuning did."""

    out: str
    """Folder of the adapter."""
    merged: str | None
    """Folder of the whole model."""
    adapted: int
    """Weights with an adapter."""
    parameters: int
    """Numbers that were trained."""
    pairs: int
    """Pairs of train."""
    val: int
    """Samples of val that were measured."""
    failed: int
    """Pairs whose picture could not be used."""
    before: dict[str, float]
    """Metrics on val of the backbone as it was."""
    after: dict[str, float]
    """Metrics on val with the adapter."""
    best_epoch: int
    epochs: int
    seconds: float
    """Everything, loading and measuring included."""
    rate: float
    """Pairs per second of the steps of this run."""
    resumed: bool


def groups(pairs: Iterable[str]) -> dict[str, Any]:
    """``["lora.rank=16", ...]`` as the configs ``lora`` and ``optim``; later pairs win.

    Raises:
        InputError: not of the form group.key=value, an unknown group, key or value.
    """
    kinds: dict[str, Any] = {"lora": LoraConfig, "optim": OptimConfig}
    found: dict[str, dict[str, str]] = {name: {} for name in kinds}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        group, dot, key = name.strip().partition(".")
        if not (equals and dot and key) or group not in kinds:
            raise InputError(f"--set {pair}: write lora.KEY=VALUE or optim.KEY=VALUE")
        found[group][key] = value.strip()
    return {name: build(kind, found[name], where=name) for name, kind in kinds.items()}
