"""What `mmc extract` can be told and what it reports. Nothing here imports torch."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmc.extract.backbones import parse_spec
from mmc.extract.sources import SourceOptions
from mmc.store.errors import InputError
from mmc.store.schema import check_name

LARGEST_BATCH = 8192
OWN = ("fields", "batch_size", "precision", "max_text_tokens")
"""What each of several backbones may have for itself."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Everything that one extraction can be told."""

    backbones: tuple[str, ...]
    """Backbones to run, such as open_clip:ViT-B-32/laion2b_s34b_b79k; each picture is decoded once
    for all of them."""
    names: tuple[str, ...] | None = None
    """A name in the store for each backbone, in the same order; default: made from the backbone."""
    fields: tuple[str, ...] | None = None
    """Arrays to keep, such as image,text_tokens; default: the pooled ones, or what the store has
    under that name."""
    batch_size: int | None = None
    """Images in a batch (texts: twice as many); default: 16 on a CPU, 256 on a GPU, or what
    the store has under that name."""
    precision: Literal["bf16", "float32"] | None = None
    """Arithmetic of the backbone; default: bf16 where the device has units for it, or what the
    store has under that name."""
    device: str = "auto"
    """Where the backbone runs: auto, cpu, cuda, cuda:1, mps."""
    workers: int | None = None
    """Threads that decode (on a CPU they also run the backbone); default: one per core."""
    max_text_tokens: int | None = None
    """Longest text in tokens; longer ones are cut; default: the backbone's own limit."""
    label_template: tuple[str, ...] | None = None
    """Sentence in which label names are embedded, with {label} in it; default: the backbone's. When
    it is given several times the embeddings are normalised and averaged."""
    label_names: Path | None = None
    """JSON file {label: name in words} for labels that are codes."""
    compress: Literal["zstd"] | None = None
    """Compress new arrays: smaller on disk, slower to read."""
    strict: bool = False
    """End with exit code 1 when any picture could not be used."""
    overwrite: bool = False
    """Throw away what the store has under that name and extract it again."""
    retry_failed: bool = False
    """Try pictures again that could not be used before."""
    max_pixels: int = 89_478_485
    """Pictures with more pixels than this are refused as decompression bombs."""
    shard_rows: int | None = None
    """Rows in a shard, the unit of writing; default: chosen from the size of a row."""
    source: SourceOptions = field(default_factory=SourceOptions)
    """How the source is read."""

    def __post_init__(self) -> None:
        if not self.backbones:
            raise InputError(
                "no backbone was given; add --backbone SPEC (see `mmc list backbones`)"
            )
        if self.names is not None and len(self.names) != len(self.backbones):
            raise InputError(
                f"{len(self.backbones)} backbones but {len(self.names)} names were given; "
                "give one --name for each --backbone, in the same order"
            )
        for name in ("batch_size", "workers", "max_text_tokens", "max_pixels", "shard_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
        if self.batch_size is not None and self.batch_size > LARGEST_BATCH:
            raise InputError(
                f"--batch-size may be {LARGEST_BATCH:,} at most, got {self.batch_size:,}: every "
                "batch is filled up to it, so that results do not depend on what else is extracted"
            )
        for template in self.label_template or ():
            if "{label}" not in template:
                raise InputError(f"the label template {template!r} has no {{label}} in it")

    def aliases(self) -> tuple[str, ...]:
        """The name in the store of each backbone.

        Raises:
            InputError: a name cannot name a folder of the store, or is used twice.
        """
        names = self.names or tuple(default_alias(spec) for spec in self.backbones)
        for name in names:
            check_name(name, "backbone name")
            if names.count(name) > 1:
                raise InputError(f"two backbones would be called {name!r}; tell them apart: --name")
        return names


def default_alias(spec: str) -> str:
    """A short name for a backbone spec: ``open_clip:ViT-B-32/laion2b`` -> ``ViT-B-32``."""
    parsed = parse_spec(spec)
    if parsed.family.startswith("fasterrcnn"):  # what follows is a file or a data set
        return parsed.family
    parts = [part for part in re.split(r"[/\\:]", parsed.name) if part]
    # Some names are model/weights; of hub names and folders the last part tells them apart.
    path = Path(parsed.name).is_absolute() or Path(parsed.name).is_dir() or ":" in parsed.name
    first = parsed.family in ("open_clip", "torchvision", "timm") and not path
    part = (parts or [""])[0 if first else -1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-._") or parsed.family


def read_label_names(path: Path | None, label_set: tuple[str, ...]) -> dict[str, str]:
    """The words for each label: what the JSON file says, else the label itself.

    Raises:
        InputError: the file is not there, is not ``{label: name}``, or names no label of the set.
    """
    if path is None:
        return {label: label for label in label_set}
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"label names {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"label names {path} are not JSON: {error}") from None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f'label names {path} must be one JSON object {{"label": "name", …}}')
    if label_set and not names.keys() & set(label_set):
        raise InputError(
            f"label names {path} name none of the labels; the first are {', '.join(label_set[:5])}"
        )
    return {label: names.get(label, label) for label in label_set}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One sample that one backbone could not embed."""

    row: int
    """Row in the store."""
    id: str
    """The sample's id."""
    feature: str
    """``<alias>/<tower>``."""
    reason: str
    """Why."""


@dataclass(frozen=True, kw_only=True)
class ExtractReport:
    """What one extraction did and how fast."""

    store: str
    """Path of the store."""
    aliases: tuple[str, ...]
    """Names of the backbones in the store."""
    samples: int
    """Samples that the store now holds, without those gone from the source."""
    embedded: int
    """Samples that got at least one new embedding in this run."""
    skipped: int
    """Samples for which there was nothing to do."""
    failed: int
    """Samples that could not be embedded in this run."""
    without_image: int
    """Samples of this run that name no image though others do."""
    without_text: int
    """Samples of this run that have an image and no text, where fused features need both."""
    failures: tuple[Failure, ...]
    """The first few failures."""
    seconds: float
    """The whole call, but for measuring ``ceiling``."""
    load_seconds: float
    """Loading the backbones, part of ``seconds``."""
    embed_seconds: float
    """From the first picture read to the last shard written, part of ``seconds``."""
    rate: float
    """Samples per second of ``embed_seconds``."""
    ceiling: float | None
    """Samples per second of the bare forward passes on ready tensors, measured after this run with
    its batch shapes and workers; None: the run was too short to measure it."""
    efficiency: float | None
    """``rate / ceiling``."""
    stages: Mapping[str, float]
    """Seconds of read, decode, encode and write, summed over the threads of each."""
    bottleneck: str
    """The stage whose threads were busiest; empty when nothing was embedded."""
