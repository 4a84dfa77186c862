"""Arrays in memory, read as if they were a store: what a training and a prediction ask of one.

Legend: n samples, C labels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmc.heads.artifact import Run
from mmc.heads.featureref import ARRAYS, ARRAYS_ALIAS
from mmc.heads.fields import Array, Fields
from mmc.store.errors import InputError
from mmc.store.samples import Labels
from mmc.store.schema import DONE, Provenance

PROVENANCE = Provenance(identity=ARRAYS, context={"spec": "arrays"})
"""Who made an array is not known."""

FIELD = "x"
"""What an X that is one array is called."""

Rows = npt.NDArray[np.int64]


class ArrayFeature:
    """One array, (n, ...), in the manner of :class:`mmc.store.Feature`."""

    tower = "array"
    """None of a store's: what the array was made from is not known."""
    chunk_rows = 1
    """No rows share a checksum."""

    def __init__(self, name: str, values: Array) -> None:
        self.name = name
        self.alias = name.split("/", 1)[0]
        self.fingerprint = PROVENANCE.fingerprint
        self.shape, self.dtype = values.shape, values.dtype
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    @property
    def done(self) -> npt.NDArray[np.bool_]:
        """(n,) True: every sample is there."""
        return np.ones(len(self), bool)

    def take(self, rows: Rows | slice, *, out: Array | None = None, **_: Any) -> Array:
        """A copy of ``rows``: the caller's array may be read-only, and is never written to.

        What else :meth:`mmc.store.Feature.take` can be told is of no matter here: no sample is
        missing, and no checksum exists.
        """
        if out is None:
            return np.array(self._values[rows])
        np.copyto(out, self._values[rows])
        return out


class ArrayStore:
    """Arrays with their labels, in the manner of :class:`mmc.store.EmbeddingStore`.

    Args:
        fields: the arrays.
        task: multilabel, multiclass, binary; unlabelled to predict.
        label_set: names of the labels.
        targets: int8 (n, C) in {-1, 0, 1} for multilabel, else class indices (n,); None to predict.
        val: (n,) which samples validate; the others train.
        source: recorded in the run.
    """

    path = "X"

    def __init__(
        self,
        fields: Fields,
        *,
        task: str = "unlabelled",
        label_set: Sequence[str] = (),
        targets: npt.NDArray[Any] | None = None,
        val: npt.NDArray[np.bool_] | None = None,
        source: dict[str, Any] | None = None,
    ) -> None:
        self._count = len(fields)
        self._features = {_full_name(name): values for name, values in fields.items()}
        self.task, self.label_set = task, tuple(label_set)
        self.labels = _labels(targets, self._count, len(self.label_set))
        self.sources = [source] if source else []
        self._val = np.zeros(self._count, bool) if val is None else val

    def __len__(self) -> int:
        return self._count

    @property
    def features(self) -> tuple[str, ...]:
        """Names of all features, ``alias/field``."""
        return tuple(self._features)

    @property
    def aliases(self) -> tuple[str, ...]:
        """What stands before the slash, each once."""
        return tuple(dict.fromkeys(name.split("/", 1)[0] for name in self._features))

    def __getitem__(self, name: str) -> ArrayFeature:
        if name not in self._features:
            raise InputError(f"X has no {name!r}; it has: {', '.join(self._features)}")
        return ArrayFeature(name, self._features[name])

    def rows(
        self,
        split: str | None = None,
        features: Sequence[str] | None = None,
        labelled: bool | None = None,
    ) -> Rows:
        """Rows of a split, labelled or not, ascending; every row has every feature."""
        wanted = np.ones(self._count, bool)
        if split is not None:
            wanted = {"train": ~self._val, "val": self._val}.get(split, ~wanted)
        if labelled is not None:
            wanted = wanted & (self.labels.known == labelled)
        return np.flatnonzero(wanted)

    def status(self, alias: str, tower: str) -> npt.NDArray[np.uint8]:
        """(n,): done, all of them."""
        return np.full(self._count, DONE, np.uint8)

    def column(self, name: str) -> pa.ChunkedArray:
        """The only column there is: ``id``, the samples' numbers as text."""
        assert name == "id", name
        return pa.chunked_array([pa.array(np.arange(self._count)).cast(pa.string())])

    def provenance(self, alias: str) -> Provenance:
        """That it was given as an array."""
        return PROVENANCE

    def full_names(self, items: Sequence[str]) -> tuple[str, ...]:
        """Features or roles of them as they are called here: ``role=image`` has an alias then."""
        found = []
        for item in items:
            role, equals, name = item.rpartition("=")
            full = _full_name(name)
            found.append(f"{role}{equals}{full if full in self._features else name}")
        return tuple(found)

    def label_text(self, alias: str) -> None:
        """None: arrays come without texts of labels."""


def _labels(targets: npt.NDArray[Any] | None, count: int, num_labels: int) -> Labels:
    if targets is None:
        nothing = np.zeros(count + 1, np.int64)
        return Labels(nothing, np.empty(0, np.int32), np.zeros(count, bool), num_labels)
    if targets.ndim == 2:
        return Labels.of_hot(targets)
    one_each = np.arange(count + 1, dtype=np.int64)
    return Labels(one_each, targets.astype(np.int32), np.ones(count, bool), num_labels)


def fields_of(run: Run, fields: Fields) -> Fields:
    """Those that a run on arrays reads, in the shapes that it was trained on.

    Raises:
        InputError: one is not there, or has another shape.
    """
    shapes = {ref.given_name: ref.shape for ref in run.features.values()}
    found = Fields({name: fields[name] for name in shapes})
    for name, values in found.items():
        if values.shape[1:] != shapes[name]:
            raise InputError(
                f"{name} of X has shape {values.shape[1:]} per sample, and had {shapes[name]} when "
                "the classifier was fitted"
            )
    return found


def _full_name(name: str) -> str:
    """``image`` -> ``arrays/image``; ``clip/image`` stays."""
    return name if "/" in name else f"{ARRAYS_ALIAS}/{name}"
