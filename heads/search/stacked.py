"""Several linear heads trained as one: their weights side by side in one matrix product.

A head of 80 labels leaves a matrix product narrow, and reading the batch costs as much as the
product itself. Measured on two cores, bf16, 80 labels, 1,024 values, batch 2,000: eight heads side
by side take 0.56 of the time of one after another, at 400 labels 0.97, and at 1,000 more than it.
Heads with hidden layers gain nothing.

Each head keeps its own loss, optimiser, schedule, clipping, average and early stop, so that it ends
with the weights that it would have had alone, but for rounding. One that has stopped leaves.

Legend: B samples, C labels, D values, K heads at work, n validation rows.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmc.heads import metrics
from mmc.heads.batches import Data
from mmc.heads.devices import precise
from mmc.heads.engine import Engine, Position, State
from mmc.heads.models.base import Head, Stage
from mmc.heads.models.linear import Linear
from mmc.heads.optim import Average, clip, lr_factor, make_optimizer, set_lr, trained_parameters
from mmc.heads.options import OptimConfig
from mmc.heads.targets import as_targets
from mmc.store.errors import MmcError

WIDEST = 2560
"""Most logits side by side; 32 heads of 80 labels were as good as 8."""
WIDE = 256
"""Labels from which a head is wide enough by itself."""
FOLLOWED = frozenset(OptimConfig.__dataclass_fields__) & {
    "weight_decay",
    "schedule",
    "warmup",
    "clip_norm",
    "ema",
    "beta2",
    "patience",
    "metric",
    "checkpoint_seconds",
}
"""Settings of the optimiser that are followed here; a head with others set trains alone."""


def stackable(head: type[Head], config: Any, optim: OptimConfig) -> bool:
    """Whether a head of these settings can be trained side by side with others."""
    default = OptimConfig()
    others = OptimConfig.__dataclass_fields__.keys() - FOLLOWED
    return (
        head is Linear
        and config.output == "linear"
        and optim.schedule in ("cosine", "constant")
        and all(getattr(optim, name) == getattr(default, name) for name in others)
    )


def heads_at_once(num_labels: int, *, streamed: bool) -> int:
    """How many heads to put side by side; where data is read anew all the time, any two gain."""
    if num_labels > WIDE and not streamed:
        return 1
    return max(2 if streamed else 1, WIDEST // num_labels)


@dataclass(eq=False)
class Member:
    """One of the heads and what trains it."""

    engine: Engine
    stage: Stage
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    average: Average | None
    total: Tensor
    """Sum over the samples since the last validation of their loss, on the device."""
    rows: int = 0
    best: State = field(default_factory=dict)
    error: str = ""
    """Why it can train no further."""

    @classmethod
    def of(cls, engine: Engine) -> "Member":
        """A head that is about to start."""
        (stage,) = engine.head.stages()
        groups = trained_parameters(engine.head, stage.trains)
        layer = _layer(engine)
        parameters = list(layer.parameters())  # weight, bias
        return cls(
            engine=engine,
            stage=stage,
            optimizer=make_optimizer(groups, engine.optim),
            parameters=parameters,
            average=Average(parameters, engine.optim.ema) if engine.optim.ema else None,
            total=torch.zeros((), device=engine.device),
        )

    @property
    def position(self) -> Position:
        """How far it is."""
        return self.engine.position

    @property
    def going(self) -> bool:
        """Whether it trains on."""
        patience = self.engine.optim.patience
        stopped = self.error or (patience and self.position.rounds_since >= patience)
        return self.position.epoch < self.engine.epochs and not stopped

    @property
    def next_round(self) -> int:
        """The epoch after which it validates next."""
        return min(self.position.epoch + self.engine.epochs_per_round, self.engine.epochs)

    def step(self, step: int, weight_grad: Tensor, bias_grad: Tensor) -> None:
        """Move by the gradients of its weight (C, D) and bias (C,)."""
        engine = self.engine
        factor = lr_factor(step, engine.epochs * engine.steps, engine.optim)
        set_lr(self.optimizer, engine.lr * factor)
        self.parameters[0].grad, self.parameters[1].grad = weight_grad, bias_grad
        if engine.optim.clip_norm:
            clip(self.parameters, engine.optim.clip_norm)
        self.optimizer.step()
        if self.average:
            self.average.update(step + 1)

    def judge(self, logits: Tensor, val: Data) -> None:
        """Take in the validation logits float32 (n, C) after an epoch."""
        engine, targets = self.engine, as_targets(val.targets).whole()
        loss = engine.loss(logits, targets.float() if targets.ndim == 2 else targets)
        try:
            metric = metrics.score(logits, targets, engine.task, engine.metric)
        except MmcError as failure:  # it diverged; the others need not end with it
            self.error = str(failure)
            return
        if self.position.take(metric, float(loss)):
            self.best = {k: v.clone() for k, v in engine.head.state_dict().items()}
        train_loss = float(self.total) / self.rows
        self.total.zero_()
        self.rows = 0
        engine.note(self.stage, self.optimizer, train_loss, metric, float(loss))

    def finish(self) -> None:
        """Leave the best parameters in the head, in memory of their own."""
        for parameter in self.parameters:
            parameter.data = parameter.data.clone()
            parameter.grad = None
        if self.best:
            self.engine.head.load_state_dict(self.best)
        self.engine.head.eval().requires_grad_(False)
        self.position.next_stage()


class Stack:
    """Trains the heads of several engines that share data, batch size, seed and precision.

    Every engine's head ends with its best parameters, its position with its history, as after
    `Engine.run`; seconds are a head's share of the time that all took together.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.lead = engines[0]
        self.members = [Member.of(engine) for engine in engines]
        self.batches = self.lead.train.batches(
            self.lead.batch_size, seed=self.lead.seed, reads=self.members[0].stage.reads
        )

    def run(self, finished: Callable[[int, str], None]) -> None:
        """Train them all.

        Args:
            finished: told each engine's place when it has stopped, and why it failed, if it did.
        """
        with precise(self.lead.dtype, self.lead.device):
            self._run(finished)

    def _run(self, finished: Callable[[int, str], None]) -> None:
        going, epoch = self._packed(self.members), 0
        while going:
            until = min(member.next_round for member in going)
            started = time.perf_counter()
            self._run_epochs(going, epoch, until)
            seconds = (time.perf_counter() - started) / len(going)
            due = [member for member in going if member.next_round == until]
            for member in going:
                member.position.train_seconds += seconds
                member.position.train_rows += len(self.lead.train) * (until - epoch)
            self._validate(due, until)
            epoch = until
            still = [member for member in going if member.going]
            if len(still) < len(going):
                for place, member in enumerate(self.members):
                    if member in going and member not in still:
                        member.finish()
                        finished(place, member.error)
                going = self._packed(still)

    def _packed(self, members: list[Member]) -> list[Member]:
        """Move the members' parameters into one matrix (K C, D) and one vector (K C,)."""
        if members:
            parts = [_layer(member.engine) for member in members]
            self.weight = torch.cat([part.weight.detach() for part in parts]).requires_grad_()
            self.bias = torch.cat([part.bias.detach() for part in parts]).requires_grad_()
            rows = self._split(self.weight.data), self._split(self.bias.data)
            for part, weight, bias in zip(parts, *rows, strict=True):
                part.weight.data, part.bias.data = weight, bias
        return members

    def _split(self, values: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """The part of each member."""
        parts: tuple[Tensor, ...] = values.split(self.lead.head.num_labels, dim)
        return parts

    def _run_epochs(self, members: list[Member], first: int, until: int) -> None:
        device, bf16 = self.lead.device, self.lead.dtype == torch.bfloat16
        for epoch in range(first, until):
            step = epoch * self.lead.steps
            for batch, targets in self.batches.epoch(0, epoch):
                # As in the engine: a cache would outlive the step inside another autocast.
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
                    logits = F.linear(batch["inputs"], self.weight, self.bias)
                losses = [
                    member.engine.loss(part, targets)
                    for member, part in zip(members, self._split(logits, 1), strict=True)
                ]
                torch.autograd.backward(losses)
                assert self.weight.grad is not None
                assert self.bias.grad is not None
                grads = self._split(self.weight.grad), self._split(self.bias.grad)
                for member, loss, *grad in zip(members, losses, *grads, strict=True):
                    member.step(step, *grad)
                    member.total += loss.detach() * len(targets)
                    member.rows += len(targets)
                self.weight.grad = self.bias.grad = None
                step += 1

    @torch.no_grad()
    def _validate(self, members: list[Member], epoch: int) -> None:
        """Judge members by one product in float32 over the validation rows."""
        averages = [member.average for member in members if member.average]
        for average in averages:
            average.swap()
        layers = [_layer(member.engine) for member in members]
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        val = self.lead.val
        logits = torch.cat([F.linear(block["inputs"], weight, bias) for block in val.blocks()])
        for member, part in zip(members, self._split(logits, 1), strict=True):
            member.position.epoch = epoch
            member.judge(part.contiguous(), val)
        for average in averages:
            average.swap()


def _layer(engine: Engine) -> nn.Linear:
    layer: nn.Linear = engine.head.classifier  # type: ignore[assignment]
    return layer
