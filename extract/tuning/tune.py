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

from mmc.extract.backbones.base import default_precision, versions
from mmc.extract.backbones.lora import PREFIX, add_adapter
from mmc.extract.backbones.lora_files import CONFIG, WEIGHTS
from mmc.extract.settings import usable_cores
from mmc.extract.tuning import saving
from mmc.extract.tuning.adapters import Adapters
from mmc.extract.tuning.cached import contrastive_step
from mmc.extract.tuning.checkpoints import Checkpoints, claimed, part
from mmc.extract.tuning.contrast import PairMask, contrastive_loss
from mmc.extract.tuning.data import Batch, Loader, Sampler, read_pairs
from mmc.extract.tuning.distributed import World, world
from mmc.extract.tuning.guards import Probe, check_beginning, check_end, used_targets
from mmc.extract.tuning.measure import retrieval, zero_shot
from mmc.extract.tuning.optim import lr_factor, make_optimizer, pack_optimizer, unpack_optimizer
from mmc.extract.tuning.options import TuneConfig, TuneReport
from mmc.extract.tuning.targets import Target, find_targets, within_multihead
from mmc.extract.tuning.towers import LogitScale, load_towers
from mmc.store.errors import InputError, MmcError

__all__ = ["TuneConfig", "TuneReport", "tune"]

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]

_MICRO_BATCHES = {"cpu": 32, "cuda": 256}
_SAID = 5
_TIE = 1e-9


