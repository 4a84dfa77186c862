"""Columns of any type as text, and columns of several files as one."""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmc.store.errors import InputError


def as_text(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """(N,) string: numbers as they are written, true and false, lists and objects as JSON text.

    A number that is whole in a column of floats loses its ".0": a column of integers becomes one of
    floats as soon as pandas misses a value.

    Args:
        name: of the column, for messages.

    Raises:
        InputError: bytes that are no UTF-8, or values without a text of their own.
    """
    kind = column.type
    if kind == pa.string():
        return column
    if pa.types.is_dictionary(kind):
        return as_text(pc.cast(column, kind.value_type), name)
    if pa.types.is_nested(kind):
        return _joined(
            [pa.array(map(_json, chunk.to_pylist()), pa.string()) for chunk in column.chunks]
        )
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise InputError(f"{name} holds {kind}, which is no text; choose another column") from None


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, default=str)


def joined(columns: Sequence[pa.ChunkedArray], name: str) -> pa.ChunkedArray:
    """The columns of several tables as one: of the type that holds them all, else as text.

    Raises:
        InputError: bytes in one and something else in another.
    """
    kinds = {column.type for column in columns if not pa.types.is_null(column.type)}
    try:
        schemas = [pa.schema([("x", kind)]) for kind in sorted(kinds or {pa.string()}, key=str)]
        kind = pa.unify_schemas(schemas, promote_options="permissive").field("x").type
        return _joined([chunk for column in columns for chunk in column.cast(kind).chunks], kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return _joined([chunk for column in columns for chunk in as_text(column, name).chunks])


def _joined(chunks: Sequence[pa.Array], kind: pa.DataType | None = None) -> pa.ChunkedArray:
    return pa.chunked_array(chunks, kind or pa.string())
