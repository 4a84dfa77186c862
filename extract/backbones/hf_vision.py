"""Image models of transformers: ViT (DINO's among them), DINOv2 and DINOv2 with registers.

``image``: the class token after the last layer norm. It is what their classifiers and k-nearest
neighbour evaluations read (ViT's ``pooler_output`` is not: that is one more layer, trained with
some checkpoints only). ``image_class`` is the same token, beside ``image_tokens``, the patches
(P, Dv) in reading order; registers are left out. Checkpoints of classifiers load without the head.
"""

from typing import Any

from torch import Tensor

from mmc.extract.backbones.hf_files import Files, load_model
from mmc.extract.backbones.hf_parts import Options, Parts

IMAGE_ENCODERS = ("vit", "dinov2", "dinov2_with_registers")
"""By ``model_type``."""


def image_encoder(files: Files, config: Any, options: Options) -> Parts:
    """A model of one tower, for images.

    Raises:
        InputError: weights that do not fit.
    """
    model: Any = load_model(files)
    prefix = 1 + getattr(config, "num_register_tokens", 0)

    def forward(inputs: Tensor) -> dict[str, Tensor]:
        states = model(pixel_values=inputs).last_hidden_state
        return {
            "image": states[:, 0],
            "image_tokens": states[:, prefix:],
            "image_class": states[:, 0],
        }

    # The DINOv2s interpolate their positions: trained at 518 pixels, used at 224.
    fixed = config.image_size if config.model_type == "vit" else None
    return Parts(model=model, image=forward, image_size=fixed)
