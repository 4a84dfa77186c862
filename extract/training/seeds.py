"""What random numbers are for: each use draws from a stream of its own, by seed, use and step.

No generator has a state that a checkpoint would have to keep.
"""

from enum import IntEnum

import numpy as np


class Use(IntEnum):
    """The second of the numbers that a stream is seeded with."""

    ORDER = 1
    """Order of an epoch."""
    DRAW = 2
    """Pairs drawn with replacement."""
    ADAPTER = 3
    """What adapters do not see in a step."""
    HEAD = 4
    """Dropout of a head."""
    INIT = 5
    """Weights that are not pretrained."""
    MASK = 6
    """Masks of a step."""
    VIEW = 7
    """How the pictures of a step are cut and flipped."""
    TOWER = 8
    """Dropout of the towers."""
    MEASURE = 9
    """Masks that a model is measured with."""


def derived(*numbers: int) -> int:
    """A seed of its own for each combination, in [0, 2^32)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
