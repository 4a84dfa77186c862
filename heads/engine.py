"""The training loop: stages, epochs, validation, early stopping, checkpoints.

Legend: B samples in a batch, n validation rows, C labels.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmc.heads import metrics
from mmc.heads.batches import Batches, Data, dropout_seed
from mmc.heads.checkpoints import Checkpoints, pack_optimizer, unpack_optimizer
from mmc.heads.compiling import compiled, compiler_errors
from mmc.heads.devices import precise, seed_all
from mmc.heads.distributed import Processes
from mmc.heads.gradients import Gradients, JoinedGradients
from mmc.heads.losses.base import Loss
from mmc.heads.models.base import Batch, Head, Stage
from mmc.heads.models.tokens import split
from mmc.heads.optim import (
    Average,
    clip,
    lowered,
    lr_factor,
    make_optimizer,
    set_lr,
    trained_parameters,
)
from mmc.heads.options import OptimConfig
from mmc.heads.room import no_room
from mmc.heads.targets import as_targets
from mmc.store.errors import MmcError

ROUND_STEPS = 50
"""Least steps between validations: a set of 48 rows is not validated after every second step."""
DEFAULT_EPOCHS, DEFAULT_STEPS = 30, 3000
"""Default length of a stage: so many epochs, and more until there are so many steps."""
TIE = 1e-6

State = dict[str, Tensor]
OnRound = Callable[[dict[str, Any]], None]
ALONE = Processes()


@dataclass
class Position:
    """How far a training is; JSON-able, kept in the checkpoint."""

    window_rows: int = 0
    """Rows of a window where training data is streamed; the order depends on it."""
    block: int | None = None
    """Bytes of its blocks, on which the order depends as well."""
    stage: int = 0
    epoch: int = 0
    """Epochs of the stage that are done."""
    best_metric: float = -math.inf
    best_loss: float = math.inf
    rounds_since: int = 0
    """Validations since the best one."""
    lr_scale: float = 1.0
    """What plateaus have taken off the learning rate of the stage."""
    train_seconds: float = 0.0
    train_rows: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What stages kept and what they dropped: lines to say aloud."""

    def improves(self, metric: float, loss: float) -> bool:
        """Whether this validation is the best of the stage; an undefined metric is a tie.

        Of validations on no rows, which give neither, it is the latest.
        """
        if math.isnan(loss):
            return True
        if math.isnan(metric) or abs(metric - self.best_metric) <= TIE:
            return loss < self.best_loss
        return metric > self.best_metric

    def take(self, metric: float, loss: float) -> bool:
        """Count a validation; whether it is the best so far."""
        best = self.improves(metric, loss)
        if best:
            self.best_metric = -math.inf if math.isnan(metric) else metric
            self.best_loss, self.rounds_since = loss, 0
        else:
            self.rounds_since += 1
        return best

    def next_stage(self) -> None:
        """Start the next stage with a clean record."""
        self.stage += 1
        self.epoch = self.rounds_since = 0
        self.best_metric, self.best_loss = -math.inf, math.inf
        self.lr_scale = 1.0


