"""Running an iterator ahead of whoever uses it, in a thread of its own."""

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def ahead(source: Generator[T], most: int, name: str) -> Iterator[Iterator[T]]:
    """The items of ``source``, made in a thread while others are used.

    Every item may be a buffer that is filled again: an item is made only when fewer than ``most``
    are waiting or in use, and one is in use until the next one is asked for. An error of
    ``source`` is raised where its item would have come. Left early, the thread ends after the item
    that it is making.

    Args:
        most: items that there are at a time.
        name: the thread's.
    """
    room = threading.Semaphore(most)
    made: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    left = threading.Event()

    def make() -> None:
        try:
            while True:
                room.acquire()
                if left.is_set():
                    source.close()
                    return
                made.put((next(source), None))
        except BaseException as error:  # raised where the items are used; StopIteration is the end
            made.put((None, error))

    def items() -> Iterator[T]:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
            room.release()

    thread = threading.Thread(target=make, name=name, daemon=True)
    thread.start()
    try:
        yield items()
    finally:
        left.set()
        room.release()
        thread.join()
