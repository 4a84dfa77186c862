"""Validation samples out of the training samples: a share of every class."""

from typing import Any

import numpy as np
import numpy.typing as npt

from mmc.store.errors import InputError


def hold_out(
    targets: npt.NDArray[np.signedinteger[Any]], fraction: float, seed: int
) -> npt.NDArray[np.bool_]:
    """Mask (n,) of the samples that validate, ``fraction`` of each class where it has enough.

    Samples are drawn at even steps from a list in which each class stands together, in random
    order. With several labels a sample stands with its rarest one, as in iterative stratification
    (Sechidis et al. 2011). No class is held out as a whole.

    Args:
        targets: int8 (n, C) in {-1, 0, 1}, or class indices (n,).
        fraction: in (0, 1).

    Raises:
        InputError: too few samples to hold any out.
    """
    stratum = targets if targets.ndim == 1 else _rarest(targets)
    order = np.random.default_rng(seed).permutation(len(stratum))
    order = order[np.argsort(stratum[order], kind="stable")]
    steps = np.floor(np.arange(len(order) + 1) * fraction + 0.5)
    held = np.zeros(len(order), bool)
    held[order[np.diff(steps) > 0]] = True
    sizes = np.bincount(stratum)
    if not held.any() and sizes.max() > 1:
        # Out of the largest class: it can spare one best.
        held[order[stratum[order] == sizes.argmax()][0]] = True
    for lost in np.flatnonzero(
        (sizes > 0) & (np.bincount(stratum[held], minlength=len(sizes)) == sizes)
    ):
        held[order[stratum[order] == lost][0]] = False
    if not held.any():
        raise InputError(
            f"{len(held)} samples are too few to hold some out for validation; give X_val and y_val"
        )
    return held


def _rarest(hot: npt.NDArray[np.signedinteger[Any]]) -> npt.NDArray[np.int64]:
    """(n,) the rarest label that each row has; C where it has none."""
    yes = hot == 1
    counts = np.append(yes.sum(0), len(hot) + 1)
    by_rarity = np.argsort(counts[:-1], kind="stable")
    first = yes[:, by_rarity].argmax(1)
    return np.where(yes.any(1), by_rarity[first], hot.shape[1]).astype(np.int64)
