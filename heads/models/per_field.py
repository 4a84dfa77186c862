"""What heads with one classifier per field share.

Shapes: B samples, C labels.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmc.heads.models.base import Batch, Head, Stage, check_least, check_shares
from mmc.heads.models.dropout import Dropout
from mmc.heads.models.inputs import InputNorm, PooledConfig
from mmc.heads.models.linear import linear_rate, output_layer, set_bias


@dataclass(frozen=True, kw_only=True)
class PerFieldConfig(PooledConfig):
    """What every head with one classifier per field can be told."""

    hidden: int = 0
    """Hidden width of each field's classifier; 0 = linear."""
    dropout: float = 0.2
    """Share of hidden values dropped while training."""

    def __post_init__(self) -> None:
        check_least(self, 0, "hidden")
        check_shares(self, "dropout")


class PerFieldHead(Head):
    """Base of the heads with one classifier per field, each trained alone first."""

    min_inputs = 2
    prior: Tensor

    def __init__(
        self,
        inputs: Mapping[str, tuple[int, ...]],
        num_labels: int,
        config: Any,
        *,
        label_text: Tensor | None = None,
    ) -> None:
        super().__init__(inputs, num_labels, config, label_text=label_text)
        self.roles = tuple(inputs)
        self.widths = [shape[0] for shape in inputs.values()]
        self.learning_rate = linear_rate(sum(self.widths) // len(self.widths))
        self.normalize = InputNorm(inputs, config.normalize)
        self.classifiers = nn.ModuleList(
            classifier(width, num_labels, config.hidden, config.dropout) for width in self.widths
        )
        self.register_buffer("prior", torch.zeros(num_labels))

    def prepare(self, batch: Batch) -> Batch:
        prepared: Batch = self.normalize(batch)
        return prepared

    def preparation(self) -> tuple[str, nn.Module] | None:
        return f"by role {self.normalize.mode}", self.normalize

    def stages(self) -> list[Stage]:
        return [self._stage(index) for index in range(len(self.roles))]

    def fit_inputs(self, blocks: Iterable[Batch]) -> None:
        self.normalize.fit(blocks)

    def set_prior(self, logits: Tensor) -> None:
        self.prior.copy_(logits)
        for one in self.classifiers:
            set_bias(one[-1], logits)  # type: ignore[index]

    def _stage(self, index: int) -> Stage:
        role, classify = self.roles[index], self.classifiers[index]
        return Stage(
            name=f"classifier {role}",
            trains={f"classifiers.{index}": 1.0},
            reads=(role,),
            score=lambda prepared: classify(prepared[role]),
        )


def classifier(width: int, outputs: int, hidden: int, dropout: float) -> nn.Sequential:
    """Linear, or one hidden layer; the last layer starts at zero."""
    if not hidden:
        return nn.Sequential(output_layer(width, outputs))
    return nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(), Dropout(dropout), output_layer(hidden, outputs)
    )
