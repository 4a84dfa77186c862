"""Stages added to a finished run, each trained on what the sum so far gets wrong.

The base is frozen, and kept inside: the trained run needs its folder no more. A stage is a small
linear or MLP head on the pooled fields; it learns what its logits, added to those of the sum so
far, do best under the loss (Friedman 2001, with the loss itself for its gradients), is then shrunk,
and stays only if validation is better with it than without. The first that does not is the last.

Shapes: B samples, C labels, D values of the pooled fields together.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmc.heads.artifact import Run
from mmc.heads.featureref import FeatureRef
from mmc.heads.models import GROUP, HEADS
from mmc.heads.models.base import Batch, Head, Stage, check_least, check_shares
from mmc.heads.models.dropout import InputDropoutLinear
from mmc.heads.models.inputs import InputNorm, PooledConfig
from mmc.heads.models.linear import linear_rate, output_layer
from mmc.heads.runfiles import WEIGHTS
from mmc.store.config import build
from mmc.store.errors import InputError
from mmc.store.registry import load, lookup

TIE = 1e-6
"""A stage must be better by more than this."""
NOT_EMBEDDINGS = ("_mask", "_classes", "_scores", "_ids")
"""Endings of fields that hold one number per token or region, and are no embedding."""


@dataclass(frozen=True, kw_only=True)
class BoostConfig(PooledConfig):
    """Settings of the boosted head."""

    base: str | None = None
    """Folder of the run to start from; none = the label priors."""
    rounds: int = 3
    """Most stages."""
    kind: Literal["mlp", "linear"] = "mlp"
    """What a stage is."""
    hidden: int = 128
    """Width of an MLP stage's hidden layer."""
    input_dropout: float = 0.4
    """Share of the inputs that an MLP stage ignores in a training step."""
    shrinkage: float = 0.5
    """What a trained stage's logits are multiplied by."""
    base_run: dict[str, Any] = field(default_factory=dict)
    """What the base is; recorded by the training, not to be set."""

    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside the others -> which others."""
        names = () if self.kind == "mlp" else ("hidden", "input_dropout")
        return dict.fromkeys(names, f"head.kind={self.kind}")

    def __post_init__(self) -> None:
        check_least(self, 1, "rounds", "hidden")
        check_shares(self, "input_dropout")
        if not 0 < self.shrinkage <= 1:
            raise InputError(f"head.shrinkage must be in (0, 1], got {self.shrinkage}")


class Boost(Head):
    """Logits = those of the base + the stages'."""

    Config = BoostConfig
    reads = "any"
    needs_validation = True
    card = (
        "A finished run, frozen and kept inside, and stages trained on what it got wrong; a stage "
        "stayed only if validation was better with it."
    )
    prior: Tensor
    ended: Tensor

    def __init__(
        self,
        inputs: Mapping[str, tuple[int, ...]],
        num_labels: int,
        config: BoostConfig,
        *,
        label_text: Tensor | None = None,
    ) -> None:
        super().__init__(inputs, num_labels, config, label_text=label_text)
        self.roles = _pooled(inputs)
        self.normalize = InputNorm({role: inputs[role] for role in self.roles}, config.normalize)
        width = sum(inputs[role][0] for role in self.roles)
        self.learning_rate = 7e-4 if config.kind == "mlp" else linear_rate(width)
        self.base = _base_head(config, inputs, num_labels) if config.base_run else None
        self.prepares_by_network = self.base is not None
        self.steps = nn.ModuleList(_step(config, width, num_labels) for _ in range(config.rounds))
        self.register_buffer("prior", torch.zeros(num_labels))
        self.register_buffer("ended", torch.tensor(False))

    @classmethod
    def completed(
        cls,
        config: BoostConfig,
        features: Mapping[str, FeatureRef],
        label_set: Sequence[str],
        task: str,
    ) -> BoostConfig:
        if config.base_run:
            raise InputError("head.base_run is recorded by the training; set head.base=RUN")
        if config.base is None:
            return config
        run = Run.load(config.base)
        where = f"head.base={config.base}"
        if run.task != task:
            raise InputError(f"{where} is a run for a {run.task} task, and this store is {task}")
        if run.label_set != tuple(label_set):
            raise InputError(
                f"{where} was trained on another label set ({_unlike(run.label_set, label_set)}); "
                "train the base on this store"
            )
        roles = {role: _same(ref, features, where) for role, ref in run.features.items()}
        record = {
            "head": run.head,
            "config": run.head_config,
            "roles": roles,
            "weights_sha256": _weights_hash(run),
        }
        return replace(config, base_run=record)

    @classmethod
    def trained_before(cls, config: BoostConfig) -> str:
        return "" if config.base is None else f"head.base={config.base}"

    def prepare(self, batch: Batch) -> Batch:
        prepared = {"inputs": self.normalize.joined({role: batch[role] for role in self.roles})}
        if self.base is not None:
            roles: dict[str, str] = self.config.base_run["roles"]
            prepared["base"] = self.base({role: batch[own] for role, own in roles.items()})
        return prepared

    def score(self, prepared: Batch) -> Tensor:
        return self._sum(prepared, len(self.steps))

    def stages(self) -> list[Stage]:
        return [self._stage(index) for index in range(len(self.steps))]

    def fit_inputs(self, blocks: Iterable[Batch]) -> None:
        self._load_base()
        self.normalize.fit(blocks)

    def set_prior(self, logits: Tensor) -> None:
        self.prior.copy_(logits)

    def train(self, mode: bool = True) -> "Boost":
        """The base stays in evaluation mode: it is what it was."""
        super().train(mode)
        if self.base is not None:
            self.base.eval()
        return self

    def _sum(self, prepared: Batch, steps: int) -> Tensor:
        """Logits (B, C) of the base and the first ``steps`` stages."""
        x_BD = prepared["inputs"]
        logits = self.prior.expand(x_BD.shape[0], -1)
        if self.base is not None:
            logits = prepared["base"].float()
        for step in self.steps[:steps]:
            logits = logits + step(x_BD)
        return logits

    def _stage(self, index: int) -> Stage:
        return Stage(
            name=f"stage {index + 1}",
            trains={f"steps.{index}": 1.0},
            score=lambda prepared: self._sum(prepared, index + 1),
            needed=lambda: not bool(self.ended),
            finish=lambda measure: self._keep_or_drop(index, measure),
        )

    def _keep_or_drop(self, index: int, measure: Callable[[], float]) -> str:
        """Shrink a trained stage; silence it, and end, if validation is no better with it."""
        layer: nn.Linear = self.steps[index][-1]  # type: ignore[index]
        trained = [parameter * self.config.shrinkage for parameter in layer.parameters()]
        for parameter in layer.parameters():
            parameter.zero_()
        before = measure()
        for parameter, value in zip(layer.parameters(), trained, strict=True):
            parameter.copy_(value)
        after = measure()
        # The stage's own line tells what it reached before it was shrunk.
        said = f"shrunk by {self.config.shrinkage:g}: {after:.4f} on val ({before:.4f} without it)"
        if after > before + TIE:
            return f"kept, {said}"
        for parameter in layer.parameters():
            parameter.zero_()
        self.ended.fill_(True)
        return f"dropped, {said}"

    def _load_base(self) -> None:
        """Take in the weights of the base."""
        if self.base is None:
            return
        run = Run.load(self.config.base)
        if _weights_hash(run) != self.config.base_run["weights_sha256"]:
            raise InputError(f"{self.config.base} changed while the training began; start it again")
        self.base.load_state_dict(run.state)


