"""The steps of a recipe from a store to predictions: heads, compare, evaluate, predict.

Imports no torch before a step runs or the settings of a head are checked.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from mmc.heads.losses import GROUP as LOSS_GROUP
from mmc.heads.losses import LOSSES
from mmc.heads.models import GROUP as HEAD_GROUP
from mmc.heads.models import HEADS
from mmc.heads.options import OptimConfig, PredictConfig, TrainConfig
from mmc.store.chain import (
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
from mmc.store.chain.step import ABSENT
from mmc.store.config import build, nearest
from mmc.store.errors import InputError, MmcError
from mmc.store.registry import load, lookup
from mmc.store.schema import check_name

BEST = "best"
"""Stands for the run with the best validation metric, where a step names a run."""
BASE = "head.base"
"""The setting that names another run."""
TAKEN = (BEST, "prepare", "caption", "extract", "train", "compare", "evaluate", "predict")
"""No names for runs: steps have them."""


class Input(Protocol):
    """What to predict on, as `mmc.extract.steps.read_input` reads it."""

    @property
    def spec(self) -> str:
        """Store or source."""

    @property
    def settings(self) -> dict[str, Any]:
        """Options of the source."""

    def state(self) -> str:
        """Another text when it has changed."""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """What needs sources or backbones, which the heads know nothing of."""

    read_input: Callable[[Node, str], Input]
    """Reads what a recipe says of the data to predict on."""
    predict: Callable[..., Any]
    """`mmc predict`: (run, input, out, config, store=, labels=, given=, report=, progress=)."""


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
    return _Heads(recipe, store, fields, joined).steps()


def _with_mask(field: str) -> tuple[str, ...]:
    """A field, and what says which of its places are real."""
    from mmc.heads.needs import MASKED, mask_of

    return (field, mask_of(field)) if field in MASKED else (field,)


class _Heads:
    """The steps of one recipe."""

    def __init__(
        self,
        recipe: Recipe,
        store: str,
        fields: Mapping[str, Sequence[str] | None] | None,
        joined: Joined,
    ) -> None:
        self.recipe, self.store, self.joined = recipe, store, joined
        self.extracted = fields is not None
        self.fields = dict(fields or {})
        self.runs: dict[str, str] = {}
        """Name -> folder, in order."""

    def steps(self) -> list[Step]:
        top = self.recipe.top
        heads, compare = top.node("heads"), top.node("compare", bare=True)
        evaluate, predict = top.node("evaluate", bare=True), top.node("predict", bare=True)
        steps = [] if heads is None else self._train(heads)
        for key, node in (("compare", compare), ("evaluate", evaluate), ("predict", predict)):
            if node is not None and not self.runs:
                raise InputError(f"{node.where}: {key} needs `heads`, and there are none")
        if compare is not None:
            steps.append(self._compare(Section(compare, "compare")))
        if evaluate is not None:
            steps.append(self._evaluate(Section(evaluate, "evaluate")))
        if predict is not None:
            items = predict.value if isinstance(predict.value, tuple) else (predict,)
            several = len(items) > 1
            for number, item in enumerate(items, 1):
                name = f"predict {number}" if several else "predict"
                steps.append(self._predict(Section(item, name), name))
        places = [step.owns for step in steps if step.owns is not None]
        for step in steps:
            if step.owns is not None and places.count(step.owns) > 1:
                raise InputError(
                    f"{self.recipe.name}: two steps write {step.owns}; give each its own `out`"
                )
        return steps

    def _train(self, node: Node) -> list[Step]:
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
                check_name(name, "run")
                if name in TAKEN:
                    raise InputError(
                        f"{name!r} is what a step is called; give the run another name"
                    )
            steps.append(self._run(name, section, later))
            section.finish()
        return steps

    def _run(self, name: str, section: Section, later: Mapping[str, str]) -> Step:
        head = section.text("head") or name
        settings = section.node("set")
        pairs = _settings(settings, f"{section.name}.set")
        config, values = section.config(TrainConfig, omit=("settings", "overwrite"), head=head)
        with located(section.where, section.name):
            entry = lookup(HEADS, head, kind="head", group=HEAD_GROUP)
            if config.loss is not None:
                lookup(LOSSES, config.loss, kind="loss", group=LOSS_GROUP)
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
                inputs["the base run"] = _state_of(text)
                after += [run for run, path in self.runs.items() if path == text]
            elif os.path.exists(text):
                inputs[key] = _path_state_of(text)
            written[key] = text
        _check_settings(entry, config, written, pairs, section.name)
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
                report=start.report,
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
            made=lambda: _made(folder),
            after=tuple(after),
            owns=folder,
        )

    def _aliases_of(self, features: Sequence[str]) -> tuple[str, ...]:
        """Backbones whose features are named.

        Raises:
            InputError: one is not extracted, or not with that field and its mask.
        """
        found = {}
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

    def _chosen(self, section: Section, key: str) -> tuple[list[str], Node | None]:
        """Runs that a step names: those of the recipe, `best`, or none."""
        nodes = section.texts(key)
        for node in nodes:
            if node.value not in (*self.runs, BEST):
                raise InputError(
                    f"{node.where}: {section.name}.{key}: there is no run {node.value!r}; "
                    f"{nearest(str(node.value), [*self.runs, BEST])}"
                )
        return [str(node.value) for node in nodes], nodes[0] if nodes else None

    def _folders(self, names: Sequence[str]) -> list[str]:
        """Folders of runs by name, as they are known when a step's turn has come."""
        return [best(self.runs) if name == BEST else self.runs[name] for name in names]

    def _runs_state(self, names: Sequence[str]) -> Callable[[], str]:
        def state() -> str:
            try:
                folders = self._folders(names)
            except InputError:  # before anything was trained
                return ABSENT
            return " ".join(f"{folder} {_made(folder) or ABSENT}" for folder in folders)

        return state

    def _compare(self, section: Section) -> Step:
        names, _ = self._chosen(section, "runs")
        names = names or list(self.runs)
        out = section.text("out") or self.recipe.path("compare.csv")
        section.finish()

        def run(start: Start) -> Result:
            from mmc.heads.comparing import compare

            found = compare(self._folders(names), out)
            return Result(text=str(found), data=found.rows)

        return self._reader("compare", "compare", {"runs": names}, names, out, run)

    def _evaluate(self, section: Section) -> Step:
        names, _ = self._chosen(section, "runs")
        names = names or list(self.runs)
        store, split = section.text("store") or self.store, section.text("split") or "test"
        device = section.text("device") or "auto"
        out = section.text("out") or self.recipe.path("evaluation.json")
        section.finish()

        def run(start: Start) -> Result:
            from mmc.heads.artifact import Run
            from mmc.heads.evaluate import evaluate, format_table
            from mmc.heads.runfiles import write_atomic
            from mmc.store import EmbeddingStore

            opened, chosen = EmbeddingStore.open(store), None if split == "all" else split
            found = {
                name: evaluate(Run.load(folder), opened, chosen, device=device)
                for name, folder in zip(names, self._folders(names), strict=True)
            }
            text = json.dumps(found, indent=2, ensure_ascii=False)
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(Path(out), f"{text}\n".encode())
            tables = [f"{name}\n{format_table(result)}" for name, result in found.items()]
            return Result(text="\n\n".join(tables), data=found)

        settings = {"runs": names, "store": store, "split": split, "device": device}
        inputs = {"the store": lambda: store_state(store, None)}
        return self._reader("evaluate", "evaluate", settings, names, out, run, inputs)

    def _predict(self, section: Section, name: str) -> Step:
        chosen, _ = self._chosen(section, "run")
        if len(chosen) > 1:
            raise InputError(f"{section.where}: {name}.run names several; give a list of steps")
        names = chosen or [BEST if len(self.runs) > 1 else next(iter(self.runs))]
        node, labels = section.node("input"), section.text("labels")
        keep = section.text("store")
        out = section.text("out") or self.recipe.path(f"{name.replace(' ', '-')}.csv")
        config, values = section.config(PredictConfig, renamed={"form": "format"})
        section.finish()
        data = None if node is None else self.joined.read_input(node, f"{name}.input")
        if keep is not None and data is None:
            raise InputError(
                f"{section.where}: {name}.store is where embeddings of an `input` are kept"
            )
        if labels is not None and not Path(labels).is_file():
            raise InputError(f"{section.where}: {name}.labels: there is no file {labels}")

        def run(start: Start) -> Result:
            done = self.joined.predict(
                Path(self._folders(names)[0]),
                self.store if data is None else data.spec,
                Path(out),
                config,
                store=keep,
                labels=None if labels is None else Path(labels),
                given={} if data is None else data.settings,
                report=start.report,
                progress=start.progress,
            )
            if not done.ok:
                for line in str(done).splitlines():
                    start.report(line)
                raise MmcError(f"{out}: a check failed, as the lines above say")
            return Result(text=str(done), data={"run": self._folders(names)[0], **vars(done)})

        settings = {
            "run": names[0],
            "labels": labels,
            "store": keep,
            **given(PredictConfig, values),
        }
        if data is None:
            inputs = {"the store": lambda: store_state(self.store, None)}
        else:
            settings |= {"input": {"path": data.spec, **data.settings}}
            inputs = {"the input": data.state}
        if labels is not None:
            inputs["the labels"] = _path_state_of(labels)
        settings = {key: value for key, value in settings.items() if value is not None}
        return self._reader(name, "predict", settings, names, out, run, inputs)

    def _reader(
        self,
        name: str,
        kind: str,
        settings: Mapping[str, Any],
        names: Sequence[str],
        out: str,
        run: Callable[[Start], Result],
        inputs: Mapping[str, Callable[[], str]] | None = None,
    ) -> Step:
        """A step that reads runs and writes one file."""
        runs = list(self.runs) if BEST in names else names
        return Step(
            name=name,
            kind=kind,
            settings=settings,
            inputs={"the runs": self._runs_state(names), **(inputs or {})},
            run=run,
            made=lambda: path_state(out) if Path(out).is_file() else None,
            after=(*(["extract"] if self.extracted else []), *runs),
            owns=out,
        )


