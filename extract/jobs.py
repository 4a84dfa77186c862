"""One batch of work: prepare (read, decode), forward, deliver. Engines decide where each part runs.

Legend: B = places in a batch, H and W = the transform's output, T = token positions.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmc.extract.backbones.base import TokenBatch
from mmc.extract.content import Content
from mmc.extract.images import ImageError, decode
from mmc.extract.lanes import Lane, ShardWork
from mmc.extract.plan import Rows
from mmc.extract.transforms import ImageTransform

STAGES = ("read", "decode", "encode", "write")
PICTURES_PER_PART = 16
"""One thread decodes so many at a time; several threads share a large batch."""


class Clock:
    """Seconds per stage, summed over threads."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._lock = threading.Lock()

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self.seconds[stage] += seconds

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)


class Buffers:
    """Pixel tensors (B, 3, H, W) uint8 that are allocated once and used again."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._free: dict[tuple[int, ...], list[Tensor]] = {}
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...]) -> Tensor:
        with self._lock:
            free = self._free.get(shape)
            if free:
                return free.pop()
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)

    def give(self, tensor: Tensor) -> None:
        with self._lock:
            self._free.setdefault(tuple(tensor.shape), []).append(tensor)


Outputs = dict[str, Tensor]


class Job(Protocol):
    """One batch. Parts first (in any threads), then forward, then deliver; once each."""

    def parts(self) -> Sequence[Callable[[], None]]:
        """The work before the network, cut into pieces that may run at the same time."""

    def forward(self, device: torch.device) -> list[Outputs]:
        """Run the network: an entry for each lane; tensors on the device, as they are stored."""

    def deliver(self, outputs: list[Outputs]) -> None:
        """Hand over the results (now on the CPU) and what failed."""


@dataclass
class ImageSettings:
    """What image jobs of one run share."""

    content: Content
    buffers: Buffers
    clock: Clock
    max_pixels: int


class ImageJob:
    """A batch of pictures for every backbone that misses some of them; read and decoded once."""

    def __init__(self, works: Sequence[ShardWork], rows: Rows, settings: ImageSettings) -> None:
        self._works = works
        self._rows = rows
        self._settings = settings
        self._wanted = [work.wants(rows) for work in works]
        self._size = works[0].lane.batch_size
        self._pixels: dict[ImageTransform, Tensor] = {}
        self._reasons: dict[int, str] = {}

    def parts(self) -> list[Callable[[], None]]:
        # Buffers are taken here, not when the job is made: jobs wait in a queue, buffers are few.
        for work in self._works:
            geometry = work.lane.geometry
            if geometry not in self._pixels:
                shape = (self._size, 3, *geometry.size)
                self._pixels[geometry] = self._settings.buffers.take(shape)
        return [
            partial(self._fill, range(start, min(start + PICTURES_PER_PART, self._size)))
            for start in range(0, self._size, PICTURES_PER_PART)
        ]

    def _fill(self, places: range) -> None:
        for place in places:
            transforms = {
                work.lane.geometry
                for work, wanted in zip(self._works, self._wanted, strict=True)
                if place < len(self._rows) and wanted[place]
            }
            for transform in self._pixels.keys() - transforms:
                self._pixels[transform][place].zero_()
            if transforms:
                self._decode(place, transforms)

    def _decode(self, place: int, transforms: set[ImageTransform]) -> None:
        settings = self._settings
        try:
            with settings.clock.measure("read"):
                data = settings.content.image_bytes(int(self._rows[place]))
            with settings.clock.measure("decode"):
                for transform in transforms:
                    pixels = decode(data, transform, max_pixels=settings.max_pixels)
                    self._pixels[transform][place].copy_(pixels)
        except ImageError as error:
            self._reasons[place] = str(error)
            for transform in transforms:
                self._pixels[transform][place].zero_()

    def forward(self, device: torch.device) -> list[Outputs]:
        moved = {
            transform: pixels.to(device, non_blocking=True)
            for transform, pixels in self._pixels.items()
        }
        return [encode_images(work.lane, moved[work.lane.geometry]) for work in self._works]

    def deliver(self, outputs: list[Outputs]) -> None:
        for pixels in self._pixels.values():
            self._settings.buffers.give(pixels)
        for work, wanted, values in zip(self._works, self._wanted, outputs, strict=True):
            good = [int(i) for i in np.flatnonzero(wanted) if int(i) not in self._reasons]
            arrays = {name: tensor.numpy()[good] for name, tensor in values.items()}
            work.put(self._rows[good], arrays)
            for place, reason in self._reasons.items():
                if wanted[place]:
                    work.fail(int(self._rows[place]), reason)
            work.batch_done()


class TextJob:
    """A batch of tokenized texts for one backbone."""

    def __init__(self, work: ShardWork, rows: Rows, tokens: TokenBatch) -> None:
        self._work, self._rows, self._tokens = work, rows, tokens

    def parts(self) -> list[Callable[[], None]]:
        return []

    def forward(self, device: torch.device) -> list[Outputs]:
        return [encode_texts(self._work.lane, self._tokens)]

    def deliver(self, outputs: list[Outputs]) -> None:
        good = np.flatnonzero(self._work.wants(self._rows))
        arrays = {name: tensor.numpy()[good] for name, tensor in outputs[0].items()}
        self._work.put(self._rows[good], arrays)
        self._work.batch_done()


def batch_tokens(tokens: TokenBatch, places: np.ndarray, batch_size: int) -> TokenBatch:
    """The texts at ``places`` as one batch of ``batch_size``; the first fills the places left."""
    padded = np.full(batch_size, places[0], np.int64)
    padded[: len(places)] = places
    return tokens.take(torch.from_numpy(padded))


def encode_images(lane: Lane, pixels: Tensor) -> Outputs:
    """One forward pass over pixels (B, 3, H, W) uint8 on the device."""
    return _stored(lane, lane.backbone.encode_image(pixels, lane.field_names))


def encode_texts(lane: Lane, tokens: TokenBatch) -> Outputs:
    """One forward pass over a TokenBatch (B, T)."""
    return _stored(lane, lane.backbone.encode_text(tokens, lane.field_names))


def _stored(lane: Lane, values: Outputs) -> Outputs:
    """Values in the dtypes of the store, still on the device."""
    return {
        spec.name: values[spec.name].to(getattr(torch, str(spec.dtype))) for spec in lane.fields
    }