def silent(stage: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


def tune(
    source: str,
    out: str | Path,
    config: TuneConfig,
    *,
    report: Say = print,
    progress: Progress = silent,
) -> TuneReport:
    """Tune a backbone on the pairs of a source; write its adapter to the folder ``out``.

    Under `torchrun` every process calls this; the first one speaks and writes.

    Args:
        source: where the pairs come from; several with ``::`` between them.
        out: folder of the adapter; an unfinished tuning there is continued.
        config: the backbone and how it is tuned.
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
            tuning = _Tuning(source, folder, config, processes, say)
            return tuning.run(progress if processes.first else silent, started)


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

    def __init__(
        self, source: str, folder: Path, config: TuneConfig, processes: World, say: Say
    ) -> None:
        self._source, self._folder, self._config = source, folder, config
        self._world, self._say = processes, say
        device = processes.device
        workers = config.workers or usable_cores()
        self._pairs = read_pairs(
            source, config.source, config.pair_column, workers=workers, report=say
        )
        for line in self._pairs.notes:
            say(line)
        self._sampler = Sampler(
            self._pairs,
            factors=config.factors,
            samples=config.samples_per_epoch,
            seed=config.seed,
        )
        self._batch_size = self._fit_batch()
        self._steps = self._sampler.length // self._batch_size
        self._val = _spaced(self._pairs.splits["val"], config.optim.val_samples)
        self._check_labels()
        self._precision = config.precision or default_precision(str(device))
        self._towers = load_towers(config.backbone, device, self._precision)
        self._encoder = self._towers.encoder
        self._loader = Loader(
            self._pairs, self._encoder, processes, workers=workers, max_pixels=config.max_pixels
        )
        self._probe = Probe.of(self._towers)
        self._adapters = self._adapt()
        self._scale = LogitScale(self._towers.model, device, trained=config.lora.logit_scale)
        self._trained: list[nn.Parameter] = [
            *self._adapters.parameters,
            *([self._scale.log] if config.lora.logit_scale else []),
        ]
        self._optimizer = make_optimizer(self._trained, config.optim)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._precision == "fp16")
        share = self._batch_size // processes.size
        micro = config.optim.micro_batch or _MICRO_BATCHES.get(device.type, 64)
        self._micro_batch = min(micro, share)
        self._checkpoints = Checkpoints(folder, self._identity())
        self._at = _Position()
        self._best: dict[str, Tensor] = {}
        self._failed = 0

    def _fit_batch(self) -> int:
        """The batch size, not more than there are pairs, and the same for every process."""
        size = min(self._config.batch_size, self._sampler.length)
        size -= size % self._world.size
        if size < 2 * self._world.size:
            raise InputError(
                f"a batch of {size} pairs is too small for {self._world.size} processes"
            )
        if size < self._config.batch_size:
            self._say(f"batches have {size} pairs: there are {self._sampler.length} in an epoch")
        return size

    def _check_labels(self) -> None:
        config, pairs = self._config, self._pairs
        if config.pairs != "own" and not (pairs.groups[pairs.splits["train"]] >= 0).any():
            raise InputError(
                f"--pairs {config.pairs} goes by labels, and {self._source} has none in train; "
                "name them with --label-column"
            )
        labelled = any(pairs.labels[row] for row in self._val)
        if config.optim.metric == "zero_shot" and not (labelled and len(pairs.label_set) > 1):
            raise InputError(
                "optim.metric=zero_shot needs labelled samples in val and two labels or more"
            )

    def _adapt(self) -> Adapters:
        """Find the weights, put the adapters on them, and prove that they work."""
        config, towers = self._config, self._towers
        targets = self._targets()
        with torch.no_grad():
            before = self._probe.features(towers)
        targets = used_targets(towers, targets, self._probe)
        adapters = Adapters(towers.model, targets, config.lora, config.seed)
        check_beginning(towers, adapters, self._probe, before)
        if config.optim.gradient_checkpointing and not towers.checkpoint_blocks(targets):
            raise InputError(f"{config.backbone}: no blocks to checkpoint were found")
        count = sum(parameter.numel() for parameter in adapters.parameters)
        whole = sum(p.numel() for p in towers.model.parameters()) - count
        self._say(
            f"{len(targets)} weights adapted: {count:,} numbers are trained, "
            f"{count / whole:.2%} of the {whole:,} of the backbone"
        )
        return adapters

    def _targets(self) -> list[Target]:
        model, kinds = self._towers.model, self._config.targets
        targets = find_targets(model, kinds)
        if not self._config.backbone.startswith("hf:"):
            return targets
        # peft's format: what peft would load without any effect has no place in it.
        left = [target for target in targets if within_multihead(model, target)]
        if left:
            self._say(f"{left[0].name} is left as it is: peft cannot adapt its kind of attention")
        return [target for target in targets if target not in left]

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued."""
        config = asdict(self._config)
        for name in ("overwrite", "merge", "workers", "device", "source"):
            del config[name]
        for name in ("checkpoint_epochs", "micro_batch"):
            del config["optim"][name]
        return {
            "config": config,
            "batch_size": self._batch_size,
            "micro_batch": self._micro_batch,
            "processes": self._world.size,
            "device": self._world.device.type,
            "precision": self._precision,
            "backbone": self._encoder.identity,
            "adapters": [name for name, _ in self._adapters],
            "pairs": self._pairs.digest,
        }

    def run(self, progress: Progress, started: float) -> TuneReport:
        """Train, keep the best epoch, write and check the adapter."""
        resumed = self._resume()
        total = self._config.epochs * self._steps
        trained = 0.0
        first_step = self._at.step
        if not self._at.history:
            self._note(self._measure(), None)
        while self._at.epoch < self._config.epochs:
            begun = time.perf_counter()
            loss = self._epoch(progress, total)
            trained += time.perf_counter() - begun
            self._at.seconds += time.perf_counter() - begun
            self._at.epoch += 1
            measured = self._measure()
            if self._at.improves(measured[self._config.optim.metric], measured["loss"]):
                self._at.best_score = measured[self._config.optim.metric]
                self._at.best_loss, self._at.best_epoch = measured["loss"], self._at.epoch
                self._best = self._state()
            self._note(measured, loss)
            self._checkpoint()
        self._finish()
        steps = self._at.step - first_step
        return self._report(started, steps * self._batch_size / trained if steps else 0.0, resumed)

    def _resume(self) -> bool:
        found = self._checkpoints.load()
        if not found:
            return False
        tensors, record = found
        self._at = _Position(**record["position"])
        self._load(part(tensors, "now"))
        unpack_optimizer(self._optimizer, part(tensors, "optim"))
        self._scaler.load_state_dict(record["scaler"])
        self._best = part(tensors, "best")
        self._say(
            f"continuing the unfinished tuning in {self._folder} after epoch {self._at.epoch}"
        )
        return True

    def _checkpoint(self) -> None:
        every = self._config.optim.checkpoint_epochs
        due = self._at.epoch % every == 0 or self._at.epoch == self._config.epochs
        if not (self._world.first and due):
            return
        parts = {
            "now": self._state(),
            "best": self._best,
            "optim": pack_optimizer(self._optimizer),
        }
        tensors = {f"{name}.{key}": t for name, state in parts.items() for key, t in state.items()}
        record = {"position": asdict(self._at), "scaler": self._scaler.state_dict()}
        self._checkpoints.save(tensors, record)

    def _state(self) -> dict[str, Tensor]:
        """The adapter's tensors as its file has them."""
        state = self._adapters.state()
        if self._config.lora.logit_scale and self._scale.own:
            state[f"{PREFIX}logit_scale"] = self._scale.log.detach().cpu().clone()
        return state

    @torch.no_grad()
    def _load(self, state: dict[str, Tensor]) -> None:
        self._adapters.load(state)
        if f"{PREFIX}logit_scale" in state:
            self._scale.log.copy_(state[f"{PREFIX}logit_scale"])

    def _epoch(self, progress: Progress, total: int) -> float:
        """Train on one epoch's pairs; the mean loss."""
        config = self._config
        losses = torch.zeros((), device=self._world.device)
        rows = self._sampler.epoch(self._at.epoch)[: self._steps * self._batch_size]
        for batch in self._loader.batches(rows, self._batch_size):
            rate = config.lr * lr_factor(self._at.step, total, config.optim)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._adapters.drop(self._at.step)
            losses += self._step(batch)
            self._at.step += 1
            progress("steps", self._at.step, total)
        self._adapters.drop(None)
        mean = float(losses) / self._steps
        if not math.isfinite(mean):
            raise MmcError(
                f"the loss is not finite in epoch {self._at.epoch + 1}; lower --lr, or choose "
                "--precision float32"
            )
        return mean

    def _step(self, batch: Batch) -> Tensor:
        mask = self._mask(batch)
        loss = contrastive_step(
            lambda part: self._encode(batch, part),
            lambda image, text, rows: contrastive_loss(image, text, self._scale(), mask, rows),
            len(batch.rows),
            self._micro_batch,
            self._trained,
            self._world,
            self._scaler.scale,
        )
        self._scaler.unscale_(self._optimizer)
        if self._config.optim.clip_norm:
            nn.utils.clip_grad_norm_(self._trained, self._config.optim.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self._scale.clamp_()
        return loss

    def _encode(self, batch: Batch, part: slice) -> tuple[Tensor, Tensor]:
        places = range(part.start, part.stop)
        return (
            self._towers.image(batch.pixels[part]),
            self._towers.text(batch.tokens.take(places)),
        )

    def _mask(self, batch: Batch) -> PairMask:
        """Of the batches of all processes."""
        rows = torch.from_numpy(batch.rows)
        valid, contents, groups = (
            self._world.gather(values.to(self._world.device))
            for values in (
                batch.valid,
                self._pairs.contents[rows],
                torch.from_numpy(self._pairs.groups)[rows],
            )
        )
        return PairMask.of(valid, same=contents, groups=groups, rule=self._config.pairs)

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        """Loss, retrieval and zero-shot classification on val."""
        padding = -len(self._val) % self._world.size
        rows = np.concatenate([self._val, self._val[:1].repeat(padding)])
        images, texts, valid = [], [], []
        for batch in self._loader.share(rows, self._micro_batch):
            image, text = self._encode(batch, slice(0, len(batch.rows)))
            images.append(image)
            texts.append(text)
            valid.append(batch.valid.to(image.device))
        image, text, good = (
            self._world.gather(torch.cat(parts))[: len(self._val)]
            for parts in (images, texts, valid)
        )
        kept = self._val[good.cpu().numpy()]
        if len(kept) < 2:
            raise MmcError("fewer than 2 pictures of val can be used; nothing tells what is best")
        image, text = image[good], text[good]
        pairs = self._pairs
        found = {"loss": self._loss(image, text, kept)}
        found |= retrieval(image, text, pairs.images[kept], pairs.texts[kept])
        if pairs.label_set:
            found |= zero_shot(image, self._label_texts(), [pairs.labels[row] for row in kept])
        return found

    def _loss(self, image: Tensor, text: Tensor, rows: np.ndarray) -> float:
        """Mean over batches as large as those of training."""
        pairs, size = self._pairs, self._batch_size
        total = 0.0
        for start in range(0, len(rows), size):
            some = torch.from_numpy(rows[start : start + size])
            here = slice(start, start + len(some))
            mask = PairMask.of(
                torch.ones(len(some), dtype=torch.bool, device=image.device),
                same=pairs.contents[some].to(image.device),
                groups=torch.from_numpy(pairs.groups)[some].to(image.device),
                rule=self._config.pairs,
            )
            loss = contrastive_loss(image[here], text[here], self._scale(), mask)
            total += float(loss) * len(some)
        return total / len(rows)

    def _label_texts(self) -> Tensor:
        """(C, D) normalised texts of the labels, averaged over templates."""
        templates = self._config.label_template or (self._encoder.prompt_template,)
        sums = []
        for template in templates:
            prompts = [template.replace("{label}", name) for name in self._pairs.label_set]
            tokens = self._encoder.tokenize(prompts)
            places = range(0, len(prompts), self._micro_batch)
            sums.append(
                torch.cat(
                    [
                        self._towers.text(
                            tokens.take(range(i, min(i + self._micro_batch, len(prompts))))
                        )
                        for i in places
                    ]
                )
            )
        return nn.functional.normalize(torch.stack(sums).mean(0), dim=-1)

    def _note(self, measured: dict[str, float], loss: float | None) -> None:
        """Add a row to the history and say it."""
        at = self._at
        row = {"epoch": at.epoch, "train_loss": loss}
        row |= {f"val_{name}": value for name, value in measured.items()}
        row |= {"logit_scale": float(self._scale().detach()), "seconds": round(at.seconds, 3)}
        at.history.append(row)
        what = "before" if loss is None else f"epoch {at.epoch} of {self._config.epochs}"
        said = "" if loss is None else f"loss {loss:.4f}, "
        shots = measured.get("zero_shot")
        self._say(
            f"{what}: {said}val loss {measured['loss']:.4f}, R@1 "
            f"{measured['image_to_text_R@1']:.3f} image to text, "
            f"{measured['text_to_image_R@1']:.3f} text to image"
            + ("" if shots is None else f", zero-shot {shots:.3f}")
        )

    def _finish(self) -> None:
        """Write the best epoch's adapter, check it as it was written, and whatever else is due."""
        self._load(self._best)
        with torch.no_grad():
            tuned = self._probe.features(self._towers)
        self._adapters.remove()
        self._failed = self._count_failed()
        if not self._world.first:
            return
        folder, config, base = self._folder, self._config, self._encoder.identity["weights"]
        saving.write_adapter(
            folder,
            self._best,
            rank=config.lora.rank,
            alpha=self._adapters.alpha,
            dropout=config.lora.dropout,
            base_model=self._encoder.context["name"],
            base_weights=base,
        )
        model = self._towers.model

        def merge() -> None:
            add_adapter(model, str(folder), base_weights=base, where=config.backbone)

        try:
            check_end(self._towers, base, self._probe, tuned, merge)
        except MmcError:
            for name in (CONFIG, WEIGHTS):
                (folder / name).unlink(missing_ok=True)
            raise
        if config.merge:
            saving.write_merged(config.backbone, model, folder / saving.MERGED)
        saving.write_history(folder / saving.HISTORY, self._at.history)
        saving.write_json(folder / saving.RECORD, self._record())
        self._checkpoints.remove()

    def _count_failed(self) -> int:
        """Rows of all processes whose picture could not be used."""
        rows = torch.zeros(len(self._pairs.ids), device=self._world.device)
        rows[list(self._loader.failed)] = 1
        self._world.sum_([rows])
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
            "backbone": self._encoder.context["resolved_spec"],
            "source": self._source,
            **self._identity(),
            "steps": self._at.step,
            "train": len(self._pairs.splits["train"]),
            "val": len(self._val),
            "failed": self._failed,
            "best_epoch": self._at.best_epoch,
            "before": self._metrics(0),
            "after": self._metrics(self._at.best_epoch),
            "versions": versions("open_clip_torch", "transformers", "torchvision"),
        }

    def _report(self, started: float, rate: float, resumed: bool) -> TuneReport:
        before, after = self._metrics(0), self._metrics(self._at.best_epoch)
        metric, folder = self._config.optim.metric, self._folder
        if self._failed:
            self._say(f"warning: {self._failed:,} pictures cannot be used:")
            for row, why in list(self._loader.failed.items())[:_SAID]:
                self._say(f"  {self._pairs.ids[row].as_py()}: {why}")
        if after[metric] <= before[metric]:
            self._say(
                f"warning: on val the tuned backbone is not better than it was ({metric} "
                f"{before[metric]:.4f} -> {after[metric]:.4f}); more pairs, more --epochs or "
                "another --lr may help"
            )
        self._say(
            f"kept epoch {self._at.best_epoch} of {self._at.epoch}: {metric} {before[metric]:.4f} "
            f"-> {after[metric]:.4f} on {len(self._val)} val samples"
        )
        self._say(f'use it: mmc extract ... --backbone "{self._config.backbone}[lora={folder}]"')
        merged = folder / saving.MERGED if self._config.merge else None
        return TuneReport(
            out=str(folder),
            merged=None if merged is None else str(merged),
            adapted=len(list(self._adapters)),
            parameters=sum(parameter.numel() for parameter in self._trained),
            pairs=len(self._pairs.splits["train"]),
            val=len(self._val),
            failed=self._failed,
            before=before,
            after=after,
            best_epoch=self._at.best_epoch,
            epochs=self._at.epoch,
            seconds=time.perf_counter() - started,
            rate=rate,
            resumed=resumed,
        )


def _spaced(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of ``rows``, evenly spaced."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).round().astype(np.int64)]
