"""What a family of transformers models hands to ``hf.py``, and the options of hf specs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from mmc.extract.backbones.base import PROMPT
from mmc.extract.backbones.hf_text import TextRules


@dataclass(frozen=True, kw_only=True)
class Options:
    """What goes in the brackets of an hf spec."""

    pooling: Literal["mean", "cls", "max"] | None = None
    """How a text encoder's tokens become one vector, instead of what its files say."""
    tokens: Literal["states", "projected"] = "states"
    """Image tokens and class token of CLIP as the tower's states, or each projected into the shared
    space (last layer norm and projection), where they can be compared with texts."""
    enc_token: Literal["cls", "enc"] = "cls"
    """First token of a text that BLIP reads beside the picture: [CLS], as transformers has it, or
    [ENC], as in its training."""
    lora: str | None = None
    """Folder of a LoRA adapter that is merged into the weights."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A loaded model and how its towers run; see :mod:`mmc.extract.backbones.encoder`."""

    model: nn.Module
    image: Callable[[Tensor], Mapping[str, Tensor]] | None = None
    image_size: Any = None
    """Of the pictures that its position embeddings are for, a number or (height, width); None: it
    interpolates them."""
    rules: TextRules | None = None
    """None: it has no text tower."""
    text: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]] | None = None
    fused: Callable[[Mapping[str, Tensor], Tensor, Tensor], Mapping[str, Tensor]] | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    """What decides its numbers beside what all families record."""
    prompt: str = PROMPT
