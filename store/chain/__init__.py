"""Recipes: a chain of steps declared in a YAML file, of which only what changed is run again.

What a step does is nothing to this package: `mmc.extract.steps` and `mmc.heads.steps` describe
theirs to it, as neither may know the other. It reads the file, says where in it a mistake is,
remembers what was made of what, and decides which steps run.
"""

from mmc.store.chain.document import Node
from mmc.store.chain.recipe import Recipe, open_recipe
from mmc.store.chain.running import Outcome, run_steps
from mmc.store.chain.section import Section, given, located, text_of
from mmc.store.chain.step import ABSENT, Result, Start, Step, path_state, store_state

__all__ = [
    "ABSENT",
    "Node",
    "Outcome",
    "Recipe",
    "Result",
    "Section",
    "Start",
    "Step",
    "given",
    "located",
    "open_recipe",
    "path_state",
    "run_steps",
    "store_state",
    "text_of",
]
