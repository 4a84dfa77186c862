"""What a training consists of, all that follows from the store and the config."""

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmc.heads import memory, metrics, splits, thresholds
from mmc.heads.alone import better_alone
from mmc.heads.artifact import Run
from mmc.heads.batches import (
    ALONE,
    Data,
    ResidentData,
    Share,
    derive_seed,
    largest_tile,
    load_prepared,
    raw_blocks,
    stored_bytes,
)
from mmc.heads.checkpoints import Checkpoints
from mmc.heads.devices import pick_device, training_dtype
from mmc.heads.distributed import join
from mmc.heads.engine import Engine, OnRound, Position, score_all
from mmc.heads.featureref import FeatureRef
from mmc.heads.features import resolve
from mmc.heads.losses.base import Loss
from mmc.heads.material import Material
from mmc.heads.models.base import Head
from mmc.heads.options import SEARCH, TrainConfig
from mmc.heads.parts import Parts
from mmc.heads.predict import BLOCK_BYTES, Predictor
from mmc.heads.room import check_room, no_room
from mmc.heads.streaming import StreamedData
from mmc.heads.targets import Targets, as_targets, load_targets, nbytes_of
from mmc.heads.temperature import fit_temperature, probabilities
from mmc.store.errors import InputError

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
BATCHES_PER_BUDGET = 8
"""Rows that are measured are read and prepared in batches; each takes some copies."""
_INIT = 3


class Loaded(NamedTuple):
    """What a head is trained and validated on."""

    train: Data | None
    """None for a head that trains nothing."""
    val: Data


