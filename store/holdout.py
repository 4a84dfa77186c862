"""Which samples validate where no split says so: the same for everything that trains on them."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

HELD_OUT = 0.1
"""Share of the training samples."""


def held_out(ids: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Mask (n,) of the samples that validate, by a hash of the id: stable when others are added.

    At least one validates and one trains, if there are two.
    """
    keys = np.array([_unit_hash(str(name)) for name in ids])
    held: npt.NDArray[np.bool_] = keys < HELD_OUT
    if len(keys) > 1 and not held.any():
        held[keys.argmin()] = True
    if len(keys) > 1 and held.all():
        held[keys.argmax()] = False
    return held


def _unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"mmc-val").digest()
    return int.from_bytes(digest, "little") / 2**64
