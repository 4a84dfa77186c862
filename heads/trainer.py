"""From a store to a finished run: choose rows, load, train, tune thresholds, measure, save."""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmc.heads import memory
from mmc.heads.checkpoints import Checkpoints, claimed, clear_run
from mmc.heads.devices import pick_device
from mmc.heads.distributed import join
from mmc.heads.engine import Position
from mmc.heads.options import TrainConfig
from mmc.heads.runfiles import RECORD, check_output
from mmc.heads.search.search import Search
from mmc.heads.trackers import tracking
from mmc.heads.training import Progress, Report, Setup
from mmc.heads.trainreport import TrainReport, effort
from mmc.store.errors import InputError

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore


def train(
    store: "EmbeddingStore",
    run_path: str | Path,
    config: TrainConfig,
    *,
    recipe: str | None = None,
    report: Report = lambda line: None,
    progress: Progress = lambda stage, done, total: None,
) -> TrainReport:
    """Train a head on ``store`` and write the run to ``run_path``.

    An unfinished training in that folder is continued, and ends in the same weights as one that
    was never stopped. With ``config.sweep``, ``seeds`` or ``folds`` it trains several times and
    keeps one (`mmc.heads.search`). Under torchrun all processes call this alike and train together;
    the main one reports, measures and writes.

    Args:
        recipe: text of the recipe that this training is a step of; it is kept in the run.
        report: told a line of plain text now and then.
        progress: told (stage, epochs done, most epochs) after every validation.

    Raises:
        InputError: anything the user can set right: a name, a setting, an empty split, an output
            folder that holds something else or a finished run.
        MmcError: training diverged.
    """
    # Building heads draws random numbers, and the engine sets seeds: the caller's stay as they are.
    with torch.random.fork_rng([]):
        return _train(store, run_path, config, recipe, report, progress)


def _train(
    store: "EmbeddingStore",
    run_path: str | Path,
    config: TrainConfig,
    recipe: str | None,
    report: Report,
    progress: Progress,
) -> TrainReport:
    started = time.perf_counter()
    several = config.sweep or config.seeds or config.folds
    processes = join(pick_device(config.device))
    if several and processes.count > 1:
        raise InputError(
            "--sweep, --seeds and --folds train in one process: start them without torchrun"
        )
    work = Search(store, config) if several else Setup(store, config)
    folder = _output_folder(run_path, config.overwrite)
    main = processes.main
    if not main:
        report, progress = _silent, _silent
    with claimed(folder) if main else nullcontext():
        if main:
            _output_folder(run_path, config.overwrite)  # another training may have ended meanwhile
            if config.overwrite:
                clear_run(folder)
        processes.wait()
        if isinstance(work, Search):
            return work.run(folder, recipe, report, progress, started)
        return _train_into(folder, work, recipe, report, progress, started)


def _train_into(
    folder: Path,
    setup: Setup,
    recipe: str | None,
    report: Report,
    progress: Progress,
    started: float,
) -> TrainReport:
    for note in setup.notes:
        report(note)
    report(setup.described())
    checkpoints = Checkpoints(folder, setup.identity())
    found = checkpoints.load()
    if found:
        report(f"continuing the unfinished training in {folder}")
    head, loss = setup.build()
    place = memory.continued(setup.place(head), found[1] if found else None)
    if place.streamed:
        report(memory.describe(place))
    history = found[1]["history"] if found else []
    with tracking(setup, folder, history, report) as trackers:
        try:
            position = setup.fit(head, loss, checkpoints, place, progress)
        except KeyboardInterrupt:
            kept = checkpoints.path.exists()
            report(
                f"interrupted; the same command goes on from the checkpoint in {folder}"
                if kept
                else "interrupted before the first checkpoint; nothing is kept"
            )
            raise
        for line in [*stage_lines(position), *position.notes]:
            report(line)
        run = setup.run(head.state_dict(), position)
        run.recipe_text = recipe
        if setup.processes.main:
            setup.measure(run)
        run.training = effort(setup, position, time.perf_counter() - started)
        if setup.processes.main:
            run.save(folder)
            checkpoints.remove()
            trackers.finish(run)
            report(f"the run is in {folder}; its README.md says how good it is and how to use it")
    return TrainReport.of(setup, run, position, resumed=found is not None)


def _silent(*_: Any) -> None:
    """Told by a process that is not the main one."""


def stage_lines(position: Position) -> list[str]:
    """What each stage reached, one line each."""
    lines = []
    for stage in dict.fromkeys(row["stage"] for row in position.history):
        rows = [row for row in position.history if row["stage"] == stage]
        best = [row for row in rows if row["best"]][-1]
        if best["val_loss"] is None:  # nothing was held out
            lines.append(f"{stage}: loss {best['loss']:.4f} after epoch {best['epoch']}")
            continue
        name = next(key for key in best if key.startswith("val_") and key != "val_loss")
        value = "undefined" if best[name] is None else f"{best[name]:.4f}"
        lines.append(
            f"{stage}: best {name} {value} (val_loss {best['val_loss']:.4f}) after epoch "
            f"{best['epoch']} of {rows[-1]['epoch']}"
        )
    return lines


def _output_folder(run_path: str | Path, overwrite: bool) -> Path:
    """The run's folder, free for a new or a continued training."""
    folder = check_output(run_path)
    inside = [path for path in folder.absolute().parents if (path / "samples.parquet").is_file()]
    if inside:
        raise InputError(f"{folder} is inside the store {inside[0]}; name a folder elsewhere")
    if (folder / RECORD).exists() and not overwrite:
        raise InputError(f"{folder} holds a finished run; name another folder, or --overwrite")
    return folder
