"""From a store to a finished run: choose rows, load, train, tune thresholds, measure, save."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmc.heads import metrics, splits, thresholds
from mmc.heads.artifact import RECORD, FeatureRef, Run, check_output
from mmc.heads.batches import derive_seed, load_prepared, raw_blocks
from mmc.heads.checkpoints import Checkpoints, clear_run
from mmc.heads.devices import pick_device, training_dtype
from mmc.heads.engine import Data, Engine, Position
from mmc.heads.features import resolve
from mmc.heads.losses import GROUP as LOSS_GROUP
from mmc.heads.losses import LOSSES
from mmc.heads.losses.base import Loss
from mmc.heads.models import GROUP as HEAD_GROUP
from mmc.heads.models import HEADS
from mmc.heads.models.base import Head
from mmc.heads.options import OptimConfig, TrainConfig, parse_set
from mmc.heads.predict import Predictor
from mmc.store.config import build
from mmc.store.errors import InputError
from mmc.store.registry import load, lookup

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

Report = Callable[[str], None]
Progress = Callable[[str, int, int], None]
"""Told (stage, epochs done, most epochs)."""

STEPS_PER_EPOCH, MIN_BATCH = 100, 32
MAX_BATCH = {"cpu": 4096}
"""Caches decide on a CPU: 512 to 4,096 was fastest, and reached a good mAP soonest."""
MAX_BATCH_ELSEWHERE = 65_536
LR_BATCH, LR_POWER = 256, 0.25
"""On movies (batch 36), captions (70) and synthetic sets (1,000 to 2,000) a linear head was best at
2e-4 to 6e-4 and an MLP at 3e-4 to 1e-3: far less growth than the root of the batch."""
_INIT = 3


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a training did."""

    run: Run
    features: dict[str, str]
    """Role -> feature."""
    rows: dict[str, int]
    """Rows used of each split."""
    metrics: dict[str, dict[str, Any]]
    """Split -> metrics at the tuned thresholds."""
    epochs: int
    """Passes over the training rows, all stages together."""
    seconds: float
    """Everything, loading and measuring included."""
    train_seconds: float
    """The steps alone."""
    rate: float
    """Samples per second of the steps."""
    batch_size: int
    lr: float
    resumed: bool
    notes: list[str] = field(default_factory=list)


def train(
    store: "EmbeddingStore",
    run_path: str | Path,
    config: TrainConfig,
    *,
    report: Report = lambda line: None,
    progress: Progress = lambda stage, done, total: None,
) -> TrainReport:
    """Train a head on ``store`` and write the run to ``run_path``.

    An unfinished training in that folder is continued, and ends in the same weights as one that
    was never stopped.

    Args:
        report: told a line of plain text now and then.
        progress: told (stage, epochs done, most epochs) after every validation.

    Raises:
        InputError: anything the user can set right: a name, a setting, an empty split, an output
            folder that holds something else or a finished run.
        MmcError: training diverged.
    """
    # Building heads draws random numbers, and the engine sets seeds: the caller's stay as they are.
    with torch.random.fork_rng([]):
        return _train(store, run_path, config, report, progress)


def _train(
    store: "EmbeddingStore",
    run_path: str | Path,
    config: TrainConfig,
    report: Report,
    progress: Progress,
) -> TrainReport:
    started = time.perf_counter()
    setup = _Setup(store, config)
    folder = _output_folder(run_path, config.overwrite)
    for note in setup.splits.notes:
        report(note)
    checkpoints = Checkpoints(folder, setup.identity())
    resumed = checkpoints.load() is not None
    if resumed:
        report(f"continuing the unfinished training in {folder}")
    head, loss = setup.build()
    position = setup.fit(head, loss, checkpoints, progress)
    for line in _stage_lines(position):
        report(line)
    run = setup.run(head, position)
    found = setup.measure(run)
    run.save(folder)
    checkpoints.remove()
    return TrainReport(
        run=run,
        features=setup.features,
        rows={name: len(getattr(setup.splits, name)) for name in ("train", "val", "test")},
        metrics=found,
        epochs=position.train_rows // max(len(setup.splits.train), 1),
        seconds=time.perf_counter() - started,
        train_seconds=position.train_seconds,
        rate=position.train_rows / position.train_seconds if position.train_seconds else 0.0,
        batch_size=setup.batch_size,
        lr=setup.lr,
        resumed=resumed,
        notes=setup.splits.notes,
    )