def _pooled(inputs: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """The roles that a stage reads: one vector per sample."""
    roles = tuple(
        role
        for role, shape in inputs.items()
        if len(shape) == 1 and not role.endswith(NOT_EMBEDDINGS)
    )
    if not roles:
        raise InputError(
            f"boost needs a pooled field besides {', '.join(inputs)}: add one with --features"
        )
    return roles


def _step(config: BoostConfig, width: int, num_labels: int) -> nn.Sequential:
    """A stage that starts by adding nothing."""
    if config.kind == "linear":
        return nn.Sequential(output_layer(width, num_labels))
    return nn.Sequential(
        InputDropoutLinear(width, config.hidden, config.input_dropout),
        nn.GELU(),
        output_layer(config.hidden, num_labels),
    )


def _base_head(config: BoostConfig, inputs: Mapping[str, tuple[int, ...]], num_labels: int) -> Head:
    """The base's head without its weights, frozen."""
    record = config.base_run
    cls: type[Head] = load(lookup(HEADS, record["head"], kind="head", group=GROUP))
    settings: Any = build(cls.Config, record["config"], where=f"head {record['head']}")
    shapes = {role: tuple(inputs[own]) for role, own in record["roles"].items()}
    return cls(shapes, num_labels, settings, label_text=None).eval().requires_grad_(False)


def _weights_hash(run: Run) -> str:
    assert run.path is not None
    return hashlib.sha256((run.path / WEIGHTS).read_bytes()).hexdigest()


def _same(ref: FeatureRef, features: Mapping[str, FeatureRef], where: str) -> str:
    """The role of the feature that is ``ref``."""
    same = [
        role
        for role, own in features.items()
        if (own.field, own.fingerprint, own.shape) == (ref.field, ref.fingerprint, ref.shape)
    ]
    if same:  # under two aliases, the one of the same name
        return next((role for role in same if features[role].feature == ref.feature), same[0])
    given = ", ".join(own.feature for own in features.values())
    if any(own.feature == ref.feature for own in features.values()):
        raise InputError(
            f"{where} reads another {ref.feature} than this store's (fingerprints differ); extract "
            "it as the base's was, or train the base on this store"
        )
    raise InputError(
        f"{where} reads {ref.feature}, which is not among the features given ({given}); name both "
        "with --features"
    )


def _unlike(first: Sequence[str], second: Sequence[str]) -> str:
    """How two label sets differ."""
    missing = [label for label in second if label not in set(first)]
    extra = [label for label in first if label not in set(second)]
    if missing or extra:
        shown = ", ".join(map(repr, [*missing, *extra][:3]))
        return f"{len(first)} labels and {len(second)} here, differing in {shown}"
    return "the same labels in another order"
