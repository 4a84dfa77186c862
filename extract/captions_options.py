"""What `mmc caption` can be told and what it reports. Nothing here imports torch."""

from dataclasses import dataclass, field
from typing import Literal

from mmc.extract.backbones import parse_spec
from mmc.extract.sources import SourceOptions
from mmc.store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Everything that one captioning can be told."""

    backbone: str
    """Captioning model, such as hf:Salesforce/blip-image-captioning-base."""
    beams: int = 3
    """Captions that are followed at once in the search for the likeliest; 1 = greedy, the
    fastest."""
    max_tokens: int = 20
    """Longest caption in tokens, without the prompt."""
    min_tokens: int = 0
    """Shortest caption in tokens, without the prompt."""
    prompt: str = "a picture of "
    """What the model is given to continue; it is taken off the captions. BLIP was trained with the
    default; an empty one lets it begin by itself."""
    batch_size: int | None = None
    """Pictures in a batch; default: 8 on a CPU, 64 on a GPU."""
    precision: Literal["bf16", "float32"] | None = None
    """Arithmetic of the model; default: bf16 where the device has units for it."""
    device: str = "auto"
    """Where the model runs: auto, cpu, cuda, cuda:1, mps."""
    workers: int | None = None
    """Threads that read and decode pictures; default: one per core."""
    max_pixels: int = 89_478_485
    """Pictures with more pixels than this are refused as decompression bombs."""
    column: str = "caption"
    """Name of the new column."""
    overwrite: bool = False
    """Replace OUT where it exists, and begin anew where it was begun with other settings."""
    source: SourceOptions = field(default_factory=SourceOptions)
    """How the source is read."""

    def __post_init__(self) -> None:
        parse_spec(self.backbone)
        for name in ("beams", "max_tokens", "batch_size", "workers", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise InputError(
                f"--min-tokens must be 0 to --max-tokens ({self.max_tokens}), got {self.min_tokens}"
            )
        if not self.column.strip():
            raise InputError("--column must be a name")


@dataclass(frozen=True, kw_only=True)
class CaptionReport:
    """What one captioning did."""

    out: str
    """The table."""
    samples: int
    """Samples in it."""
    captioned: int
    """Samples with a caption."""
    written: int
    """Distinct pictures captioned in this run."""
    reused: int
    """Distinct pictures that an interrupted run had captioned."""
    failed: int
    """Samples whose picture cannot be used; their caption is empty."""
    without_image: int
    """Samples that name no picture; their caption is empty."""
    failures: tuple[str, ...]
    """The first of the failures, and why."""
    seconds: float
    rate: float
    """Pictures a second while captioning; 0 where there was nothing to do."""
