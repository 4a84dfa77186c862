"""`mmc tune`: LoRA adapters for a backbone of two towers, by CLIP's loss on the user's own pairs.

The epoch that was best on validation data is kept. Stopped at any point and run again, a tuning
continues from its checkpoint and ends, on a CPU, in the same bits.
"""

import math
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmc.extract.backbones.base import versions
from mmc.extract.backbones.lora import PREFIX, add_adapter
from mmc.extract.backbones.lora_files import CONFIG, WEIGHTS
from mmc.extract.tuning import saving
from mmc.extract.tuning.cached import contrastive_step
from mmc.extract.tuning.checkpoints import Checkpoints, claimed, part
from mmc.extract.tuning.contrast import PairMask, contrastive_loss
from mmc.extract.tuning.data import Batch
from mmc.extract.tuning.distributed import world
from mmc.extract.tuning.guards import check_end
from mmc.extract.tuning.joint import JointHead
from mmc.extract.tuning.optim import lr_factor, make_optimizer, pack_optimizer, unpack_optimizer
from mmc.extract.tuning.options import TuneConfig, TuneReport
from mmc.extract.tuning.setup import Say, Setup
from mmc.extract.tuning.validation import encode
from mmc.store.errors import InputError, MmcError

__all__ = ["TuneConfig", "TuneReport", "tune"]

Progress = Callable[[str, int, int], None]

_DROPOUT = 4
"""What a seed is for; `data` and `adapters` have the others."""
_SAID = 5
_TIE = 1e-9


