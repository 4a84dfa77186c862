"""Train with several settings, seeds or folds over one reading of the data, and keep one run.

What is kept, and by which figure:

- ``--sweep``: the setting that is best on validation. Nothing is chosen on test.
- ``--seeds``: of that setting, the seed that is best on validation. How good such a head is to be
  expected is told by the mean over the seeds, which the run records with their spread.
- ``--folds``: the setting whose heads are best on samples they have not seen, on average over the
  folds. The run is then an ordinary training of it on train and val; its thresholds are tuned on
  the predictions out of fold.
"""

import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from mmc.heads import metrics, splits, thresholds
from mmc.heads.artifact import Run
from mmc.heads.material import Material
from mmc.heads.options import TrainConfig, as_options, parse_sweep
from mmc.heads.search import tables
from mmc.heads.search.folds import fold_splits
from mmc.heads.search.grid import Setting, settings
from mmc.heads.search.outoffold import OutOfFold
from mmc.heads.search.running import Runner
from mmc.heads.search.spread import best_loss, mean, spread, std, turned
from mmc.heads.search.trials import Result, Shelf, Trial
from mmc.heads.splits import Rows
from mmc.heads.temperature import fit_temperature, probabilities
from mmc.heads.training import Progress, Report, Setup
from mmc.heads.trainreport import TrainReport, effort
from mmc.store.errors import InputError, MmcError

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore


