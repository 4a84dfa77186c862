"""Settings that every training of a backbone has. Nothing here imports torch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mmc.store.errors import InputError

MORE = "::"
"""Between the sources, and between their factors."""
Schedule = Literal["cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How the parameters are found (AdamW); ``--set optim.KEY=VALUE``."""

    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; biases, norms and the logit scale have none."""
    schedule: Schedule = "cosine"
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
    val_samples: int = 5000
    """Most samples of val that are measured; recalls are of so many candidates."""

    def __post_init__(self) -> None:
        check_amounts(self, "optim.", ("weight_decay", "clip_norm"))
        for name in ("warmup", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optim.{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 < self.eps < math.inf:
            raise InputError(f"optim.eps must be above 0, got {self.eps}")
        check_counts(self, "optim.", ("micro_batch", "checkpoint_epochs", "val_samples"))
        if self.val_samples < 2:
            raise InputError("optim.val_samples must be 2 or more: one alone is always found")
        check_choices(self, "optim.", {"schedule": get_args(Schedule)})


def check_counts(config: Any, prefix: str, names: Iterable[str]) -> None:
    """Raises InputError where a field of whole numbers is below 1; None is none."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"{_called(prefix, name)} must be 1 or more, got {value}")


def check_amounts(config: Any, prefix: str, names: Iterable[str]) -> None:
    """Raises InputError where a field is below 0 or not finite."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < math.inf:
            raise InputError(f"{_called(prefix, name)} must be 0 or more, got {value}")


def check_choices(config: Any, prefix: str, choices: dict[str, tuple[str, ...]]) -> None:
    """Raises InputError where a field has none of its values."""
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise InputError(f"{_called(prefix, name)} must be one of {', '.join(known)}")


def check_run(config: Any) -> None:
    """Raises InputError where what every training is told (batch, epochs, rate, seed) cannot be."""
    check_counts(config, "--", ("epochs", "batch_size", "workers", "max_pixels"))
    if config.batch_size < 2:
        raise InputError("--batch-size must be 2 or more: a pair alone has no negatives")
    if not 0 < config.lr < math.inf:
        raise InputError(f"--lr must be above 0 and finite, got {config.lr}")
    if not 0 <= config.seed < 2**63:
        raise InputError(f"--seed must be in [0, 2^63), got {config.seed}")


def check_draws(config: Any) -> None:
    """Raises InputError where what decides which pairs are drawn cannot be."""
    check_counts(config, "--", ("samples_per_epoch",))
    if not all(0 < factor < math.inf for factor in factors_of(config.upsample)):
        raise InputError("--upsample: factors must be above 0 and finite, such as 2::1::1")


def factors_of(upsample: str | None) -> tuple[float, ...]:
    """``2::1::1`` as numbers, one a source; () where it is not given.

    Raises:
        InputError: one is no number.
    """
    try:
        return tuple(float(piece) for piece in upsample.split(MORE)) if upsample else ()
    except ValueError:
        raise InputError(
            f"--upsample {upsample!r}: write one number a source, as 2::1::1"
        ) from None


def _called(prefix: str, name: str) -> str:
    """An option's or a setting's name as the user writes it."""
    return prefix + (name.replace("_", "-") if prefix == "--" else name)
