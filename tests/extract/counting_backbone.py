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
from mmc.extract.transforms import ImageTransform, OriginalSize, Pyramid
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

    def _count(self, tower: str, batch: Tensor | list[Tensor]) -> None:
        assert torch.get_num_threads() == 1
        with _LOCK:
            CALLS[f"{tower} batches"] += 1
            CALLS[f"{tower} rows"] += len(batch)
        time.sleep(self._delay)


class Fused(Counting):
    """With fields of image and text together; its image tower runs for them, too."""

    default_fields = ("image", "text", "fused")

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]
        width = IMAGE_WIDTH + TEXT_WIDTH
        for name, shape in (("fused", (width,)), ("itm", (1,))):
            spec = FieldSpec(name=name, shape=shape, dtype="float16", tower="fused")
            self.fields[name] = spec

    def encode_fused(
        self, pixels: Tensor, tokens: TokenBatch, fields: Sequence[str]
    ) -> dict[str, Tensor]:
        self._count("fused", tokens.ids)
        found = self.encode_image(pixels, ["image", "image_tokens"])
        ids = tokens.ids.float() / 128  # at full length, whatever else is in the batch
        sums = torch.stack([ids[:, at::TEXT_WIDTH].sum(1) for at in range(TEXT_WIDTH)], dim=1)
        found["fused"] = torch.cat([found["image"], sums], dim=1)
        found["itm"] = found["image"][:, :1] * sums[:, :1]
        return {name: found[name] for name in fields}


class Texts(Counting):
    """No image tower."""

    default_fields = ("text",)

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]
        self.fields = {"text": self.fields["text"]}
        self.image_transform = None


class Images(Counting):
    """No text tower, and a batch size of its own."""

    default_fields = ("image",)
    batch_size = 2

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]
        self.fields = {"image": self.fields["image"]}


class Tiles(Images):
    """Two levels of tiles; the mean colour of each."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.image_transform = Pyramid(base=self.image_transform, levels=2)
        self.identity["preprocessing"] = self.image_transform.as_dict()
        self.fields = {
            "image_tokens": FieldSpec(
                name="image_tokens", shape=(5, 3), dtype="float32", tower="image"
            )
        }

    default_fields = ("image_tokens",)

    def encode_image(self, pixels: Tensor, fields: Sequence[str]) -> dict[str, Tensor]:
        self._count("image", pixels)
        return {"image_tokens": pixels.float().mean(dim=(3, 4))}


class Originals(Images):
    """Takes pictures in their own size: height, width and mean, one picture after another."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.image_transform = OriginalSize()
        self.identity["preprocessing"] = self.image_transform.as_dict()
        self.fields = {"image": FieldSpec(name="image", shape=(3,), dtype="float32", tower="image")}

    def encode_image(self, pixels: list[Tensor], fields: Sequence[str]) -> dict[str, Tensor]:
        assert 1 <= len(pixels) <= 16
        self._count("image", pixels)
        rows = [[*picture.shape[1:], float(picture.float().mean())] for picture in pixels]
        return {"image": torch.tensor(rows)}


def offsets(batch_size: int) -> Tensor:
    """(B,) what the place in the batch and the batch's size add to each result."""
    return 0.01 * torch.arange(batch_size) + 0.05 * batch_size
