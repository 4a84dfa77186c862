"""Epochs, measuring after each, the best one, and going on from a checkpoint.

What a step is and what is kept of an epoch is a subclass's. Stopped at any point and run again, a
training continues from its checkpoint and ends, on a CPU, in the same bits.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mmc.extract.plan import Rows
from mmc.extract.training.checkpoints import Checkpoints, part
from mmc.extract.training.data import Batch, Loader, PairSet, Sampler
from mmc.extract.training.distributed import World
from mmc.extract.training.measure import chance
from mmc.extract.training.optim import lr_factor, pack_optimizer, unpack_optimizer
from mmc.store.errors import MmcError

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]

_SAID = 5
_TIE = 1e-9
_COLLAPSED = 0.1
"""Features have become alike where their distance (1 - mean cosine) is this share of the first."""
_SHARES = {"retrieval", "zero_shot"}
"""Metrics that are shares of val."""


def silent(stage: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


def speechless(line: str) -> None:
    """What all processes but the first say."""


class Job(Protocol):
    """What a training consists of, whatever is trained."""

    source: str
    folder: Path
    config: Any
    """With epochs, lr and optim."""
    world: World
    say: Say
    pairs: PairSet
    sampler: Sampler
    loader: Loader
    batch_size: int
    micro_batch: int
    precision: str
    steps: int
    """Of an epoch."""
    val: Rows
    """What is measured."""

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued; see `common_identity`."""


def common_identity(job: Job, indifferent: Sequence[str]) -> dict[str, Any]:
    """What must be equal in every training.

    Args:
        indifferent: settings that may change.
    """
    config = asdict(job.config)
    for name in indifferent:
        del config[name]
    for name in ("checkpoint_epochs", "micro_batch"):
        del config["optim"][name]
    return {
        "config": config,
        "batch_size": job.batch_size,
        "micro_batch": job.micro_batch,
        "processes": job.world.size,
        "device": job.world.device.type,
        "precision": job.precision,
        "pairs": job.pairs.digest,
    }


@dataclass
class Position:
    """How far a training is; JSON-able, kept in the checkpoint."""

    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_score: float = -math.inf
    best_loss: float = math.inf
    highest: float = -math.inf
    """Score of any epoch, kept or not."""
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def improves(self, score: float, loss: float, noise: float = 0.0) -> bool:
        """Whether an epoch is the best one so far; the loss decides among those of one score.

        Args:
            noise: scores that lie no further below the highest one count as one. (Below that of
                the epoch kept, many small steps down would each be small.)
        """
        least = max(self.highest, self.best_score, score) - max(noise, _TIE)
        return score >= least and (loss < self.best_loss or self.best_score < least)

    def metrics(self, epoch: int) -> dict[str, float]:
        """What was measured after an epoch, 0 is before the first."""
        row = self.history[epoch]
        assert row["epoch"] == epoch
        return {key.removeprefix("val_"): row[key] for key in row if key.startswith("val_")}


