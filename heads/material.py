"""What trainings on the same store can share: rows, labels, fitted scales and prepared samples."""

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmc.heads import memory, splits
from mmc.heads.splits import Splits

if TYPE_CHECKING:
    from mmc.heads.models.base import Head
    from mmc.store import EmbeddingStore


T = TypeVar("T")


class Material:
    """Makes each of them when it is first asked for, and keeps it.

    Of prepared samples, which fill the memory, only those asked for last are kept: trainings that
    prepare alike should follow each other.

    Args:
        store: where everything comes from.
        chosen: the rows to use; None: by the store's splits.
    """

    def __init__(self, store: "EmbeddingStore", chosen: Splits | None = None) -> None:
        self.store = store
        self._chosen = chosen
        # Splits are kept here as well, so that their `id` names them.
        self._kept: dict[Hashable, Any] = {}
        self._prepared: tuple[Hashable, Any] | None = None

    def splits(self, features: Mapping[str, str], *, trains: bool) -> Splits:
        """See `mmc.heads.splits.choose`."""
        if self._chosen is not None:
            return self._chosen
        names = tuple(features.values())
        return self._once(
            ("splits", names, trains), lambda: splits.choose(self.store, names, trains=trains)
        )

    def digest(self, chosen: Splits) -> str:
        """See `mmc.heads.splits.digest`."""
        return self._once(("digest", id(chosen)), lambda: splits.digest(chosen, self.store))

    def counts(self, chosen: Splits) -> tuple[Tensor, Tensor]:
        """Training rows that have each label, and those for which it is known, float64 (C,)."""

        def count() -> tuple[Tensor, Tensor]:
            labels, rows = self.store.labels, chosen.train
            return (
                torch.from_numpy(labels.counts(rows)).double(),
                torch.from_numpy(labels.known_counts(rows)).double(),
            )

        positives, known = self._once(("counts", id(chosen)), count)
        return positives.clone(), known.clone()

    def label_rows(self, chosen: Splits) -> tuple[Tensor, Tensor]:
        """Labels of the training rows, as (indptr (n + 1,), indices), int64."""

        def look_up() -> tuple[Tensor, Tensor]:
            indptr, indices = splits.label_rows(self.store, chosen.train)
            return torch.from_numpy(indptr), torch.from_numpy(indices)

        return self._once(("label rows", id(chosen)), look_up)

    def unknown_rows(self, chosen: Splits) -> tuple[Tensor, Tensor] | None:
        """Single labels that training rows do not know, in the same form; None: there are none."""
        labels = self.store.labels
        if not labels.partly:
            return None
        indptr, indices = labels.unknown(chosen.train)
        return torch.from_numpy(indptr), torch.from_numpy(indices.astype(np.int64))

    def fit_inputs(self, head: "Head", reads: Hashable, fit: Callable[[], None]) -> None:
        """``fit`` the head's inputs, or take over what a head of the same preparation found.

        Args:
            reads: which fields of which rows.
        """
        shared = head.preparation()
        if shared is None:
            fit()
            return
        form, module = shared

        def fitted() -> dict[str, Tensor]:
            fit()
            return {name: value.cpu().clone() for name, value in module.state_dict().items()}

        module.load_state_dict(self._once(("fitted", reads, form), fitted))

    def prepared(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gives, or gave the last time if that was under the same ``key``."""
        if self._prepared is None or self._prepared[0] != key:
            self.release()
            self._prepared = (key, make())
        found: T = self._prepared[1]
        return found

    def release(self) -> None:
        """Forget the prepared samples, before what comes next is given their room."""
        self._prepared = None

    def plan(self, key: Hashable, make: Callable[[], memory.Plan]) -> memory.Plan:
        """The plan under ``key``, made when what was prepared before has left the memory."""
        if ("plan", key) not in self._kept:
            self.release()
        return self._once(("plan", key), make)

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._kept:
            self._kept[key] = make()
        found: T = self._kept[key]
        return found
