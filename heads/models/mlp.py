"""Hidden layers on the concatenated fields.

Shapes: B samples, C labels, D values of all fields together.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mmc.heads.models.base import Batch, check_least, check_shares
from mmc.heads.models.dropout import Dropout, InputDropoutLinear
from mmc.heads.models.inputs import PooledHead
from mmc.heads.models.linear import LinearConfig, chosen_output, set_bias


@dataclass(frozen=True, kw_only=True)
class MLPConfig(LinearConfig):
    """Settings of the MLP head."""

    hidden: int = 512
    """Width of the hidden layers."""
    layers: int = 1
    """Hidden layers."""
    input_dropout: float = 0.4
    """Share of the inputs ignored in a training step, the same for the whole batch."""
    dropout: float = 0.0
    """Share of hidden values dropped while training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "hidden", "layers")
        check_shares(self, "input_dropout", "dropout")


class MLP(PooledHead):
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
        width = self.width
        self.hidden = nn.Sequential()
        for index in range(config.layers):
            share = 0.0 if index else config.input_dropout
            layer = InputDropoutLinear(width, config.hidden, share)
            self.hidden.extend([layer, nn.GELU(), Dropout(config.dropout)])
            width = config.hidden
        self.classifier = chosen_output(config, width, num_labels)

    def score(self, prepared: Batch) -> Tensor:
        logits: Tensor = self.classifier(self.hidden(prepared["inputs"]))
        return logits

    def set_prior(self, logits: Tensor) -> None:
        set_bias(self.classifier, logits)
