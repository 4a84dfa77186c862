"""Splits: their names, and dividing samples by a hash of the id or with labels balanced."""

import hashlib
import math
import os
import random
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmc.store.errors import InputError

SPLITS = ("train", "val", "test")
_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_NUMBER = re.compile(r"[-_. ]*(?:shard|part)?[-_. ]*\d+(?:[-_. ]*of[-_. ]*\d+)?$", re.IGNORECASE)
_METHODS = ("hash", "stratified")
_SEED = 0


def split_named(name: str) -> str | None:
    """train, val or test when ``name`` means one of them."""
    return _NAMES.get(name.strip().lower())


def split_of_file(path: str) -> str | None:
    """The split in a file's name: `train.csv`, `val-00000-of-00003.parquet`, `test_7.tar`."""
    stem = os.path.basename(path).partition(".")[0]
    return split_named(stem) or split_named(_NUMBER.sub("", stem))


def numbered(name: str) -> bool:
    """Whether a file's name says that it is one of several: `train-00000-of-00003.parquet`."""
    return bool(_NUMBER.search(name.partition(".")[0]))


def without_number(name: str) -> str:
    """What the names of the pieces of one table share."""
    stem, _, suffix = name.partition(".")
    return f"{_NUMBER.sub('', stem)}.{suffix}"


def normalise(name: str) -> str:
    """The split's usual name; a name of the user's own stays as it is."""
    return split_named(name) or name.strip()


def parse_split_by(text: str) -> tuple[str, tuple[float, ...]]:
    """``hash:0.8,0.1,0.1`` as ("hash", (0.8, 0.1, 0.1)): shares of train, val and, if given, test.

    Raises:
        InputError: another form, shares that are negative or do not sum to 1.
    """
    method, _, rest = text.partition(":")
    try:
        shares = tuple(float(part) for part in rest.split(","))
    except ValueError:
        shares = ()
    if method not in _METHODS or not 2 <= len(shares) <= 3:
        raise InputError(
            f"cannot read split-by {text!r}; write hash:0.8,0.1,0.1 or stratified:0.8,0.1,0.1"
            " (shares of train, val, test)"
        )
    if not all(0 <= share <= 1 for share in shares) or not math.isclose(
        sum(shares), 1, abs_tol=1e-6
    ):
        raise InputError(f"the shares of split-by {text!r} must be in [0, 1] and sum to 1")
    return method, shares


def by_hash(ids: Sequence[str], shares: Sequence[float]) -> NDArray[np.int8]:
    """Split index of each id, from a hash of the id alone: stable when samples are added."""
    # 8 bytes of BLAKE2b as a fraction of 2**64, compared with the cumulated shares.
    digests = b"".join(
        hashlib.blake2b(name.encode(), digest_size=8, person=b"mmc-split").digest() for name in ids
    )
    fractions = np.frombuffer(digests, ">u8").astype(np.float64) / 2.0**64
    bounds = np.cumsum(shares)[:-1]
    return np.searchsorted(bounds, fractions, side="right").astype(np.int8)


def stratified(labels: Sequence[Sequence[int]], shares: Sequence[float]) -> NDArray[np.int8]:
    """Split index of each sample so that each label is divided by ``shares``; deterministic.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas, ECML PKDD 2011): the rarest label
    still undivided goes first; each of its samples goes to the split that lacks this label most,
    then to the one that lacks samples most. Samples without labels fill up what is left.
    """
    rng = random.Random(_SEED)
    order = list(range(len(labels)))
    rng.shuffle(order)
    holders: dict[int, list[int]] = {}
    for sample in order:
        for label in labels[sample]:
            holders.setdefault(label, []).append(sample)
    lacking = {label: [share * len(rows) for share in shares] for label, rows in holders.items()}
    room = [share * len(labels) for share in shares]
    remaining = {label: len(rows) for label, rows in holders.items()}
    assigned = np.full(len(labels), -1, np.int8)
    # A split that was asked to be empty stays so, whatever the rounding.
    open_splits = [index for index, share in enumerate(shares) if share > 0]

    def assign(sample: int, wanted: Sequence[float]) -> None:
        split = max(open_splits, key=lambda index: (wanted[index], room[index], rng.random()))
        assigned[sample] = split
        room[split] -= 1
        for label in labels[sample]:
            lacking[label][split] -= 1
            remaining[label] -= 1

    while remaining:
        label = min(remaining, key=lambda name: (remaining[name], name))
        for sample in holders[label]:
            if assigned[sample] < 0:
                assign(sample, lacking[label])
        del holders[label]
        # Labels may have run out on the way; the one just divided has.
        for name in [name for name, count in remaining.items() if count == 0]:
            del remaining[name]
    for sample in order:
        if assigned[sample] < 0:
            assign(sample, room)
    return assigned
