"""The y of scikit-learn: classes of any type or multi-hot rows <-> a task, label names, targets.

Legend: n samples, C labels.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy.sparse import issparse
from sklearn.utils import check_array, check_consistent_length, column_or_1d
from sklearn.utils.multiclass import check_classification_targets

from mmc.store.errors import InputError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Classes:
    """What y can hold."""

    task: str
    """multilabel, multiclass or binary."""
    values: Array
    """(C,): the classes in order; for multilabel the names of the columns, or their numbers."""

    @property
    def names(self) -> tuple[str, ...]:
        """Label names, as a run has them."""
        return tuple(str(value) for value in self.values)

    @classmethod
    def learn(cls, y: Any, count: int) -> tuple[Self, Array]:
        """The classes of ``y`` and its targets: int8 (n, C) in {-1, 0, 1}, or int64 (n,).

        Args:
            count: n, the samples of X.

        Raises:
            ValueError: y has another length, is not one of the forms, or has a single class.
        """
        array = _read(y, count)
        if array.ndim == 2:
            columns = getattr(y, "columns", None)
            values = np.arange(array.shape[1]) if columns is None else np.asarray(columns)
            if len(set(map(str, values))) < len(values):
                raise InputError("two columns of y have the same name")
            return cls("multilabel", values), array
        check_classification_targets(array)
        values, targets = np.unique(array, return_inverse=True)
        if len(values) < 2:
            raise InputError(
                f"y has one class only ({values[0]!r}): there is nothing to tell apart"
            )
        task = "binary" if len(values) == 2 else "multiclass"
        return cls(task, values), targets.astype(np.int64)

    def encode(self, y: Any, count: int, name: str = "y") -> Array:
        """Targets of another y.

        Raises:
            ValueError: it has another length or form, or a class that is not known.
        """
        array = _read(y, count, name)
        if (array.ndim == 2) != (self.task == "multilabel"):
            raise InputError(f"{name} has {array.ndim} dimensions; the classifier is {self.task}")
        if array.ndim == 2:
            if array.shape[1] != len(self.values):
                raise InputError(
                    f"{name} has {array.shape[1]} columns; y had {len(self.values)} when fitted"
                )
            return array
        strange = sorted(set(array.tolist()) - set(self.values.tolist()), key=str)
        if strange:
            shown = ", ".join(map(repr, strange[:5]))
            raise InputError(f"{name} has classes that y has not: {shown}")
        return np.searchsorted(self.values, array).astype(np.int64)

    def decode(self, decisions: npt.NDArray[np.bool_]) -> Array:
        """Decisions (n, C) -> what y would hold: multi-hot int64 (n, C), or classes (n,)."""
        if self.task == "multilabel":
            return decisions.astype(np.int64)
        return self.values[decisions.argmax(1)]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary that `from_json` reads back."""
        return {"dtype": self.values.dtype.str, "values": self.values.tolist()}

    @classmethod
    def from_json(cls, task: str, data: dict[str, Any]) -> Self:
        """Classes from what `to_json` gave."""
        return cls(task, np.array(data["values"], dtype=data["dtype"]))


def _read(y: Any, count: int, name: str = "y") -> Array:
    """``y`` as classes (n,), or as multi-hot int8 (n, C) of -1, 0 and 1."""
    if y is None:
        raise InputError(f"HeadClassifier requires {name} to be passed, but the target y is None")
    if _has_lists(y):
        raise InputError(
            f"{name} holds lists of labels; make them a multi-hot array with "
            "sklearn.preprocessing.MultiLabelBinarizer().fit_transform(y)"
        )
    array = check_array(
        y.toarray() if issparse(y) else y, ensure_2d=False, dtype=None, input_name=name
    )
    check_consistent_length(np.empty(count), array)
    if array.ndim == 1 or array.shape[1] == 1:
        return column_or_1d(array, warn=True)
    numbers = array.dtype.kind in "biuf"
    if not numbers or not np.isin(array, (-1, 0, 1)).all():
        raise InputError(
            f"{name} of several columns must hold 0 and 1 (and -1 for unknown), a column per "
            "label; sklearn.preprocessing.MultiLabelBinarizer makes that of lists of labels"
        )
    return array.astype(np.int8)


def _has_lists(y: Any) -> bool:
    """Whether each sample has a list of labels: of names, or of different lengths."""
    if isinstance(y, str | bytes) or not hasattr(y, "__iter__") or getattr(y, "ndim", 1) != 1:
        return False
    rows = [row for row in y if isinstance(row, list | tuple | set | frozenset)]
    return bool(rows) and (
        len({len(row) for row in rows}) > 1
        or any(isinstance(row, set | frozenset) for row in rows)
        or any(isinstance(value, str) for row in rows for value in row)
    )
