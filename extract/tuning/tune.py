"""`mmc tune`: LoRA adapters for a backbone of two towers, by CLIP's loss on the user's own pairs.

The epoch that was best on validation data is kept. Stopped at any point and run again, a tuning
continues from its checkpoint and ends, on a CPU, in the same bits.
"""

import re
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmc.extract.backbones import parse_spec
from mmc.extract.backbones.base import versions
from mmc.extract.backbones.lora import PREFIX, add_adapter
from mmc.extract.backbones.lora_files import CONFIG, WEIGHTS
from mmc.extract.training.cached import contrastive_step
from mmc.extract.training.checkpoints import claimed, part, write_history, write_json
from mmc.extract.training.contrast import contrastive_loss
from mmc.extract.training.data import Batch
from mmc.extract.training.distributed import world
from mmc.extract.training.evaluation import pair_mask
from mmc.extract.training.loop import Progress, Say, Training, silent, speechless
from mmc.extract.training.optim import make_optimizer
from mmc.extract.training.seeds import Use, derived
from mmc.extract.tuning import saving
from mmc.extract.tuning.guards import check_end
from mmc.extract.tuning.joint import JointHead
from mmc.extract.tuning.options import RECORD, TuneConfig, TuneReport
from mmc.extract.tuning.setup import Setup
from mmc.extract.tuning.validation import encode
from mmc.store.errors import InputError, MmcError

__all__ = ["TuneConfig", "TuneReport", "tune"]


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
    begun = Path(parse_spec(config.backbone).name).expanduser()
    if begun.exists() and begun.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{folder} holds what the tuning begins with; name another OUT")
    with world(config.device) as processes:
        say = report if processes.first else speechless
        claim = (
            claimed(folder, saving.FILES, RECORD, overwrite=config.overwrite)
            if processes.first
            else nullcontext(lambda: None)
        )
        with claim as clear:
            processes.wait()
            setup = Setup(source, folder, config, head, processes, say)
            clear()
            processes.wait()
            tuning = _Tuning(setup)
            try:
                tuning.resume()
                tuning.train(progress if processes.first else silent)
                return tuning.finish(started)
            except KeyboardInterrupt:
                say(tuning.interrupted())
                raise


