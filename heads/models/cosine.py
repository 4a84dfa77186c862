"""An output layer whose logits are scaled cosines.

Shapes: B samples, C labels, D values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineOutput(nn.Module):
    """Logits = scale x cos(x, weights of the label) + bias; the bias is set, never trained.

    That it is the label priors and nothing else lets a loss find the cosine from the logits
    (`mmc.heads.losses.aam`).
    """

    bias: Tensor

    def __init__(self, width: int, num_labels: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        # About unit length, so that one step of Adam turns it about as far whatever the width.
        self.weight = nn.Parameter(torch.randn(num_labels, width) / width**0.5)
        self.register_buffer("bias", torch.zeros(num_labels))

    def forward(self, x: Tensor) -> Tensor:
        cosine_BC = F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1).to(x.dtype))
        return cosine_BC.float() * self.scale + self.bias

    def extra_repr(self) -> str:
        """See :class:`torch.nn.Module`."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, scale={self.scale}"
