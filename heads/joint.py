"""A head that is trained together with the backbone that feeds it, and then kept as a run.

Legend: n rows, B of a batch, D features of an embedding, C labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmc.heads import metrics
from mmc.heads.engine import Position
from mmc.heads.losses.base import Loss
from mmc.heads.models import GROUP as HEAD_GROUP
from mmc.heads.models import HEADS
from mmc.heads.models.base import Head
from mmc.heads.options import TrainConfig, parse_set
from mmc.heads.parts import Parts
from mmc.heads.training import Setup
from mmc.heads.trainreport import place
from mmc.store.errors import InputError
from mmc.store.registry import load, lookup

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

FIELDS = ("image", "text")


class JointTraining:
    """The head called ``config.head`` on the pooled image and text of one backbone."""

    def __init__(self, config: TrainConfig, keep: Callable[["JointTraining", Path], None]) -> None:
        """
        Args:
            config: head, loss, learning rate and settings; the rest is the backbone's training.
            keep: called in the end with the folder of the backbone's adapter; see `save`.

        Raises:
            InputError: no such head or loss, or settings that they do not have.
        """
        self.config, self._keep = config, keep
        if "optim" in parse_set(config.settings):
            raise InputError("--set optim.… is the backbone's; a head trained with it has none")
        entry = lookup(HEADS, config.head, kind="head", group=HEAD_GROUP)
        self._class: type[Head] = load(entry)
        self.identity: dict[str, Any] = {
            key: value
            for key, value in asdict(config).items()
            if key in ("head", "loss", "lr", "settings")
        }
        self.lr = config.lr or self._class.learning_rate
        self._head: Head
        self._loss: Loss
        self._task = ""

    def build(
        self,
        image: Tensor,
        text: Tensor,
        labels: Sequence[list[int] | None],
        label_set: Sequence[str],
        task: str,
    ) -> nn.Module:
        """The head, with its inputs' scale and the label priors; see `JointHead` of the tuning.

        Raises:
            InputError: the task has no labels, or the head is trained in another way.
        """
        if task not in metrics.HEADLINE:
            raise InputError("--head needs labels; name them with --label-column")
        parts = Parts(self.config, task)
        config = parts.head_config
        if getattr(config, "normalize", "") == "none":
            raise InputError("--head: normalize=none is not possible; features come normalised")
        widths = {"image": (image.shape[1],), "text": (text.shape[1],)}
        if self._class.wants_label_text or self._class.min_inputs > len(FIELDS):
            raise InputError(_other_ways(self.config.head))
        with torch.random.fork_rng([]):
            torch.manual_seed(self.config.seed)
            self._head = self._class(widths, len(label_set), config)
        stages = self._head.stages()
        if len(stages) != 1 or stages[0].score or stages[0].finish or set(stages[0].trains) != {""}:
            raise InputError(_other_ways(self.config.head))
        self._task, self._count = task, len(label_set)
        self._head.to(image.device)
        known = self._targets(labels).double()
        if task == "multilabel":
            counts = (known == 1).sum(0).double(), (known >= 0).sum(0).double()
        else:
            classes = known[known >= 0].long()
            number = torch.bincount(classes, minlength=self._count).double()
            counts = number, torch.full_like(number, float(len(classes)))
        self._loss = parts.loss_class(parts.loss_config, *counts).to(image.device)
        with torch.no_grad():
            self._head.fit_inputs([{"image": image, "text": text}])
            self._head.set_prior(self._loss.prior())
        return self._head

    def loss(self, image: Tensor, text: Tensor, labels: Sequence[list[int] | None]) -> Tensor:
        """Mean loss (scalar) of (B, D) and (B, D); 0 where no row has labels."""
        rows = [row for row, some in enumerate(labels) if some is not None]
        if not rows:
            return (image.sum() + text.sum()) * 0
        self._head.train()
        logits = self._head({"image": image[rows], "text": text[rows]})
        targets = self._targets([labels[row] for row in rows]).to(image.device)
        value: Tensor = self._loss(logits, targets)
        return value

    @torch.no_grad()
    def measure(self, image: Tensor, text: Tensor, labels: Sequence[list[int] | None]) -> float:
        """The task's headline metric (mAP, AUROC, macro-F1) on rows (n, D); NaN: not defined."""
        rows = [row for row, some in enumerate(labels) if some is not None]
        self._head.eval()
        logits = self._head({"image": image[rows], "text": text[rows]})
        targets = self._targets([labels[row] for row in rows]).to(image.device)
        return metrics.score(logits, targets, self._task)

    def finish(self, folder: Path) -> None:
        """Keep the head as it is now."""
        self._keep(self, folder)

    def save(self, store: "EmbeddingStore", alias: str, run: Path) -> None:
        """Write the head as a run on features of ``store``, tuned thresholds and metrics included.

        Args:
            store: of the source that was trained on, embedded with the adapter.
            alias: of the backbone in it.
        """
        features = tuple(f"{name}={alias}/{name}" for name in FIELDS)
        config = TrainConfig(
            head=self.config.head,
            loss=self.config.loss,
            features=features,
            seed=self.config.seed,
            settings=self.config.settings,
        )
        setup = Setup(store, config)
        made = setup.run(self._head.state_dict(), Position())
        setup.measure(made)
        made.training = place(store)
        made.save(run)

    def _targets(self, labels: Sequence[list[int] | None]) -> Tensor:
        """As losses take them: int8 (n, C) for several labels, else the class, int64 (n,)."""
        if self._task == "multilabel":
            targets = torch.zeros(len(labels), self._count, dtype=torch.int8)
            for row, some in enumerate(labels):
                if some is None:
                    targets[row] = -1
                else:
                    targets[row, some] = 1
            return targets
        return torch.tensor([some[0] if some else -1 for some in labels], dtype=torch.int64)


def _other_ways(head: str) -> str:
    return (
        f"--head {head} is trained in stages or reads label texts; choose linear, mlp or fusion, "
        "or run mmc train-head on the tuned backbone's features"
    )
