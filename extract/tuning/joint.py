"""What a tuning asks of a classification head that is trained along with it.

Heads live in a package of their own, which this one does not know: whoever calls `tune` hands one
over. Legend: n rows, B of a batch, D features (normalised), C labels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn


class JointHead(Protocol):
    """A head on both embeddings, its loss and its measure."""

    identity: dict[str, Any]
    """JSON-able: what must be the same for an unfinished tuning to be continued."""
    lr: float
    """Peak learning rate of the head, which starts from nothing."""

    def build(
        self,
        image: Tensor,
        text: Tensor,
        labels: Sequence[list[int] | None],
        label_set: Sequence[str],
        task: str,
    ) -> nn.Module:
        """The module to train, on the device of the features, fitted to those of train.

        Args:
            image: (n, D).
            text: (n, D).
            labels: n rows; None = unlabelled.

        Raises:
            InputError: it cannot be trained on these.
        """

    def loss(self, image: Tensor, text: Tensor, labels: Sequence[list[int] | None]) -> Tensor:
        """Mean loss of B rows, a scalar; rows without labels add nothing."""

    def measure(self, image: Tensor, text: Tensor, labels: Sequence[list[int] | None]) -> float:
        """How good it is on n rows, larger is better."""

    def finish(self, folder: Path) -> None:
        """The module is that of the best epoch, and the adapter is in ``folder``: keep it."""