def silent(stage: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


def tune(
    source: str,
    out: str | Path,
    config: TuneConfig,
    *,
    head: JointHead | None = None,
    report: Say = print,
    progress: Progress = silent,
) -> TuneReport:
    """Tune a backbone on the pairs of a source; write its adapter to the folder ``out``.

    Under `torchrun` every process calls this; the first one speaks and writes.

    Args:
        source: where the pairs come from; several with ``::`` between them.
        out: folder of the adapter; an unfinished tuning there is continued.
        config: the backbone and how it is tuned.
        head: trained along with the adapter, on the pooled features of both towers.
        report: called with each line for the user.
        progress: called with (stage, done, total).

    Raises:
        InputError: anything that the user can set right: a source without pairs, a backbone without
            two towers, a setting, a folder that holds something else or a finished tuning.
        MmcError: adapters without effect, a loss that is not finite, another process at work.
    """
    started = time.perf_counter()
    folder = Path(out).expanduser()
    if re.search(r"[,\[\]]", str(folder.absolute())):
        raise InputError(f"OUT {folder}: a path with , [ or ] cannot stand in a spec as lora=OUT")
    with world(config.device) as processes:
        say = report if processes.first else _nothing
        claim = (
            claimed(folder, saving.FILES, saving.RECORD, overwrite=config.overwrite)
            if processes.first
            else nullcontext()
        )
        with claim:
            processes.wait()
            setup = Setup(source, folder, config, head, processes, say)
            tuning = _Tuning(setup)
            try:
                return tuning.run(progress if processes.first else silent, started)
            except KeyboardInterrupt:
                say(tuning.interrupted())
                raise


def _nothing(line: str) -> None:
    """What the other processes say."""


@dataclass
class _Position:
    """How far a tuning is; JSON-able, kept in the checkpoint."""

    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_score: float = -math.inf
    best_loss: float = math.inf
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def improves(self, score: float, loss: float) -> bool:
        """Whether an epoch is the best one so far."""
        if abs(score - self.best_score) <= _TIE:
            return loss < self.best_loss
        return score > self.best_score


class _Tuning:
    """One tuning in one process."""

    def __init__(self, setup: Setup) -> None:
        self.job = setup
        config, head = setup.config, setup.head
        groups: list[tuple[float, list[nn.Parameter]]] = [
            (1.0, setup.adapters.parameters),
            (1.0, [setup.scale.log] if config.lora.logit_scale else []),
            (0.0 if head is None else head.lr / config.lr, list(setup.classifier.parameters())),
        ]
        self._trained = [parameter for _, some in groups for parameter in some]
        self._optimizer = make_optimizer(groups, config.optim)
        self._scaler = torch.amp.GradScaler(
            setup.world.device.type, enabled=setup.precision == "fp16"
        )
        self._checkpoints = Checkpoints(setup.folder, setup.identity())
        self._at = _Position()
        self._best: dict[str, Tensor] = {}
        self._best_head: dict[str, Tensor] = {}
        self._failed = 0

    def run(self, progress: Progress, started: float) -> TuneReport:
        """Train, keep the best epoch, write and check the adapter."""
        resumed = self._resume()
        total = self.job.config.epochs * self.job.steps
        trained = 0.0
        first_step = self._at.step
        if not self._at.history:
            self._note(self.job.validation.measure(self.job.val), None)
        while self._at.epoch < self.job.config.epochs:
            begun = time.perf_counter()
            loss = self._epoch(progress, total)
            trained += time.perf_counter() - begun
            self._at.seconds += time.perf_counter() - begun
            self._at.epoch += 1
            measured = self.job.validation.measure(self.job.val)
            score = measured[self.job.config.optim.metric]
            if self._at.improves(score, measured["loss"]):
                self._at.best_score, self._at.best_loss = score, measured["loss"]
                self._at.best_epoch = self._at.epoch
                self._best = self._state()
                self._best_head = _copied(self.job.classifier.state_dict())
            self._note(measured, loss)
            self._checkpoint()
        self._finish()
        steps = self._at.step - first_step
        return self._report(
            started, steps * self.job.batch_size / trained if steps else 0.0, resumed
        )

    def interrupted(self) -> str:
        """What is left after Ctrl-C."""
        if not self._checkpoints.path.exists():
            return "interrupted before the first checkpoint; nothing is kept"
        return f"interrupted; the same command goes on from the checkpoint in {self.job.folder}"

    def _resume(self) -> bool:
        found = self._checkpoints.load()
        if not found:
            return False
        tensors, record = found
        self._at = _Position(**record["position"])
        self._load(part(tensors, "now"))
        self.job.classifier.load_state_dict(part(tensors, "head"))
        unpack_optimizer(self._optimizer, part(tensors, "optim"))
        self._scaler.load_state_dict(record["scaler"])
        self.job.loader.failed |= dict(record["failed"])
        self._best, self._best_head = part(tensors, "best"), part(tensors, "best_head")
        self.job.say(
            f"continuing the unfinished tuning in {self.job.folder} after epoch {self._at.epoch}"
        )
        return True

    def _checkpoint(self) -> None:
        every = self.job.config.optim.checkpoint_epochs
        due = self._at.epoch % every == 0 or self._at.epoch == self.job.config.epochs
        if not (self.job.world.first and due):
            return
        parts = {
            "now": self._state(),
            "best": self._best,
            "head": self.job.classifier.state_dict(),
            "best_head": self._best_head,
            "optim": pack_optimizer(self._optimizer),
        }
        tensors = {f"{name}.{key}": t for name, state in parts.items() for key, t in state.items()}
        record = {
            "position": asdict(self._at),
            "scaler": self._scaler.state_dict(),
            "failed": list(self.job.loader.failed.items()),
        }
        self._checkpoints.save(tensors, record)

    def _state(self) -> dict[str, Tensor]:
        """The adapter's tensors as its file has them."""
        state = self.job.adapters.state()
        if self.job.config.lora.logit_scale and self.job.scale.own:
            state[f"{PREFIX}logit_scale"] = self.job.scale.log.detach().cpu().clone()
        return state

    @torch.no_grad()
    def _load(self, state: dict[str, Tensor]) -> None:
        self.job.adapters.load(state)
        if f"{PREFIX}logit_scale" in state:
            self.job.scale.log.copy_(state[f"{PREFIX}logit_scale"])

    def _epoch(self, progress: Progress, total: int) -> float:
        """Train on one epoch's pairs; the mean loss."""
        config = self.job.config
        losses = torch.zeros((), device=self.job.world.device)
        rows = self.job.sampler.epoch(self._at.epoch)[: self.job.steps * self.job.batch_size]
        for batch in self.job.loader.batches(rows, self.job.batch_size):
            rate = config.lr * lr_factor(self._at.step, total, config.optim)
            for group in self._optimizer.param_groups:
                group["lr"] = rate * group["share"]
            self.job.adapters.drop(self._at.step)
            losses += self._step(batch)
            self._at.step += 1
            progress("steps", self._at.step, total)
        self.job.adapters.drop(None)
        mean = float(losses) / self.job.steps
        if not math.isfinite(mean):
            raise MmcError(
                f"the loss is not finite in epoch {self._at.epoch + 1}; lower --lr, or choose "
                "--precision float32"
            )
        return mean

    def _step(self, batch: Batch) -> Tensor:
        mask = self._mask(batch)

        def shared_loss(image: Tensor, text: Tensor, rows: slice) -> Tensor:
            loss = contrastive_loss(image, text, self.job.scale(), mask, rows)
            return loss + self._head_loss(batch, image[rows], text[rows])

        loss = contrastive_step(
            lambda part: encode(self.job.towers, batch, part),
            shared_loss,
            len(batch.rows),
            self.job.micro_batch,
            self._trained,
            self.job.world,
            self._scaler.scale,
        )
        self._scaler.unscale_(self._optimizer)
        if self.job.config.optim.clip_norm:
            nn.utils.clip_grad_norm_(self._trained, self.job.config.optim.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self.job.scale.clamp_()
        return loss

    def _head_loss(self, batch: Batch, image: Tensor, text: Tensor) -> Tensor:
        """This process's share of the head's loss, the mean over all of them."""
        if self.job.head is None:
            return image.new_zeros(())
        labels = [
            some if good else None
            for some, good in zip(
                self.job.pairs.labels_of(batch.rows), batch.valid.tolist(), strict=True
            )
        ]
        devices = [self.job.world.device] if self.job.world.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(_derived(self.job.config.seed, _DROPOUT, self._at.step))
            loss = self.job.head.loss(image, text, labels)
        return self.job.config.optim.head_weight * loss / self.job.world.size

    def _mask(self, batch: Batch) -> PairMask:
        """Of the batches of all processes."""
        pairs, world = self.job.pairs, self.job.world
        valid, contents, groups = (
            world.gather(values.to(world.device))
            for values in (
                batch.valid,
                pairs.contents_of(batch.rows),
                pairs.groups_of(batch.rows),
            )
        )
        return PairMask.of(valid, same=contents, groups=groups, rule=self.job.config.pairs)

    def _note(self, measured: dict[str, float], loss: float | None) -> None:
        """Add a row to the history and say it."""
        at = self._at
        row = {"epoch": at.epoch, "train_loss": loss}
        row |= {f"val_{name}": value for name, value in measured.items()}
        row |= {"logit_scale": float(self.job.scale().detach()), "seconds": round(at.seconds, 3)}
        at.history.append(row)
        when = "before" if loss is None else f"epoch {at.epoch} of {self.job.config.epochs}"
        said = "" if loss is None else f"loss {loss:.4f}, "
        more = "".join(
            f", {what} {measured[name]:.3f}"
            for name, what in (("zero_shot", "zero-shot"), ("head", "head"))
            if name in measured
        )
        self.job.say(
            f"{when}: {said}val loss {measured['loss']:.4f}, R@1 "
            f"{measured['image_to_text_R@1']:.3f} image to text, "
            f"{measured['text_to_image_R@1']:.3f} text to image" + more
        )

    def _finish(self) -> None:
        """Write the best epoch's adapter, check it as it was written, and whatever else is due."""
        self._load(self._best)
        with torch.no_grad():
            tuned = self.job.probe.features(self.job.towers)
        self.job.adapters.remove()
        self._failed = self._count_failed()
        if not self.job.world.first:
            return
        folder, config = self.job.folder, self.job.config
        base = self.job.encoder.identity["weights"]
        saving.write_adapter(
            folder,
            self._best,
            rank=config.lora.rank,
            alpha=self.job.adapters.alpha,
            dropout=config.lora.dropout,
            base_model=self.job.encoder.context["name"],
            base_weights=base,
        )
        model = self.job.towers.model

        def merge() -> None:
            add_adapter(model, str(folder), base_weights=base, where=config.backbone)

        try:
            check_end(self.job.towers, base, self.job.probe, tuned, merge)
        except MmcError:
            for name in (CONFIG, WEIGHTS):
                (folder / name).unlink(missing_ok=True)
            raise
        if self.job.head is not None:
            self.job.classifier.load_state_dict(self._best_head)
            self.job.head.finish(folder)
        if config.merge:
            saving.write_merged(config.backbone, model, folder / saving.MERGED)
        saving.write_history(folder / saving.HISTORY, self._at.history)
        saving.write_json(folder / saving.RECORD, self._record())
        self._checkpoints.remove()

    def _count_failed(self) -> int:
        """Rows of all processes whose picture could not be used."""
        rows = torch.zeros(len(self.job.pairs.ids), device=self.job.world.device)
        rows[list(self.job.loader.failed)] = 1
        self.job.world.sum_([rows])
        return int(rows.count_nonzero())

    def _metrics(self, epoch: int) -> dict[str, float]:
        row = self._at.history[epoch]
        assert row["epoch"] == epoch
        return {
            key.removeprefix("val_"): value for key, value in row.items() if key.startswith("val_")
        }

    def _record(self) -> dict[str, Any]:
        return {
            "format": saving.FORMAT,
            "backbone": self.job.encoder.context["resolved_spec"],
            "source": self.job.source,
            **self.job.identity(),
            "steps": self._at.step,
            "train": len(self.job.pairs.splits["train"]),
            "val": len(self.job.val),
            "failed": self._failed,
            "best_epoch": self._at.best_epoch,
            "before": self._metrics(0),
            "after": self._metrics(self._at.best_epoch),
            "versions": versions("mmc", "open_clip_torch", "transformers", "torchvision"),
        }

    def _report(self, started: float, rate: float, resumed: bool) -> TuneReport:
        before, after = self._metrics(0), self._metrics(self._at.best_epoch)
        metric, folder = self.job.config.optim.metric, self.job.folder
        if self._failed:
            self.job.say(f"warning: {self._failed:,} pictures cannot be used:")
            for row, why in list(self.job.loader.failed.items())[:_SAID]:
                self.job.say(f"  {self.job.pairs.ids[row].as_py()}: {why}")
        if after[metric] <= before[metric]:
            self.job.say(
                f"warning: on val the tuned backbone is not better than it was ({metric} "
                f"{before[metric]:.4f} -> {after[metric]:.4f}); more pairs, more --epochs or "
                "another --lr may help"
            )
        self.job.say(
            f"kept epoch {self._at.best_epoch} of {self._at.epoch}: {metric} {before[metric]:.4f} "
            f"-> {after[metric]:.4f} on {len(self.job.val)} val samples"
        )
        self.job.say(
            f'use it: mmc extract ... --backbone "{self.job.config.backbone}[lora={folder}]"'
        )
        merged = folder / saving.MERGED if self.job.config.merge else None
        return TuneReport(
            out=str(folder),
            merged=None if merged is None else str(merged),
            adapted=len(list(self.job.adapters)),
            parameters=sum(parameter.numel() for parameter in self._trained),
            pairs=len(self.job.pairs.splits["train"]),
            val=len(self.job.val),
            failed=self._failed,
            before=before,
            after=after,
            best_epoch=self._at.best_epoch,
            epochs=self._at.epoch,
            seconds=time.perf_counter() - started,
            rate=rate,
            resumed=resumed,
        )


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def _derived(*numbers: int) -> int:
    """A seed of its own for each combination."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
