"""The threads of an extraction on one device, from planned shards to committed ones.

    feeder ──jobs──> encoders ──results──> shard works ──complete──> committer

On a CPU every encoder thread decodes and runs its own batches with one arithmetic thread. Measured:
two such threads ran 1.97 times as fast as one; one batch on two arithmetic threads gained 1.63
times, and fell to a third as soon as another process wanted a core. On an accelerator a pool of
threads decodes ahead and one encoder thread keeps the device busy.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from mmc.extract.jobs import Clock, Job, Outputs
from mmc.extract.lanes import ShardWork
from mmc.store.errors import MmcError

T = TypeVar("T")

SHARDS_IN_FLIGHT = 2
QUEUED_JOBS = 64
BATCHES_AHEAD = 3
"""Batches that are decoded ahead of an accelerator."""
FLUSH_SECONDS = 60.0
"""A shard that takes long is committed this often, as far as it is."""


@dataclass(frozen=True)
class ShardTask:
    """The batches of one shard; the jobs are made when its turn comes."""

    works: Sequence[ShardWork]
    jobs: Callable[[], Iterable[Job]]
    """Makes the jobs, after telling each work how many to expect."""


class Stopped(Exception):
    """The run is being stopped."""


class Channel(Generic[T]):
    """A bounded queue between threads that can be closed (at its end) or stopped (at once)."""

    def __init__(self, size: int, stop: threading.Event) -> None:
        self._items: deque[T] = deque()
        self._size, self._stop = size, stop
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: T) -> None:
        """Append, waiting for room.

        Raises:
            Stopped: the run is being stopped.
        """
        with self._changed:
            self._wait(lambda: len(self._items) < self._size)
            self._items.append(item)
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def get(self, wait: bool = True) -> T | None:
        """The next item; None when the channel is closed and empty.

        Args:
            wait: whether to wait for one; without, None also means that there is none just now.

        Raises:
            Stopped: the run is being stopped.
        """
        with self._changed:
            if wait:
                self._wait(lambda: bool(self._items) or self._closed)
            if not self._items:
                return None
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def __iter__(self) -> Iterator[T]:
        """Items until the channel is closed and empty; raises Stopped as `get` does."""
        while (item := self.get()) is not None:
            yield item

    def _wait(self, condition: Callable[[], bool]) -> None:
        # The timeout is for the stop event, which cannot notify this condition.
        while not self._stop.is_set():
            if condition():
                return
            self._changed.wait(timeout=0.1)
        raise Stopped


class Engine:
    """Runs the tasks on one device; reports progress from the calling thread."""

    def __init__(self, device: torch.device, workers: int, clock: Clock) -> None:
        self._device, self._workers, self._clock = device, workers, clock
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._slots = threading.Semaphore(SHARDS_IN_FLIGHT)
        self._jobs: Channel[Job] = Channel(QUEUED_JOBS, self._stop)
        self._shards: Channel[ShardTask] = Channel(SHARDS_IN_FLIGHT, self._stop)
        self._head: ShardTask | None = None
        self._writable = True

    @property
    def encoders(self) -> int:
        """Threads that run the network."""
        return self._workers if self._device.type == "cpu" else 1

    def run(self, tasks: Iterable[ShardTask], tick: Callable[[], None]) -> None:
        """Run all tasks; ``tick`` is called several times a second.

        An error in any thread, and Ctrl-C, stop all of them; what the oldest shard in flight has
        by then is committed before the error goes on to the caller.
        """
        encode = self._encode_here if self._device.type == "cpu" else self._encode_on_device
        encoders = [self._start(f"encode-{i}", encode) for i in range(self.encoders)]
        feeder = self._start("feed", lambda: self._feed(tasks))
        committer = self._start("commit", self._commit)
        try:
            for thread in (feeder, *encoders, committer):
                while thread.is_alive():
                    thread.join(timeout=0.1)
                    tick()
        finally:
            self._stop.set()
            for thread in (feeder, *encoders, committer):
                thread.join()
            self._commit_head()
        if self._errors:
            raise self._errors[0]
        tick()

    def _start(self, name: str, work: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                # The setting is per thread, and fixed so that the number of workers cannot change
                # how a sum is split, hence its last bits.
                torch.set_num_threads(1)
                with torch.no_grad():
                    work()
            except Stopped:
                pass
            except torch.OutOfMemoryError as error:
                self._errors.append(
                    MmcError(f"{self._device} ran out of memory; give a smaller --batch-size")
                )
                self._errors[-1].__cause__ = error
                self._stop.set()
            except BaseException as error:
                self._errors.append(error)
                self._stop.set()

        thread = threading.Thread(target=guarded, name=f"mmc-{name}", daemon=True)
        thread.start()
        return thread

    def _feed(self, tasks: Iterable[ShardTask]) -> None:
        planned = iter(tasks)
        while True:
            # A task owns the arrays of its shard's results: none is made before there is room.
            while not self._slots.acquire(timeout=0.1):
                if self._stop.is_set():
                    raise Stopped
            task = next(planned, None)
            if task is None:
                break
            self._shards.put(task)
            for job in task.jobs():
                self._jobs.put(job)
        self._jobs.close()
        self._shards.close()

    def _encode_here(self) -> None:
        """One of several threads that each do whole batches."""
        for job in self._jobs:
            for part in job.parts():
                part()
            with self._clock.measure("encode"):
                outputs = job.forward(self._device)
            job.deliver(outputs)

    def _encode_on_device(self) -> None:
        """The one thread that feeds the accelerator; decoding runs ahead in a pool."""
        decoding: deque[tuple[Job, list[Future[None]]]] = deque()
        on_device: deque[tuple[Job, list[Outputs], torch.cuda.Event | None]] = deque()
        with ThreadPoolExecutor(self._workers, "mmc-decode", torch.set_num_threads, (1,)) as pool:
            while True:
                while len(decoding) <= BATCHES_AHEAD and (job := self._jobs.get(wait=False)):
                    decoding.append((job, [pool.submit(part) for part in job.parts()]))
                # One batch stays on the device while the results of the last are handed over;
                # but with nothing to run it goes too: the next shard may wait for these to end.
                while len(on_device) > (1 if decoding else 0):
                    _finish(*on_device.popleft())
                if decoding:
                    job, parts = decoding.popleft()
                    for part in parts:
                        part.result()
                    with self._clock.measure("encode"):
                        on_device.append((job, *_to_host(job.forward(self._device))))
                elif (job := self._jobs.get()) is not None:
                    decoding.append((job, [pool.submit(part) for part in job.parts()]))
                else:
                    return

    def _commit(self) -> None:
        for task in self._shards:
            self._head = task
            for work in task.works:
                self._wait_and_commit(work)
            self._head = None
            self._slots.release()

    def _wait_and_commit(self, work: ShardWork) -> None:
        flushed = time.monotonic()
        while not work.complete.wait(timeout=0.1):
            if self._stop.is_set():
                raise Stopped
            if time.monotonic() - flushed > FLUSH_SECONDS:
                self._write(work)
                flushed = time.monotonic()
        self._write(work)

    def _write(self, work: ShardWork) -> None:
        try:
            with self._clock.measure("write"):
                work.commit()
        except BaseException:
            self._writable = False
            raise

    def _commit_head(self) -> None:
        """After a stop: keep what the oldest shard in flight has. Later shards may hold copies of
        rows of this one that are still missing, so they are left."""
        if self._head is None or not self._writable:
            return
        for work in self._head.works:
            self._write(work)


def _to_host(outputs: list[Outputs]) -> tuple[list[Outputs], torch.cuda.Event | None]:
    """Start copying results to the host; the event tells when they are there."""
    tensors = [tensor for values in outputs for tensor in values.values()]
    if not tensors or tensors[0].device.type != "cuda":
        return [{name: value.cpu() for name, value in values.items()} for values in outputs], None
    copies: list[Outputs] = []
    for values in outputs:
        copies.append({})
        for name, value in values.items():
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            copies[-1][name] = host.copy_(value, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copies, event


def _finish(job: Job, outputs: list[Outputs], event: torch.cuda.Event | None) -> None:
    if event is not None:
        event.synchronize()
    job.deliver(outputs)
