"""Hidden layers on the concatenated fields.

Shapes: B samples, C labels, D values of all fields together.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmc.heads.models.base import Batch, Head
from mmc.heads.models.dropout import Dropout, InputDropoutLinear
from mmc.heads.models.inputs import InputNorm, Normalize
from mmc.heads.models.linear import Output, check_scale, chosen_output, set_bias
from mmc.store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Settings of the MLP head."""

    hidden: int = 512
    """Width of the hidden layers."""
    layers: int = 1
    """Hidden layers."""
    input_dropout: float = 0.4
    """Share of the inputs ignored in a training step, the same for the whole batch."""
    dropout: float = 0.0
    """Share of hidden values dropped while training."""
    normalize: Normalize = "center"
    """Per field: ``center`` = unit length, minus the training mean, one scale; ``l2`` = unit
    length times sqrt(D); ``standardize`` = unit length, then each value to mean 0 and variance 1;
    ``none`` = as stored."""
    output: Output = "linear"
    """``linear`` = a product with the label's weights; ``cosine`` = ``scale`` times their cosine,
    plus the label's prior (the loss aam asks for it)."""
    scale: float = 15.0
    """Logits per unit of cosine under ``output=cosine``."""

    def __post_init__(self) -> None:
        check_scale(self.scale)
        for name in ("hidden", "layers"):
            if getattr(self, name) < 1:
                raise InputError(f"head.{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("input_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"head.{name} must be in [0, 1), got {getattr(self, name)}")


class MLP(Head):
    """Linear, GELU and dropout per hidden layer, then a linear layer to the logits."""

    Config = MLPConfig
    learning_rate = 7e-4

    def __init__(
        self,
        inputs: Mapping[str, tuple[int, ...]],
        num_labels: int,
        config: MLPConfig,
        *,
        label_text: Tensor | None = None,
    ) -> None:
        super().__init__(inputs, num_labels, config, label_text=label_text)
        self.normalize = InputNorm(inputs, config.normalize)
        width = sum(shape[0] for shape in inputs.values())
        self.hidden = nn.Sequential()
        for index in range(config.layers):
            share = 0.0 if index else config.input_dropout
            layer = InputDropoutLinear(width, config.hidden, share)
            self.hidden.extend([layer, nn.GELU(), Dropout(config.dropout)])
            width = config.hidden
        self.classifier = chosen_output(config.output, config.scale, width, num_labels)

    def prepare(self, batch: Batch) -> Batch:
        return {"inputs": torch.cat(list(self.normalize(batch).values()), dim=-1)}

    def score(self, prepared: Batch) -> Tensor:
        logits: Tensor = self.classifier(self.hidden(prepared["inputs"]))
        return logits

    def fit_inputs(self, blocks: Iterable[Batch]) -> None:
        self.normalize.fit(blocks)

    def set_prior(self, logits: Tensor) -> None:
        set_bias(self.classifier, logits)
