"""What `mmc labels` is told. Imports no torch."""

from dataclasses import dataclass

from mmc.store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """How the labels of a store are looked at."""

    features: tuple[str, ...] = ()
    """What samples are compared by: ALIAS or alias/field; none = all pooled fields, or those of
    the run."""
    limit: int = 1000
    """Most rows of each ranked list (each kind of suspect, to_label.csv, outliers.csv)."""
    near: float | None = None
    """Cosine from which two embeddings are near-identical; default: a fiftieth of the distance of
    two random samples, worked out for each feature and printed."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto = a GPU where there is one."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise InputError(f"--limit must be 1 or more, got {self.limit}")
        if self.near is not None and not 0 < self.near <= 1:
            raise InputError(f"--near must be a cosine in (0, 1], got {self.near}")
