"""A tree of labels, such as animal over cat and dog, and its levels.

A name may stand below several parents, and below itself: "above" means along any path.
"""

from collections.abc import Mapping, Sequence

from mmc.extract.sources.base import LabelLevel
from mmc.store.errors import InputError

Tree = Mapping[str, Sequence[str]]
"""Parent -> children."""


def tree_names(tree: Tree) -> tuple[str, ...]:
    """All parents and children, in alphabetical order."""
    return tuple(sorted({*tree, *(child for children in tree.values() for child in children)}))


def at_level(tree: Tree, level: LabelLevel, where: str) -> dict[str, tuple[str, ...]]:
    """For each name, what it counts as: itself, nothing, or at the top all top names above it.

    Raises:
        InputError: the tree has no such level: every name is below another, or above one.
    """
    names = tree_names(tree)
    if level == "all":
        return {name: (name,) for name in names}
    parents = {name: [p for p, children in tree.items() if name in children] for name in names}
    if level == "leaf":
        kept = {name for name in names if not tree.get(name)}
        up = {name: {name} for name in names}
    else:
        kept = {name for name in names if not parents[name]}
        up = {name: _above(name, parents) for name in names}
    if not kept:
        raise InputError(f"{where}: no label is at level {level}: its parents go round in a circle")
    return {name: tuple(sorted(up[name] & kept)) for name in names}


def _above(name: str, parents: Mapping[str, Sequence[str]]) -> set[str]:
    """``name`` and everything above it."""
    found, todo = {name}, [name]
    while todo:
        new = set(parents[todo.pop()]) - found
        found |= new
        todo += new
    return found