class _Setup:
    """Everything that follows from the store and the config, checked before any work."""

    def __init__(self, store: "EmbeddingStore", config: TrainConfig) -> None:
        self.store, self.config = store, config
        entry = lookup(HEADS, config.head, kind="head", group=HEAD_GROUP)
        self.head_class: type[Head] = load(entry)
        settings = parse_set(config.settings)
        self.head_config: Any = build(
            self.head_class.Config, settings.get("head", {}), where=f"head {config.head}"
        )
        self.optim = build(OptimConfig, settings.get("optim", {}), where="optim")
        if store.task not in metrics.HEADLINE:
            raise InputError(f"{store.path} is {store.task}: there is nothing to train on")
        self.loss_name = config.loss or ("bce" if store.task == "multilabel" else "ce")
        self.loss_class = _loss_class(self.loss_name, store.task)
        self.loss_config: Any = build(
            self.loss_class.Config, settings.get("loss", {}), where=f"loss {self.loss_name}"
        )
        _check_metric(self.optim.metric, store.task)
        self.device = pick_device(config.device)
        self.dtype = training_dtype(config.precision, self.device)
        self.features = resolve(store, config.features, self.head_class, config.head)
        self.refs = {role: FeatureRef.of(store, name) for role, name in self.features.items()}
        self.label_text = self._label_text()
        trial = self._new_head()
        self.trains = bool(trial.stages())
        self.splits = splits.choose(store, list(self.features.values()), trains=self.trains)
        self.batch_size = config.batch_size or default_batch(len(self.splits.train), self.device)
        self.lr = config.lr or default_lr(
            trial.learning_rate, self.batch_size, len(self.splits.train)
        )

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued."""
        config = asdict(self.config)
        del config["overwrite"]
        config["settings"] = {
            "head": asdict(self.head_config),
            "loss": asdict(self.loss_config),
            "optim": asdict(self.optim),
        }
        config |= {"loss": self.loss_name, "batch_size": self.batch_size, "lr": self.lr}
        config |= {"device": str(self.device), "precision": str(self.dtype)}
        del config["settings"]["optim"]["checkpoint_seconds"]
        return {
            "config": config,
            "features": {role: ref.fingerprint for role, ref in self.refs.items()},
            "label_set": list(self.store.label_set),
            "task": self.store.task,
            "rows and labels": splits.digest(self.splits, self.store),
        }

    def build(self) -> tuple[Head, Loss]:
        """The head with its inputs' scale and the label priors, and the loss."""
        torch.manual_seed(derive_seed(self.config.seed, _INIT))
        head = self._new_head().to(self.device)
        loss = self.loss_class(self.loss_config, *self._counts()).to(self.device)
        rows = self.splits.train
        with torch.no_grad():
            if len(rows):
                blocks = raw_blocks(self.store, self.features, rows, self.device)
                head.fit_inputs(batch for _, batch in blocks)
                head.set_prior(loss.prior())
        return head, loss

    def fit(self, head: Head, loss: Loss, checkpoints: Checkpoints, progress: Progress) -> Position:
        """Load what the head reads and train it."""
        val = self._data(head, self.splits.val, torch.float32)
        position = Position()
        if self.trains:
            position = Engine(
                head,
                loss,
                train=self._data(head, self.splits.train, self.dtype),
                val=val,
                task=self.store.task,
                batch_size=self.batch_size,
                epochs=self.config.epochs,
                lr=self.lr,
                optim=self.optim,
                seed=self.config.seed,
                dtype=self.dtype,
                checkpoints=checkpoints,
                on_round=lambda row: progress(row["stage"], row["epoch"], row["epochs"]),
            ).run()
        if len(self.splits.val):
            head.eval()
            with torch.no_grad():
                head.fit_validation(val.inputs, val.targets, self.store.task)
        return position

    def run(self, head: Head, position: Position) -> Run:
        """The run, not yet measured."""
        source = self.store.sources[0] if self.store.sources else {}
        return Run(
            head=self.config.head,
            head_config=asdict(self.head_config),
            loss=self.loss_name,
            loss_config=asdict(self.loss_config),
            features=self.refs,
            label_set=tuple(self.store.label_set),
            task=self.store.task,
            state={key: value.cpu() for key, value in head.state_dict().items()},
            thresholds=thresholds.Thresholds.default(self.store.task, len(self.store.label_set)),
            source=source,
            seed=self.config.seed,
            train_config=self.identity()["config"],
            history=position.history,
        )

    def measure(self, run: Run) -> dict[str, dict[str, Any]]:
        """Tune thresholds on the validation rows, then measure validation and test."""
        predictor = Predictor(run, self.store, device=self.device)
        for name in ("val", "test"):
            rows = getattr(self.splits, name)
            if not len(rows):
                continue
            logits = predictor.logits(rows)
            targets = splits.targets(self.store, rows).to(logits.device)
            if name == "val":
                probabilities = metrics.probabilities(logits, run.task)
                run.thresholds = thresholds.tune(probabilities, targets, run.task)
            run.metrics[name] = metrics.evaluate(
                logits, targets, run.task, label_set=run.label_set, thresholds=run.thresholds
            )
        return run.metrics

    def _new_head(self) -> Head:
        inputs = {role: ref.shape for role, ref in self.refs.items()}
        return self.head_class(
            inputs, len(self.store.label_set), self.head_config, label_text=self.label_text
        )

    def _label_text(self) -> Tensor | None:
        """Label texts (C, D) in the label set's order, for a head that wants them."""
        if not self.head_class.wants_label_text:
            return None
        alias = next(iter(self.refs.values())).alias
        found = self.store.label_text(alias)
        assert found is not None, "resolve() has checked this"
        names, array = found
        place = {name: index for index, name in enumerate(names)}
        missing = [label for label in self.store.label_set if label not in place]
        if missing:
            raise InputError(
                f"{alias} has no label text for {', '.join(map(repr, missing[:3]))}; run "
                "`mmc extract` again, which adds the texts of new labels"
            )
        order = [place[label] for label in self.store.label_set]
        return torch.from_numpy(np.ascontiguousarray(array[order], dtype=np.float32))

    def _counts(self) -> tuple[Tensor, Tensor]:
        """Training rows that have each label, and those for which it is known, (C,) each."""
        positives = torch.from_numpy(self.store.labels.counts(self.splits.train)).double()
        return positives, torch.full_like(positives, float(len(self.splits.train)))

    def _data(self, head: Head, rows: splits.Rows, dtype: torch.dtype) -> Data:
        inputs = load_prepared(self.store, self.features, rows, head, self.device, dtype)
        return Data(inputs=inputs, targets=splits.targets(self.store, rows).to(self.device))


