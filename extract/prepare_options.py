"""What `mmc prepare` can be told and what it reports. Nothing here imports torch."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from mmc.extract.sources import SourceOptions
from mmc.store.errors import InputError

Form = Literal["webdataset", "csv"]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Everything that one preparation can be told."""

    to: Form = "webdataset"
    """webdataset: tars of about equal size in a folder for each split, with an index. csv: a table
    for each split and a folder of images."""
    max_side: int = 512
    """Longest side of a picture in pixels; larger ones are made smaller, none is enlarged."""
    quality: int = 90
    """JPEG quality of pictures that are written anew, 1 to 100. A JPEG that is small enough and
    upright is copied as it is."""
    shard_samples: int = 10_000
    """At most so many samples in a tar (csv: in a folder of images); the tars of a split differ by
    one sample at most."""
    overwrite: bool = False
    """Replace what was prepared there before, of whatever data and with whatever settings."""
    workers: int | None = None
    """Threads that decode and encode; default: one per core."""
    max_pixels: int = 89_478_485
    """Pictures with more pixels than this are refused as decompression bombs."""
    source: SourceOptions = field(default_factory=SourceOptions)
    """How the source is read."""

    def __post_init__(self) -> None:
        if self.to not in get_args(Form):
            raise InputError(f"cannot prepare {self.to!r}; choose from {', '.join(get_args(Form))}")
        for name in ("max_side", "shard_samples", "workers", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality must be 1 to 100, got {self.quality}")


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What one preparation did."""

    out: str
    """The folder."""
    to: str
    samples: int
    """Samples written."""
    images: int
    """Of these, how many have a picture."""
    failed: int
    """Pictures of the source that cannot be used; their samples are kept where they have a text."""
    dropped: int
    """Samples left out, for they have neither a picture that can be used nor a text."""
    shards: int
    reused: int
    """Shards that an earlier run had finished."""
    splits: dict[str, int]
    """Samples written, by split."""
    bytes: int
    """Of all shards."""
    seconds: float
    failures: tuple[str, ...]
    """The first pictures of this run that cannot be used, and why."""
    warnings: tuple[str, ...]
    """In what the prepared data differs from the source."""
