"""`mmc pretrain`: a ViT and a BERT with a shared space, from the user's own pairs.

Three losses: contrastive between pictures and texts, and what the towers tell of hidden patches and
hidden tokens (masked image and language modelling). The epoch that was best on validation data is
kept. Stopped at any point and run again, a pretraining continues from its checkpoint and ends, on a
CPU, in the same bits.
"""

import re
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmc.extract.backbones import load_backbone, parse_spec
from mmc.extract.backbones.base import versions
from mmc.extract.backbones.hub import quick_when_offline
from mmc.extract.pretraining import saving
from mmc.extract.pretraining.batchloss import BatchLosses
from mmc.extract.pretraining.forward import Forward
from mmc.extract.pretraining.masking import RULE
from mmc.extract.pretraining.options import PretrainConfig, PretrainReport
from mmc.extract.pretraining.setup import Setup
from mmc.extract.pretraining.validation import Validation
from mmc.extract.training.checkpoints import (
    Checkpoints,
    claimed,
    part,
    write_history,
    write_json,
)
from mmc.extract.training.data import Batch
from mmc.extract.training.distributed import world
from mmc.extract.training.loop import Progress, Say, Training, silent, speechless
from mmc.extract.training.optim import make_optimizer, pack_optimizer
from mmc.extract.training.trackers import Log, logging
from mmc.store.errors import InputError, MmcError

__all__ = ["PretrainConfig", "PretrainReport", "pretrain"]

_PROBES = 4
_TOLERANCE = 1e-4
"""Largest difference of features of the saved model, as a share of the largest feature."""
_NEW = ("mask_token", "pooler.dense.weight", "pooler.dense.bias")
"""Of a tower that begins with weights, what these need not have: it learns as what is new."""


def pretrain(
    source: str,
    out: str | Path,
    config: PretrainConfig,
    *,
    report: Say = print,
    progress: Progress = silent,
) -> PretrainReport:
    """Pretrain two towers on the pairs of a source; write them to the folder ``out``.

    Under `torchrun` every process calls this; the first one speaks and writes.

    Args:
        source: where the pairs come from; several with ``::`` between them.
        out: folder of the model; an unfinished pretraining there is continued.
        config: the towers and how they are trained.
        report: called with each line for the user.
        progress: called with (stage, done, total).

    Raises:
        InputError: anything that the user can set right: a source without pairs, weights that do
            not fit, a setting, a folder that holds something else or a finished pretraining.
        MmcError: a loss that is not finite, pictures that cannot be used, another process at work.
    """
    started = time.perf_counter()
    folder = Path(out).expanduser()
    if re.search(r"[\[\]]", str(folder.absolute())):
        raise InputError(f"OUT {folder}: a path with [ or ] cannot stand in a spec as hf:OUT")
    named = (config.vision.weights, config.text.weights, config.text.tokenizer)
    for spec in filter(None, named):
        if Path(parse_spec(spec).name).expanduser().resolve() == folder.resolve():
            raise InputError(f"{folder} is what the pretraining begins with; name another OUT")
    with world(config.device) as processes, ExitStack() as stack:
        for name in filter(None, named):
            stack.enter_context(quick_when_offline(name.removeprefix("hf:")))
        say = report if processes.first else speechless
        claim = (
            claimed(folder, saving.FILES, saving.RECORD, overwrite=config.overwrite)
            if processes.first
            else nullcontext(lambda: None)
        )
        with claim as clear:
            processes.wait()
            training = _Pretraining(Setup(source, folder, config, processes, say))
            clear()
            processes.wait()
            try:
                training.run(progress if processes.first else silent)
                return training.finish(started)
            except KeyboardInterrupt:
                say(training.interrupted())
                raise


