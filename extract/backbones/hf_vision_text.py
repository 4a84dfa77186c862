"""transformers' VisionTextDualEncoder: an image encoder and a text encoder with a shared space.

What `mmc pretrain` writes, and such models of the hub (a ViT or CLIP's image tower beside a BERT).
``image`` and ``text`` (D,) are the projected pooler outputs, not normalised; ``image_tokens`` the
patches of the image tower's ``last_hidden_state`` in reading order, ``image_class`` its class
token, ``text_tokens`` the text tower's ``last_hidden_state``.
"""

from typing import Any

from torch import Tensor

from mmc.extract.backbones.hf_files import Files, load_model
from mmc.extract.backbones.hf_parts import Options, Parts
from mmc.extract.backbones.hf_text import TextRules, real_tokens
from mmc.store.errors import InputError

VISION_TEXT = "vision-text-dual-encoder"
"""Its ``model_type``."""
_IMAGE_TOWERS = ("vit", "clip_vision_model", "dinov2", "deit")
_TEXT_TOWERS = ("bert", "camembert", "roberta", "xlm-roberta")
"""Those whose pooler reads the class token and whose padding is masked, by ``model_type``."""


def vision_text(files: Files, config: Any, options: Options) -> Parts:
    """A model of two towers.

    Raises:
        InputError: a tower of another kind; weights that do not fit.
    """
    vision, words = config.vision_config, config.text_config
    for kind, known, what in (
        (vision.model_type, _IMAGE_TOWERS, "image"),
        (words.model_type, _TEXT_TOWERS, "text"),
    ):
        if kind not in known:
            raise InputError(
                f"hf:{files.name}: its {what} tower is of type {kind!r}; supported are "
                f"{', '.join(known)}"
            )
    model: Any = load_model(files)
    context = words.max_position_embeddings
    if words.model_type != "bert":  # they number positions from behind the padding's id
        context -= model.text_model.embeddings.padding_idx + 1
    prefix = 2 if vision.model_type == "deit" else 1

    def image(inputs: Tensor) -> dict[str, Tensor]:
        out = model.vision_model(pixel_values=inputs)
        return {
            "image": model.visual_projection(out.pooler_output),
            "image_tokens": out.last_hidden_state[:, prefix:],
            "image_class": out.last_hidden_state[:, 0],
        }

    def text(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        out = model.text_model(input_ids=ids, attention_mask=real_tokens(ids, lengths))
        return model.text_projection(out.pooler_output), out.last_hidden_state

    return Parts(
        model=model,
        image=image,
        image_size=None if vision.model_type == "dinov2" else vision.image_size,
        rules=TextRules(context=context, cut="exact", pooling="model"),
        text=text,
    )
