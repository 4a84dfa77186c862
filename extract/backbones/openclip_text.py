"""The text towers of open_clip models and their tokenizers."""

from collections.abc import Callable
from typing import Any

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from mmc.extract.backbones.base import TokenBatch, one_line, sha256_json, text_buckets
from mmc.extract.backbones.encoder import TextTower
from mmc.extract.backbones.openclip_weights import Source
from mmc.store.errors import InputError


def tokenizer_for(source: Source) -> Any:
    """open_clip's own tokenizer for the model."""
    try:
        return open_clip.get_tokenizer(source.model)
    except (OSError, ValueError, ImportError) as error:
        folder = source.model.startswith("local-dir:")
        needed = "; tokenizer.json and tokenizer_config.json belong into the folder"
        raise InputError(
            f"open_clip:{source.name}: its tokenizer cannot be loaded{needed if folder else ''} "
            f"({one_line(error)})"
        ) from None


def text_tower(model: Any, tokenizer: Any, max_text_tokens: int | None) -> TextTower:
    """How ``model`` tokenizes and encodes texts; it is a CLIP, CustomTextCLIP or CoCa."""
    tower = getattr(model, "text", model)
    context = int(tokenizer.context_length)
    length = context if max_text_tokens is None else max_text_tokens
    if length > context:
        raise InputError(f"max_text_tokens {length} is more than the model's context of {context}")
    if length < context and getattr(tokenizer, "tokenizer_mode", "") == "clips":
        raise InputError(f"max_text_tokens must be {context} for this model's tokenizer")
    exact = _cutting_is_exact(tower)

    def tokenize(texts: list[str]) -> TokenBatch:
        ids = tokenizer(texts, context_length=length)
        lengths = _lengths(ids, tokenizer)
        if not exact and length < context:
            padding = torch.full((len(ids), context - length), _pad_id(tokenizer), dtype=ids.dtype)
            ids = torch.cat([ids, padding], 1)
        needed = torch.maximum(lengths, _pooled_at(tower, ids) + 1)
        return TokenBatch(ids, lengths, text_buckets(needed, ids.shape[1], exact=exact))

    return TextTower(tokenize=tokenize, forward=_text_forward(tower), length=length)


def _pool_type(tower: Any) -> str:
    """How a native tower pools; a CLIP, which is its own text tower, calls it otherwise."""
    return str(getattr(tower, "text_pool_type", getattr(tower, "pool_type", "")))


def _eos_id(tower: Any) -> Any:
    return getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))


def _cutting_is_exact(tower: Any) -> bool:
    """Whether columns after a row's end cannot change its result."""
    if isinstance(tower, HFTextEncoder):
        return True  # it masks padding
    causal = getattr(tower, "attn_mask", None) is not None
    plain = getattr(tower, "cls_emb", None) is None
    return causal and plain and _pool_type(tower) in ("argmax", "eos", "first")


def _pooled_at(tower: Any, ids: Tensor) -> Tensor:
    """Column whose state is pooled, int64 (B,); 0 where that is not a question of ids."""
    if _pool_type(tower) == "argmax":
        return ids.argmax(1)
    if _pool_type(tower) == "eos":
        return torch.eq(ids, _eos_id(tower)).int().argmax(1)
    return torch.zeros(len(ids), dtype=torch.int64)


def _text_forward(tower: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The function from ids (B, any) and lengths (B,) to pooled features and token states."""
    if isinstance(tower, HFTextEncoder):
        return lambda ids, lengths: _hf_text_forward(tower, ids)
    if getattr(tower, "cls_emb", None) is not None:
        tower.output_tokens = True
        return lambda ids, lengths: tower(ids)
    return lambda ids, lengths: _native_text_forward(tower, ids)


def _native_text_forward(tower: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """``encode_text`` for fewer columns than the context: positions and mask are cut alike."""
    length = ids.shape[1]
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(ids).to(dtype) + tower.positional_embedding[:length].to(dtype)
    mask = None if tower.attn_mask is None else tower.attn_mask[:length, :length]
    states = tower.ln_final(tower.transformer(x, attn_mask=mask))
    pooled = text_global_pool(states, ids, _pool_type(tower), eos_token_id=_eos_id(tower))
    projection = tower.text_projection
    if isinstance(projection, nn.Linear):
        pooled = projection(pooled)
    elif projection is not None:
        pooled = pooled @ projection
    return pooled, states


def _hf_text_forward(tower: HFTextEncoder, ids: Tensor) -> tuple[Tensor, Tensor]:
    mask = (ids != tower.config.pad_token_id).long()
    out = tower.transformer(input_ids=ids, attention_mask=mask)
    return tower.proj(tower.pooler(out, mask)), out.last_hidden_state


def _pad_id(tokenizer: Any) -> int:
    inner = getattr(tokenizer, "tokenizer", None)
    return int(inner.pad_token_id) if inner is not None else 0


def _lengths(ids: Tensor, tokenizer: Any) -> Tensor:
    """Real tokens per row, int64 (B,): up to the end token, or to the last that is not padding.

    open_clip's own tokenizer pads with 0, which is also the token "!".
    """
    width = ids.shape[1]
    end = getattr(tokenizer, "eot_token_id", None)
    inner = getattr(tokenizer, "tokenizer", None)
    if end is None and inner is not None and inner.pad_token_id == inner.eos_token_id:
        end = inner.eos_token_id
    columns = torch.arange(width)
    if end is not None:
        return torch.where(ids == end, columns, width - 1).amin(1) + 1
    return (torch.where(ids != _pad_id(tokenizer), columns, 0).amax(1) + 1).to(torch.int64)


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash of what decides the ids of a text."""
    inner = getattr(tokenizer, "tokenizer", None)
    vocabulary = tokenizer.encoder if inner is None else inner.get_vocab()
    merges = sorted(tokenizer.bpe_ranks.items()) if inner is None else None
    backend = getattr(inner, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else None
    return sha256_json(
        [
            type(tokenizer).__name__,
            sorted(vocabulary.items()),
            merges,
            rules,
            tokenizer.context_length,
            getattr(getattr(tokenizer, "clean_fn", None), "__name__", None),
        ]
    )
