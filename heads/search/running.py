"""Trains what a search still lacks: over one reading of the data, side by side where it pays."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict

from mmc.heads import memory, metrics, splits
from mmc.heads.engine import Position
from mmc.heads.losses.base import Loss
from mmc.heads.models.base import Head
from mmc.heads.predict import Predictor
from mmc.heads.search.stacked import Stack, heads_at_once, stackable
from mmc.heads.search.trials import Result, Shelf, Trial
from mmc.heads.training import Loaded, Progress, Report
from mmc.store.errors import InputError, MmcError


class Runner:
    """Trains trials and puts them on the shelf.

    Args:
        finished: told each trial when it is on the shelf.
    """

    def __init__(
        self,
        shelf: Shelf,
        report: Report,
        progress: Progress,
        finished: Callable[[Trial], None] = lambda trial: None,
    ) -> None:
        self.shelf, self.report, self.progress, self.finished = shelf, report, progress, finished
        self._said = {""}

    def run(self, trials: Sequence[Trial]) -> None:
        """Train those that are not on the shelf; what prepares alike follows each other."""
        waiting = [trial for trial in trials if self.shelf.result(trial) is None]
        for trial in waiting:
            if trial.name in self.shelf.damaged:
                file = self.shelf.damaged.pop(trial.name)
                self.report(
                    f"warning: {trial.described}: {file} is damaged or gone; it is trained again"
                )
        for reading in _grouped(waiting, lambda trial: trial.setup.preparation):
            for alike in _grouped(reading, _stack_key):
                if len(alike) > 1:
                    self._stacks(alike)
                else:
                    self._alone(alike[0])
            reading[0].setup.material.release()

    def _alone(self, trial: Trial) -> None:
        setup, checkpoints = trial.setup, self.shelf.checkpoints(trial)
        head, loss = setup.build()
        place = self._place(trial, head)
        found = checkpoints.load()
        place = memory.continued(place, found[1] if found else None)
        data = setup.load(head, place)
        position, error = Position(), ""
        try:
            if setup.trains:
                progress = self._progress(trial.described)
                engine = setup.engine(head, loss, data, place, progress, checkpoints)
                position = engine.run()
            setup.fit_validation(head, data, position)
        except InputError:
            raise
        except MmcError as failure:
            error = str(failure)
        self._finish(trial, head, data, position, error)

    def _stacks(self, trials: list[Trial]) -> None:
        first = trials[0].setup
        built = {trials[0].name: first.build()}
        place = self._place(trials[0], built[trials[0].name][0])
        width = heads_at_once(len(first.store.label_set), streamed=bool(place.window_rows))
        for start in range(0, len(trials), width):
            part = trials[start : start + width]
            if len(part) == 1:
                self._alone(part[0])
                continue
            self._stack([(t, *(built.pop(t.name, None) or t.setup.build())) for t in part])

    def _stack(self, members: list[tuple[Trial, Head, Loss]]) -> None:
        lead, head, _ = members[0]
        place = self._place(lead, head)
        data = lead.setup.load(head, place)
        longest = self._progress(f"{len(members)} trainings at once")
        engines = [
            trial.setup.engine(head, loss, data, place, longest) for trial, head, loss in members
        ]

        def finished(index: int, error: str) -> None:
            trial, head, _ = members[index]
            self._finish(trial, head, data, engines[index].position, error)

        Stack(engines).run(finished)

    def _finish(
        self, trial: Trial, head: Head, data: Loaded, position: Position, error: str
    ) -> None:
        """Measure the trained head and put it on the shelf."""
        record = asdict(position) | {"best_metric": 0.0, "best_loss": 0.0}  # JSON has no infinity
        if error:
            self.shelf.put(trial, Result(metric=None, position=record, error=error), {})
            self.report(f"{trial.described}: failed: {error}")
            self.finished(trial)
            return
        setup = trial.setup
        metric, logits, held_out = setup.validate(head, data), None, math.nan
        if trial.held_out is not None:
            run = setup.run(head.state_dict(), position)
            logits = Predictor(run, setup.store, device=setup.device).logits(trial.held_out).cpu()
            targets = splits.targets(setup.store, trial.held_out)
            held_out = metrics.score(logits, targets, setup.store.task, setup.optim.metric)
        result = Result(
            metric=_or_none(metric),
            held_out=_or_none(held_out),
            position=record,
        )
        self.shelf.put(trial, result, head.state_dict(), logits)
        name = setup.optim.metric or metrics.HEADLINE[setup.store.task]
        where, value = ("held-out", held_out) if logits is not None else ("val", metric)
        shown = "undefined" if math.isnan(value) else f"{value:.4f}"
        self.report(f"{trial.described}: {where} {name} {shown}")
        self.finished(trial)

    def _place(self, trial: Trial, head: Head) -> memory.Plan:
        """What there is room for; said once where data is streamed."""
        place = trial.setup.place(head)
        line = memory.describe(place) if place.streamed else ""
        if line not in self._said:
            self._said.add(line)
            self.report(line)
        return place

    def _progress(self, what: str) -> Progress:
        """The caller's, with a name that tells the trainings apart."""
        return lambda stage, done, total: self.progress(f"{what}: {stage}", done, total)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _grouped(trials: Sequence[Trial], key: Callable[[Trial], Hashable]) -> Iterator[list[Trial]]:
    """The trials of each key, in the order in which keys are first met."""
    groups: dict[Hashable, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(key(trial), []).append(trial)
    yield from groups.values()


def _stack_key(trial: Trial) -> Hashable:
    """Equal for trials that can train side by side: the same batches in the same order."""
    setup = trial.setup
    if setup.trains and stackable(setup.head_class, setup.head_config, setup.optim):
        return (setup.batch_size, setup.config.seed)
    return trial.name
