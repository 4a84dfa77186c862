"""The steps of a recipe from a store to predictions: heads, compare, evaluate, predict.

Imports no torch before a step runs or the settings of a head are checked.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from mmc.heads.losses import GROUP as LOSS_GROUP
from mmc.heads.losses import LOSSES
from mmc.heads.models import GROUP as HEAD_GROUP
from mmc.heads.models import HEADS
from mmc.heads.options import (
    GROUPS,
    Configs,
    TrainConfig,
    build_part,
    configs_of,
    elsewhere,
)
from mmc.heads.runstate import run_state
from mmc.heads.search.grid import settings as sweep_settings
from mmc.heads.steps_after import BEST, Joined, Readers
from mmc.store.chain import (
    ABSENT,
    Node,
    Recipe,
    Result,
    Section,
    Start,
    Step,
    given,
    located,
    path_state,
    store_state,
)
from mmc.store.config import nearest
from mmc.store.errors import InputError
from mmc.store.registry import lookup
from mmc.store.schema import check_name

__all__ = ["Joined", "head_steps"]

BASE = "head.base"
"""The setting that names another run."""
TAKEN = (BEST, "prepare", "caption", "extract", "train", "compare", "evaluate", "predict")
"""No names for runs: steps have them."""
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names that Windows keeps for devices."""


def head_steps(
    recipe: Recipe,
    store: str,
    fields: Mapping[str, Sequence[str] | None] | None,
    joined: Joined,
) -> list[Step]:
    """The steps of a recipe after the store is filled, checked.

    Args:
        recipe: open.
        store: the store.
        fields: backbone that the recipe extracts into it -> the fields that it asks for, None: its
            pooled ones. None: the recipe extracts nothing.
        joined: what `mmc.cli` joins.

    Raises:
        InputError: a key, a value or a name is wrong; with file and line.
    """
    trained = _Heads(recipe, store, fields)
    node = recipe.top.node("heads")
    steps = [] if node is None else trained.steps(node)
    before = ("extract",) if trained.extracted else ()
    steps += Readers(recipe, store, trained.runs, joined, before).steps()
    places = [os.path.abspath(step.owns) for step in steps if step.owns is not None]
    for place in places:
        if places.count(place) > 1:
            raise InputError(
                f"{recipe.name}: two steps write {os.path.relpath(place)}; give each its own `out`"
            )
    return steps


def _with_mask(field: str) -> tuple[str, ...]:
    """A field, and what says which of its places are real."""
    from mmc.heads.needs import MASKED, mask_of

    return (field, mask_of(field)) if field in MASKED else (field,)


class _Heads:
    """The heads of one recipe."""

    def __init__(
        self, recipe: Recipe, store: str, fields: Mapping[str, Sequence[str] | None] | None
    ) -> None:
        self.recipe, self.store = recipe, store
        self.extracted = fields is not None
        self.fields = dict(fields or {})
        self.runs: dict[str, str] = {}
        """Name -> folder, in order."""
        self._warned: set[str] = set()

    def steps(self, node: Node) -> list[Step]:
        """A step for each run."""
        entries = Section(node, "heads").entries()
        if not self.extracted:
            from mmc.store import EmbeddingStore

            with located(node.where, "heads without `extract` read a store"):
                opened = EmbeddingStore.open(self.store)
            self.fields = {alias: tuple(opened.record(alias).fields) for alias in opened.aliases}
        later = {name: entry.where for name, entry in entries}
        steps = []
        for name, entry in entries:
            del later[name]
            section = Section(entry, f"heads.{name}")
            with located(entry.where, f"heads.{name}"):
                _check_run(name, self.runs)
            steps.append(self._run(name, section, later))
        return steps

    def _run(self, name: str, section: Section, later: Mapping[str, str]) -> Step:
        head = section.text("head") or name
        settings = section.node("set")
        pairs = _settings(settings, f"{section.name}.set")
        config, values = section.config(
            TrainConfig, omit=("settings", "overwrite"), whole=("sweep",), head=head
        )
        with located(section.where, section.name):
            lookup(HEADS, head, kind="head", group=HEAD_GROUP)
            for setting in sweep_settings(config):
                lookup(HEADS, setting.config.head, kind="head", group=HEAD_GROUP)
                if setting.config.loss is not None:
                    lookup(LOSSES, setting.config.loss, kind="loss", group=LOSS_GROUP)
            read = self._aliases_of(config.features)
        folder = self.recipe.path(f"runs/{name}")
        inputs: dict[str, Callable[[], str]] = {
            "the store": lambda: store_state(self.store, read or None)
        }
        after, written = ["extract"] if self.extracted else [], {}
        for key, node in pairs.items():
            text = _written(node, f"{section.name}.set.{key}")
            if key == BASE:
                text = self._base(node, text, later)
                inputs["the base run"] = _run_state_of(text)
                after += [run for run, path in self.runs.items() if path == text]
            elif os.path.exists(text):
                inputs[key] = _path_state_of(text)
            written[key] = text
        section.finish(lambda key: _in_set(key, config))
        _check_settings(config, written, pairs, section.name)
        config = replace(config, settings=tuple(f"{key}={text}" for key, text in written.items()))
        self.runs[name] = folder

        def run(start: Start) -> Result:
            from mmc.heads.trainer import train
            from mmc.store import EmbeddingStore

            done = train(
                EmbeddingStore.open(self.store),
                folder,
                replace(config, overwrite=start.replace),
                recipe=self.recipe.kept,
                report=self._once(start.report),
                progress=start.progress,
            )
            data = {key: value for key, value in vars(done).items() if key != "run"}
            return Result(data=data)

        return Step(
            name=name,
            kind="train",
            settings={
                "head": head,
                "store": self.store,
                **given(TrainConfig, values),
                "set": {key: node.plain() for key, node in pairs.items()},
            },
            inputs=inputs,
            run=run,
            made=lambda: run_state(folder),
            after=tuple(after),
            owns=folder,
        )

    def _once(self, report: Callable[[str], None]) -> Callable[[str], None]:
        """``report``, but a warning that an earlier run has given: it is of the store."""

        def tell(line: str) -> None:
            if line not in self._warned:
                report(line)
            if line.startswith("warning: "):
                self._warned.add(line)

        return tell

    def _aliases_of(self, features: Sequence[str]) -> tuple[str, ...]:
        """Backbones whose features are named.

        Raises:
            InputError: one is not extracted, or not with that field and its mask.
        """
        found: dict[str, None] = {}
        for item in features:
            alias, _, field = item.rpartition("=")[2].partition("/")
            if alias not in self.fields:
                known = nearest(alias, list(self.fields))
                raise InputError(f"features: no backbone is called {alias!r}; {known}")
            found[alias] = None
            asked = self.fields[alias]
            if field and asked is not None:
                lacking = [name for name in _with_mask(field) if name not in asked]
                if lacking:
                    raise InputError(
                        f"features: {alias}/{field} needs {' and '.join(lacking)} among the fields "
                        f"that {alias} is extracted with ({', '.join(asked)})"
                    )
        return tuple(found)

    def _base(self, node: Node, text: str, later: Mapping[str, str]) -> str:
        """The folder of the run that `boost` starts from: one of the recipe's, or any other."""
        if text in self.runs:
            return self.runs[text]
        if text in later:
            raise InputError(
                f"{node.where}: {BASE}: the run {text} comes later ({later[text]}); put it before"
            )
        if not os.path.isdir(text):
            known = list(self.runs)
            raise InputError(
                f"{node.where}: {BASE}: {text!r} is no run of this recipe and no folder; "
                f"{nearest(text, known)}"
            )
        return text