class _Tuning(Training):
    """One tuning in one process."""

    what = "tuning"

    def __init__(self, setup: Setup) -> None:
        config, head = setup.config, setup.head
        groups: list[tuple[float, list[nn.Parameter]]] = [
            (1.0, setup.adapters.parameters),
            (1.0, [setup.scale.log] if config.lora.logit_scale else []),
            (0.0 if head is None else head.lr / config.lr, list(setup.classifier.parameters())),
        ]
        super().__init__(setup, make_optimizer(groups, config.optim))
        self.job: Setup = setup
        self._trained = [parameter for _, some in groups for parameter in some]
        self._scaler = torch.amp.GradScaler(
            setup.world.device.type, enabled=setup.precision == "fp16"
        )
        self._best: dict[str, Tensor] = {}
        self._best_head: dict[str, Tensor] = {}
        self._failed = 0

    def state(self) -> dict[str, dict[str, Tensor]]:
        """See :class:`Training`."""
        return {
            "now": self._adapters(),
            "best": self._best,
            "head": self.job.classifier.state_dict(),
            "best_head": self._best_head,
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """See :class:`Training`."""
        self._load(part(tensors, "now"))
        self.job.classifier.load_state_dict(part(tensors, "head"))
        self._best, self._best_head = part(tensors, "best"), part(tensors, "best_head")

    def record(self) -> dict[str, Any]:
        """See :class:`Training`."""
        return {"scaler": self._scaler.state_dict()}

    def load_record(self, record: dict[str, Any]) -> None:
        """See :class:`Training`."""
        self._scaler.load_state_dict(record["scaler"])

    def keep(self) -> None:
        """See :class:`Training`."""
        self._best = self._adapters()
        self._best_head = _copied(self.job.classifier.state_dict())

    def measure(self) -> dict[str, float]:
        """See :class:`Training`."""
        self.job.adapters.drop(None)
        return self.job.validation.measure(self.job.val)

    def more(self) -> dict[str, float]:
        """See :class:`Training`."""
        return {"logit_scale": float(self.job.scale().detach())}

    def _adapters(self) -> dict[str, Tensor]:
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

    def step(self, batch: Batch) -> Tensor:
        """See :class:`Training`."""
        self.job.adapters.drop(self.at.step)
        mask = pair_mask(self.job.pairs, self.job.loader, batch, self.job.config.pairs)

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
        self._scaler.unscale_(self.optimizer)
        if self.job.config.optim.clip_norm:
            nn.utils.clip_grad_norm_(self._trained, self.job.config.optim.clip_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad()
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
            torch.manual_seed(derived(self.job.config.seed, Use.HEAD, self.at.step))
            loss = self.job.head.loss(image, text, labels)
        return self.job.config.optim.head_weight * loss / self.job.world.size

    def tell(self, epoch: str, row: dict[str, Any]) -> str:
        """See :class:`Training`."""
        loss = row["train_loss"]
        said = "" if loss is None else f"loss {loss:.4f}, "
        more = "".join(
            f", {what} {row[f'val_{name}']:.3f}"
            for name, what in (("zero_shot", "zero-shot"), ("head", "head"))
            if f"val_{name}" in row
        )
        return (
            f"{epoch}: {said}val loss {row['val_loss']:.4f}, R@1 "
            f"{row['val_image_to_text_R@1']:.3f} image to text, "
            f"{row['val_text_to_image_R@1']:.3f} text to image{more}"
        )

    def finish(self, started: float) -> TuneReport:
        """Write the best epoch's adapter, check it, and say what was reached."""
        self._finish()
        return self._report(started)

    def _finish(self) -> None:
        """Write the best epoch's adapter, check it as it was written, and whatever else is due."""
        self._load(self._best)
        with torch.no_grad():
            tuned = self.job.probe.features(self.job.towers)
        self.job.adapters.remove()
        self._failed = self.count_failed()
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
        write_history(folder / saving.HISTORY, self.at.history)
        write_json(folder / RECORD, self._record())
        self.checkpoints.remove()

    def _record(self) -> dict[str, Any]:
        return {
            "format": saving.FORMAT,
            "backbone": self.job.encoder.context["resolved_spec"],
            "source": self.job.source,
            **self.job.identity(),
            "steps": self.at.step,
            "train": len(self.job.pairs.splits["train"]),
            "failed": self._failed,
            **self.outcome(),
            "versions": versions("mmc", "open_clip_torch", "transformers", "torchvision"),
        }

    def _report(self, started: float) -> TuneReport:
        before, after = self.at.metrics(0), self.at.metrics(self.at.best_epoch)
        metric, folder = self.job.config.optim.metric, self.job.folder
        self.tell_failed(self._failed)
        gain = after[metric] - before[metric]
        if gain <= self.noise(after):
            self.job.say(
                f"warning: on val the tuned backbone is {'hardly' if gain > 0 else 'not'} better "
                f"than it was ({metric} {before[metric]:.4f} -> {after[metric]:.4f}); more pairs, "
                "more --epochs or another --lr may help"
            )
        self.warn_of_chance(after["retrieval"])
        was = f"{before[metric]:.4f} -> "
        told = {
            "retrieval": f" ({self.chance():.4f} by chance)",
            "head": "; whether tuning helped it, a head on the frozen features tells",
        }
        self.job.say(
            f"kept epoch {self.at.best_epoch} of {self.at.epoch}: {metric} "
            f"{'' if metric == 'head' else was}{after[metric]:.4f} on {len(self.job.val)} val "
            f"samples{told.get(metric, '')}"
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
            failed=self._failed,
            **self.outcome(),
            epochs=self.at.epoch,
            seconds=time.perf_counter() - started,
            rate=self.rate,
            resumed=self.resumed,
        )


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}
