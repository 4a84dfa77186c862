"""What a training consists of, all that follows from the store and the config."""

import math
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmc.heads import memory, metrics, splits, thresholds
from mmc.heads.artifact import Run
from mmc.heads.batches import (
    ALONE,
    Data,
    ResidentData,
    Share,
    derive_seed,
    load_prepared,
    raw_blocks,
)
from mmc.heads.checkpoints import Checkpoints
from mmc.heads.devices import pick_device, training_dtype
from mmc.heads.distributed import join
from mmc.heads.engine import Engine, OnRound, Position
from mmc.heads.featureref import FeatureRef
from mmc.heads.features import resolve
from mmc.heads.losses import GROUP as LOSS_GROUP
from mmc.heads.losses import LOSSES
from mmc.heads.losses.base import Loss
from mmc.heads.models import GROUP as HEAD_GROUP
from mmc.heads.models import HEADS
from mmc.heads.models.base import Head
from mmc.heads.options import OptimConfig, TrainConfig, parse_set
from mmc.heads.predict import Predictor
from mmc.heads.streaming import WINDOWS, StreamedData
from mmc.heads.temperature import fit_temperature, probabilities
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


class Setup:
    """Everything that follows from the store and the config, checked before any work."""

    def __init__(self, store: "EmbeddingStore", config: TrainConfig) -> None:
        self.store, self.config = store, config
        entry = lookup(HEADS, config.head, kind="head", group=HEAD_GROUP)
        self.head_class: type[Head] = load(entry)
        settings = parse_set(config.settings)
        self.optim = build(OptimConfig, settings.get("optim", {}), where="optim")
        if store.task not in metrics.HEADLINE:
            raise InputError(f"{store.path} is {store.task}: there is nothing to train on")
        self.loss_name = config.loss or ("bce" if store.task == "multilabel" else "ce")
        self.loss_class = _loss_class(self.loss_name, store.task)
        self.loss_config: Any = build(
            self.loss_class.Config, settings.get("loss", {}), where=f"loss {self.loss_name}"
        )
        self.head_config = self._head_config(settings.get("head", {}))
        _check_metric(self.optim.metric, store.task)
        self.device = pick_device(config.device)
        self.processes = join(self.device)
        self.on_round: OnRound = lambda row: None
        """Told the rows of the history as they come."""
        self.share = Share(self.processes.index, self.processes.count)
        self.dtype = training_dtype(config.precision, self.device)
        self.features = resolve(store, config.features, self.head_class, config.head)
        self.refs = {role: FeatureRef.of(store, name) for role, name in self.features.items()}
        self.head_config = self.head_class.completed(
            self.head_config, self.refs, tuple(store.label_set), store.task
        )
        self.label_text = self._label_text()
        trial = self._new_head()
        self.trains = bool(trial.stages())
        self.splits = splits.choose(store, list(self.features.values()), trains=self.trains)
        rows, parts = len(self.splits.train), self.optim.accumulation
        self.batch_size = config.batch_size or default_batch(
            rows // parts, self.device, trial.largest_batch
        )
        self.lr = config.lr or default_lr(trial.learning_rate, self.batch_size * parts, rows)

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued."""
        config = asdict(self.config)
        del config["overwrite"], config["track"]
        config["settings"] = {
            "head": asdict(self.head_config),
            "loss": asdict(self.loss_config),
            "optim": asdict(self.optim),
        }
        config |= {"loss": self.loss_name, "batch_size": self.batch_size, "lr": self.lr}
        config |= {"device": str(self.device), "precision": str(self.dtype)}
        if self.processes.count > 1:
            config |= {"device": self.device.type, "processes": self.processes.count}
        del config["settings"]["optim"]["checkpoint_seconds"]
        if self.text_alias:
            prompt = self.store.label_prompt(self.text_alias)
            config["label_text"] = {"alias": self.text_alias, "prompt": prompt}
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
                head.fit_labels(*self._label_rows())
                head.load_weights()
        self.processes.share(head.state_dict().values())
        return head, loss

    def fit(
        self,
        head: Head,
        loss: Loss,
        checkpoints: Checkpoints | None,
        place: memory.Plan,
        progress: Progress,
    ) -> Position:
        """Load what the head reads, or as much of it as there is room for, and train it."""
        val_rows = self.splits.val if self.processes.main else self.splits.val[:0]
        kept = self._resident(head, _spaced(val_rows, place.val_rows), torch.float32)
        val: Data = kept
        if len(kept) < len(val_rows):
            val = self._streamed(head, val_rows, torch.float32, place.window_rows)
        position = Position()
        if self.trains:
            position = Engine(
                head,
                loss,
                train=(
                    self._streamed(
                        head, self.splits.train, self.dtype, place.window_rows, self.share
                    )
                    if place.window_rows
                    else self._resident(head, self.splits.train, self.dtype, self.share)
                ),
                val=val,
                task=self.store.task,
                batch_size=self.batch_size,
                epochs=self.config.epochs,
                lr=self.lr,
                optim=self.optim,
                seed=self.config.seed,
                dtype=self.dtype,
                window_rows=place.window_rows,
                checkpoints=checkpoints,
                on_round=lambda row: self._told(row, progress),
                processes=self.processes,
            ).run()
        if len(kept):
            head.eval()
            with torch.no_grad():
                said = head.fit_validation(
                    kept.inputs, kept.targets, self.store.task, self.optim.metric
                )
            position.notes += [said] if said else []
        self.processes.share(head.state_dict().values())
        return position

    def _told(self, row: dict[str, Any], progress: Progress) -> None:
        progress(row["stage"], row["epoch"], row["epochs"])
        self.on_round(row)

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
        """Fit temperature, then thresholds on validation; measure validation and test."""
        predictor = Predictor(run, self.store, device=self.device)
        for name in ("val", "test"):
            rows = getattr(self.splits, name)
            if not len(rows):
                continue
            logits = predictor.logits(rows)
            targets = splits.targets(self.store, rows).to(logits.device)
            if name == "val":
                run.temperature = fit_temperature(logits, targets, run.task)
                p = probabilities(logits, run.task, run.temperature)
                run.thresholds = thresholds.tune(p, targets, run.task)
            run.metrics[name] = metrics.evaluate(
                logits,
                targets,
                run.task,
                label_set=run.label_set,
                thresholds=run.thresholds,
                temperature=run.temperature,
            )
            run.metrics[name]["rows_digest"] = splits.rows_digest(self.store, rows, targets)
            run.metrics[name]["also_in_train"] = self.splits.seen.get(name, {})
        return run.metrics

    def _new_head(self) -> Head:
        inputs = {role: ref.shape for role, ref in self.refs.items()}
        return self.head_class(
            inputs, len(self.store.label_set), self.head_config, label_text=self.label_text
        )

    def _head_config(self, given: dict[str, str]) -> Any:
        """The head's settings: those given, and those that the loss needs."""
        head, loss = self.config.head, self.loss_name
        needed = self.loss_class.head_settings(self.loss_config)
        known = {f.name for f in fields(self.head_class.Config)}
        for key, value in needed.items():
            if key not in known:
                raise InputError(
                    f"loss {loss} needs a head with the setting {key}={value}, and {head} has no "
                    f"{key}; choose a head that `mmc list losses` names for it"
                )
        config: Any = build(self.head_class.Config, {**needed, **given}, where=f"head {head}")
        for key, value in needed.items():
            if getattr(config, key) != value:
                raise InputError(
                    f"head.{key}={getattr(config, key)} does not go with loss {loss}, which needs "
                    f"{value}; leave it out"
                )
        return config

    def _label_text(self) -> Tensor | None:
        """Label texts (C, D) in the label set's order, for a head that wants or takes them."""
        self.text_alias = ""
        if not (self.head_class.wants_label_text or self.head_class.takes_label_text):
            return None
        texts = {ref.alias: self.store.label_text(ref.alias) for ref in self.refs.values()}
        alias, found = next(((a, f) for a, f in texts.items() if f is not None), ("", None))
        if found is None:
            assert not self.head_class.wants_label_text, "resolve() has checked this"
            return None
        self.text_alias = alias
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
        labels, rows = self.store.labels, self.splits.train
        return (
            torch.from_numpy(labels.counts(rows)).double(),
            torch.from_numpy(labels.known_counts(rows)).double(),
        )

    def _label_rows(self) -> tuple[Tensor, Tensor]:
        """Labels of the training rows, as (indptr (n + 1,), indices), int64."""
        labels, rows = self.store.labels, self.splits.train
        counts = labels.indptr[rows + 1] - labels.indptr[rows]
        indptr = np.concatenate([[0], np.cumsum(counts)])
        # Place of every label in the store's list: the row's start plus 0, 1, 2 ...
        places = np.repeat(labels.indptr[rows] - indptr[:-1], counts) + np.arange(indptr[-1])
        indices = labels.indices[places].astype(np.int64)
        return torch.from_numpy(indptr.astype(np.int64)), torch.from_numpy(indices)

    def place(self, head: Head) -> memory.Plan:
        """What there is room for."""
        limit = self.config.max_memory
        rows = self.splits.train if len(self.splits.train) else self.splits.val
        floats, others = 0, 0
        for values in self._resident(head, rows[:1], torch.float32).inputs.values():
            if values.is_floating_point():
                floats += values.numel()
            else:
                others += values.nbytes
        row = floats * self.dtype.itemsize + others
        plan = memory.plan(
            train=(len(self.splits.train), -(-row // self.processes.count)),
            val=(len(self.splits.val), floats * torch.float32.itemsize + others),
            budget=memory.parse_size(limit) if limit else memory.allowed(self.device),
            batch_size=self.batch_size,
            windows=WINDOWS,
        )
        # The order of the rows depends on it, and so it is the main process's.
        (window_rows,) = self.processes.numbers([plan.window_rows], self.device)
        return replace(plan, window_rows=int(window_rows))

    def _resident(
        self, head: Head, rows: splits.Rows, dtype: torch.dtype, share: Share = ALONE
    ) -> ResidentData:
        own = share.rows(rows)
        inputs = load_prepared(self.store, self.features, own, head, self.device, dtype)
        return ResidentData(inputs=inputs, targets=self._targets(own), share=share, size=len(rows))

    def _streamed(
        self,
        head: Head,
        rows: splits.Rows,
        dtype: torch.dtype,
        window_rows: int,
        share: Share = ALONE,
    ) -> StreamedData:
        return StreamedData(
            self.store,
            self.features,
            rows,
            self._targets(rows),
            head,
            device=self.device,
            dtype=dtype,
            window_rows=window_rows,
            share=share,
        )

    def _targets(self, rows: splits.Rows) -> Tensor:
        return splits.targets(self.store, rows).to(self.device)


def _spaced(rows: splits.Rows, count: int) -> splits.Rows:
    """``count`` of the rows at most, evenly spaced."""
    return rows if len(rows) <= count else rows[:: -(-len(rows) // max(count, 1))]


def default_batch(rows: int, device: torch.device, most: int | None = None) -> int:
    """About 100 steps an epoch, within what is fast on the device and what the head allows."""
    largest = MAX_BATCH.get(device.type, MAX_BATCH_ELSEWHERE)
    return min(max(MIN_BATCH, min(largest, rows // STEPS_PER_EPOCH)), most or largest)


def default_lr(base: float, batch_size: int, rows: int) -> float:
    """``base`` at 256 samples, scaled gently with the batch that there really is."""
    return base * math.pow(min(batch_size, max(rows, 1)) / LR_BATCH, LR_POWER)


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
