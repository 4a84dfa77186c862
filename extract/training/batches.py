"""How large batches and their parts are, and which rows stand for many."""

from collections.abc import Callable

import numpy as np

from mmc.extract.plan import Rows
from mmc.extract.training.distributed import World
from mmc.store.errors import InputError

_MICRO_BATCHES = {"cpu": 32, "cuda": 256}
_LEFT = 0.1
"""Share of an epoch's pairs that may be left out unsaid."""


def fit_batch(wanted: int, available: int, world: World, say: Callable[[str], None]) -> int:
    """The batch size, not more than there are pairs, and the same for every process.

    Raises:
        InputError: a process would get fewer than 2.
    """
    size = min(wanted, available)
    size -= size % world.size
    if size < 2 * world.size:
        raise InputError(
            f"{min(wanted, available)} pairs a step are too few: each process needs 2, and there "
            f"are {world.size} of them; see --batch-size and --samples-per-epoch"
        )
    if size < wanted:
        say(f"batches have {size} pairs: there are {available} in an epoch")
    elif available % size > _LEFT * available:
        say(
            f"batches of {size}: {available // size} an epoch, and {available % size} of the "
            f"{available:,} pairs, others each time, are left out; a smaller --batch-size takes "
            "more steps"
        )
    return size


def fit_micro_batch(wanted: int | None, batch_size: int, world: World) -> int:
    """Pairs that go through the towers at once."""
    return min(wanted or _MICRO_BATCHES.get(world.device.type, 64), batch_size // world.size)


def spaced(rows: Rows, most: int) -> Rows:
    """At most so many of ``rows``, evenly spaced."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).round().astype(np.int64)]
