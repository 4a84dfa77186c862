"""From lanes (towers to fill) to the tasks that an engine runs: shard by shard, batch by batch."""

from collections.abc import Iterator, Sequence

import numpy as np

from mmc.extract.content import Content
from mmc.extract.engines import ShardTask
from mmc.extract.jobs import Clock, ImageJob, ImageSettings, Job, TextJob, batch_tokens
from mmc.extract.lanes import NO_IMAGE, Lane, ShardWork
from mmc.extract.plan import Rows, image_batches, text_batches


def image_groups(lanes: Sequence[Lane]) -> list[list[Lane]]:
    """Image lanes that share shards and batches, so that each picture is decoded once for all."""
    groups: dict[tuple[int, int], list[Lane]] = {}
    for lane in lanes:
        if lane.tower == "image" and len(lane.pending):
            groups.setdefault((lane.writer.shard_rows, lane.batch_size), []).append(lane)
    return list(groups.values())


def tasks(
    lanes: Sequence[Lane],
    live: np.ndarray,
    no_image: np.ndarray,
    settings: ImageSettings,
) -> Iterator[ShardTask]:
    """All tasks of a run in order: pictures first, then texts.

    Args:
        lanes: the towers to fill.
        live: (N,) bool, rows that are not gone.
        no_image: (N,) bool, rows that name no image.
        settings: of image jobs; its content and clock serve the texts too.
    """
    for group in image_groups(lanes):
        for shard, (start, stop) in _shards(group[0]):
            works = _works(group, shard, start, stop)
            if works:
                placed = _firsts(group[0], live & ~no_image, start, stop)
                yield ShardTask(works, _ImageJobs(works, placed, no_image, settings))
    for lane in lanes:
        if lane.tower != "text":
            continue
        for shard, (start, stop) in _shards(lane):
            for work in _works([lane], shard, start, stop):
                placed = _firsts(lane, live, start, stop)
                yield ShardTask([work], _TextJobs(work, placed, settings.content, settings.clock))


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


def _firsts(lane: Lane, usable: np.ndarray, start: int, stop: int) -> Rows:
    """The rows of a shard that have a place in a batch, whether they are pending or not."""
    rows = np.arange(start, stop, dtype=np.int64)
    firsts: Rows = rows[(lane.firsts[start:stop] == rows) & usable[start:stop]]
    return firsts


class _ImageJobs:
    """Makes the image jobs of one shard."""

    def __init__(
        self,
        works: Sequence[ShardWork],
        placed: Rows,
        no_image: np.ndarray,
        settings: ImageSettings,
    ) -> None:
        self._works, self._placed, self._settings = works, placed, settings
        self._no_image = no_image

    def __call__(self) -> Iterator[Job]:
        batches = []
        for batch in image_batches(self._placed, self._works[0].lane.batch_size):
            takers = [work for work in self._works if work.wants(batch.rows).any()]
            if takers:
                batches.append((batch, takers))
        for work in self._works:
            for row in work.compute[self._no_image[work.compute]]:
                work.fail(int(row), NO_IMAGE)
            work.expect(sum(work in takers for _, takers in batches))
        for batch, takers in batches:
            for work in takers:
                work.lane.count_batch(0, None)
            yield ImageJob(takers, batch.rows, self._settings)


class _TextJobs:
    """Makes the text jobs of one shard."""

    def __init__(self, work: ShardWork, placed: Rows, content: Content, clock: Clock) -> None:
        self._work, self._placed, self._content, self._clock = work, placed, content, clock

    def __call__(self) -> Iterator[Job]:
        work, lane = self._work, self._work.lane
        if len(work.compute) == 0:
            work.expect(0)
            return
        with self._clock.measure("decode"):
            tokens = lane.backbone.tokenize(self._content.texts(self._placed))
        batches = text_batches(self._placed, tokens.buckets.numpy(), lane.batch_size)
        wanted = [batch for batch in batches if work.wants(batch.rows).any()]
        work.expect(len(wanted))
        # The longest first, so that no thread starts a long one when the others are through.
        for batch in reversed(wanted):
            places = np.searchsorted(self._placed, batch.rows)
            ready = batch_tokens(tokens, places, lane.batch_size)
            lane.count_batch(batch.length, ready)
            yield TextJob(work, batch.rows, ready)
