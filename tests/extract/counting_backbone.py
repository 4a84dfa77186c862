"""A backbone for tests of the pipeline: fast, counted, and picky about batches.

Every result depends on the place in the batch (0.01 per place) and on the batch's size (0.05 per
row), so that two extractions are equal only if each row was computed at the same place of a batch
of the same shape: what real networks show in their last bits shows here in plain numbers.

It is imported by name (``python:counting_backbone:Counting``), also from other processes.
"""

import threading
import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from mmc.extract.backbones.base import TokenBatch, text_buckets
from mmc.extract.transforms import ImageTransform
from mmc.store import FieldSpec

CALLS: Counter[str] = Counter()
_LOCK = threading.Lock()

IMAGE_WIDTH, TEXT_WIDTH = 6, 4


class Counting:
    """Mean colours of the picture's halves; letters of the text."""

    prompt_template = "a photo of a {label}"
    default_fields = ("image", "text")

    def __init__(
        self,
        *,
        device: str,
        precision: str,
        max_text_tokens: int | None,
        delay: str = "0",
        weights: str = "a",
        size: str = "16",
    ) -> None:
        self._delay = float(delay)
        self.fields = {
            spec.name: spec
            for spec in (
                FieldSpec(name="image", shape=(IMAGE_WIDTH,), dtype="float16", tower="image"),
                FieldSpec(name="image_tokens", shape=(2, 3), dtype="float32", tower="image"),
                FieldSpec(name="text", shape=(TEXT_WIDTH,), dtype="float16", tower="text"),
            )
        }
        self.image_transform = ImageTransform(size=(int(size), int(size)))
        self.identity = {
            "weights": weights,
            "preprocessing": self.image_transform.as_dict(),
            "precision": precision,
            "max_text_tokens": max_text_tokens or 24,
        }
        self.context = {"device": device}
        self._length = max_text_tokens or 24
        CALLS["loaded"] += 1

    def tokenize(self, texts: list[str]) -> TokenBatch:
        ids = torch.zeros(len(texts), self._length, dtype=torch.int64)
        lengths = torch.ones(len(texts), dtype=torch.int64)
        for row, text in enumerate(texts):
            codes = [1, *(ord(letter) for letter in text)][: self._length]
            ids[row, : len(codes)] = torch.tensor(codes)
            lengths[row] = len(codes)
        buckets = text_buckets(lengths, self._length, exact=True)
        return TokenBatch(ids=ids, lengths=lengths, buckets=buckets)

    def encode_image(self, pixels: Tensor, fields: Sequence[str]) -> dict[str, Tensor]:
        self._count("image", pixels)
        halves = pixels.float().unflatten(3, (2, -1)).mean(dim=(2, 4)).transpose(1, 2) / 255
        halves = halves + offsets(len(pixels))[:, None, None]
        found = {"image": halves.flatten(1), "image_tokens": halves}
        return {name: found[name] for name in fields}

    def encode_text(self, tokens: TokenBatch, fields: Sequence[str]) -> dict[str, Tensor]:
        self._count("text", tokens.ids)
        ids = tokens.cut().float() / 128
        sums = torch.stack([ids[:, at::TEXT_WIDTH].sum(1) for at in range(TEXT_WIDTH)], dim=1)
        return {"text": sums + offsets(len(ids))[:, None]}

    def _count(self, tower: str, batch: Tensor) -> None:
        assert torch.get_num_threads() == 1
        with _LOCK:
            CALLS[f"{tower} batches"] += 1
            CALLS[f"{tower} rows"] += len(batch)
        time.sleep(self._delay)


def offsets(batch_size: int) -> Tensor:
    """(B,) what the place in the batch and the batch's size add to each result."""
    return 0.01 * torch.arange(batch_size) + 0.05 * batch_size
