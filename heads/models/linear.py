"""One linear layer on the concatenated fields.

Shapes: B samples, C labels, D values of all fields together.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmc.heads.models.base import Batch
from mmc.heads.models.cosine import CosineOutput
from mmc.heads.models.inputs import PooledConfig, PooledHead
from mmc.store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class LinearConfig(PooledConfig):
    """Settings of the linear head."""

    output: Literal["linear", "cosine"] = "linear"
    """``linear`` = a product with the label's weights; ``cosine`` = ``scale`` times their cosine,
    plus the label's prior (the loss aam asks for it)."""
    scale: float = 15.0
    """Logits per unit of cosine under ``output=cosine``."""

    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside the others -> which others."""
        return {} if self.output == "cosine" else {"scale": f"head.output={self.output}"}

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise InputError(f"head.scale must be above 0, got {self.scale}")


class Linear(PooledHead):
    """Logits = W x + b, x the normalised fields side by side."""

    Config = LinearConfig

    def __init__(
        self,
        inputs: Mapping[str, tuple[int, ...]],
        num_labels: int,
        config: LinearConfig,
        *,
        label_text: Tensor | None = None,
    ) -> None:
        super().__init__(inputs, num_labels, config, label_text=label_text)
        self.classifier = chosen_output(config, self.width, num_labels)
        # A cosine needs larger steps: at one rate it had not got there after 30 epochs of movies.
        self.learning_rate = linear_rate(self.width) * (3 if config.output == "cosine" else 1)

    def score(self, prepared: Batch) -> Tensor:
        logits: Tensor = self.classifier(prepared["inputs"])
        return logits

    def set_prior(self, logits: Tensor) -> None:
        set_bias(self.classifier, logits)


def linear_rate(width: int) -> float:
    """Learning rate of a linear classifier on ``width`` values of unit variance.

    Adam moves every weight alike, so the logits of a wide input move further. 2e-4 to 8e-4 was best
    on 384 to 1,024 values, with the best in between falling as the width grew.
    """
    return 3.5e-4 * math.sqrt(512 / width)


def output_layer(width: int, num_labels: int) -> nn.Linear:
    """A linear layer to logits that starts as the constant answer: weights zero."""
    layer = nn.Linear(width, num_labels)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def chosen_output(config: LinearConfig, width: int, num_labels: int) -> nn.Linear | CosineOutput:
    """The output layer that a config's ``output`` and ``scale`` ask for."""
    if config.output == "cosine":
        return CosineOutput(width, num_labels, config.scale)
    return output_layer(width, num_labels)


def set_bias(layer: nn.Linear | CosineOutput, logits: Tensor) -> None:
    """Overwrite the bias of an output layer by (C,)."""
    with torch.no_grad():
        layer.bias.copy_(logits)
