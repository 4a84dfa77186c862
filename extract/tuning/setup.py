"""What a tuning consists of, all that follows from its source and its config."""

from pathlib import Path
from typing import Any

from torch import nn

from mmc.extract.backbones.base import default_precision
from mmc.extract.settings import usable_cores
from mmc.extract.training.batches import fit_batch, fit_micro_batch, spaced
from mmc.extract.training.data import Loader, Sampler, read_pairs
from mmc.extract.training.distributed import World
from mmc.extract.training.loop import Say, common_identity
from mmc.extract.training.options import factors_of
from mmc.extract.tuning.guards import Probe, adapt
from mmc.extract.tuning.joint import JointHead
from mmc.extract.tuning.options import TuneConfig
from mmc.extract.tuning.towers import LogitScale, load_towers
from mmc.extract.tuning.validation import Validation
from mmc.store.errors import InputError

_FITTED = 4096
"""Most pairs that a head's inputs are fitted to."""


class Setup:
    """Everything that follows from source and config, checked and proved before any training."""

    def __init__(
        self,
        source: str,
        folder: Path,
        config: TuneConfig,
        head: JointHead | None,
        processes: World,
        say: Say,
    ) -> None:
        self.source, self.folder, self.config, self.head = source, folder, config, head
        self.world, self.say = processes, say
        device = processes.device
        workers = config.workers or usable_cores()
        self.pairs = read_pairs(
            source, config.source, config.pair_column, workers=workers, report=say
        )
        for line in self.pairs.notes:
            say(line)
        self.sampler = Sampler(
            self.pairs,
            factors=factors_of(config.upsample),
            samples=config.samples_per_epoch,
            seed=config.seed,
        )
        self.batch_size = fit_batch(config.batch_size, self.sampler.length, processes, say)
        self.steps = self.sampler.length // self.batch_size
        self.val = spaced(self.pairs.splits["val"], config.optim.val_samples)
        self._check_labels()
        self.precision = config.precision or default_precision(str(device))
        self.towers = load_towers(config.backbone, device, self.precision)
        self.encoder = self.towers.encoder
        self.loader = Loader(
            self.pairs, self.encoder, processes, workers=workers, max_pixels=config.max_pixels
        )
        self.probe = Probe.of(self.towers)
        self.adapters = adapt(self.towers, config, self.probe, say)
        self.scale = LogitScale(self.towers.model, device, trained=config.lora.logit_scale)
        self.micro_batch = fit_micro_batch(config.optim.micro_batch, self.batch_size, processes)
        self.validation = Validation(
            self.pairs,
            self.towers,
            self.loader,
            self.scale,
            config,
            head,
            batch_size=self.batch_size,
            micro_batch=self.micro_batch,
        )
        self.classifier = nn.Module() if head is None else self._build(head)

    def _build(self, head: JointHead) -> nn.Module:
        """The head, fitted to what the backbone gives before it is tuned."""
        rows = spaced(self.pairs.splits["train"], _FITTED)
        image, text, kept = self.validation.embed(rows)
        pairs = self.pairs
        return head.build(image, text, pairs.labels_of(kept), pairs.label_set, pairs.task)

    def _check_labels(self) -> None:
        config, pairs = self.config, self.pairs
        if config.pairs != "own" and not (pairs.groups[pairs.splits["train"]] >= 0).any():
            raise InputError(
                f"--pairs {config.pairs} goes by labels, and {self.source} has none in train; "
                "name them with --label-column"
            )
        labelled = any(pairs.labels[row] for row in self.val)
        if config.optim.metric == "head" and self.head is None:
            raise InputError("optim.metric=head goes with --head")
        if config.optim.metric == "zero_shot" and not (labelled and len(pairs.label_set) > 1):
            raise InputError(
                "optim.metric=zero_shot needs labelled samples in val and two labels or more"
            )

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued."""
        return {
            **common_identity(self, ("overwrite", "merge", "workers", "device", "source")),
            "backbone": self.encoder.identity,
            "adapters": [name for name, _ in self.adapters],
            "head": None if self.head is None else self.head.identity,
        }
