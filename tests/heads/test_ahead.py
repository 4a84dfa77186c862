"""An iterator that runs ahead of its user."""

import threading
import time

import pytest

from mmc.heads.ahead import ahead


def test_items_come_in_their_order():
    with ahead((number for number in range(100)), 3, "test") as items:
        assert list(items) == list(range(100))


@pytest.mark.parametrize("most", [1, 2, 4])
def test_never_more_items_than_there_is_room_for(most):
    """A buffer is not filled again while it is used, and all others are filled meanwhile."""
    made: list[int] = []

    def source():
        for number in range(20):
            made.append(number)
            yield number

    with ahead(source(), most, "test") as items:
        for used, number in enumerate(items):
            assert number == used
            wanted, deadline = min(used + most, 20), time.monotonic() + 5
            while len(made) < wanted and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.005)
            assert len(made) == wanted


def test_an_error_comes_where_its_item_would():
    def source():
        yield 1
        yield 2
        raise ValueError("broken")

    seen: list[int] = []
    with pytest.raises(ValueError, match="broken"), ahead(source(), 3, "test") as items:
        seen.extend(items)
    assert seen == [1, 2]


def test_left_early_it_ends_and_cleans_up():
    closed = threading.Event()

    def source():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    with ahead(source(), 2, "test-left-early") as items:
        next(items)
    assert closed.is_set()
    assert not any(thread.name == "test-left-early" for thread in threading.enumerate())


def test_one_may_run_ahead_of_another():
    with (
        ahead((number for number in range(50)), 2, "inner") as inner,
        ahead((number * 2 for number in inner), 3, "outer") as outer,
    ):
        assert next(outer) == 0
        assert next(outer) == 2
