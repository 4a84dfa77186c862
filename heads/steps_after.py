"""The steps of a recipe that read its runs: compare, evaluate, predict.

Imports no torch before a step runs.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from mmc.heads.options import PredictConfig
from mmc.heads.runstate import best, run_state
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
from mmc.store.errors import InputError, MmcError

BEST = "best"
"""Stands for the run with the best validation metric, where a step names a run."""


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


class Readers:
    """The steps of one recipe that read its runs."""

    def __init__(
        self,
        recipe: Recipe,
        store: str,
        runs: Mapping[str, str],
        joined: Joined,
        before: Sequence[str],
    ) -> None:
        self.recipe, self.store, self.joined = recipe, store, joined
        self.runs, self.before = runs, tuple(before)

    def steps(self) -> list[Step]:
        """Those that the recipe has, in the order compare, evaluate, predict."""
        top = self.recipe.top
        nodes = {key: top.node(key, bare=True) for key in ("compare", "evaluate", "predict")}
        steps = []
        for key, node in nodes.items():
            if node is None:
                continue
            if not self.runs:
                raise InputError(f"{node.where}: {key} needs `heads`, and there are none")
            if key == "compare":
                steps.append(self._compare(Section(node, key)))
            elif key == "evaluate":
                steps.append(self._evaluate(Section(node, key)))
            else:
                items = node.value if isinstance(node.value, tuple) else (node,)
                several = len(items) > 1
                steps += [self._predict(Section(item, key), several) for item in items]
        return steps

    def _chosen(self, section: Section, key: str, *, known: Sequence[str]) -> list[str]:
        """Runs that a step names, or none."""
        nodes = section.texts(key)
        for node in nodes:
            if node.value not in known:
                raise InputError(
                    f"{node.where}: {section.name}.{key}: there is no run {node.value!r}; "
                    f"{nearest(str(node.value), known)}"
                )
        return [str(node.value) for node in nodes]

    def _folders(self, names: Sequence[str]) -> list[str]:
        """Folders of runs by name, as they are known when a step's turn has come."""
        return [best(self.runs) if name == BEST else self.runs[name] for name in names]

    def _runs_state(self, names: Sequence[str]) -> Callable[[], str]:
        def state() -> str:
            try:
                folders = self._folders(names)
            except InputError:  # before anything was trained
                return ABSENT
            return " ".join(f"{folder} {run_state(folder) or ABSENT}" for folder in folders)

        return state

    def _compare(self, section: Section) -> Step:
        names = self._chosen(section, "runs", known=[*self.runs]) or list(self.runs)
        out = section.text("out") or self.recipe.path("compare.csv")
        split = section.text("split")
        section.finish()

        def run(start: Start) -> Result:
            from mmc.heads.compare import compare, comparison_csv, format_comparison
            from mmc.heads.runfiles import write_atomic
            from mmc.store import EmbeddingStore

            paths = [Path(folder) for folder in self._folders(names)]
            if split is None:
                found = compare(paths, report=start.report)
            else:
                opened = EmbeddingStore.open(self.store)
                found = compare(paths, store=opened, split=split, report=start.report)
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(Path(out), comparison_csv(found))
            return Result(text=format_comparison(found), data=found.to_json())

        settings = {"runs": names} if split is None else {"runs": names, "split": split}
        inputs = {} if split is None else {"the store": lambda: store_state(self.store, None)}
        return self._reader("compare", "compare", settings, names, out, run, inputs)

    def _evaluate(self, section: Section) -> Step:
        names = self._chosen(section, "runs", known=[*self.runs, BEST]) or list(self.runs)
        other, split = section.text("store"), section.text("split") or "test"
        if other is not None:
            from mmc.store import EmbeddingStore

            with located(section.where, "evaluate.store"):
                EmbeddingStore.open(other)
        store = other or self.store
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

    def _predict(self, section: Section, several: bool) -> Step:
        name = section.name
        chosen = self._chosen(section, "run", known=[*self.runs, BEST])
        if len(chosen) > 1:
            raise InputError(f"{section.where}: {name}.run names several; give a list of steps")
        names = chosen or [BEST if len(self.runs) > 1 else next(iter(self.runs))]
        node, labels = section.node("input"), section.text("labels")
        keep, out = section.text("store"), section.text("out")
        if several and out is None:
            raise InputError(f"{section.where}: one of several predictions needs an `out`")
        out = out or self.recipe.path("predictions.csv")
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
            return Result(text=str(done), data={"run": self._folders(names)[0], **asdict(done)})

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
            inputs["the labels"] = lambda: path_state(labels)
        settings = {key: value for key, value in settings.items() if value is not None}
        called = f"predict {out}" if several else "predict"
        return self._reader(called, "predict", settings, names, out, run, inputs)

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
            after=(*self.before, *runs),
            owns=out,
        )