class Engine:
    """Trains the stages of one head.

    The head ends with the best parameters of the last stage. Stopped at any point and run again
    on the same data from its checkpoint, it ends with the same bits.

    Several processes train one head: each is given its share of ``train``, all the same in
    everything else; of ``val`` only the main one needs any rows. All end with the same parameters:
    those of one process, but for rounding and for what is drawn anew for each part of a batch
    (dropout).
    """

    def __init__(
        self,
        head: Head,
        loss: Loss,
        *,
        train: Data,
        val: Data,
        task: str,
        batch_size: int,
        epochs: int | None,
        lr: float,
        optim: OptimConfig,
        seed: int,
        dtype: torch.dtype,
        window_rows: int = 0,
        block: int | None = None,
        checkpoints: Checkpoints | None = None,
        on_round: OnRound | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.head, self.loss = head, loss
        self.train, self.val, self.task = train, val, task
        self.batch_size, self.lr, self.optim, self.seed = batch_size, lr, optim, seed
        self.dtype = dtype
        self.device = train.targets.device
        self.part_rows = head.part_rows if self.device.type == "cpu" else batch_size
        self.processes = processes
        self.steps = -(-len(train) // (min(batch_size, len(train)) * optim.accumulation))
        self.epochs = epochs or max(DEFAULT_EPOCHS, -(-DEFAULT_STEPS // self.steps))
        self.epochs_per_round = -(-ROUND_STEPS // self.steps)
        self.metric = optim.metric or metrics.HEADLINE[task]
        self.checkpoints, self.on_round = checkpoints, on_round
        self.position = Position(window_rows=window_rows, block=block)
        self._saved_at = time.monotonic()

    def run(self) -> Position:
        """Train every stage, from the checkpoint if there is one."""
        found = self.checkpoints.load() if self.checkpoints else None
        tensors: State = {}
        if found:
            tensors, record = found
            self.position = Position(**record)
            self.head.load_state_dict(_part(tensors, "head"))
        stages = self.head.stages()
        devices = [self.device] if self.device.type == "cuda" else []
        what = "the training (a smaller --batch-size or head needs less)"
        with torch.random.fork_rng(devices), precise(self.dtype, self.device), no_room(what):
            for index in range(self.position.stage, len(stages)):
                needed = stages[index].needed
                if needed is None or needed():
                    self._run_stage(stages[index], tensors)
                tensors = {}
                self.position.next_stage()
        self.head.eval().requires_grad_(False)
        return self.position

    def _run_stage(self, stage: Stage, resumed: State) -> None:
        """Train one stage until it stops improving; leaves its best parameters in the head."""
        groups = trained_parameters(self.head, stage.trains)
        parameters = [p for named in groups.values() for p in named.values()]
        optimizer = make_optimizer(groups, self.optim)
        gradients = self._gradients(parameters)
        score = stage.score or self.head.score
        score = compiled(score) if self.optim.compile else score
        average = Average(parameters, self.optim.ema) if self.optim.ema else None
        best: State = {}
        if resumed:
            unpack_optimizer(optimizer, _part(resumed, "optim"))
            best = _to(_part(resumed, "best"), self.device)
            if average:
                average.values = list(_to(_part(resumed, "average"), self.device).values())
        batches = self.train.batches(self.batch_size, seed=self.seed, reads=stage.reads)
        at = self.position
        patience = self.optim.patience or math.inf
        while at.epoch < self.epochs and at.rounds_since < patience:
            until = min(at.epoch + self.epochs_per_round, self.epochs)
            started = time.perf_counter()
            with compiler_errors():
                train_loss = self._run_epochs(score, batches, optimizer, gradients, average, until)
            at.train_seconds += time.perf_counter() - started
            at.train_rows += len(self.train) * (until - at.epoch)
            at.epoch = until
            if average:
                average.swap()
            metric, val_loss = self._validate(stage)
            if math.isnan(val_loss) and not math.isfinite(train_loss):
                raise MmcError("the training diverged: its loss is not finite; lower the lr")
            if at.take(metric, val_loss):
                best = {key: value.clone() for key, value in self.head.state_dict().items()}
            if average:
                average.swap()
            self.note(stage, optimizer, train_loss, metric, val_loss)
            at.lr_scale = lowered(at.lr_scale, at.rounds_since, self.lr, self.optim)
            self._checkpoint(optimizer, best, average)
        if best:
            self.head.load_state_dict(best)
        self._finish(stage)

    def _finish(self, stage: Stage) -> None:
        """Let the stage decide whether it stays."""
        if not stage.finish:
            return

        def measure() -> float:
            metric, val_loss = self._validate(stage)
            return -val_loss if math.isnan(metric) else metric

        with torch.no_grad():
            self.position.notes.append(f"{stage.name}: {stage.finish(measure)}")

    def _gradients(self, parameters: list[torch.nn.Parameter]) -> Gradients:
        whole = self.optim.accumulation == 1 and self.part_rows >= self.batch_size
        if whole and self.processes.count == 1:
            return Gradients(parameters)
        return JoinedGradients(parameters, self.loss, self.processes)

    def _run_epochs(
        self,
        score: Callable[[Batch], Tensor],
        batches: Batches,
        optimizer: torch.optim.Optimizer,
        gradients: Gradients,
        average: Average | None,
        until: int,
    ) -> float:
        """Train up to epoch ``until``; the mean loss of the steps."""
        stage, parts = self.position.stage, self.optim.accumulation
        for epoch in range(self.position.epoch, until):
            seed_all(dropout_seed(self.seed, stage, epoch, self.processes.index), self.device)
            step, pending = epoch * self.steps, 0
            for batch, targets in batches.epoch(stage, epoch):
                self._backward(score, batch, targets, gradients)
                pending += 1
                if pending == parts:
                    self._step(step, optimizer, gradients, average)
                    step, pending = step + 1, 0
            if pending:
                self._step(step, optimizer, gradients, average)
        return gradients.mean_loss()

    def _backward(
        self,
        score: Callable[[Batch], Tensor],
        batch: Batch,
        targets: Tensor,
        gradients: Gradients,
    ) -> None:
        labels = self.head.select_labels(targets)  # several processes choose together
        if not len(targets):  # all of this batch is in the others
            return
        if labels is not None:
            batch, targets = {**batch, "labels": labels}, _known(targets, labels)
        bf16 = self.dtype == torch.bfloat16
        rows = self.part_rows
        for part, known in zip(split(batch, rows), targets.split(rows), strict=True):
            # Its cache outlives a step inside another autocast, with weights that have changed.
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False
            ):
                logits = score(part)
            gradients.add(self.loss(logits, known), known)

    def _step(
        self,
        step: int,
        optimizer: torch.optim.Optimizer,
        gradients: Gradients,
        average: Average | None,
    ) -> None:
        """Take step number ``step`` of the stage."""
        factor = lr_factor(step, self.epochs * self.steps, self.optim)
        set_lr(optimizer, self.lr * factor * self.position.lr_scale)
        gradients.join()
        if self.optim.clip_norm:
            clip(gradients.parameters, self.optim.clip_norm)
        optimizer.step()
        gradients.clear()
        if average:
            average.update(step + 1)

    @torch.no_grad()
    def _validate(self, stage: Stage) -> tuple[float, float]:
        """Metric (NaN where undefined) and loss on the validation rows, in float32; NaN of none.

        The main process measures, so that all go on alike.
        """
        found = self._measure(stage) if self.processes.main else (math.nan, math.nan)
        metric, loss = self.processes.numbers(found, self.device)
        return metric, loss

    def _measure(self, stage: Stage) -> tuple[float, float]:
        if not len(self.val):
            return math.nan, math.nan
        training = [module for module in self.head.modules() if module.training]
        self.head.eval()
        logits = score_all(stage.score or self.head.score, self.val.blocks())
        for module in training:
            module.training = True
        targets = as_targets(self.val.targets).whole()
        loss = self.loss(logits, targets.float() if targets.ndim == 2 else targets)
        return metrics.score(logits, targets, self.task, self.metric), float(loss)

    def note(
        self,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        train_loss: float,
        metric: float,
        val_loss: float,
    ) -> None:
        """Add a row to the history and tell the listener."""
        at = self.position
        row = {
            "stage": stage.name,
            "epoch": at.epoch,
            "loss": train_loss,
            "lr": max(group["lr"] for group in optimizer.param_groups),
            "val_loss": None if math.isnan(val_loss) else val_loss,
            f"val_{self.metric}": None if math.isnan(metric) else metric,
            "best": at.rounds_since == 0,
            "seconds": round(at.train_seconds, 4),
        }
        at.history.append(row)
        if self.on_round:
            self.on_round({**row, "epochs": self.epochs})

    def _checkpoint(
        self, optimizer: torch.optim.Optimizer, best: State, average: Average | None
    ) -> None:
        """Save the state if the last checkpoint is old enough."""
        if not self.checkpoints or not self.processes.main:
            return
        if time.monotonic() - self._saved_at < self.optim.checkpoint_seconds:
            return
        parts: dict[str, State] = {
            "head": self.head.state_dict(),
            "best": best,
            "optim": pack_optimizer(optimizer),
            "average": dict(enumerate_names(average.values)) if average else {},
        }
        tensors = {f"{part}.{key}": t for part, state in parts.items() for key, t in state.items()}
        self.checkpoints.save(tensors, asdict(self.position))
        self._saved_at = time.monotonic()


def score_all(score: Callable[[Batch], Tensor], blocks: Iterable[Batch]) -> Tensor:
    """Logits float32 (n, C) of prepared inputs, a block of rows at a time."""
    return torch.cat([score(block).float() for block in blocks])


def _known(targets: Tensor, labels: Tensor) -> Tensor:
    """The targets of some labels only; of the others they are unknown."""
    if targets.ndim == 1:
        return targets
    return torch.full_like(targets, -1.0).index_copy_(1, labels, targets[:, labels])


def enumerate_names(values: list[Tensor]) -> list[tuple[str, Tensor]]:
    """Sortable names for tensors that have none."""
    return [(f"{index:06d}", value) for index, value in enumerate(values)]


def _part(tensors: State, part: str) -> State:
    """The tensors of one part of a checkpoint, in their saved order, without the part's name."""
    prefix = f"{part}."
    return {k.removeprefix(prefix): tensors[k] for k in sorted(tensors) if k.startswith(prefix)}


def _to(tensors: State, device: torch.device) -> State:
    return {key: value.to(device) for key, value in tensors.items()}