class Search:
    """Every training that a config asks for, checked before any work.

    Raises:
        InputError: a setting that cannot be trained; too few samples for the folds.
    """

    def __init__(self, store: "EmbeddingStore", config: TrainConfig) -> None:
        self.store, self.config = store, config
        self.material = Material(store)
        self.notes: list[str] = []
        self._folds: dict[int, list[tuple[Material, Rows]]] = {}
        self.trials = [self._trials(setting) for setting in settings(config)]
        """By setting: one trial, or one for each seed or fold."""

    @property
    def metric(self) -> str:
        """What trainings are compared by."""
        first = self.trials[0][0].setup
        return first.optim.metric or metrics.HEADLINE[self.store.task]

    def run(
        self,
        folder: Path,
        recipe: str | None,
        report: Report,
        progress: Progress,
        started: float,
    ) -> TrainReport:
        """Train what is not trained yet, and write the run into ``folder``.

        Args:
            folder: claimed for this training.
            recipe: see `mmc.heads.trainer.train`.
            started: when it began, by `time.perf_counter`.
        """
        everything = [trial for trials in self.trials for trial in trials]
        for note in dict.fromkeys(self.notes):
            report(note)
        shelf = Shelf(folder, self._identity())
        there = sum(shelf.result(trial) is not None for trial in everything)
        if there:
            report(
                f"continuing the unfinished search in {folder}: {there} of {len(everything)} "
                "trainings are there"
            )
        runner = Runner(shelf, report, progress, lambda trial: self._drop_losers(shelf))
        try:
            runner.run(everything)
            run, trial = self._kept(folder, shelf, runner)
        except KeyboardInterrupt:
            there = sum(shelf.result(trial) is not None for trial in everything)
            report(
                f"interrupted; {there} of {len(everything)} trainings are kept, and the same "
                "command goes on"
            )
            raise
        position = shelf.position(trial)
        for line in position.notes:
            report(line)
        run.recipe_text = recipe
        run.training = effort(trial.setup, position, time.perf_counter() - started)
        tables.write(folder, run.search, tables.histories(self.trials, shelf.result))
        run.save(folder)
        shelf.remove()
        report(f"the run is in {folder}; its README.md says how good it is and how to use it")
        return TrainReport.of(trial.setup, run, position, resumed=bool(there))

    # -- what there is to train --------------------------------------------------------------------

    def _trials(self, setting: Setting) -> list[Trial]:
        """The trials of one setting."""
        setup = self._setup(setting, setting.config, self.material)
        self.notes += setup.notes
        several = "--seeds" if self.config.seeds else "--folds" if self.config.folds else ""
        if several and not setup.trains:
            raise InputError(f"{setting.config.head} trains nothing: leave out {several}")
        before = setup.head_class.trained_before(setup.head_config)
        if self.config.folds and before:
            raise InputError(
                f"--folds with {before}: that run may have been trained on the samples of the "
                "folds, and predictions of them would look better than they are; leave out "
                f"--folds, or {before.partition('=')[0]}"
            )
        if self.config.seeds:
            first = setting.config.seed
            return [
                Trial(
                    setting=setting,
                    kind="seed",
                    repeat=seed,
                    setup=self._setup(setting, replace(setting.config, seed=seed), self.material),
                )
                for seed in range(first, first + self.config.seeds)
            ]
        if self.config.folds:
            return [
                Trial(
                    setting=setting,
                    kind="fold",
                    repeat=fold,
                    setup=self._setup(setting, setting.config, material),
                    held_out=held_out,
                )
                for fold, (material, held_out) in enumerate(self._parts(setup))
            ]
        return [Trial(setting=setting, kind="", repeat=setting.config.seed, setup=setup)]

    def _setup(self, setting: Setting, config: TrainConfig, material: Material) -> Setup:
        try:
            return Setup(self.store, config, material)
        except InputError as error:
            if setting.values:
                raise InputError(f"--sweep, setting {setting}: {error}") from None
            raise

    def _parts(self, setup: Setup) -> list[tuple[Material, Rows]]:
        """What is shared by the trainings of each fold, and the rows held out."""
        assert self.config.folds
        if id(setup.splits) not in self._folds:
            features = list(setup.features.values())
            found, notes = fold_splits(
                self.store, features, setup.splits, self.config.folds, self.config.seed
            )
            self.notes += notes
            self._folds[id(setup.splits)] = [
                (Material(self.store, chosen), held) for chosen, held in found
            ]
        return self._folds[id(setup.splits)]

    def _identity(self) -> dict[str, Any]:
        """What must be equal for an unfinished search to be continued."""
        search: dict[str, Any] = {"sweep": parse_sweep(self.config.sweep)}
        search |= {"seeds": self.config.seeds, "folds": self.config.folds}
        return {"search": search, **self.trials[0][0].setup.identity()}

    # -- what is kept ------------------------------------------------------------------------------

    def _best(self, shelf: Shelf) -> int | None:
        """The setting that is best of those that are through, if any is."""
        best, best_score = None, -math.inf
        for index, trials in enumerate(self.trials):
            results = [shelf.result(trial) for trial in trials]
            whole = [result for result in results if result is not None and not result.error]
            if len(whole) < len(trials):
                continue
            score = mean([result.score for result in whole])
            score = -math.inf if score is None else score
            if best is None or score > best_score:
                best, best_score = index, score
        return best

    def _drop_losers(self, shelf: Shelf) -> None:
        """Parameters of settings that another one has beaten are not needed any more."""
        best = self._best(shelf)
        for index, trials in enumerate(self.trials):
            if index != best and all(shelf.result(trial) for trial in trials):
                for trial in trials:
                    shelf.drop(trial)

    def _best_held(self, shelf: Shelf, runner: Runner) -> int:
        """The best setting, with its parameters on the shelf."""
        while (best := self._best(shelf)) is not None:
            dropped = [trial for trial in self.trials[best] if shelf.dropped(trial)]
            if not dropped:
                return best
            # It had lost to one whose damaged files were trained again, to a lower score.
            for trial in dropped:
                shelf.forget(trial)
            runner.run(dropped)
        failed = [shelf.result(trial) for trials in self.trials for trial in trials]
        error = next(result.error for result in failed if result and result.error)
        raise MmcError(f"no setting could be trained; the first: {error}")

    def _kept(self, folder: Path, shelf: Shelf, runner: Runner) -> tuple[Run, Trial]:
        """The run to keep, measured, and the trial that it comes from."""
        best = self._best_held(shelf, runner)
        chosen = self.trials[best]
        found: dict[str, Any] = {"metric": self.metric}
        if self.config.sweep:
            found["sweep"] = self._sweep(shelf, best)
        if self.config.seeds:
            run, trial, found["seeds"] = self._seeds(shelf, chosen)
        elif self.config.folds:
            run, trial, found["folds"] = self._cross_validated(folder, shelf, runner, chosen)
        else:
            trial = chosen[0]
            run = self._run(shelf, trial)
            trial.setup.measure(run)
        run.search = found | {"options": as_options(trial.setup.config)}
        return run, trial

    def _run(self, shelf: Shelf, trial: Trial) -> Run:
        return trial.setup.run(shelf.state(trial), shelf.position(trial))

    def _sweep(self, shelf: Shelf, best: int) -> dict[str, Any]:
        """A row for each setting, in the order of the grid."""
        rows = []
        for index, trials in enumerate(self.trials):
            results = [shelf.result(trial) for trial in trials]
            whole = [result for result in results if result is not None]
            rows.append(self._row(trials, whole) | {"best": index == best})
        return {"keys": list(self.trials[0][0].setting.values), "settings": rows}

    def _row(self, trials: list[Trial], results: list[Result]) -> dict[str, Any]:
        scores = [result.score for result in results]
        where = "held_out" if self.config.folds else "val"
        losses = [best_loss(result) for result in results]
        row: dict[str, Any] = {"setting": trials[0].setting.number, **trials[0].setting.values}
        row[f"{where}_{self.metric}"] = mean(scores)
        if len(scores) > 1:
            row["std"] = std(scores)
        return row | {
            "val_loss": mean(losses),
            # A training's, on average; seconds are of all of them.
            "epochs_run": round(statistics.fmean(map(_epochs, trials, results)), 1),
            "seconds": round(sum(r.position.get("train_seconds", 0.0) for r in results), 3),
            "error": next((result.error for result in results if result.error), ""),
        }

    def _seeds(self, shelf: Shelf, chosen: list[Trial]) -> tuple[Run, Trial, dict[str, Any]]:
        """The best seed's run, and what all of them reached."""
        runs = [self._run(shelf, trial) for trial in chosen]
        for trial, run in zip(chosen, runs, strict=True):
            trial.setup.measure(run)
        scores = [_result(shelf, trial).score for trial in chosen]
        place = max(
            range(len(runs)), key=lambda i: -math.inf if math.isnan(scores[i]) else scores[i]
        )
        rows: list[dict[str, Any]] = [
            {
                "seed": trial.repeat,
                **{split: tables.headline(run.task, found) for split, found in run.metrics.items()},
                "kept": index == place,
            }
            for index, (trial, run) in enumerate(zip(chosen, runs, strict=True))
        ]
        by_split = {split: spread([row[split] for row in rows]) for split in runs[0].metrics}
        return runs[place], chosen[place], {"by_seed": rows, **turned(by_split)}

    def _cross_validated(
        self, folder: Path, shelf: Shelf, runner: Runner, chosen: list[Trial]
    ) -> tuple[Run, Trial, dict[str, Any]]:
        """An ordinary training of the setting, and what its heads say out of fold."""
        setting = chosen[0].setting
        setup = self._setup(setting, setting.config, self.material)
        last = Trial(setting=setting, kind="", repeat=setting.config.seed, setup=setup)
        runner.run([last])
        if _result(shelf, last).error:
            raise MmcError(_result(shelf, last).error)
        unseen = self._out_of_fold(shelf, chosen)
        run = self._run(shelf, last)
        setup.measure(run, (unseen.logits, unseen.targets))
        unseen.save(folder)
        rows = [
            {"fold": trial.repeat, **self._fold_metrics(unseen, trial.repeat, run.thresholds.mode)}
            for trial in chosen
        ]
        together = metrics.evaluate(
            unseen.logits,
            unseen.targets,
            run.task,
            label_set=run.label_set,
            thresholds=run.thresholds,
            temperature=run.temperature,
        )
        return (
            run,
            last,
            {
                "by_fold": rows,
                **spread([{k: v for k, v in row.items() if k != "fold"} for row in rows]),
                "together": tables.headline(run.task, together),
            },
        )

    def _out_of_fold(self, shelf: Shelf, chosen: list[Trial]) -> OutOfFold:
        held = [trial.held_out for trial in chosen]
        rows = torch.cat([torch.from_numpy(part) for part in held if part is not None])
        fold = torch.cat(
            [torch.full((len(t.held_out),), t.repeat) for t in chosen if t.held_out is not None]
        )
        order = rows.argsort()
        taken = rows[order].numpy()
        ids = self.store.column("id").combine_chunks().cast(pa.string()).take(pa.array(taken))
        return OutOfFold(
            ids=ids,
            fold=fold[order],
            logits=torch.cat([shelf.logits(trial) for trial in chosen])[order],
            targets=splits.targets(self.store, taken),
            task=self.store.task,
        )

    def _fold_metrics(self, unseen: OutOfFold, fold: int, mode: thresholds.Mode) -> dict[str, Any]:
        """Metrics of one fold, at the temperature and thresholds that fit the others.

        Args:
            mode: how thresholds are made, that of the run: where one for all labels and one for
                each are as good, folds would differ in it, and far more in macro-F1 than they do.
        """
        held = unseen.fold == fold
        scores, truth = unseen.logits[~held], unseen.targets[~held]
        temperature = fit_temperature(scores, truth, unseen.task)
        p = probabilities(scores, unseen.task, temperature)
        cuts = thresholds.tune(p, truth, unseen.task, mode=None if mode == "argmax" else mode)
        found = metrics.evaluate(
            unseen.logits[held],
            unseen.targets[held],
            unseen.task,
            label_set=self.store.label_set,
            thresholds=cuts,
            temperature=temperature,
        )
        return {"samples": int(held.sum()), **tables.headline(unseen.task, found)}


def _epochs(trial: Trial, result: Result) -> int:
    """Passes over its training rows."""
    rows: int = result.position.get("train_rows", 0)
    return rows // max(len(trial.setup.splits.train), 1)


def _result(shelf: Shelf, trial: Trial) -> Result:
    result = shelf.result(trial)
    assert result is not None
    return result