class Setup:
    """Everything that follows from the store and the config, checked before any work.

    Args:
        material: what it shares with other trainings on the store.
    """

    def __init__(
        self, store: "EmbeddingStore", config: TrainConfig, material: Material | None = None
    ) -> None:
        self.store, self.config = store, config
        self.material = material or Material(store)
        if store.task not in metrics.HEADLINE:
            raise InputError(f"{store.path} is {store.task}: there is nothing to train on")
        parts = Parts(config, store.task)
        self.head_class, self.head_config = parts.head_class, parts.head_config
        self.loss_name, self.loss_class = parts.loss, parts.loss_class
        self.loss_config, self.optim = parts.loss_config, parts.optim
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
        check_room(self._new_head, self.device, self._named())
        trial = self._new_head()
        self.trains = bool(trial.stages())
        self.splits = self.material.splits(self.features, trains=self.trains)
        self.notes = [*self.splits.notes, *self._idle_settings(parts)]
        """Lines to say aloud before any work."""
        self.preparation = self._preparation(trial)
        rows, joined = len(self.splits.train), self.optim.accumulation
        self.batch_size = config.batch_size or default_batch(
            rows // joined, self.device, trial.largest_batch
        )
        self.lr = config.lr or default_lr(trial.learning_rate, self.batch_size * joined, rows)

    def described(self) -> str:
        """A line on what is trained on what."""
        read = f"{self.config.head} reads {', '.join(self.features.values())}"
        if not self.trains:
            return read
        rows = f"{len(self.splits.train):,} train and {len(self.splits.val):,} val rows"
        return f"{read}: {rows}, loss {self.loss_name}, batch {self.batch_size:,}, lr {self.lr:.2g}"

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued."""
        config = asdict(self.config)
        for name in ("overwrite", "track", *SEARCH):
            del config[name]
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
            "rows and labels": self.material.digest(self.splits),
        }

    def build(self) -> tuple[Head, Loss]:
        """The head with its inputs' scale and the label priors, and the loss."""
        torch.manual_seed(derive_seed(self.config.seed, _INIT))
        with no_room(self._named()):
            head = self._new_head().to(self.device)
        loss = self.loss_class(self.loss_config, *self._counts()).to(self.device)
        rows = self.splits.train
        with torch.no_grad():
            if len(rows):
                self.material.fit_inputs(head, self._reads(), lambda: self._fit_inputs(head))
                head.set_prior(loss.prior())
                if self.head_class.fit_labels is not Head.fit_labels:
                    given = self.material.label_rows(self.splits)
                    head.fit_labels(*given, self.material.unknown_rows(self.splits))
                head.load_weights()
        self.processes.share(head.state_dict().values())
        return head, loss

    def load(self, head: Head, place: memory.Plan) -> Loaded:
        """What the head reads, as far as there is room for it; once for all that share it."""
        key = (
            self.preparation,
            place.window_rows,
            place.block,
            place.val_streamed,
            place.buffers,
        )
        return self.material.prepared(key, lambda: self._load(head, place))

    def _preparation(self, head: Head) -> Hashable:
        """Equal for trainings that read and prepare the same."""
        form = head.preparation()
        own = form[0] if form else (self.config.head, repr(self.head_config), self.config.seed)
        return (self._reads(), own, self.dtype, self.trains)

    def engine(
        self,
        head: Head,
        loss: Loss,
        data: Loaded,
        place: memory.Plan,
        progress: Progress,
        checkpoints: Checkpoints | None = None,
    ) -> Engine:
        """What trains the head."""
        assert data.train is not None
        return Engine(
            head,
            loss,
            train=data.train,
            val=data.val,
            task=self.store.task,
            batch_size=self.batch_size,
            epochs=self.config.epochs,
            lr=self.lr,
            optim=self.optim,
            seed=self.config.seed,
            dtype=self.dtype,
            window_rows=place.window_rows,
            block=place.block,
            checkpoints=checkpoints,
            on_round=lambda row: self._told(row, progress),
            processes=self.processes,
        )

    def fit(
        self,
        head: Head,
        loss: Loss,
        checkpoints: Checkpoints | None,
        place: memory.Plan,
        progress: Progress,
    ) -> Position:
        """Load the data and train the head."""
        data = self.load(head, place)
        position = Position()
        if self.trains:
            position = self.engine(head, loss, data, place, progress, checkpoints).run()
        self.fit_validation(head, data, position)
        del data
        self.material.release()
        memory.give_back()
        return position

    def fit_validation(self, head: Head, data: Loaded, position: Position) -> None:
        """Let the trained head set what is fitted on the validation rows."""
        if len(data.val):
            head.eval()
            with torch.no_grad():
                targets = as_targets(data.val.targets).whole()
                said = head.fit_validation(
                    data.val.blocks(), targets, self.store.task, self.optim.metric
                )
                advice = self._alone(head, data.val, targets, position)
            position.notes += [line for line in (said, advice) if line]
        self.processes.share(head.state_dict().values())

    def _alone(self, head: Head, val: Data, targets: Tensor, position: Position) -> str:
        """What to say where a field alone is better than all together."""
        parts = [stage for stage in head.stages() if stage.reads]
        if not parts:
            return ""
        return better_alone(
            parts,
            position.history,
            self.features,
            score_all(head.score, val.blocks()),
            targets,
            self.store.task,
            self.optim.metric or metrics.HEADLINE[self.store.task],
        )

    def _told(self, row: dict[str, Any], progress: Progress) -> None:
        progress(row["stage"], row["epoch"], row["epochs"])
        self.on_round(row)

    @torch.no_grad()
    def validate(self, head: Head, data: Loaded) -> float:
        """The metric that trainings are compared by, on the validation rows; NaN: undefined."""
        logits = score_all(head.eval().score, data.val.blocks())
        targets = as_targets(data.val.targets).whole()
        return metrics.score(logits, targets, self.store.task, self.optim.metric)

    def run(self, state: Mapping[str, Tensor], position: Position) -> Run:
        """The run of a head with this ``state_dict``, not yet measured."""
        source = self.store.sources[0] if self.store.sources else {}
        return Run(
            head=self.config.head,
            head_config=asdict(self.head_config),
            loss=self.loss_name,
            loss_config=asdict(self.loss_config),
            features=self.refs,
            label_set=tuple(self.store.label_set),
            task=self.store.task,
            state={key: value.cpu() for key, value in state.items()},
            thresholds=thresholds.Thresholds.default(self.store.task, len(self.store.label_set)),
            source=source,
            seed=self.config.seed,
            train_config=self.identity()["config"],
            history=position.history,
        )

    def measure(
        self, run: Run, unseen: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Fit temperature, then thresholds on validation; measure validation and test.

        Args:
            unseen: logits and targets to fit them on instead.
        """
        limit = self.config.max_memory
        most = memory.parse_size(limit) // BATCHES_PER_BUDGET if limit else BLOCK_BYTES
        predictor = Predictor(
            run, self.store, device=self.device, batch_bytes=min(most, BLOCK_BYTES)
        )
        for name in ("val", "test"):
            rows = getattr(self.splits, name)
            if not len(rows):
                continue
            logits = predictor.logits(rows)
            targets = splits.targets(self.store, rows).to(logits.device)
            if name == "val":
                scores, truth = unseen or (logits, targets)
                run.temperature = fit_temperature(scores, truth, run.task)
                p = probabilities(scores, run.task, run.temperature)
                run.thresholds = thresholds.tune(p, truth, run.task)
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

    def _named(self) -> str:
        """The head, with what is set of it."""
        given = [pair for pair in self.config.settings if pair.startswith("head.")]
        return f"head {self.config.head}" + (f" with {', '.join(given)}" if given else "")

    def _idle_settings(self, parts: Parts) -> list[str]:
        """A line on each setting that is given and does nothing."""
        lines = parts.idle()
        given = [name for name in ("epochs", "lr", "batch_size") if getattr(self.config, name)]
        if given and not self.trains:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            lines.append(f"warning: {self.config.head} trains nothing, so {options} does nothing")
        return lines

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
        return self.material.counts(self.splits)

    def _reads(self) -> tuple[Any, ...]:
        """Which fields of which rows are read, and where they are put."""
        return (tuple(self.features.items()), id(self.splits), str(self.device))

    def _fit_inputs(self, head: Head) -> None:
        blocks = raw_blocks(self.store, self.features, self.splits.train, self.device)
        head.fit_inputs(batch for _, batch in blocks)

    def place(self, head: Head) -> memory.Plan:
        """What there is room for; the same for all that share the data.

        Raises:
            InputError: nothing fits into the memory that the user allows.
        """
        plan = self.material.plan(self.preparation, lambda: self._place(head))
        if plan.window_rows and plan.needs.batch_size < self.batch_size:  # made for smaller ones
            key = (self.preparation, self.batch_size)
            plan = self.material.plan(key, lambda: self._place(head))
        return memory.check(plan) if self.config.max_memory else plan

    def _place(self, head: Head) -> memory.Plan:
        limit = self.config.max_memory
        train = self.splits.train if self.trains else self.splits.train[:0]
        rows = train if len(train) else self.splits.val
        floats, others = 0, 0
        for values in self._resident(head, rows[:1], torch.float32).inputs.values():
            if values.is_floating_point():
                floats += values.numel()
            else:
                others += values.nbytes
        needs = memory.Needs(
            train_rows=len(train),
            val_rows=len(self.splits.val),
            batch_size=self.batch_size,
            stored=stored_bytes(self.store, self.features),
            prepared=floats * self.dtype.itemsize + others,
            val_prepared=floats * torch.float32.itemsize + others,
            target=self._targets(rows[:1]).room(1).nbytes,
            labels=sum(nbytes_of(self.store, part) for part in (train, self.splits.val))
            + self.store.labels.nbytes,
            score=len(self.store.label_set) * torch.float32.itemsize,
            tile=largest_tile(head, self.device),
            processes=self.processes.count,
        )
        budget = memory.parse_size(limit) if limit else memory.allowed(self.device)
        plan = memory.plan(needs, budget)
        # The order of the rows depends on them, and so they are the main process's.
        own = [plan.window_rows, plan.block]
        window_rows, block = map(int, self.processes.numbers(own, self.device))
        return replace(plan, window_rows=window_rows, block=block)

    def _load(self, head: Head, place: memory.Plan) -> Loaded:
        data = self._loaded(head, place)
        memory.give_back()
        return data

    def _loaded(self, head: Head, place: memory.Plan) -> Loaded:
        # Of several processes the main one validates.
        rows = self.splits.val if self.processes.main else self.splits.val[:0]
        if place.val_streamed and len(rows):
            val: Data = self._streamed(head, rows, torch.float32, place)
        else:
            val = self._resident(head, rows, torch.float32, place=place)
        if not self.trains:
            return Loaded(None, val)
        rows = self.splits.train
        if place.window_rows:
            train: Data = self._streamed(
                head, rows, self.dtype, place, place.window_rows, self.share
            )
        else:
            train = self._resident(head, rows, self.dtype, self.share, place)
        return Loaded(train, val)

    def _resident(
        self,
        head: Head,
        rows: splits.Rows,
        dtype: torch.dtype,
        share: Share = ALONE,
        place: memory.Plan | None = None,
    ) -> ResidentData:
        own = share.rows(rows)
        inputs = load_prepared(
            self.store,
            self.features,
            own,
            head,
            self.device,
            dtype,
            block_bytes=None if place is None else place.block,
            tile_bytes=None if place is None else place.tile,
        )
        return ResidentData(inputs=inputs, targets=self._targets(own), share=share, size=len(rows))

    def _streamed(
        self,
        head: Head,
        rows: splits.Rows,
        dtype: torch.dtype,
        place: memory.Plan,
        window_rows: int = 0,
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
            buffers=place.buffers,
            block_bytes=place.block,
            tile_bytes=place.tile,
            share=share,
        )

    def _targets(self, rows: splits.Rows) -> Targets:
        return load_targets(self.store, rows, self.device)


def default_batch(rows: int, device: torch.device, most: int | None = None) -> int:
    """About 100 steps an epoch, within what is fast on the device and what the head allows."""
    largest = MAX_BATCH.get(device.type, MAX_BATCH_ELSEWHERE)
    return min(max(MIN_BATCH, min(largest, rows // STEPS_PER_EPOCH)), most or largest)


def default_lr(base: float, batch_size: int, rows: int) -> float:
    """``base`` at 256 samples, scaled gently with the batch that there really is."""
    return base * math.pow(min(batch_size, max(rows, 1)) / LR_BATCH, LR_POWER)
