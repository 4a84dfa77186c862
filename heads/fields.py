"""Samples in memory: several arrays with a row per sample each, which scikit-learn can divide.

Legend: n samples.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import issparse

from mmc.store.errors import InputError

Array = npt.NDArray[Any]


class Fields:
    """Arrays by name, (n, ...) each: what a dictionary of arrays cannot be to scikit-learn.

    It has a length, and ``fields[rows]`` is another one, so that ``cross_val_score``,
    ``train_test_split`` and ``GridSearchCV`` take it for X. Nothing is copied unless it has to be
    converted.

    Args:
        arrays: by field (``image``, ``text_tokens``), or by feature (``clip/image``) where several
            backbones give the same field. Floats are kept as float16 or float32 and otherwise
            become float32; a ``..._mask`` becomes bool; whole numbers stay as they are.

    Raises:
        InputError: a name or an array that cannot be used, or arrays of different lengths.
    """

    def __init__(self, arrays: Mapping[str, npt.ArrayLike]) -> None:
        if not arrays:
            raise InputError("X is an empty dictionary: give arrays by field, such as image=...")
        self._arrays = {_name(name): _array(name, values) for name, values in arrays.items()}
        lengths = {name: len(values) for name, values in self._arrays.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
            raise InputError(f"the arrays of X differ in their number of samples: {found}")

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __getitem__(self, key: Any) -> Any:
        """The array of a name; or the samples of rows (numbers, mask, slice) as `Fields`."""
        if isinstance(key, str):
            if key not in self._arrays:
                raise InputError(f"X has no {key!r}; it has: {', '.join(self._arrays)}")
            return self._arrays[key]
        if isinstance(key, tuple):  # scikit-learn asks for [rows, ...]
            key = key[0]
        if isinstance(key, int | np.integer):
            key = [int(key)]
        taken = Fields.__new__(Fields)
        taken._arrays = {name: values[key] for name, values in self._arrays.items()}
        return taken

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {values.shape}" for name, values in self._arrays.items())
        return f"Fields({shapes})"

    @property
    def shape(self) -> tuple[int]:
        """(n,)."""
        return (len(self),)

    def items(self) -> Iterator[tuple[str, Array]]:
        """(name, array) of each."""
        return iter(self._arrays.items())

    def joined(self, other: "Fields") -> "Fields":
        """The samples of both, these first.

        Raises:
            InputError: they do not have the same fields.
        """
        for name, values in self._arrays.items():
            if name not in other._arrays or other[name].shape[1:] != values.shape[1:]:
                raise InputError(f"X_val must have {name} of shape (n, {_row_shape(values)}) as X")
        return Fields({name: np.concatenate([a, other[name]]) for name, a in self._arrays.items()})

    def check_finite(self) -> None:
        """Raise InputError where a float is NaN or infinite."""
        for name, values in self._arrays.items():
            if values.dtype.kind != "f":
                continue
            with np.errstate(invalid="ignore", over="ignore"):
                if np.isfinite(values.sum(dtype=np.float64)):
                    continue
            bad = ~np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
            raise InputError(
                f"{name} has NaN or infinite values in {int(bad.sum()):,} of {len(values):,} "
                f"samples (first: {int(bad.argmax())}); leave those out, or fill them"
            )


def as_fields(X: Any) -> Any:
    """A dictionary of arrays as `Fields`; anything else (SciPy's sparse dictionaries) as it is."""
    return Fields(X) if isinstance(X, Mapping) and not issparse(X) else X


def _name(name: object) -> str:
    parts = name.split("/") if isinstance(name, str) else []
    if not all(parts) or len(parts) not in (1, 2) or set("=,") & set(str(name)):
        raise InputError(f"{name!r} is no name of a field: write image, or alias/image")
    return str(name)


def _array(name: str, values: npt.ArrayLike) -> Array:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is not an array: {error}") from None
    if array.ndim < 1 or array.dtype.kind not in "fiub":
        raise InputError(
            f"{name} must be an array of numbers with a row per sample, got shape {array.shape} "
            f"of {array.dtype}"
        )
    if name.endswith("_mask"):
        return array.astype(bool, copy=False)
    if array.dtype.kind == "f" and array.dtype not in (np.float16, np.float32):
        with np.errstate(over="ignore"):  # told by check_finite
            return array.astype(np.float32)
    return array


def _row_shape(values: Array) -> str:
    return ", ".join(map(str, values.shape[1:]))