def best(runs: Mapping[str, str]) -> str:
    """Folder of the run with the best validation metric: the first of equals.

    Args:
        runs: name -> folder.

    Raises:
        InputError: a run is not there, or none was validated.
    """
    from mmc.heads.metrics import HEADLINE
    from mmc.heads.runfiles import read_record

    found = {}
    for name, folder in runs.items():
        record = read_record(Path(folder))
        value = record["metrics"].get("val", {}).get(HEADLINE[record["task"]])
        if value is not None:
            found[name] = value
    if not found:
        raise InputError("no run was validated, so none is the best; name one")
    return runs[max(found, key=lambda name: found[name])]


_UNSTEADY = ("created", "versions", "training", "recipe_sha256")
"""Keys of run.json that nothing after the run depends on."""


def _made(folder: str) -> str | None:
    """State of a run: another one where its weights, thresholds or metrics are; None: not whole."""
    try:
        record = json.loads((Path(folder) / "run.json").read_bytes())
        size = (Path(folder) / "head.safetensors").stat().st_size
    except (OSError, ValueError):
        return None
    kept = {key: value for key, value in record.items() if key not in _UNSTEADY}
    text = json.dumps([kept, size], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _state_of(folder: str) -> Callable[[], str]:
    return lambda: _made(folder) or ABSENT


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


def _check_settings(
    entry: Any,
    config: TrainConfig,
    written: Mapping[str, str],
    nodes: Mapping[str, Node],
    name: str,
) -> None:
    """Check what a run's ``set`` says against the head's, the loss' and the optimiser's settings.

    Raises:
        InputError: an unknown key or a value that is refused; with file and line.
    """
    if not written:
        return
    losses = [config.loss] if config.loss is not None else ["bce", "ce"]  # by the task, yet unknown
    for key, text in written.items():
        group, dot, setting = key.partition(".")
        with located(nodes[key].where, f"{name}.set"):
            if group == "head" and dot:
                build(load(entry).Config, {setting: text}, where=f"head {entry.name}")
            elif group == "loss" and dot:
                _check_loss(losses, setting, text)
            elif group == "optim" and dot:
                build(OptimConfig, {setting: text}, where="optim")
            else:
                raise InputError(f"{key}: write head.KEY, loss.KEY or optim.KEY")


def _check_loss(losses: Sequence[str], setting: str, text: str) -> None:
    """Raises InputError where no loss of these takes the setting."""
    for number, loss in enumerate(losses, 1):
        config = load(lookup(LOSSES, loss, kind="loss", group=LOSS_GROUP)).Config
        try:
            build(config, {setting: text}, where=f"loss {loss}")
            return
        except InputError:
            if number == len(losses):
                raise