class Training(ABC):
    """One training in one process."""

    what = "training"
    """What it is called in messages."""
    losses: tuple[str, ...] = ("train_loss",)
    """What a step gives, by the names in the history; the first is the one that is minimised."""

    def __init__(self, job: Job, optimizer: torch.optim.Optimizer) -> None:
        self.job, self.optimizer = job, optimizer
        self.checkpoints = Checkpoints(job.folder, job.identity())
        self.at = Position()
        self.resumed = self._collapsed = False
        self.rate = 0.0
        """Pairs per second of the steps of this run."""

    @abstractmethod
    def step(self, batch: Batch) -> Tensor:
        """Change the parameters by one batch; its losses, (len(losses),) or a scalar."""

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """What is measured on val, by name; `loss` is one of them."""

    @abstractmethod
    def keep(self) -> None:
        """The epoch that ``at`` stands behind is the best so far."""

    @abstractmethod
    def state(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of a checkpoint but the optimiser's, by part and name."""

    @abstractmethod
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take what `state` gave, from a checkpoint; see `part`."""

    @abstractmethod
    def tell(self, epoch: str, row: dict[str, Any]) -> str:
        """What a row of the history says, in words."""

    def record(self) -> dict[str, Any]:
        """More of a checkpoint, JSON-able."""
        return {}

    def load_record(self, record: dict[str, Any]) -> None:  # noqa: B027  # may stay empty
        """Take what `record` gave."""

    def score(self, measured: dict[str, float]) -> float:
        """What decides which epoch is the best; larger is better."""
        return measured[self.job.config.optim.metric]

    def noise(self, measured: dict[str, float]) -> float:
        """Standard error of a score that is a share of the samples of val, of others 0.

        With a few hundred samples the best recall of many epochs is a stroke of luck, and often of
        an epoch that has begun to learn by heart (the rule of one standard error, Breiman et al.
        1984, with the loss for what is simpler).
        """
        metric = self.job.config.optim.metric
        if metric not in _SHARES:
            return 0.0
        return self._standard_error(measured[metric])

    def _standard_error(self, share: float) -> float:
        return math.sqrt(share * (1 - share) / len(self.job.val))

    def more(self) -> dict[str, float]:
        """More for a row of the history."""
        return {}

    def enough(self) -> bool:
        """Whether to stop before the last epoch."""
        return False

    def resume(self) -> None:
        """Go on from a checkpoint, if there is one.

        Raises:
            InputError: it is of another training, or damaged.
        """
        found = self.checkpoints.load()
        if not found:
            return
        tensors, record = found
        self.at = Position(**record["position"])
        self.load(tensors)
        unpack_optimizer(self.optimizer, part(tensors, "optim"))
        self.job.loader.failed |= dict(record["failed"])
        self.load_record(record)
        self.resumed = True
        self.job.say(
            f"continuing the unfinished {self.what} in {self.job.folder} after epoch "
            f"{self.at.epoch}"
        )

    def train(self, progress: Progress) -> None:
        """All epochs that are left."""
        total = self.job.config.epochs * self.job.steps
        trained, first_step = 0.0, self.at.step
        if not self.at.history:
            self._note(self._measured(), None)
        while self.at.epoch < self.job.config.epochs and not self.enough():
            begun = time.perf_counter()
            losses = self._epoch(progress, total)
            took = time.perf_counter() - begun
            trained += took
            self.at.seconds += took
            self.at.epoch += 1
            measured = self._measured()
            score = self.score(measured)
            if self.at.improves(score, measured["loss"], self.noise(measured)):
                self.at.best_score, self.at.best_loss = score, measured["loss"]
                self.at.best_epoch = self.at.epoch
                self.keep()
            self.at.highest = max(self.at.highest, score)
            self._note(measured, losses)
            self.warn_of_collapse(measured)
            self._checkpoint()
        steps = self.at.step - first_step
        self.rate = steps * self.job.batch_size / trained if steps else 0.0

    def interrupted(self) -> str:
        """What is left after Ctrl-C."""
        if not self.checkpoints.path.exists():
            return "interrupted before the first checkpoint; nothing is kept"
        return f"interrupted; the same command goes on from the checkpoint in {self.job.folder}"

    def count_failed(self) -> int:
        """Rows of all processes whose picture could not be used."""
        rows = torch.zeros(len(self.job.pairs.ids), device=self.job.world.device)
        rows[list(self.job.loader.failed)] = 1
        self.job.world.sum_([rows])
        return int(rows.count_nonzero())

    def tell_failed(self, count: int) -> None:
        """Say which pictures could not be used."""
        if count:
            self.job.say(f"warning: {count:,} pictures cannot be used:")
            for row, why in list(self.job.loader.failed.items())[:_SAID]:
                self.job.say(f"  {self.job.pairs.ids[row].as_py()}: {why}")

    def chance(self) -> float:
        """`retrieval` on val of a random ranking."""
        pairs, val = self.job.pairs, self.job.val
        return chance(pairs.images[val], pairs.texts[val])

    def warn_of_chance(self, found: float) -> None:
        """Say so where ``found``, a `retrieval` on val, is within a standard error of chance."""
        guess = self.chance()
        if found - guess <= self._standard_error(guess):
            self.job.say(
                "warning: on val pictures and texts find each other hardly better than by chance "
                f"(retrieval {found:.4f}, by chance {guess:.4f}); train heads on these features "
                "and on others before you rely on them"
            )

    def outcome(self) -> dict[str, Any]:
        """What the record of every finished training and its report say alike."""
        return {
            "val": len(self.job.val),
            "best_epoch": self.at.best_epoch,
            "before": self.at.metrics(0),
            "after": self.at.metrics(self.at.best_epoch),
        }

    def _checkpoint(self) -> None:
        every = self.job.config.optim.checkpoint_epochs
        due = self.at.epoch % every == 0 or self.at.epoch == self.job.config.epochs
        if not (self.job.world.first and due):
            return
        record = {
            "position": asdict(self.at),
            "failed": list(self.job.loader.failed.items()),
            **self.record(),
        }
        parts = {**self.state(), "optim": pack_optimizer(self.optimizer)}
        self.checkpoints.save(parts, record)

    def _epoch(self, progress: Progress, total: int) -> list[float]:
        """Train on one epoch's pairs; the mean losses."""
        config = self.job.config
        losses = torch.zeros(len(self.losses), device=self.job.world.device)
        usable = torch.zeros((), device=self.job.world.device)
        rows = self.job.sampler.epoch(self.at.epoch)[: self.job.steps * self.job.batch_size]
        for batch in self.job.loader.batches(rows, self.job.batch_size):
            rate = config.lr * lr_factor(self.at.step, total, config.optim)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["share"]
            losses += self.step(batch)
            usable += batch.valid.sum()
            self.at.step += 1
            progress("steps", self.at.step, total)
        mean: list[float] = (losses / self.job.steps).tolist()
        self._check_finite(mean[0], self.at.epoch + 1)
        self.job.world.sum_([usable])
        if not usable:
            why = next(iter(self.job.loader.failed.values()), "")
            raise MmcError(f"no picture of train can be used (the first that cannot: {why})")
        return mean

    def _measured(self) -> dict[str, float]:
        """What `measure` gives, of weights that are numbers."""
        measured = self.measure()
        self._check_finite(measured["loss"], self.at.epoch)
        return measured

    def warn_of_collapse(self, measured: dict[str, float]) -> None:
        """Say once where all features become alike: they tell nothing, and only lose more."""
        first = self.at.metrics(0)
        for what, name in (("pictures", "image_cosine"), ("texts", "text_cosine")):
            if self._collapsed or 1 - measured[name] >= _COLLAPSED * (1 - first[name]):
                continue
            self._collapsed = True
            self.job.say(
                f"warning: the features of all {what} become alike (mean cosine {first[name]:.3f} "
                f"-> {measured[name]:.4f}), so that they tell less and less; lower --lr"
            )

    def _check_finite(self, loss: float, epoch: int) -> None:
        """Raises MmcError where a loss is no number; epoch 0 is before the first step."""
        if math.isfinite(loss):
            return
        exact = self.job.precision == "float32"
        if not epoch:
            raise MmcError(
                "the loss on val is not finite before the first step: the weights that the "
                f"{self.what} begins with are damaged"
                + ("" if exact else ", or need --precision float32")
            )
        more = "raise optim.warmup" if exact else "choose --precision float32"
        raise MmcError(f"the loss is not finite in epoch {epoch}; lower --lr, or {more}")

    def _note(self, measured: dict[str, float], losses: list[float] | None) -> None:
        """Add a row to the history and say it."""
        row: dict[str, Any] = {"epoch": self.at.epoch}
        given: Sequence[float | None] = losses or [None] * len(self.losses)
        row |= dict(zip(self.losses, given, strict=True))
        row |= {f"val_{name}": value for name, value in measured.items()}
        row |= {**self.more(), "seconds": round(self.at.seconds, 3)}
        self.at.history.append(row)
        when = "before" if losses is None else f"epoch {self.at.epoch} of {self.job.config.epochs}"
        self.job.say(self.tell(when, row))
