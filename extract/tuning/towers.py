"""The two towers of a backbone as they are trained: features, logit scale, checkpointed blocks.

Legend: B pairs, D features of the shared space.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmc.extract.backbones import load_backbone
from mmc.extract.backbones.base import TokenBatch
from mmc.extract.backbones.encoder import Encoder
from mmc.extract.training.blocks import checkpoint_blocks
from mmc.extract.training.contrast import LARGEST_SCALE
from mmc.extract.tuning.targets import Target
from mmc.store.errors import InputError

_SCALE = "logit_scale"
_FIRST_SCALE = 1 / 0.07
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}


class LogitScale(nn.Module):
    """The inverse temperature of similarities; the model's own where it has one."""

    def __init__(self, model: nn.Module, device: torch.device, *, trained: bool) -> None:
        super().__init__()
        own = dict(model.named_parameters()).get(_SCALE)
        start = torch.tensor(math.log(_FIRST_SCALE), device=device)
        self.own = own is not None
        self.log = nn.Parameter(start if own is None else own.detach().clone())
        self.log.requires_grad_(trained)
        self._most = max(LARGEST_SCALE, float(self.log.detach().max()))

    def forward(self) -> Tensor:
        """The scale itself, a scalar."""
        return self.log.exp().reshape(())

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep it within CLIP's limit (or where the model was)."""
        self.log.clamp_(max=self._most)


class Towers:
    """A backbone's towers, in evaluation mode: no dropout, batch norms as they are.

    What is trained is added from outside (:mod:`mmc.extract.tuning.adapters`).
    """

    def __init__(self, encoder: Encoder, device: torch.device, precision: str) -> None:
        assert encoder.model is not None
        self.encoder, self.model, self.device = encoder, encoder.model, device
        self._dtype = _DTYPES[precision]

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of training; weights and adapters stay float32."""
        mixed = self._dtype != torch.float32
        return torch.autocast(self.device.type, self._dtype, enabled=mixed)

    def image(self, pixels: Tensor) -> Tensor:
        """Normalised features (B, D) float32 of uint8 (B, 3, H, W)."""
        with self.autocast():
            features = self.encoder.embed_image(pixels)
        return F.normalize(features, dim=-1)

    def text(self, tokens: TokenBatch) -> Tensor:
        """Normalised features (B, D) float32 of tokenized texts."""
        with self.autocast():
            features = self.encoder.embed_text(tokens)
        return F.normalize(features, dim=-1)

    def checkpoint_blocks(self, targets: Iterable[Target]) -> int:
        """Compute the blocks that hold a target anew in the backward pass; how many they are.

        A block is what stands in the outermost list of modules on the way to the target.
        """
        modules = dict(self.model.named_modules())
        blocks: dict[str, nn.Module] = {}
        for target in targets:
            path = target.name.split(".")
            for length in range(1, len(path)):
                owner = modules.get(".".join(path[:length]))
                inside = ".".join(path[: length + 1])
                if isinstance(owner, nn.ModuleList | nn.Sequential) and inside in modules:
                    blocks[inside] = modules[inside]
                    break
        return checkpoint_blocks(blocks.values(), dropout=False)


def load_towers(spec: str, device: torch.device, precision: str) -> Towers:
    """The backbone of ``spec`` for training, float32 weights.

    Args:
        precision: bf16, fp16 or float32: of the matrix products.

    Raises:
        InputError: it cannot be loaded, or has not two towers with features to compare.
    """
    if precision == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16 needs a GPU; on a CPU choose bf16 or float32")
    backbone = load_backbone(spec, device=str(device), precision="float32")
    if not isinstance(backbone, Encoder) or backbone.model is None:
        raise InputError(f"{spec} cannot be tuned; mmc tune takes open_clip: and hf: backbones")
    for tower, what in (("image", "picture"), ("text", "text")):
        if tower not in backbone.fields:
            raise InputError(
                f"{spec} has no {tower} tower; tuning compares a {what} with its counterpart, so "
                "choose a model of both, such as CLIP or SigLIP"
            )
    widths = [backbone.fields[name].shape for name in ("image", "text")]
    if widths[0] != widths[1]:
        raise InputError(f"{spec}: pictures have {widths[0][0]} features, texts {widths[1][0]}")
    return Towers(backbone, device, precision)
