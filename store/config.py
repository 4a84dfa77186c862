"""Component configs: frozen keyword-only dataclasses whose field docstrings are the help text."""

import ast
import dataclasses
import difflib
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

from mmc.store.errors import InputError

T = TypeVar("T")


def field_docs(config: type) -> dict[str, str]:
    """The docstring written under each field of a dataclass, by field name (bases included)."""
    docs: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, doc in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(doc, ast.Expr)
                and isinstance(doc.value, ast.Constant)
                and isinstance(doc.value.value, str)
            ):
                docs[field.target.id] = inspect.cleandoc(doc.value.value)
    return docs


def build(config: type[T], settings: Mapping[str, Any], *, where: str) -> T:
    """Make ``config`` from ``settings``; strings are converted to each field's type.

    Raises:
        InputError: an unknown key (nearest names are given) or a value of the wrong type.
    """
    names = settable(config)
    for key in settings:
        if key not in names:
            raise InputError(f"{where} has no setting {key!r}; {nearest(key, names)}")
    return config(
        **{key: typed(config, key, value, where=where) for key, value in settings.items()}
    )


def settable(config: type) -> list[str]:
    """Names of the fields that a config is made with."""
    return [field.name for field in dataclasses.fields(config) if field.init]


def nearest(key: str, names: Sequence[str]) -> str:
    """For an error: the names that ``key`` may be a slip of the hand for, else all of them."""
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"


def typed(config: type, field: str, value: Any, *, where: str, key: str | None = None) -> Any:
    """``value`` as the type of a field of ``config``; strings are converted.

    Args:
        config: a config's class.
        field: name of the field.
        value: for it.
        where: for messages: what the setting is of.
        key: what the user calls the field, where that differs.

    Raises:
        InputError: it is of another type.
    """
    hint = typing.get_type_hints(config)[field]
    try:
        return _convert(value, hint)
    except (TypeError, ValueError) as error:
        why = f": {error}" if str(error) else ""
        raise InputError(
            f"{where} setting {key or field}={value!r} is not {_wanted(hint)}{why}"
        ) from None


def choices(config: type, field: str) -> tuple[Any, ...]:
    """The values of a field of ``config`` that takes one of a few; none where it takes others."""
    hint = typing.get_type_hints(config)[field]
    return get_args(hint) if get_origin(hint) is typing.Literal else ()


def _wanted(hint: Any) -> str:
    """A type in a user's words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("none" if arg is type(None) else _wanted(arg) for arg in args)
    if origin is typing.Literal:
        return "one of its values"
    if origin is tuple:
        return f"{_wanted(args[0])}, or several with commas"
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _convert(value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` (bool, int, float, str, Literal, tuple[X, ...], unions with None)."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        return _convert(value, next(arg for arg in args if arg is not type(None)))
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"choose from {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, str | list | tuple):
            raise TypeError(f"got {type(value).__name__}")
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(_convert(part, args[0]) for part in parts)
    if not isinstance(value, str):
        if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
            return _finite(float(value))
        if not isinstance(value, origin or hint) or (hint is int and isinstance(value, bool)):
            raise TypeError(f"got {type(value).__name__}")
        return value
    if hint is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if value.lower() not in words:
            raise ValueError("use true or false")
        return words[value.lower()]
    try:
        number = hint(value)
    except ValueError:  # Python's words for it say no more
        raise ValueError from None
    return _finite(number) if hint is float else number


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("it must be finite")
    return value
