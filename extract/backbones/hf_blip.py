"""BLIP for image-text retrieval in transformers (Li et al. 2022, arXiv:2201.12086), base and large.

With I the states of the image tower (after its last layer norm), T those of the text encoder alone
and M those of the text encoder attending to I:

- ``image`` (256,) = vision_proj(I[0]), ``text`` (256,) = text_proj(T[0]), not normalised; their
  cosine is the model's image-text similarity. ``image_class`` = I[0], ``image_tokens`` = the
  patches I[1:] in reading order (24 x 24 at 384 pixels), ``text_tokens`` = T.
- ``fused`` (768,) = M[0], ``fused_tokens`` = M, ``itm`` (1,) = the probability that they match.

T, the text length, is 35 unless the user says otherwise: that of the original retrieval training.
The option ``enc_token`` says which token stands first when the text is read with the picture.

Weights are those of ``BlipForImageTextRetrieval``, as on the hub (``Salesforce/blip-itm-*``). The
authors' own ``.pth`` files, of the same weights, are not read.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from mmc.extract.backbones.hf_files import Files, load_model, load_tokenizer
from mmc.extract.backbones.hf_parts import Options, Parts
from mmc.extract.backbones.hf_text import TextRules, real_tokens
from mmc.store.errors import InputError

TEXT_TOKENS = 35
RETRIEVAL = "BlipForImageTextRetrieval"
CAPTIONING = "BlipForConditionalGeneration"
_OTHERS = {
    CAPTIONING: "it writes captions: `mmc caption SOURCE OUT --backbone {spec}`",
    "BlipForQuestionAnswering": "it answers questions",
    "BlipModel": "its projections are not trained in the published checkpoints",
}


def blip(files: Files, config: Any, options: Options) -> Parts:
    """A retrieval model with its three ways of reading.

    Raises:
        InputError: a checkpoint of another class; weights that do not fit.
    """
    _check_class(files, config)
    model: Any = load_model(files, transformers.BlipForImageTextRetrieval)
    encoder, use_enc = model.text_encoder, options.enc_token == "enc"
    enc = _enc_id(files, config) if use_enc else -1

    def image(inputs: Tensor) -> dict[str, Tensor]:
        # Not pooler_output, which goes through the last layer norm twice.
        states = model.vision_model(pixel_values=inputs).last_hidden_state
        return {
            "image": model.vision_proj(states[:, 0]),
            "image_tokens": states[:, 1:],
            "image_class": states[:, 0],
        }

    def text(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        states = encoder(input_ids=ids, attention_mask=real_tokens(ids, lengths)).last_hidden_state
        return model.text_proj(states[:, 0]), states

    def fused(fields: Mapping[str, Tensor], ids: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        seen = torch.cat([fields["image_class"][:, None], fields["image_tokens"]], 1)
        if use_enc:
            ids = torch.cat([torch.full_like(ids[:, :1], enc), ids[:, 1:]], 1)
        # No mask for the image: all of it is real, and the library ignores that mask.
        states = encoder(
            input_ids=ids,
            attention_mask=real_tokens(ids, lengths),
            encoder_hidden_states=seen,
        ).last_hidden_state
        match = torch.softmax(model.itm_head(states[:, 0]).float(), 1)
        return {"fused": states[:, 0], "fused_tokens": states, "itm": match[:, 1:]}

    rules = TextRules(
        context=config.text_config.max_position_embeddings,
        default=TEXT_TOKENS,
        cut="exact",
        pooling="model",
    )
    return Parts(
        model=model,
        image=image,
        image_size=config.vision_config.image_size,
        rules=rules,
        text=text,
        fused=fused,
        identity={"enc_token": options.enc_token},
    )


def _check_class(files: Files, config: Any) -> None:
    """Raises InputError where the checkpoint is for something else than retrieval."""
    kind = (getattr(config, "architectures", None) or [RETRIEVAL])[0]
    if kind != RETRIEVAL:
        spec = f"hf:{files.name}"
        what = _OTHERS.get(kind, "it is not for retrieval").format(spec=spec)
        raise InputError(
            f"{spec} is a {kind}: {what}; features come from a {RETRIEVAL}, such as "
            "hf:Salesforce/blip-itm-base-coco"
        )


def _enc_id(files: Files, config: Any) -> int:
    """Id of [ENC]: the tokenizer's, or behind [DEC] at the end of the vocabulary."""
    tokenizer = load_tokenizer(files)
    known = tokenizer.get_vocab().get("[ENC]")
    if known is not None:
        return int(known)
    text = config.text_config
    if text.bos_token_id is None or text.bos_token_id + 1 != text.vocab_size - 1:
        raise InputError(f"hf:{files.name}: no [ENC] token in its vocabulary; use enc_token=cls")
    return int(text.vocab_size) - 1
