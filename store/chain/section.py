"""One mapping of a recipe, read key by key; whatever is wrong is told with its file and line."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

from mmc.store.chain.document import Node
from mmc.store.config import nearest, settable, typed
from mmc.store.errors import InputError

T = TypeVar("T")


@contextmanager
def located(where: str, name: str) -> Iterator[None]:
    """Put ``where: name:`` before the message of any `InputError` raised inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {name}: {error}") from None


class Section:
    """A mapping whose keys are taken one after another; `finish` refuses what is left."""

    def __init__(self, node: Node, name: str) -> None:
        self.where, self.name = node.where, name
        if node.value is None:
            node = Node({}, node.where)
        if not isinstance(node.value, dict):
            raise InputError(
                f"{node.where}: {name} must hold keys and values, got {node.plain()!r}"
            )
        self._left: dict[str, Node] = dict(node.value)
        self._known: list[str] = []

    def node(self, key: str, *, bare: bool = False) -> Node | None:
        """The value of ``key``, whatever it is; None where it is not given, or is false.

        Args:
            key: of this mapping.
            bare: whether the key alone says something, as ``compare:`` does; else null is nothing.
        """
        self._known.append(key)
        found = self._left.pop(key, None)
        if found is None or found.value is False or (found.value is None and not bare):
            return None
        return found

    def text(self, key: str) -> str | None:
        """The value of ``key``, which must be text.

        Raises:
            InputError: it is something else, or empty.
        """
        node = self.node(key)
        return None if node is None else text_of(node, f"{self.name}.{key}")

    def texts(self, key: str) -> list[Node]:
        """The values of ``key``: a text or a list of them.

        Raises:
            InputError: it holds something else.
        """
        node = self.node(key)
        if node is None:
            return []
        items = node.value if isinstance(node.value, tuple) else (node,)
        for item in items:
            text_of(item, f"{self.name}.{key}")
        return list(items)

    def config(
        self,
        config: type[T],
        *,
        omit: Collection[str] = (),
        renamed: Mapping[str, str] | None = None,
        whole: Collection[str] = (),
        **fixed: Any,
    ) -> tuple[T, dict[str, Any]]:
        """Take all keys that are fields of ``config``: it, and what was given.

        Args:
            config: a config's class.
            omit: fields that a recipe cannot set.
            renamed: field -> key, where they differ.
            whole: fields of several values for which a text is one value, commas and all.
            fixed: values of fields that a recipe does not give as keys.

        Raises:
            InputError: a value of the wrong type, or one that ``config`` refuses.
        """
        keys = {
            (renamed or {}).get(field, field): field
            for field in settable(config)
            if field not in omit and field not in fixed
        }
        self._known += keys
        values: dict[str, Any] = {}
        places: dict[str, tuple[str, str]] = {}
        for key in [key for key in self._left if key in keys]:
            node, field = self._left.pop(key), keys[key]
            value = node.plain()
            if value == "":
                raise InputError(f"{node.where}: {self.name}.{key} is empty; leave it out")
            value = [value] if field in whole and isinstance(value, str) else value
            where = f"{node.where}: {self.name}"
            values[field] = typed(config, field, value, where=where, key=key)
            places[field] = node.where, key
        try:
            return config(**fixed, **values), values
        except InputError as error:
            for field, value in values.items():  # which of them is it? alone it is refused alike
                where, key = places[field]
                try:
                    config(**fixed, **{field: value})
                except InputError as alone:
                    said, name = str(error), f"{self.name}.{key}"
                    if str(alone) != said:
                        continue
                    if said.startswith(where):  # it names the option by itself
                        raise InputError(said) from None
                    name = "" if said.startswith(name) else f"{name}: "
                    raise InputError(f"{where}: {name}{said}") from None
            raise InputError(f"{self.where}: {self.name}: {error}") from None

    def entries(self) -> list[tuple[str, Node]]:
        """All that is left, in order; for a section whose keys are names."""
        found, self._left = list(self._left.items()), {}
        return found

    def finish(self, meant: Callable[[str], str] = lambda key: "") -> None:
        """Raises InputError where a key is left that nobody took.

        Args:
            meant: for the message: what the key may be meant for; empty: unknown.
        """
        for key, node in self._left.items():
            hint = meant(key) or nearest(key, list(dict.fromkeys(self._known)))
            raise InputError(f"{node.where}: {self.name} has no key {key!r}; {hint}")


def text_of(node: Node, name: str) -> str:
    """The text that a node holds.

    Raises:
        InputError: it holds something else, or nothing.
    """
    if not isinstance(node.value, str) or not node.value.strip():
        raise InputError(f"{node.where}: {name} must be text, got {node.plain()!r}")
    return node.value


def given(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``values`` is not the default anyway, JSON-able: the settings of a step."""
    defaults = {field.name: field.default for field in fields(config)}
    return {
        key: list(value) if isinstance(value, tuple) else _plain(value)
        for key, value in values.items()
        if value != defaults[key]
    }


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
