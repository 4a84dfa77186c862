"""The image towers of open_clip models: pooled features, the grid of tokens, the class token.

Grid tokens are in reading order (row by row), without the class token, which is apart:

- CLIP's own vision transformer: its patches after the last layer norm and before the projection
  (a model that normalises after pooling: before that norm); ViT-B/32 gives 7 x 7 = 49.
- ResNets (CLIP's own): the last grid, before attention pooling; no class token.
- timm trunks (SigLIP, EVA, ConvNeXt …): what ``forward_features`` gives, before pooling.
- CoCa: the queries of its attentional pooler, which lie nowhere in the picture; no class token.
"""

from collections.abc import Callable
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor

from mmc.store.errors import InputError

Forward = Callable[[Tensor], dict[str, Tensor]]


def image_forward(visual: Any, precision: str, *, projected: bool, where: str) -> Forward:
    """The function from normalised images (B, 3, H, W) to the image fields.

    Args:
        visual: the model's image tower.
        precision: ``bf16`` lays convolutions out for it.
        projected: tokens in the shared space: each through the last layer norm and the projection,
            as the pooled token goes.
        where: the backbone as typed, for messages.

    Raises:
        InputError: ``projected`` is asked of a tower that projects something else than its tokens.
    """
    grid_of_its_own = isinstance(visual, VisionTransformer) and visual.attn_pool is None
    if projected and not grid_of_its_own:
        raise InputError(
            f"{where}: tokens=projected needs a tower whose tokens are projected one by one, as "
            f"CLIP's vision transformers; this one ({_kind(visual)}) pools them in another way"
        )
    if grid_of_its_own:
        return lambda x: _vit_forward(visual, x, projected)
    if isinstance(visual, VisionTransformer):
        visual.output_tokens = True
        return lambda x: dict(zip(("image", "image_tokens"), visual(x), strict=True))
    # Convolutions of bfloat16 are about twice as fast in this layout; float32 keeps the library's
    # own, for its very rounding.
    layout = torch.channels_last if precision == "bf16" else torch.contiguous_format
    visual.to(memory_format=layout)
    if isinstance(visual, ModifiedResNet):
        return lambda x: _resnet_forward(visual, x.contiguous(memory_format=layout))
    if isinstance(visual, TimmModel):
        return lambda x: _timm_forward(visual, x.contiguous(memory_format=layout))
    return lambda x: {"image": visual(x)}


def _kind(visual: Any) -> str:
    if isinstance(visual, VisionTransformer):
        return "CoCa's attentional pooler"
    if isinstance(visual, TimmModel):
        return f"timm {type(visual.trunk).__name__}"
    return type(visual).__name__


def _vit_forward(visual: VisionTransformer, x: Tensor, projected: bool) -> dict[str, Tensor]:
    found = visual.forward_intermediates(
        x,
        indices=1,
        normalize_intermediates=projected or not visual.final_ln_after_pool,
        output_fmt="NLC",
        output_extra_tokens=True,
    )
    patches, prefix = found["image_intermediates"][-1], found["image_intermediates_prefix"][-1]
    if projected:
        patches, prefix = patches @ visual.proj, prefix @ visual.proj
    return {
        "image": found["image_features"],
        "image_tokens": patches,
        "image_class": prefix[:, 0],
    }


def _resnet_forward(visual: ModifiedResNet, x: Tensor) -> dict[str, Tensor]:
    found = visual.forward_intermediates(x, indices=1)
    grid = found["image_intermediates"][-1]
    return {"image": found["image_features"], "image_tokens": grid.flatten(2).transpose(1, 2)}


def _timm_forward(visual: TimmModel, x: Tensor) -> dict[str, Tensor]:
    """timm: a model is its features followed by its head."""
    trunk = visual.trunk
    features = trunk.forward_features(x)
    found = {"image": visual.head(trunk.forward_head(features))}
    if features.ndim == 3:
        found["image_tokens"] = features[:, getattr(trunk, "num_prefix_tokens", 0) :]
        if getattr(trunk, "cls_token", None) is not None:
            found["image_class"] = features[:, 0]
    elif getattr(trunk, "output_fmt", "NCHW") == "NHWC":
        found["image_tokens"] = features.flatten(1, 2)
    else:
        found["image_tokens"] = features.flatten(2).transpose(1, 2)
    return found
