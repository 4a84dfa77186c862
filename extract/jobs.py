"""One batch of work: prepare (read, decode), forward, deliver. Engines decide where each part runs.

A job of pictures is a block of places in which every backbone cuts its own batches: each picture is
read and decoded once, whatever the backbones' batch sizes and transforms are.

Legend: B = places in a batch, K = places in a block, H and W = a picture's sides, T = token
positions.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmc.extract.backbones.base import TokenBatch
from mmc.extract.content import Content
from mmc.extract.forward import Outputs, Pass, Pixels, Tally
from mmc.extract.images import ImageError, decode_rgb, fit
from mmc.extract.lanes import ShardWork
from mmc.extract.plan import Rows
from mmc.extract.transforms import Transform

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
    """Pixel tensors uint8 (K, *shape) that are allocated once and used again."""

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


class Job(Protocol):
    """One batch. Parts first (in any threads), then forward, then deliver; once each."""

    def parts(self) -> Sequence[Callable[[], None]]:
        """The work before the network, cut into pieces that may run at the same time."""

    def forward(self, device: torch.device) -> list[Outputs]:
        """Run the network: an entry for each pass; tensors on the device, as they are stored."""

    def deliver(self, outputs: list[Outputs]) -> None:
        """Hand over the results (now on the CPU) and what failed."""


@dataclass
class JobSettings:
    """What the jobs of one run share."""

    content: Content
    buffers: Buffers
    clock: Clock
    tally: Tally
    max_pixels: int


@dataclass
class Turn:
    """One forward pass in a block of pictures: the batch that begins at place ``start``."""

    step: Pass
    works: Sequence[ShardWork]
    """Of the image tower, the fused tower, or both, of one backbone."""
    start: int
    rows: Rows
    """At most the batch size; the places after them stay empty."""
    tokens: TokenBatch | None = None
    """Texts of the batch's rows, for the fused tower."""
    wanted: np.ndarray = field(init=False)
    """(n,) bool: rows that any of the works wants."""

    def __post_init__(self) -> None:
        self.wanted = np.logical_or.reduce([work.wants(self.rows) for work in self.works])

    @property
    def geometry(self) -> Transform:
        return self.works[0].lane.geometry

    def wants(self, place: int) -> bool:
        """Whether the picture at this place of the block is needed."""
        at = place - self.start
        return 0 <= at < len(self.rows) and bool(self.wanted[at])


class PictureJob:
    """A block of pictures for every backbone that misses some of them; read and decoded once."""

    def __init__(
        self, rows: Rows, places: int, turns: Sequence[Turn], settings: JobSettings
    ) -> None:
        self._rows, self._places, self._turns = rows, places, turns
        self._settings = settings
        self._pixels: dict[Transform, Tensor] = {}
        self._originals: dict[tuple[Transform, int], Tensor] = {}
        """Pictures in their own size, by place."""
        self._reasons: dict[int, str] = {}

    def parts(self) -> list[Callable[[], None]]:
        # Buffers are taken here, not when the job is made: jobs wait in a queue, buffers are few.
        for turn in self._turns:
            shape = turn.geometry.shape
            if shape is not None and turn.geometry not in self._pixels:
                buffer = self._settings.buffers.take((self._places, *shape))
                self._pixels[turn.geometry] = buffer
        return [
            partial(self._fill, range(start, min(start + PICTURES_PER_PART, self._places)))
            for start in range(0, self._places, PICTURES_PER_PART)
        ]

    def _fill(self, places: range) -> None:
        for place in places:
            wanted = {turn.geometry for turn in self._turns if turn.wants(place)}
            for transform in self._pixels.keys() - wanted:
                self._pixels[transform][place].zero_()
            if wanted:
                self._decode(place, wanted)

    def _decode(self, place: int, transforms: set[Transform]) -> None:
        settings = self._settings
        try:
            with settings.clock.measure("read"):
                data = settings.content.image_bytes(int(self._rows[place]))
            with settings.clock.measure("decode"):
                picture = decode_rgb(data, max_pixels=settings.max_pixels)
                for transform in transforms:
                    fitted = fit(picture, transform)
                    if transform in self._pixels:
                        self._pixels[transform][place].copy_(fitted)
                    else:
                        self._originals[transform, place] = fitted
        except ImageError as error:
            self._reasons[place] = str(error)
            for transform in transforms & self._pixels.keys():
                self._pixels[transform][place].zero_()

    def forward(self, device: torch.device) -> list[Outputs]:
        moved = {
            transform: pixels.to(device, non_blocking=True)
            for transform, pixels in self._pixels.items()
        }
        outputs = []
        for turn in self._turns:
            pixels = self._of(turn, moved, device)
            empty = isinstance(pixels, list) and not pixels
            if not empty:
                self._settings.tally.note(turn.step, pixels, turn.tokens)
            outputs.append({} if empty else turn.step.run(pixels, turn.tokens))
        return outputs

    def _of(self, turn: Turn, moved: dict[Transform, Tensor], device: torch.device) -> Pixels:
        """The pixels of one pass: (B, *shape), or a list of the pictures that could be read."""
        if turn.geometry in moved:
            return moved[turn.geometry][turn.start : turn.start + turn.step.batch_size]
        return [
            self._originals[turn.geometry, place].to(device, non_blocking=True)
            for place in self._good(turn)
        ]

    def _good(self, turn: Turn) -> list[int]:
        """Places of the block that the pass has a result for."""
        places = (turn.start + int(at) for at in np.flatnonzero(turn.wanted))
        return [place for place in places if place not in self._reasons]

    def deliver(self, outputs: list[Outputs]) -> None:
        for pixels in self._pixels.values():
            self._settings.buffers.give(pixels)
        for turn, values in zip(self._turns, outputs, strict=True):
            good = np.array(self._good(turn), np.int64)
            at = good - turn.start if turn.geometry in self._pixels else np.arange(len(good))
            for work in turn.works:
                self._hand_over(work, turn, good, at, values)
                work.batch_done()

    def _hand_over(
        self, work: ShardWork, turn: Turn, good: np.ndarray, at: np.ndarray, values: Outputs
    ) -> None:
        """Give a work its rows: of the places ``good``, whose results are ``values[...][at]``."""
        wanted = work.wants(self._rows[good])
        names = [spec.name for spec in work.lane.fields]
        arrays = {name: values[name].numpy()[at[wanted]] for name in names if len(good)}
        work.put(self._rows[good[wanted]], arrays)
        for place, reason in self._reasons.items():
            if turn.wants(place) and work.wants(self._rows[place : place + 1])[0]:
                work.fail(int(self._rows[place]), reason)


class TextJob:
    """A batch of tokenized texts for one backbone."""

    def __init__(
        self, step: Pass, work: ShardWork, rows: Rows, tokens: TokenBatch, settings: JobSettings
    ) -> None:
        self._step, self._work, self._rows, self._tokens = step, work, rows, tokens
        self._settings = settings

    def parts(self) -> list[Callable[[], None]]:
        return []

    def forward(self, device: torch.device) -> list[Outputs]:
        self._settings.tally.note(self._step, None, self._tokens)
        return [self._step.run(None, self._tokens)]

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