def _check_run(name: str, before: Iterable[str]) -> None:
    """Raises InputError where a run cannot be called so, after those of before."""
    check_name(name, "run")
    if name in TAKEN:
        raise InputError(f"{name!r} is what a step is called; give the run another name")
    if _DEVICE.fullmatch(name) or name.endswith("."):
        raise InputError(f"{name!r} cannot name a folder on Windows; give the run another name")
    same = next((other for other in before if other.casefold() == name.casefold()), None)
    if same is not None:
        raise InputError(
            f"{name!r} and {same!r} are one folder where case does not count (Windows, macOS); "
            "give the run another name"
        )


def _run_state_of(folder: str) -> Callable[[], str]:
    return lambda: run_state(folder) or ABSENT


def _path_state_of(path: str) -> Callable[[], str]:
    return lambda: path_state(path)


def _settings(node: Node | None, name: str) -> dict[str, Node]:
    """What a ``set`` says; null leaves a setting as it is without it."""
    if node is None:
        return {}
    entries = Section(node, name).entries()
    return {key: one for key, one in entries if one.value is not None}


def _written(node: Node, name: str) -> str:
    """A setting as ``--set`` takes it."""
    value = node.plain()
    if isinstance(value, dict):
        raise InputError(f"{node.where}: {name} holds keys; write {name}.KEY: VALUE in one line")
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _in_set(key: str, config: TrainConfig) -> str:
    """For an error: the setting that a key of a run may be meant for; empty: none."""
    meant = elsewhere(key.rpartition(".")[2], lambda: _configs(config), option="the key {name}")
    return meant and meant.replace("?", " under `set`?" if "." in meant else "?")


def _check_settings(
    config: TrainConfig, written: Mapping[str, str], nodes: Mapping[str, Node], name: str
) -> None:
    """Check what a run's ``set`` says against the head's, the loss' and the optimiser's settings.

    Raises:
        InputError: an unknown key or a value that is refused; with file and line.
    """
    for key, text in written.items():
        group, dot, setting = key.partition(".")
        with located(nodes[key].where, f"{name}.set"):
            if not dot:
                meant = elsewhere(key, lambda: _configs(config), option=BESIDE)
                raise InputError(f"{key}: {meant or _FORM}")
            if group not in GROUPS or not setting:
                raise InputError(f"{key}: {_FORM}")
            _check_setting(config, group, setting, text)


BESIDE = "the key {name}, beside `set`"
"""How a recipe gives what is an option of `mmc train-head`."""
_FORM = "write head.KEY, loss.KEY or optim.KEY"


def _check_setting(config: TrainConfig, group: str, setting: str, text: str) -> None:
    """Raises InputError where the part does not take the setting."""
    # By the task, which is not known yet, the loss is one of two; either may take it.
    losses = [config.loss] if config.loss is not None or group != "loss" else ["bce", "ce"]
    for number, loss in enumerate(losses, 1):
        configs = configs_of(config.head, loss)
        where = {"head": f"head {config.head}", "loss": f"loss {loss}"}.get(group, group)
        try:
            build_part(
                configs[group],
                {setting: text},
                where=where,
                configs=lambda configs=configs: configs,  # type: ignore[misc]
                option=BESIDE,
            )
            return
        except InputError:
            if number == len(losses):
                raise


def _configs(config: TrainConfig) -> Configs:
    return configs_of(config.head, config.loss or "bce")