def default_batch(rows: int, device: torch.device) -> int:
    """About 100 steps an epoch, within what is fast on the device."""
    largest = MAX_BATCH.get(device.type, MAX_BATCH_ELSEWHERE)
    return max(MIN_BATCH, min(largest, rows // STEPS_PER_EPOCH))


def default_lr(base: float, batch_size: int, rows: int) -> float:
    """``base`` at 256 samples, scaled gently with the batch that there really is."""
    return base * math.pow(min(batch_size, max(rows, 1)) / LR_BATCH, LR_POWER)


def _stage_lines(position: Position) -> list[str]:
    """What each stage reached, one line each."""
    lines = []
    for stage in dict.fromkeys(row["stage"] for row in position.history):
        rows = [row for row in position.history if row["stage"] == stage]
        best = [row for row in rows if row["best"]][-1]
        name = next(key for key in best if key.startswith("val_") and key != "val_loss")
        value = "undefined" if best[name] is None else f"{best[name]:.4f}"
        lines.append(
            f"{stage}: best {name} {value} (val_loss {best['val_loss']:.4f}) after epoch "
            f"{best['epoch']} of {rows[-1]['epoch']}"
        )
    return lines


def _loss_class(name: str, task: str) -> type[Loss]:
    loss: type[Loss] = load(lookup(LOSSES, name, kind="loss", group=LOSS_GROUP))
    if task not in loss.tasks:
        raise InputError(
            f"loss {name} is for {' and '.join(sorted(loss.tasks))} tasks, and this one is {task}"
        )
    return loss


def _check_metric(metric: str | None, task: str) -> None:
    if metric is not None and metric not in metrics.METRICS[task]:
        raise InputError(
            f"optim.metric {metric!r} is not one of a {task} task: "
            f"{', '.join(metrics.METRICS[task])}"
        )


def _output_folder(run_path: str | Path, overwrite: bool) -> Path:
    """The run's folder, free for a new or a continued training."""
    folder = check_output(run_path)
    if overwrite and folder.is_dir():
        clear_run(folder)
    if (folder / RECORD).exists():
        raise InputError(f"{folder} holds a finished run; name another folder, or --overwrite")
    return folder
