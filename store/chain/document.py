"""A YAML file as values that know their line, and ``--set key=value`` on top of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from mmc.store.errors import InputError

WHOLE = "set"
"""What follows this key in a ``--set`` is one key, dots and all: ``heads.a.set.head.hidden``."""


@dataclass(frozen=True)
class Node:
    """A value of a recipe and where it was written."""

    value: Any
    """dict of str to Node, tuple of Node, str, int, float, bool or None."""
    where: str
    """``file:line`` of its key, or the ``--set`` that gave it."""

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, tuple):
            return [node.plain() for node in self.value]
        return self.value


def parse(text: str, name: str) -> Node:
    """Read YAML, as ``yaml.safe_load`` does, keeping the lines.

    Args:
        text: of the file.
        name: of the file, for messages.

    Raises:
        InputError: not YAML, a key that is given twice or is no text, a value that is neither text
            nor a number; the message starts with ``name:line``.
    """
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise InputError(f"{name} is empty")
        return Node(_Converter(loader, name).value(root, 1), f"{name}:1")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{name}{line}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{name}: not YAML: {' '.join(str(error).split())}") from None


class _Converter:
    """From PyYAML's nodes to plain values."""

    def __init__(self, loader: Any, name: str) -> None:
        self._loader, self._name = loader, name
        self._done: dict[int, Any] = {}
        self._open: set[int] = set()

    def value(self, node: Any, line: int) -> Any:
        """What a node holds. Anchors make one node stand at several places: convert it once."""
        if id(node) in self._open:
            raise InputError(f"{self._name}:{line}: an alias stands inside what it means")
        if id(node) not in self._done:
            self._open.add(id(node))
            self._done[id(node)] = self._convert(node, line)
            self._open.remove(id(node))
        return self._done[id(node)]

    def _convert(self, node: Any, line: int) -> Any:
        if not isinstance(node, yaml.ScalarNode) and node.tag not in _TAGS:
            raise InputError(f"{self._name}:{line}: the tag {node.tag} is not known")
        if isinstance(node, yaml.SequenceNode):
            return tuple(self._placed(child, child.start_mark.line + 1) for child in node.value)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node)
        value = self._loader.construct_object(node)
        if value is not None and not isinstance(value, str | int | float):
            kind = type(value).__name__
            raise InputError(
                f"{self._name}:{line}: {node.value} is read as a {kind}; put it in quotes"
            )
        return value

    def _mapping(self, node: Any) -> dict[str, Node]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = self._key(key), key.start_mark.line + 1
            if name in lines and name != "<<":
                raise InputError(
                    f"{self._name}:{line}: {name!r} is given twice, first in line {lines[name]}"
                )
            lines[name] = line
        self._loader.flatten_mapping(node)  # `<<: *other`; what stands here itself comes last
        return {
            self._key(key): self._placed(child, key.start_mark.line + 1)
            for key, child in node.value
        }

    def _key(self, key: Any) -> str:
        name = self._loader.construct_object(key) if key.tag != _MERGE else "<<"
        if not isinstance(name, str):
            shown = getattr(key, "value", key)
            raise InputError(
                f"{self._name}:{key.start_mark.line + 1}: the key {shown} is no text; put it in "
                "quotes"
            )
        return name

    def _placed(self, node: Any, line: int) -> Node:
        return Node(self.value(node, line), f"{self._name}:{line}")


_MERGE = "tag:yaml.org,2002:merge"
_TAGS = ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")


def override(root: Node, pairs: Sequence[str], example: str = "heads.linear.lr=0.001") -> Node:
    """``root`` with each ``key.key=value`` set; values are YAML, later pairs win.

    Args:
        root: what it is set on.
        pairs: as the user wrote them.
        example: of a pair, for messages.

    Raises:
        InputError: not of that form, or a key of something that has no keys.
    """
    for pair in pairs:
        path, equals, text = pair.partition("=")
        where = f"--set {pair}"
        if not (equals and path.strip()):
            raise InputError(f"{where}: write key.key=value, such as {example}")
        value = parse(text, where).value if text.strip() else None
        root = _placed(root, path.strip(), Node(_moved(value, where), where), where)
    return root


def _moved(value: Any, where: str) -> Any:
    """``value`` with one place for all that is in it."""
    if isinstance(value, dict):
        return {key: Node(_moved(node.value, where), where) for key, node in value.items()}
    if isinstance(value, tuple):
        return tuple(Node(_moved(node.value, where), where) for node in value)
    return value


def _placed(node: Node, path: str, new: Node, where: str) -> Node:
    """A copy of ``node`` in which ``path`` is ``new``."""
    if not path:
        return new
    if isinstance(node.value, tuple):
        first, _, rest = path.partition(".")
        if not first.isdecimal() or int(first) >= len(node.value):
            raise InputError(
                f"{where}: {node.where} is a list of {len(node.value)}; say which, from 0"
            )
        at = int(first)
        inner = _placed(node.value[at], rest, new, where)
        return Node((*node.value[:at], inner, *node.value[at + 1 :]), node.where)
    if node.value is not None and not isinstance(node.value, dict):
        raise InputError(f"{where}: {node.where} holds {node.value!r}, which has no keys")
    items = dict(node.value or {})
    # A name may have dots in it.
    known = [key for key in items if path == key or path.startswith(f"{key}.")]
    first = max(known, key=len) if known else path.partition(".")[0]
    rest = path[len(first) + 1 :]
    inner = items.get(first, Node(None, where))
    if first == WHOLE and rest:
        inner = _placed_whole(inner, rest, new, where)
    else:
        inner = _placed(inner, rest, new, where)
    return Node({**items, first: inner}, node.where)


def _placed_whole(node: Node, key: str, new: Node, where: str) -> Node:
    if node.value is not None and not isinstance(node.value, dict):
        raise InputError(f"{where}: {node.where} holds {node.value!r}, which has no keys")
    return Node({**(node.value or {}), key: new}, node.where)
