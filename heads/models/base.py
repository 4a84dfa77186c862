"""What every head is: a small module from the fields of a batch to label logits.

Shapes: B samples in a batch, C labels, D values of one field.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from mmc.store.errors import InputError

if TYPE_CHECKING:
    from mmc.heads.featureref import FeatureRef

Batch = dict[str, Tensor]
"""Role -> values of a batch, (B, ...) each."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training of a part of the head, until the validation metric stops improving."""

    name: str
    """Shown in the history and the progress bar."""
    trains: Mapping[str, float] = field(default_factory=lambda: {"": 1.0})
    """Name of each submodule that this stage trains ("" is the whole head) -> its share of the
    learning rate. Everything else is frozen and in evaluation mode."""
    reads: tuple[str, ...] | None = None
    """Keys of the prepared batch that ``score`` reads; None: all of them."""
    score: Callable[[Batch], Tensor] | None = None
    """Prepared batch -> logits (B, C) that this stage trains and validates; None: the head's."""
    needed: Callable[[], bool] | None = None
    """Asked before the stage; False passes it over."""
    finish: Callable[[Callable[[], float]], str] | None = None
    """Called after the stage, when its best parameters are in the head, with a function that
    measures ``score`` as it then is on the validation rows (more is better): keep what the stage
    learned or take it back, and say which."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """An input that a head finds by itself among the fields of an alias.

    A field's mask (``text_mask`` of ``text_tokens`` ...) comes with it, unasked.
    """

    fields: tuple[str, ...]
    """Any of these, the first that the alias has."""
    optional: bool = False
    """The head does without it, as long as another need is met."""
    one: bool = False
    """It takes one such field, so that two aliases which have it are a question to the user."""


@dataclass(frozen=True, kw_only=True)
class NoConfig:
    """Settings of a component that has none."""


def check_least(config: Any, least: float, *names: str) -> None:
    """Raise InputError where a setting of a head is below ``least``."""
    for name in names:
        if not getattr(config, name) >= least:
            raise InputError(f"head.{name} must be {least:g} or more, got {getattr(config, name)}")


def check_shares(config: Any, *names: str) -> None:
    """Raise InputError where a setting of a head is not in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"head.{name} must be in [0, 1), got {getattr(config, name)}")


