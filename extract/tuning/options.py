"""What `mmc tune` can be told and what it reports. Nothing here imports torch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mmc.extract.backbones import parse_spec
from mmc.extract.sources import SourceOptions
from mmc.store.config import build
from mmc.store.errors import InputError

Target = Literal["out", "q", "k", "v", "mlp", "conv"]
PairRule = Literal["own", "positives", "exclude"]
Metric = Literal["retrieval", "zero_shot", "head"]
MORE = "::"
"""Between the sources, and between their factors."""


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
class OptimConfig:
    """How the parameters are found (AdamW); ``--set optim.KEY=VALUE``."""

    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; biases, norms and the logit scale have none."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: falling to zero along a cosine, or constant."""
    warmup: float = 0.05
    """Share of all steps in which the learning rate rises from zero."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.98
    """Decay of AdamW's second moment."""
    eps: float = 1e-6
    """AdamW's epsilon."""
    clip_norm: float = 1.0
    """Gradients longer than this are shortened to it; 0 = off."""
    micro_batch: int | None = None
    """Pairs that go through the backbone at once; a larger batch goes through in parts, twice, and
    still has all its negatives. Default: 32 on a CPU, 256 on a GPU."""
    gradient_checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping what it computed: less
    memory, a third more work, the same numbers."""
    checkpoint_epochs: int = 1
    """A checkpoint after every so many epochs. What a kill can cost."""
    metric: Metric = "retrieval"
    """What decides which epoch is kept: retrieval (the mean of R@1, R@5 and R@10, both ways),
    zero_shot (the label texts, by accuracy) or head (with --head: mAP, AUROC or macro-F1); the
    validation loss breaks ties."""
    head_weight: float = 1.0
    """Weight of the head's loss beside the contrastive one."""
    val_samples: int = 5000
    """Most samples of val that are measured; recalls are of so many candidates."""

    def __post_init__(self) -> None:
        for name in ("weight_decay", "clip_norm", "head_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"optim.{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("warmup", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optim.{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 < self.eps < math.inf:
            raise InputError(f"optim.eps must be above 0, got {self.eps}")
        for name in ("micro_batch", "checkpoint_epochs", "val_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"optim.{name} must be 1 or more, got {value}")
        for name, choices in (("schedule", ("cosine", "constant")), ("metric", get_args(Metric))):
            if getattr(self, name) not in choices:
                raise InputError(f"optim.{name} must be one of {', '.join(choices)}")


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
        for name in ("samples_per_epoch", "epochs", "batch_size", "workers", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
        if self.batch_size < 2:
            raise InputError("--batch-size must be 2 or more: a pair alone has no negatives")
        if not 0 < self.lr < math.inf:
            raise InputError(f"--lr must be above 0 and finite, got {self.lr}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed must be in [0, 2^63), got {self.seed}")
        if not all(0 < factor < math.inf for factor in self.factors):
            raise InputError("--upsample: factors must be above 0 and finite, such as 2::1::1")
        for template in self.label_template or ():
            if "{label}" not in template:
                raise InputError(f"--label-template {template!r} has no {{label}} in it")

    @property
    def factors(self) -> tuple[float, ...]:
        """``upsample`` as numbers, one a source; () where it is not given.

        Raises:
            InputError: one is no number.
        """
        try:
            return tuple(float(part) for part in (self.upsample or "").split(MORE) if self.upsample)
        except ValueError:
            raise InputError(
                f"--upsample {self.upsample!r}: write one number a source, as 2::1::1"
            ) from None


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
