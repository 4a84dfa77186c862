"""What `mmc pretrain` can be told and what it reports. Nothing here imports torch."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mmc.extract.sources import SourceOptions
from mmc.extract.training import options as training
from mmc.extract.training.options import (
    check_amounts,
    check_choices,
    check_counts,
    check_draws,
    check_run,
)
from mmc.store.errors import InputError

Shape = Literal["patches", "units", "blocks"]
Pixels = Literal["simmim", "mae", "mae_norm"]
Views = Literal["clean", "masked"]
Metric = Literal["loss", "retrieval"]
Tracker = Literal["tensorboard"]
HF = "hf:"


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image tower, a ViT."""

    weights: str | None = None
    """Begin with this ViT, hf:NAME or hf:FOLDER, or with that of a pretraining; its sizes and its
    preprocessing are then its own. Default: begin with nothing, with the sizes below."""
    image_size: int | None = None
    """Height and width of a picture in pixels, to which it is resized; default: 224."""
    patch_size: int | None = None
    """Height and width of a patch in pixels; default: 16."""
    width: int | None = None
    """Features of a token; default: 384."""
    layers: int | None = None
    """Transformer blocks; default: 12."""
    heads: int | None = None
    """Attention heads; default: 6."""
    mlp: int | None = None
    """Features inside a block's MLP; default: four times the width."""
    dropout: float = 0.0
    """Dropout of the blocks and of attention while training."""

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes with their defaults."""
        return _sizes(self, _VISION)

    def __post_init__(self) -> None:
        _check_tower(self, "vision", _VISION)
        if self.weights is None and self.sizes["image_size"] % self.sizes["patch_size"]:
            raise InputError(
                f"vision.image_size={self.sizes['image_size']} is not a multiple of "
                f"vision.patch_size={self.sizes['patch_size']}"
            )


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text tower, a BERT."""

    weights: str | None = None
    """Begin with this BERT, hf:NAME or hf:FOLDER, or with that of a pretraining; its sizes and its
    tokenizer are then its own. Default: begin with nothing, with the sizes below."""
    tokenizer: str | None = None
    """Tokenizer of a tower that begins with nothing, hf:NAME or hf:FOLDER; default: a WordPiece
    vocabulary made from the texts of train."""
    vocabulary: int | None = None
    """Most tokens of a vocabulary that is made; default: 30,000."""
    lower: bool = True
    """Whether a vocabulary that is made is of lower-case letters without accents."""
    tokens: int | None = None
    """Tokens that a text is cut to; default: 64, or fewer where the weights take no more."""
    width: int | None = None
    """Features of a token; default: 384."""
    layers: int | None = None
    """Transformer blocks; default: 6."""
    heads: int | None = None
    """Attention heads; default: 6."""
    mlp: int | None = None
    """Features inside a block's MLP; default: four times the width."""
    dropout: float = 0.1
    """Dropout of the blocks and of attention while training."""

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes with their defaults."""
        return _sizes(self, _TEXT)

    def __post_init__(self) -> None:
        _check_tower(self, "text", _TEXT)
        _check_spec("text.tokenizer", self.tokenizer)
        if self.tokens is not None and self.tokens < 3:
            raise InputError(f"text.tokens must be 3 or more, got {self.tokens}")
        if self.vocabulary is not None and self.vocabulary < 100:
            raise InputError(f"text.vocabulary must be 100 or more, got {self.vocabulary}")
        where = "text.weights" if self.weights else "text.tokenizer" if self.tokenizer else None
        if where and (self.vocabulary is not None or not self.lower):
            raise InputError(f"text.vocabulary and text.lower come from {where}; leave them out")


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """What is hidden from the towers and has to be told."""

    patches: float = 0.4
    """Share of a picture's patches; the same number in every picture, round(share * patches)."""
    shape: Shape = "blocks"
    """patches (each for itself), units (squares of `unit` pixels) or blocks (rectangles)."""
    unit: int = 32
    """Side of a unit in pixels."""
    tokens: float = 0.15
    """Share of a text's tokens, each drawn for itself, at least one; never special ones."""
    replaced: float = 0.8
    """Share of these that the mask token stands in for."""
    random: float = 0.1
    """Share of these that another token stands in for; the rest stay as they are."""

    def __post_init__(self) -> None:
        for name in ("patches", "tokens"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"mask.{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("replaced", "random"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"mask.{name} must be in [0, 1], got {getattr(self, name)}")
        if self.replaced + self.random > 1:
            raise InputError("mask.replaced and mask.random are more than 1 together")
        check_counts(self, "mask.", ("unit",))
        check_choices(self, "mask.", {"shape": get_args(Shape)})


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised: the sum of three losses."""

    contrastive: float = 1.0
    """Weight of CLIP's loss between the pictures and the texts of a batch."""
    image: float = 1.0
    """Weight of the loss of masked patches."""
    text: float = 1.0
    """Weight of the loss of masked tokens."""
    pixels: Pixels = "simmim"
    """What is told of a masked patch: its pixels, by their mean absolute error (simmim), by their
    mean squared error (mae), or so with each patch brought to mean 0 and variance 1 (mae_norm)."""
    views: Views = "clean"
    """What the contrastive loss sees: clean pictures and texts, for which each tower runs a second
    time, or the masked ones."""
    temperature: float | None = None
    """Of the contrastive loss, at first; default: 0.07, or that of the model that both towers
    begin with."""
    learn_temperature: bool = True
    """Train it, between 0.01 and 1."""

    def __post_init__(self) -> None:
        weights = ("contrastive", "image", "text")
        check_amounts(self, "loss.", weights)
        if not any(getattr(self, name) for name in weights):
            raise InputError("loss.contrastive, loss.image and loss.text are all 0")
        check_choices(self, "loss.", {"pixels": get_args(Pixels), "views": get_args(Views)})
        if self.temperature is not None and not 0.01 <= self.temperature <= 1:
            raise InputError(f"loss.temperature must be in [0.01, 1], got {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How pictures are varied from epoch to epoch."""

    crop: float = 0.6
    """Smallest share of a picture's area that is cut out and enlarged (random resized crop); 1 =
    the whole picture always."""
    flip: bool = False
    """Mirror every second picture; not for texts that tell left from right, or for letters."""

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise InputError(f"augment.crop must be in (0, 1], got {self.crop}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(training.OptimConfig):
    """How the parameters are found (AdamW)."""

    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; biases, norms, positions, the class and mask tokens and
    the temperature have none."""
    pretrained: float = 0.2
    """Share of the learning rate that towers which begin with weights have."""
    metric: Metric = "loss"
    """What decides which epoch is kept: loss (the weighted sum, on val) or retrieval (the mean of
    R@1, R@5 and R@10, both ways)."""
    patience: int = 0
    """Stop after so many epochs without a better one; 0 = never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amounts(self, "optim.", ("pretrained", "patience"))
        check_choices(self, "optim.", {"metric": get_args(Metric)})


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that one pretraining can be told."""

    upsample: str | None = None
    """How often pairs of each source are drawn, beside the others: 2::1::1 for a::b::c. Drawn
    with replacement."""
    samples_per_epoch: int | None = None
    """Draw so many pairs with replacement in an epoch; default: each pair of train once."""
    epochs: int = 30
    """Passes over the training pairs."""
    batch_size: int = 256
    """Pairs in a step, of all processes together: each is a negative of all others."""
    lr: float = 5e-4
    """Peak learning rate."""
    projection: int | None = None
    """Features of the space that pictures and texts share; default: 256, or those of the model
    that both towers begin with."""
    precision: Literal["bf16", "float32"] | None = None
    """Of the matrix products while training; default: bf16 where the device has units for it.
    Weights and losses are float32 always."""
    seed: int = 0
    """Weights, order, masks, crops and dropout; the same seed gives the same model."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps; with torchrun: one GPU for each process."""
    workers: int | None = None
    """Threads that read and decode pictures; default: one per core."""
    max_pixels: int = 89_478_485
    """Pictures with more pixels than this are refused as decompression bombs."""
    track: tuple[Tracker, ...] = ()
    """Log losses and recalls: tensorboard (into OUT/tensorboard)."""
    overwrite: bool = False
    """Pretrain again where a model is already."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The image tower."""
    text: TextConfig = field(default_factory=TextConfig)
    """The text tower."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """What is masked."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What is minimised."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How pictures are varied."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser, and how a step is computed."""
    source: SourceOptions = field(default_factory=SourceOptions)
    """How the sources are read."""

    def __post_init__(self) -> None:
        check_draws(self)
        check_run(self)
        check_counts(self, "", ("projection",))
        for name, ratio in (("image", self.mask.patches), ("text", self.mask.tokens)):
            if getattr(self.loss, name) and not ratio:
                what = "patches" if name == "image" else "tokens"
                raise InputError(f"mask.{what}=0 leaves nothing to be told; set loss.{name}=0, too")


GROUPS: dict[str, type] = {
    "vision": VisionConfig,
    "text": TextConfig,
    "mask": MaskConfig,
    "loss": LossConfig,
    "augment": AugmentConfig,
    "optim": OptimConfig,
}
"""The parts of a config that have settings of their own."""


@dataclass(frozen=True, kw_only=True)
class PretrainReport:
    """What one pretraining did."""

    out: str
    """Folder of the model."""
    parameters: int
    """Numbers that were trained."""
    vocabulary: int
    """Tokens of the text tower."""
    pairs: int
    """Pairs of train."""
    val: int
    """Samples of val that were measured."""
    failed: int
    """Pairs whose picture could not be used."""
    before: dict[str, float]
    """Metrics on val before the first step."""
    after: dict[str, float]
    """Metrics on val of the epoch that was kept."""
    best_epoch: int
    epochs: int
    seconds: float
    """Everything, loading and measuring included."""
    rate: float
    """Pairs per second of the steps of this run."""
    resumed: bool


_TOWER = {"width": 384, "heads": 6}
_VISION = {"image_size": 224, "patch_size": 16, **_TOWER, "layers": 12}
_TEXT = {**_TOWER, "layers": 6}


def _sizes(config: Any, defaults: dict[str, int]) -> dict[str, int]:
    given = {name: getattr(config, name) for name in (*defaults, "mlp")}
    found = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    return {"mlp": 4 * found["width"], **found}


def _check_tower(config: Any, group: str, defaults: dict[str, int]) -> None:
    names = (*defaults, "mlp")
    check_counts(config, f"{group}.", names)
    if not 0 <= config.dropout < 1:
        raise InputError(f"{group}.dropout must be in [0, 1), got {config.dropout}")
    _check_spec(f"{group}.weights", config.weights)
    given = [name for name in names if getattr(config, name) is not None]
    if config.weights is not None and given:
        several = len(given) > 1
        raise InputError(
            f"{', '.join(f'{group}.{name}' for name in given)} {'come' if several else 'comes'} "
            f"from {group}.weights; leave {'them' if several else 'it'} out"
        )
    sizes = _sizes(config, defaults)
    if sizes["width"] % sizes["heads"]:
        raise InputError(
            f"{group}.width={sizes['width']} is not a multiple of {group}.heads={sizes['heads']}"
        )


def _check_spec(name: str, spec: str | None) -> None:
    if spec is not None and not (spec.startswith(HF) and spec.removeprefix(HF).strip()):
        raise InputError(f"{name}={spec}: write hf:NAME or hf:FOLDER")
