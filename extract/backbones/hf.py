"""transformers models: ``hf:FOLDER`` or ``hf:HUB_NAME``; the family is read from ``config.json``.

Dual encoders (CLIP, SigLIP and the fixed-size SigLIP 2): ``image`` and ``text`` as
``get_image_features`` and ``get_text_features`` give them, not normalised; ``image_tokens`` the
patches of the vision tower's ``last_hidden_state`` (class token left out), ``text_tokens`` the text
tower's. Text encoders (BERT and its kin): ``text`` pooled as ``1_Pooling/config.json`` says, by the
mean over real tokens where there is none; ``text_tokens`` the ``last_hidden_state``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmc.extract.backbones.base import (
    PROMPT,
    cast,
    device_name,
    sha256_json,
    versions,
    weights_sha256,
)
from mmc.extract.backbones.encoder import Encoder, ImageTower, TextTower
from mmc.extract.backbones.hf_files import (
    Files,
    image_transform,
    load_config,
    load_model,
    sentence_pooling,
)
from mmc.extract.backbones.hf_text import TextRules, Tokens
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


@dataclass(frozen=True, kw_only=True)
class Options:
    """What goes in the brackets of an hf spec."""

    pooling: Literal["mean", "cls", "max"] | None = None
    """How a text encoder's tokens become one vector, instead of what its files say."""


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
    kind = config.model_type
    if kind in DUAL_ENCODERS:
        if settings.pooling is not None:
            raise InputError(
                f"hf:{name}: pooling is an option of text encoders; {kind} has its own"
            )
        model = load_model(files)
        rules = _dual_text_rules(config)
    elif kind in TEXT_ENCODERS:
        model = load_model(files)
        rules = _encoder_text_rules(files, model, settings.pooling)
    else:
        known = ", ".join((*DUAL_ENCODERS, *TEXT_ENCODERS))
        more = "; use its fixed-size checkpoints, such as siglip2-base-patch16-224"
        raise InputError(
            f"hf:{name}: models of type {kind!r} are not supported; supported are {known}"
            + (more if kind == "siglip2" else "")
        )
    return _build(files, config, model, rules, device, precision, max_text_tokens)


def _build(
    files: Files,
    config: Any,
    model: nn.Module,
    rules: TextRules,
    device: str,
    precision: str,
    max_text_tokens: int | None,
) -> Encoder:
    tokens = Tokens(files, rules, max_text_tokens)
    dual = config.model_type in DUAL_ENCODERS
    transform = image_transform(files) if dual else None
    digest = weights_sha256(model.state_dict())
    dtype = cast(model.eval().requires_grad_(False).to(device), precision)
    identity = {
        "architecture": f"transformers {type(model).__name__}",
        "config": sha256_json(_architecture(config)),
        "weights": digest,
        "preprocessing": transform.as_dict() if transform else None,
        "tokenizer": tokens.digest(),
        "max_text_tokens": tokens.length,
        "pooling": rules.pooling,
        "precision": precision,
    }
    context = {
        "name": str(Path(files.source).absolute()) if files.is_folder else files.name,
        "versions": versions("transformers", "tokenizers", "torchvision", "pillow"),
        "device": device_name(device),
    }
    forward = _dual_text_forward if dual else _encoder_text_forward
    return Encoder(
        image=ImageTower(transform=transform, forward=_image_forward(model)) if transform else None,
        text=TextTower(
            tokenize=tokens, forward=forward(model, rules.pooling), length=tokens.length
        ),
        device=device,
        dtype=dtype,
        identity=identity,
        context=context,
        prompt_template=PROMPT if dual else "{label}",
    )


def _architecture(config: Any) -> dict[str, Any]:
    """The config without what does not change a number."""
    noise = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if key not in noise}
        return value

    kept: dict[str, Any] = clean(config.to_dict())
    return kept


def _dual_text_rules(config: Any) -> TextRules:
    """CLIP is causal and pools at the end token; SigLIP sees padding and pools the last slot."""
    text = config.text_config
    clip = config.model_type == "clip"
    return TextRules(
        context=text.max_position_embeddings,
        cut="exact" if clip else "never",
        # Configs from before transformers 4.31 say 2; then the largest id is the end token.
        pooled_token=("largest" if text.eos_token_id == 2 else text.eos_token_id) if clip else None,
        pooling="model",
    )


def _encoder_text_rules(files: Files, model: Any, pooling: str | None) -> TextRules:
    sentence = sentence_pooling(files, pooling)
    context = getattr(model.config, "max_position_embeddings", None) or 512
    # RoBERTa and its kin number positions from behind the padding's id.
    padding = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    if padding is not None:
        context -= padding + 1
    if sentence.max_length is not None:
        context = min(context, sentence.max_length)
    return TextRules(context=context, cut="exact", pooling=sentence.mode, lower=sentence.lower)


def _image_forward(model: Any) -> Any:
    # A vision tower with a class token has one position more than patches.
    prefix = 1 if hasattr(model.vision_model.embeddings, "class_embedding") else 0

    def forward(inputs: Tensor) -> tuple[Tensor, Tensor]:
        out = model.get_image_features(pixel_values=inputs)
        return out.pooler_output, out.last_hidden_state[:, prefix:]

    return forward


def _dual_text_forward(model: Any, pooling: str) -> Any:
    def forward(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        out = model.get_text_features(input_ids=ids)
        return out.pooler_output, out.last_hidden_state

    return forward


def _encoder_text_forward(model: Any, pooling: str) -> Any:
    def forward(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        states = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return pool(states.float(), mask, pooling), states

    return forward


def pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector per row from float32 states (B, T, D) and their bool mask (B, T)."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "max":
        return states.masked_fill(~mask[:, :, None], -torch.inf).amax(1)
    total = (states * mask[:, :, None]).sum(1)
    return total / mask.sum(1, keepdim=True).clamp(min=1)
