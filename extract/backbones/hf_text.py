"""Tokenizing for transformers models, the same for every family."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmc.extract.backbones.base import TokenBatch, sha256_json, text_buckets
from mmc.store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TextRules:
    """What a text tower asks of its tokens."""

    context: int
    """Tokens that the model takes at most."""
    default: int | None = None
    """Tokens that are kept unless the user says; None: as many as it takes."""
    cut: Literal["exact", "never"]
    """Whether columns after a row's end may be left out without changing its result."""
    pooling: str
    """``mean``, ``cls``, ``max``, or ``model`` where the model pools itself."""
    pooled_token: int | Literal["largest"] | None = None
    """The token whose state is pooled: an id, the largest id of the row, or not by id."""
    lower: bool = False
    """Lower the text first."""


def real_tokens(ids: Tensor, lengths: Tensor) -> Tensor:
    """Which of ids (B, T) are real, int64 0 or 1, as attention masks are given."""
    return (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()


class Tokens:
    """Texts to :class:`TokenBatch`; padding is always on the right and always whole."""

    def __init__(self, tokenizer: Any, rules: TextRules, max_text_tokens: int | None) -> None:
        self._tokenizer = tokenizer
        self._rules = rules
        # Tokenizers without a limit of their own say 1e30.
        context = min(rules.context, int(min(self._tokenizer.model_max_length, 2**31 - 1)))
        self.length = max_text_tokens or min(context, rules.default or context)
        if self.length > context:
            raise InputError(
                f"max_text_tokens {self.length} is more than the model's context of {context}"
            )
        self._width = self.length if rules.cut == "exact" else rules.context
        self._pad = self._tokenizer.pad_token_id
        if self._pad is None:
            self._pad = 0

    def __call__(self, texts: list[str]) -> TokenBatch:
        if self._rules.lower:
            texts = [text.lower() for text in texts]
        rows = (
            self._tokenizer(texts, truncation=True, max_length=self.length)["input_ids"]
            if texts
            else []
        )
        ids = torch.full((len(rows), self._width), self._pad, dtype=torch.int64)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        lengths = torch.tensor([len(tokens) for tokens in rows], dtype=torch.int64)
        needed = torch.maximum(lengths, self._pooled_at(ids) + 1)
        return TokenBatch(
            ids, lengths, text_buckets(needed, self._width, exact=self._rules.cut == "exact")
        )

    def _pooled_at(self, ids: Tensor) -> Tensor:
        """Column whose state the model pools, int64 (B,); 0 where ids do not decide it."""
        wanted = self._rules.pooled_token
        if wanted == "largest":
            return ids.argmax(1)
        if wanted is None:
            return torch.zeros(len(ids), dtype=torch.int64)
        return (ids == wanted).int().argmax(1)

    def texts(self, ids: Tensor) -> list[str]:
        """The words of ids (B, any), special tokens left out."""
        decoded = self._tokenizer.batch_decode(ids.cpu(), skip_special_tokens=True)
        return [" ".join(text.split()) for text in decoded]

    def digest(self) -> str:
        """Hash of what decides the ids of a text."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        rules: Any = None
        if backend is not None:
            # Limits are set by each call; they are in the identity under their own names.
            backend.no_truncation()
            backend.no_padding()
            rules = backend.to_str()
        return sha256_json(
            [
                sorted(self._tokenizer.get_vocab().items()),
                rules,
                sorted((k, str(v)) for k, v in self._tokenizer.special_tokens_map.items()),
                self._pad,
                self._rules.lower,
            ]
        )
