"""From lanes (towers to fill) to the tasks that an engine runs: shard by shard, batch by batch.

A backbone's image tower and its fused tower run in one pass where both are missing. Batches of
pictures are cut from the rows that hold a picture first; a row that repeats a picture with another
text is a sample of its own for the fused tower alone, and has its place in batches after those. So
what the image tower is given never depends on whether fused fields are asked for.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmc.extract.backbones.base import TokenBatch
from mmc.extract.engines import ShardTask
from mmc.extract.forward import Pass
from mmc.extract.jobs import Job, JobSettings, PictureJob, TextJob, Turn, batch_tokens
from mmc.extract.lanes import NO_IMAGE, NO_TEXT, Lane, ShardWork
from mmc.extract.plan import Rows, image_batches, text_batches

LARGEST_BLOCK = 4
"""Times the largest batch: backbones whose batches have no smaller common multiple decode alone."""
MOST_ORIGINALS = 64
"""Places of a block with pictures in their own size, which take memory as they please."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Presence:
    """What rows have, (N,) bool each."""

    live: Mask
    """Not gone from the source."""
    image: Mask
    text: Mask


def picture_groups(lanes: Sequence[Lane]) -> list[list[Lane]]:
    """Image and fused lanes that share shards and blocks: each picture is decoded once for all."""
    groups: list[list[Lane]] = []
    for lane in lanes:
        if lane.tower == "text" or not len(lane.pending):
            continue
        for group in groups:
            if _go_together([*group, lane]):
                group.append(lane)
                break
        else:
            groups.append([lane])
    return groups


def _go_together(lanes: Sequence[Lane]) -> bool:
    """Whether the lanes have the same shards, and blocks of pictures that fit the memory."""
    sizes = {lane.batch_size for lane in lanes}
    limit = LARGEST_BLOCK * max(sizes)
    if len(sizes) > 1 and any(lane.geometry.shape is None for lane in lanes):
        limit = min(limit, MOST_ORIGINALS)
    return len({lane.writer.shard_rows for lane in lanes}) == 1 and math.lcm(*sizes) <= limit


def tasks(lanes: Sequence[Lane], presence: Presence, settings: JobSettings) -> Iterator[ShardTask]:
    """All tasks of a run in order: pictures first, then texts.

    Args:
        lanes: the towers to fill.
        presence: what rows have.
        settings: of all jobs.
    """
    for group in picture_groups(lanes):
        for shard, (start, stop) in _shards(group[0]):
            works = _works(group, shard, start, stop)
            if works:
                places = _picture_places(works, presence, start, stop)
                yield ShardTask(works, _PictureJobs(works, places, presence, settings))
    for lane in lanes:
        if lane.tower != "text":
            continue
        for shard, (start, stop) in _shards(lane):
            for work in _works([lane], shard, start, stop):
                placed = _firsts(lane, presence.live, start, stop)
                yield ShardTask([work], _TextJobs(work, placed, settings))


def _shards(lane: Lane) -> Iterator[tuple[int, tuple[int, int]]]:
    for shard in range(lane.writer.num_shards):
        yield shard, lane.writer.bounds(shard)


def _works(lanes: Sequence[Lane], shard: int, start: int, stop: int) -> list[ShardWork]:
    """The lanes' results for one shard, for those that miss rows in it."""
    works = []
    for lane in lanes:
        first, last = np.searchsorted(lane.pending, [start, stop])
        if last > first:
            works.append(ShardWork(lane, shard, lane.pending[first:last]))
    return works


def _firsts(lane: Lane, usable: Mask, start: int, stop: int) -> Rows:
    """The rows of a shard that have a place in a batch, whether they are pending or not."""
    rows = np.arange(start, stop, dtype=np.int64)
    firsts: Rows = rows[(lane.firsts[start:stop] == rows) & usable[start:stop]]
    return firsts


