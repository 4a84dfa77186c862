"""Which samples validate where no split says so: the same for everything that trains on them."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

HELD_OUT = 0.1
"""Share of the training samples."""


def held_out(names: Sequence[str], least: int = 1) -> npt.NDArray[np.bool_]:
    """Mask (n,) of the samples that validate, by a hash of the name: stable when others are added.

    Samples of one name (see `names_of`) stay on one side, unless all have the same one. At least
    one validates and one trains, if there are two.

    Args:
        names: n of them.
        least: so many different names validate, if one is left to train. Those of a smaller number
            are among them.
    """
    keys = np.array([_unit_hash(str(name)) for name in names])
    held: npt.NDArray[np.bool_] = keys < HELD_OUT
    if len(keys) < 2:
        return held
    if keys.min() == keys.max():
        held[:] = np.arange(len(keys)) == 0
        return held
    if len(np.unique(keys[held])) < least:
        different = np.unique(keys)
        held = keys <= different[min(least, len(different) - 1) - 1]
    if held.all():
        held = keys != keys.max()
    return held


def names_of(
    ids: pa.ChunkedArray, pictures: pa.ChunkedArray, rows: npt.NDArray[np.int64]
) -> list[str]:
    """What `held_out` takes so that all samples of one picture stay on one side.

    A sample goes by its id, but by its picture's key where another sample has the same picture, as
    where a picture has several captions. All samples are asked, not only ``rows``: what trains on
    other rows of the same samples must hold out the same ones.

    Args:
        ids: (N,) of all samples.
        pictures: (N,) key of each one's picture; null = none.
        rows: (n,) those that are named.
    """
    encoded = pictures.combine_chunks().dictionary_encode()
    codes = pc.fill_null(encoded.indices, -1).to_numpy()
    shared = np.bincount(codes[codes >= 0], minlength=1) > 1
    own = pc.if_else(pa.array((codes >= 0) & shared[codes]), pictures.combine_chunks(), ids)
    names: list[str] = own.take(pa.array(rows)).to_pylist()
    return names


def _unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"mmc-val").digest()
    return int.from_bytes(digest, "little") / 2**64