class _Pretraining(Training):
    """One pretraining in one process."""

    what = "pretraining"
    losses = ("train_loss", "train_contrastive_loss", "train_image_loss", "train_text_loss")

    def __init__(self, setup: Setup) -> None:
        config, model = setup.config, setup.model
        towers: list[nn.Parameter] = []
        for tower, group in (
            (model.dual.vision_model, config.vision),
            (model.dual.text_model, config.text),
        ):
            if group.weights is not None:
                towers += [
                    parameter
                    for name, parameter in tower.named_parameters()
                    if parameter.requires_grad and not name.endswith(_NEW)
                ]
        begun = {id(parameter) for parameter in towers}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            (1.0, [parameter for parameter in trained if id(parameter) not in begun]),
            (config.optim.pretrained, towers),
        ]
        super().__init__(setup, make_optimizer(groups, config.optim, model.undecayed()))
        self.job: Setup = setup
        self._trained = trained
        self._best = Checkpoints(setup.folder, setup.identity(), saving.BEST)
        self._forward = Forward(setup)
        self._validation = Validation(setup, self._forward)
        self._log: Log = lambda row: None
        self._failed = 0

    def run(self, progress: Progress) -> None:
        """Train, and log."""
        config = self.job.config
        sees = f"; the contrastive loss sees {config.loss.views} pairs"
        self.job.say(
            f"{sum(p.numel() for p in self._trained):,} numbers are trained; a vocabulary of "
            f"{self.job.vocabulary.size:,} tokens; hidden are {self.job.masks.count} of "
            f"{self.job.masks.patches} patches and {config.mask.tokens:.0%} of the tokens"
            + (sees if config.loss.contrastive else "")
        )
        self.resume()
        parameters = flat(self.job.identity()["config"])
        first = self.job.world.first
        with logging(
            config.track if first else (),
            self.job.folder,
            parameters,
            self.at.history,
            self.job.say,
        ) as self._log:
            self.train(progress)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """See :class:`Training`."""
        return {"model": self.job.model.state()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """See :class:`Training`."""
        self.job.model.load(part(tensors, "model"))

    def keep(self) -> None:
        """See :class:`Training`."""
        if self.job.world.first:
            record = {
                "epoch": self.at.epoch,
                "loss": self.at.best_loss,
                "score": self.at.best_score,
            }
            parts = {**self.state(), "optim": pack_optimizer(self.optimizer)}
            self._best.save(parts, record)

    def score(self, measured: dict[str, float]) -> float:
        """See :class:`Training`."""
        metric = self.job.config.optim.metric
        return -measured["loss"] if metric == "loss" else measured[metric]

    def warn_of_collapse(self, measured: dict[str, float]) -> None:
        """See :class:`Training`; without the contrastive loss nothing learns to tell apart."""
        if self.job.config.loss.contrastive:
            super().warn_of_collapse(measured)

    def measure(self) -> dict[str, float]:
        """See :class:`Training`."""
        return self._validation.measure()

    def more(self) -> dict[str, float]:
        """See :class:`Training`."""
        return {"logit_scale": float(self.job.model.scale.detach())}

    def enough(self) -> bool:
        """See :class:`Training`."""
        patience = self.job.config.optim.patience
        return bool(patience) and self.at.epoch - self.at.best_epoch >= patience

    def tell(self, epoch: str, row: dict[str, Any]) -> str:
        """See :class:`Training`."""
        self._log(row)
        said = "" if row["train_loss"] is None else f"loss {row['train_loss']:.4f}, "
        parts = ", ".join(
            f"{name} {row[f'val_{name}_loss']:.4f}"
            for name in ("contrastive", "image", "text")
            if f"val_{name}_loss" in row
        )
        return (
            f"{epoch}: {said}val loss {row['val_loss']:.4f} ({parts}), R@1 "
            f"{row['val_image_to_text_R@1']:.3f} image to text, "
            f"{row['val_text_to_image_R@1']:.3f} text to image"
        )

    def step(self, batch: Batch) -> Tensor:
        """See :class:`Training`."""
        job, clip = self.job, self.job.config.optim.clip_norm
        job.model.train()
        losses = BatchLosses(job, self._forward, batch, self.at.step).backward(self._trained)
        if clip:
            nn.utils.clip_grad_norm_(self._trained, clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        job.model.clamp_()
        return losses

    def finish(self, started: float) -> PretrainReport:
        """Write the best epoch's model, check it as it was written, and say what was reached."""
        self._failed = self.count_failed()
        if self.job.world.first:
            folder, found = self.job.folder, self._best.load()
            if found is None:
                raise MmcError("no epoch had a finite loss on val; lower --lr")
            self.load(found[0])
            plain = self.job.model.stock()
            saving.write_model(folder, plain, self.job.tokenizer, self.job.processor)
            try:
                self._check(plain)
            except MmcError:
                for name in saving.MODEL:
                    (folder / name).unlink(missing_ok=True)
                raise
            write_history(folder / saving.HISTORY, self.at.history)
            write_json(folder / saving.RECORD, self._record())
            self.checkpoints.remove()
        return self._report(started)

    @torch.no_grad()
    def _check(self, plain: nn.Module) -> None:
        """The folder as a backbone, without any mask, gives the features of the towers trained.

        Raises:
            MmcError: it does not.
        """
        saved: Any = load_backbone(f"hf:{self.job.folder}", device="cpu", precision="float32")
        model = self.job.model.cpu().eval()
        transform = self.job.inputs.image_transform
        random = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (_PROBES, *transform.shape), generator=random)
        pixels = pixels.to(torch.uint8)
        words = self.job.texts(self.job.val[:_PROBES])
        tokens = self.job.inputs.tokenize(words)
        normalize = self.job.normalize.cpu()
        image, _ = model.image(normalize(pixels, torch.float32))
        text, _ = model.text(tokens.cut(), tokens.lengths)
        for what, wanted, given in (
            ("image", image, saved.embed_image(pixels)),
            (
                "text",
                text,
                saved.embed_text(saved.tokenize(words)),
            ),
        ):
            given = nn.functional.normalize(given, dim=-1)
            difference = float((given - wanted).abs().max() / wanted.abs().max())
            if not difference <= _TOLERANCE:
                raise MmcError(
                    f"the saved model changes the {what} features by {difference:.1e} of their size"
                )

    def _record(self) -> dict[str, Any]:
        masks = self.job.masks
        return {
            "format": saving.FORMAT,
            "source": self.job.source,
            **self.job.identity(),
            "patches": {"number": masks.patches, "hidden": masks.count, "rule": RULE},
            "tokens": self.job.vocabulary.size,
            "steps": self.at.step,
            "train": len(self.job.pairs.splits["train"]),
            "failed": self._failed,
            **self.outcome(),
            "versions": versions("mmc", "transformers", "tokenizers", "torchvision"),
        }

    def _report(self, started: float) -> PretrainReport:
        before, after = self.at.metrics(0), self.at.metrics(self.at.best_epoch)
        folder = self.job.folder
        self.tell_failed(self._failed)
        if after["loss"] >= before["loss"]:
            self.job.say(
                f"warning: on val the loss is not lower than it was ({before['loss']:.4f} -> "
                f"{after['loss']:.4f}); more pairs, more --epochs or another --lr may help"
            )
        if self.job.config.loss.contrastive:
            self.warn_of_chance(after["retrieval"])
        self.job.say(
            f"kept epoch {self.at.best_epoch} of {self.at.epoch}: loss {before['loss']:.4f} -> "
            f"{after['loss']:.4f}, retrieval {before['retrieval']:.4f} -> {after['retrieval']:.4f} "
            f"on {len(self.job.val)} val samples ({self.chance():.4f} by chance)"
        )
        self.job.say(f"use it: mmc extract ... --backbone hf:{folder}")
        return PretrainReport(
            out=str(folder),
            parameters=sum(parameter.numel() for parameter in self._trained),
            vocabulary=self.job.vocabulary.size,
            pairs=len(self.job.pairs.splits["train"]),
            failed=self._failed,
            **self.outcome(),
            epochs=self.at.epoch,
            seconds=time.perf_counter() - started,
            rate=self.rate,
            resumed=self.resumed,
        )


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Settings one level deep, as ``mask.patches``: what a tracker takes."""
    found: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, bool | int | float | str)
            found[prefix + key] = value if plain else str(value)
    return found