def _picture_places(
    works: Sequence[ShardWork], presence: Presence, start: int, stop: int
) -> list[Rows]:
    """Rows of a shard that are cut into batches: each picture's first, then its other texts."""
    rows = np.arange(start, stop, dtype=np.int64)
    pictures = works[0].lane.pictures[start:stop] == rows
    usable = (presence.live & presence.image)[start:stop]
    places = [rows[pictures & usable]]
    for work in works:
        if work.lane.tower == "fused":
            others = (work.lane.firsts[start:stop] == rows) & ~pictures
            places.append(rows[others & usable & presence.text[start:stop]])
            break  # the same for every backbone
    return places


class _PictureJobs:
    """Makes the jobs of one shard's pictures."""

    def __init__(
        self,
        works: Sequence[ShardWork],
        places: Sequence[Rows],
        presence: Presence,
        settings: JobSettings,
    ) -> None:
        self._works, self._places, self._settings = works, places, settings
        self._presence = presence
        self._block = math.lcm(*(work.lane.batch_size for work in works))

    def __call__(self) -> Iterator[Job]:
        jobs = []
        for placed in self._places:
            for block in image_batches(placed, self._block):
                turns = [turn for works in self._backbones() for turn in _turns(works, block.rows)]
                if turns:
                    jobs.append((block.rows, turns))
        for work in self._works:
            self._settle_absent(work)
            work.expect(sum(work in turn.works for _, turns in jobs for turn in turns))
        for rows, turns in jobs:
            for turn in turns:
                if "fused" in turn.step.towers:
                    turn.tokens = self._tokens(turn)
            yield PictureJob(rows, self._block, turns, self._settings)

    def _backbones(self) -> list[list[ShardWork]]:
        """The works of each backbone."""
        found: dict[str, list[ShardWork]] = {}
        for work in self._works:
            found.setdefault(work.lane.alias, []).append(work)
        return list(found.values())

    def _settle_absent(self, work: ShardWork) -> None:
        """Rows that lack what the tower reads."""
        for row in work.compute[~self._presence.image[work.compute]]:
            work.fail(int(row), NO_IMAGE)
        if work.lane.tower == "fused":
            half = self._presence.image & ~self._presence.text
            for row in work.compute[half[work.compute]]:
                work.fail(int(row), NO_TEXT)

    def _tokens(self, turn: Turn) -> TokenBatch:
        settings = self._settings
        with settings.clock.measure("decode"):
            tokens = turn.step.backbone.tokenize(settings.content.texts(turn.rows))
        return batch_tokens(tokens, np.arange(len(turn.rows)), turn.step.batch_size)


def _turns(works: Sequence[ShardWork], block: Rows) -> Iterator[Turn]:
    """The passes of one backbone over a block, each with the towers that miss any of its rows."""
    for number, batch in enumerate(image_batches(block, works[0].lane.batch_size)):
        takers = [work for work in works if work.wants(batch.rows).any()]
        if takers:
            step = _step([work.lane for work in takers])
            yield Turn(step, takers, number * step.batch_size, batch.rows)


def _step(lanes: Sequence[Lane], length: int = 0) -> Pass:
    """The pass that fills these lanes, all of one backbone."""
    return Pass(
        alias=lanes[0].alias,
        backbone=lanes[0].backbone,
        fields=tuple(spec for lane in lanes for spec in lane.fields),
        batch_size=lanes[0].batch_size,
        length=length,
    )


class _TextJobs:
    """Makes the text jobs of one shard."""

    def __init__(self, work: ShardWork, placed: Rows, settings: JobSettings) -> None:
        self._work, self._placed, self._settings = work, placed, settings

    def __call__(self) -> Iterator[Job]:
        work, lane, settings = self._work, self._work.lane, self._settings
        if len(work.compute) == 0:
            work.expect(0)
            return
        with settings.clock.measure("decode"):
            tokens = lane.backbone.tokenize(settings.content.texts(self._placed))
        batches = text_batches(self._placed, tokens.buckets.numpy(), lane.batch_size)
        wanted = [batch for batch in batches if work.wants(batch.rows).any()]
        work.expect(len(wanted))
        # The longest first, so that no thread starts a long one when the others are through.
        for batch in reversed(wanted):
            places = np.searchsorted(self._placed, batch.rows)
            ready = batch_tokens(tokens, places, lane.batch_size)
            yield TextJob(_step([lane], batch.length), work, batch.rows, ready, settings)
