"""transformers models: ``hf:FOLDER`` or ``hf:HUB_NAME``; the family is read from ``config.json``.

Dual encoders (CLIP, SigLIP and the fixed-size SigLIP 2): ``image`` and ``text`` as
``get_image_features`` and ``get_text_features`` give them, not normalised; ``image_tokens`` the
patches of the vision tower's ``last_hidden_state`` in reading order, which for CLIP is before its
last layer norm, and ``image_class`` its class token (CLIP); ``text_tokens`` the text tower's. Text
encoders (BERT and its kin): ``text`` pooled as ``1_Pooling/config.json`` says, by the mean over
real tokens where there is none; ``text_tokens`` the ``last_hidden_state``. Image encoders: see
``hf_vision``. BLIP: see ``hf_blip``. An image and a text encoder with a shared space: see
``hf_vision_text``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmc.extract.backbones.attention import lay_out_inputs
from mmc.extract.backbones.base import (
    cast,
    device_name,
    sha256_json,
    versions,
    weights_sha256,
)
from mmc.extract.backbones.encoder import Encoder, FusedTower, ImageTower, TextTower
from mmc.extract.backbones.hf_blip import blip
from mmc.extract.backbones.hf_files import (
    Files,
    architecture,
    check_image_size,
    image_transform,
    load_config,
    load_model,
    load_tokenizer,
    sentence_pooling,
)
from mmc.extract.backbones.hf_parts import Options, Parts
from mmc.extract.backbones.hf_text import TextRules, Tokens, real_tokens
from mmc.extract.backbones.hf_vision import IMAGE_ENCODERS, image_encoder
from mmc.extract.backbones.hf_vision_text import VISION_TEXT, vision_text
from mmc.extract.backbones.lora import add_adapter
from mmc.store import config as configs
from mmc.store.errors import InputError

TEXT_ENCODERS = (
    "albert",
    "bert",
    "camembert",
    "convbert",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "ernie",
    "modernbert",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
)
"""Bidirectional encoders that mask padding, by ``model_type``."""
DUAL_ENCODERS = ("clip", "siglip")


def load(
    name: str, options: dict[str, str], *, device: str, precision: str, max_text_tokens: int | None
) -> Encoder:
    """The backbone in the folder or hub repository ``name``.

    Raises:
        InputError: see :func:`mmc.extract.backbones.load_backbone`.
    """
    settings = configs.build(Options, options, where=f"backbone hf:{name}")
    files = Files(name)
    config = load_config(files)
    load_parts = _family(files, config.model_type)
    _check_options(files, config.model_type, settings)
    parts = load_parts(files, config, settings)
    return _build(files, config, parts, settings, device, precision, max_text_tokens)


def _family(files: Files, kind: str) -> Callable[[Files, Any, Options], Parts]:
    """The function that loads models of a ``model_type``."""
    families: dict[str, Callable[[Files, Any, Options], Parts]] = {
        **dict.fromkeys(DUAL_ENCODERS, _dual_encoder),
        **dict.fromkeys(TEXT_ENCODERS, _text_encoder),
        **dict.fromkeys(IMAGE_ENCODERS, image_encoder),
        "blip": blip,
        VISION_TEXT: vision_text,
    }
    found = families.get(kind)
    if found is None:
        more = "; use its fixed-size checkpoints, such as siglip2-base-patch16-224"
        raise InputError(
            f"hf:{files.name}: models of type {kind!r} are not supported; supported are "
            f"{', '.join(families)}" + (more if kind == "siglip2" else "")
        )
    return found


def _check_options(files: Files, kind: str, options: Options) -> None:
    """Raises InputError where an option is one of another family."""
    for name, kinds, whose in (
        ("pooling", TEXT_ENCODERS, "text encoders"),
        ("tokens", ("clip",), "CLIP"),
        ("enc_token", ("blip",), "BLIP"),
    ):
        if getattr(options, name) != getattr(Options, name) and kind not in kinds:
            raise InputError(
                f"hf:{files.name}: {name} is an option of {whose}; {kind} does not have it"
            )


def _build(
    files: Files,
    config: Any,
    parts: Parts,
    options: Options,
    device: str,
    precision: str,
    max_text_tokens: int | None,
) -> Encoder:
    tokens = None
    if parts.rules:
        tokens = Tokens(load_tokenizer(files), parts.rules, max_text_tokens)
    transform = image_transform(files) if parts.image else None
    if transform is not None:
        check_image_size(files, transform, parts.image_size)
    digest = weights_sha256(parts.model.state_dict())
    adapter = add_adapter(parts.model, options.lora, base_weights=digest, where=f"hf:{files.name}")
    lay_out_inputs(parts.model)
    dtype = cast(parts.model.eval().requires_grad_(False).to(device), precision)
    identity = {
        "architecture": f"transformers {type(parts.model).__name__}",
        "config": sha256_json(architecture(config)),
        "weights": digest,
        "preprocessing": transform.as_dict() if transform else None,
        "tokenizer": tokens.digest() if tokens else None,
        "max_text_tokens": tokens.length if tokens else None,
        "pooling": parts.rules.pooling if parts.rules else "model",
        "precision": precision,
        **parts.identity,
        **adapter.identity,
    }
    context = {
        "name": str(Path(files.source).absolute()) if files.is_folder else files.name,
        "versions": versions("transformers", "tokenizers", "torchvision", "pillow"),
        "device": device_name(device),
        **adapter.context,
    }
    return Encoder(
        image=ImageTower(transform=transform, forward=parts.image)
        if transform and parts.image
        else None,
        text=TextTower(tokenize=tokens, forward=parts.text, length=tokens.length)
        if tokens and parts.text
        else None,
        fused=FusedTower(forward=parts.fused) if parts.fused else None,
        device=device,
        dtype=dtype,
        identity=identity,
        context=context,
        prompt_template=parts.prompt,
        model=parts.model,
    )


def _dual_encoder(files: Files, config: Any, options: Options) -> Parts:
    """CLIP is causal and pools at the end token; SigLIP sees padding and pools the last slot."""
    model: Any = load_model(files)
    text, clip = config.text_config, config.model_type == "clip"
    projected = options.tokens == "projected"

    def image_forward(inputs: Tensor) -> dict[str, Tensor]:
        out = model.get_image_features(pixel_values=inputs)
        states = out.last_hidden_state
        if projected:
            states = model.visual_projection(model.vision_model.post_layernorm(states))
        if not clip:  # SigLIP has patches alone
            return {"image": out.pooler_output, "image_tokens": states}
        return {
            "image": out.pooler_output,
            "image_tokens": states[:, 1:],
            "image_class": states[:, 0],
        }

    def text_forward(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        out = model.get_text_features(input_ids=ids)
        return out.pooler_output, out.last_hidden_state

    rules = TextRules(
        context=text.max_position_embeddings,
        cut="exact" if clip else "never",
        # Configs from before transformers 4.31 say 2; then the largest id is the end token.
        pooled_token=("largest" if text.eos_token_id == 2 else text.eos_token_id) if clip else None,
        pooling="model",
    )
    return Parts(
        model=model,
        image=image_forward,
        image_size=config.vision_config.image_size,
        rules=rules,
        text=text_forward,
        identity={"tokens": options.tokens} if projected else {},
    )


def _text_encoder(files: Files, config: Any, options: Options) -> Parts:
    model: Any = load_model(files)
    rules = _text_encoder_rules(files, model, options.pooling)

    def forward(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        mask = real_tokens(ids, lengths)
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return pool(states.float(), mask.bool(), rules.pooling), states

    return Parts(model=model, rules=rules, text=forward, prompt="{label}")


def _text_encoder_rules(files: Files, model: Any, pooling: str | None) -> TextRules:
    sentence = sentence_pooling(files, pooling)
    context = getattr(model.config, "max_position_embeddings", None) or 512
    # RoBERTa and its kin number positions from behind the padding's id.
    padding = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    if padding is not None:
        context -= padding + 1
    if sentence.max_length is not None:
        context = min(context, sentence.max_length)
    return TextRules(context=context, cut="exact", pooling=sentence.mode, lower=sentence.lower)


def pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector per row from float32 states (B, T, D) and their bool mask (B, T)."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "max":
        return states.masked_fill(~mask[:, :, None], -torch.inf).amax(1)
    total = (states * mask[:, :, None]).sum(1)
    return total / mask.sum(1, keepdim=True).clamp(min=1)
