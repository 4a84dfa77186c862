"""Some rows of a store, in the manner of the whole."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mmc.store.errors import InputError

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore


class StoreRows:
    """A store whose `rows` are among those given; everything else is the store's own.

    Args:
        rows: numbers, or a mask (N,).

    Raises:
        InputError: rows outside the store.
    """

    def __init__(self, store: "EmbeddingStore", rows: npt.ArrayLike) -> None:
        self._store = store
        self._wanted = np.zeros(len(store), bool)
        given = np.asarray(rows)
        mask = given.dtype == np.bool_ and len(given) == len(store)
        numbers = given.dtype.kind in "iu" and bool(((given >= 0) & (given < len(store))).all())
        if given.ndim != 1 or not (mask or numbers):
            raise InputError(f"rows must be numbers below {len(store):,}, or a mask of so many")
        self._wanted[given] = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __getitem__(self, name: str) -> Any:
        return self._store[name]

    def __len__(self) -> int:
        return len(self._store)

    def rows(
        self,
        split: str | None = None,
        features: Sequence[str] | None = None,
        labelled: bool | None = None,
    ) -> npt.NDArray[np.int64]:
        """See :meth:`mmc.store.EmbeddingStore.rows`."""
        found = self._store.rows(split, features, labelled)
        return found[self._wanted[found]]