class Head(nn.Module):
    """Base of the heads: ``forward`` is ``score`` after ``prepare``.

    The split exists for speed: what ``prepare`` does to a sample never changes while training,
    so the trainer applies it once to every sample and keeps the result.

    A head is built by ``cls(inputs, num_labels, config, label_text=...)``: ``inputs`` maps each
    role to its shape per sample; ``label_text`` is (C, D) float32, or None, for a head that wants
    it (a saved head is built with None, then its state is loaded).
    """

    Config: ClassVar[type] = NoConfig
    """Frozen keyword-only dataclass of the head's own settings."""
    reads: ClassVar[Literal["pooled", "any"]] = "pooled"
    """"pooled": fields of shape (D,); "any": tokens and others as well."""
    needs: ClassVar[tuple[Need, ...]] = ()
    """What a head of tokens reads of each alias unless the user names fields."""
    extras: ClassVar[tuple[str, ...]] = ()
    """Fields that it reads besides, where the alias of a chosen field has them: ``boxes`` with
    ``regions``, ``image_places`` and ``image_class`` with ``image_tokens``."""
    min_inputs: ClassVar[int] = 1
    max_inputs: ClassVar[int | None] = None
    needs_validation: ClassVar[bool] = False
    """It decides by the validation rows what it keeps, and cannot be trained without any."""
    wants_label_text: ClassVar[bool] = False
    """The label texts of the (one) alias that the head reads are passed to it."""
    takes_label_text: ClassVar[bool] = False
    """The label texts of an alias that the head reads are passed to it where there are any."""
    card: ClassVar[str] = ""
    """What a reader of the model card should know of this head: a sentence or two, or nothing."""
    largest_batch: int | None = None
    """No default batch is larger, whatever the device: samples of many tokens take much memory."""
    part_rows: int = 8192
    """On a CPU a larger batch is computed in parts of so many samples, whose values stay in caches;
    the step is that of the whole batch, up to rounding."""
    prepares_by_network: bool = False
    """``prepare`` runs a whole network, every call of which costs something: it is given more rows
    at a time."""
    learning_rate: float = 1e-3
    """Default at a batch of 256 samples; the trainer scales it with the batch. A head may set its
    own once it knows its inputs."""

    def __init__(
        self,
        inputs: Mapping[str, tuple[int, ...]],
        num_labels: int,
        config: Any,
        *,
        label_text: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.inputs = dict(inputs)
        self.num_labels = num_labels
        self.config = config

    @classmethod
    def completed(
        cls,
        config: Any,
        features: "Mapping[str, FeatureRef]",
        label_set: Sequence[str],
        task: str,
    ) -> Any:
        """``config`` with everything that it refers to, so that a run needs nothing else.

        Called once, before the training; what it returns is what the run records.

        Args:
            features: by role, what the head will read.

        Raises:
            InputError: what it refers to does not go with these features or labels.
        """
        return config

    @classmethod
    def trained_before(cls, config: Any) -> str:
        """The setting, as ``head.base=RUN``, that names a head trained on labels of its own choice.

        Rows held out of this training may have been among them. Empty: there is none.
        """
        return ""

    def forward(self, batch: Batch) -> Tensor:
        """Fields as they are stored, (B, ...) by role -> logits (B, C)."""
        return self.score(self.prepare(batch))

    def prepare(self, batch: Batch) -> Batch:
        """The part that does not train, sample by sample; its keys are what ``score`` reads."""
        return batch

    def preparation(self) -> tuple[str, nn.Module] | None:
        """The form of what ``prepare`` gives, and the module that ``fit_inputs`` fits for it.

        Heads of one form that read the same fields are trained on the same prepared data, and take
        over the state of the one that was fitted first. A subclass that prepares otherwise must say
        so. None: the head's class, settings and seed decide what it prepares.
        """
        return None

    def score(self, prepared: Batch) -> Tensor:
        """Prepared batch -> logits (B, C)."""
        raise NotImplementedError

    def stages(self) -> list[Stage]:
        """What to train, in order. Default: everything at once. Empty: nothing to train."""
        return [Stage(name="train")]

    def fit_inputs(self, blocks: Iterable[Batch]) -> None:
        """Set what ``prepare`` needs from the training rows, given once, block by block.

        The default needs nothing and reads nothing.
        """

    def fit_labels(
        self, indptr: Tensor, indices: Tensor, unknown: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Look at which labels occur together; before any training, on the CPU.

        Row i of the training rows has the labels ``indices[indptr[i]:indptr[i + 1]]``, int64.

        Args:
            unknown: the same of single labels that are not known; None: there are none.
        """

    def set_prior(self, logits: Tensor) -> None:
        """Start from the best constant answer: (C,) goes into the biases on the logits.

        Measured on 200k x 512 features with 80 labels: a fifth of the time to the same validation
        mAP.
        """

    def fit_validation(
        self, blocks: Iterable[Batch], targets: Tensor, task: str, metric: str | None = None
    ) -> str | None:
        """Set what is not trained but fitted on the validation rows; a line to say aloud, or None.

        Args:
            blocks: what ``prepare`` gave of all validation rows, piece by piece; they may be read
                from the disk as they are asked for.
            targets: int8 (n, C) for multilabel, -1 where a label is unknown, else int64 (n,); no
                row is unknown.
            metric: what the training is judged by, a name of `mmc.heads.metrics.METRICS`; None:
                the task's own.
        """

    @property
    def text_width(self) -> int | None:
        """Values of a label text, for a head that scores labels by them; None: it does not."""
        return None

    def load_weights(self) -> None:
        """Load the weights that the settings name, if any; once, after the prior is set.

        Raises:
            InputError: the file is not there, or holds something else.
        """

    def select_labels(self, targets: Tensor) -> Tensor | None:
        """Labels (M,) that a training step scores, ascending; None: all of them.

        Called with the targets of each training batch. The choice is then in the prepared batch
        as ``labels``; the logits of other labels count for nothing.
        """
        return None

    def for_labels(self, label_text: Tensor, same: Tensor) -> dict[str, Tensor]:
        """The head's state for other labels than those it was trained on.

        Args:
            label_text: (C', D) of the labels to score.
            same: int64 (C',), the place among the head's own labels of one of that name, else -1.

        Raises:
            InputError: the head knows its labels by number only.
        """
        raise InputError(
            "this head scores the labels it was trained on and no others; train zero_shot, "
            "dm_decoder, or ml_decoder with head.queries=label_text"
        )
