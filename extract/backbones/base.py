"""What every backbone offers, and what backbones share.

Shapes: B samples, T tokens, P patches, D and Dv and Dt features.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmc.extract.backbones.hub import UNREACHABLE
from mmc.extract.transforms import ImageTransform, Transform
from mmc.store.errors import InputError
from mmc.store.schema import FieldSpec

PROMPT = "a photo of a {label}"
"""Label prompt of models trained on captions."""
BUCKET = 8
"""Texts are cut to their length rounded up to a multiple of this, where cutting is exact."""


@dataclass(frozen=True)
class TokenBatch:
    """Tokenized texts, one row each, real tokens first.

    ``buckets`` is how far each row has to be computed. It depends on the row alone, so rows of
    one bucket may be batched together without their results depending on what else is extracted.
    """

    ids: Tensor
    """int64 (B, T), padded to the model's context."""
    lengths: Tensor
    """int64 (B,): real tokens of each row, special ones included."""
    buckets: Tensor
    """int64 (B,): columns of ``ids`` that decide the row's result."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int] | Tensor) -> "TokenBatch":
        """The given rows, in that order."""
        at = torch.as_tensor(rows, dtype=torch.int64)
        return TokenBatch(self.ids[at], self.lengths[at], self.buckets[at])

    def cut(self) -> Tensor:
        """``ids`` up to the largest bucket of the batch."""
        return self.ids[:, : int(self.buckets.max())] if len(self) else self.ids


class Backbone(Protocol):
    """A pretrained network that turns decoded images and texts into named arrays.

    Attributes say what it is; three methods do the work. Batching, retrying and storing are the
    caller's. ``encode_image`` and ``encode_text`` may be called from several threads at once.

    A backbone may also have the attribute ``batch_size`` (int or None): pictures in a batch unless
    the user says. One with fields of the tower ``fused`` is a :class:`FusedBackbone`.
    """

    fields: Mapping[str, FieldSpec]
    """Everything it can give: shape per sample, dtype as stored, and the tower: ``image``, ``text``
    or ``fused`` (of both)."""
    default_fields: tuple[str, ...]
    """What is extracted unless the user asks for other fields: the pooled ones."""
    image_transform: Transform | None
    """How images are brought to its size; None: it has no image tower."""
    identity: dict[str, Any]
    """JSON-able; all that decides the numbers: weights, preprocessing, precision, lengths."""
    context: dict[str, Any]
    """JSON-able; what is worth knowing about the run: versions, device, ``name``, which is what
    followed the family in the spec with its path made absolute, and ``options``, the options whose
    paths were made absolute."""
    prompt_template: str
    """Default text for a label, with ``{label}`` in it."""

    def tokenize(self, texts: list[str]) -> TokenBatch:
        """Token ids of ``texts``, truncated to the model's length; deterministic."""

    def encode_image(self, pixels: Tensor, fields: Sequence[str]) -> dict[str, Tensor]:
        """``fields`` of uint8 images (B, *image_transform.shape): (B, ...) each.

        float32, bool for masks, int16 for places and classes. With ``OriginalSize`` ``pixels`` is a
        list of B tensors (3, H, W), on the device or not; a picture's numbers must then be the
        same whichever others are in the list.
        """

    def encode_text(self, tokens: TokenBatch, fields: Sequence[str]) -> dict[str, Tensor]:
        """``fields`` of tokenized texts: float32 (bool masks, int32 ids), (B, ...) each.

        A token field holds zeros where its mask is False.
        """


class FusedBackbone(Backbone, Protocol):
    """A backbone with fields that are made from a sample's image and text together."""

    def encode_fused(
        self, pixels: Tensor, tokens: TokenBatch, fields: Sequence[str]
    ) -> dict[str, Tensor]:
        """``fields`` of images (B, *image_transform.shape) and the texts of the same samples.

        They may be fields of the fused tower and of the image tower, which runs once for both;
        an image field has the very bytes that ``encode_image`` gives for these pixels. Token ids
        are used at their full length T, so that a row's numbers depend on nothing else.
        """


class Normalizer(nn.Module):
    """uint8 (B, 3, H, W) to the model's normalised input, computed in float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, transform: ImageTransform) -> None:
        super().__init__()
        # (scale * x - mean) / std = (x - mean / scale) / (std / scale): one pass less.
        for name in ("mean", "std"):
            values = torch.tensor(getattr(transform, name), dtype=torch.float64) / transform.scale
            self.register_buffer(name, values.float().view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalised ``pixels`` as ``dtype``."""
        return torch.sub(pixels, self.mean).div_(self.std).to(dtype)


def check_fields(fields: Sequence[str], known: Mapping[str, FieldSpec], tower: str) -> None:
    """Raises InputError where a field is not one of ``tower``'s."""
    here = [name for name, spec in known.items() if spec.tower == tower]
    for name in fields:
        if name not in here:
            what = ", ".join(here) or "none"
            raise InputError(f"this backbone has no {tower} field {name!r}; it has: {what}")


_IMAGE_FIELDS = ("image", "region", "boxes")
_FUSED_FIELDS = ("fused", "itm")
# float16 would move a box by half a pixel of a thousand.
_DTYPES = {
    "boxes": "float32",
    "region_classes": "int16",
    "image_places": "int16",
    "text_ids": "int32",
}


def field_table(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, FieldSpec]:
    """Field specs from shapes per sample; towers and dtypes by name.

    Masks are bool, classes of regions and places of tiles int16, token ids int32, boxes float32,
    the rest float16.
    What begins with ``image``, ``region`` or ``boxes`` is of the image tower, with ``fused`` or
    ``itm`` of the fused one, anything else of the text tower.
    """
    return {
        name: FieldSpec(name=name, shape=tuple(shape), dtype=_dtype(name), tower=_tower(name))
        for name, shape in shapes.items()
    }


def _tower(name: str) -> str:
    if name.startswith(_IMAGE_FIELDS):
        return "image"
    return "fused" if name.startswith(_FUSED_FIELDS) else "text"


def _dtype(name: str) -> str:
    if name.endswith("_mask"):
        return "bool"
    return _DTYPES.get(name, "float16")


def text_buckets(lengths: Tensor, context: int, *, exact: bool) -> Tensor:
    """Columns to compute for rows of ``lengths``: rounded up where cutting is ``exact``."""
    if not exact:
        return torch.full_like(lengths, context)
    return ((lengths + BUCKET - 1) // BUCKET * BUCKET).clamp(max=context)


def masked_tokens(states: Tensor, lengths: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Token states (B, any, Dt) as float32 (B, ``length``, Dt), and their mask (B, ``length``).

    States are zero outside the mask, so that a row does not depend on how far the rest of its
    batch was computed.
    """
    mask = torch.arange(length, device=states.device) < lengths.to(states.device)[:, None]
    out = states.new_zeros((len(states), length, states.shape[2]), dtype=torch.float32)
    width = min(length, states.shape[1])
    out[:, :width] = states[:, :width]
    return out.masked_fill_(~mask[:, :, None], 0), mask


def cast(model: nn.Module, precision: str) -> torch.dtype:
    """Cast floating-point weights in place for ``precision``; returns the dtype of inputs.

    Weights, not autocast: on CPUs autocast expands attention weights in every call.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model.to(dtype)
    return dtype


def default_precision(device: str) -> str:
    """``bf16`` on GPUs that have it and on CPUs with bf16 units, else ``float32``."""
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if kind != "cpu":
        return "float32"
    units = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, ARM
    return "bf16" if units & set(_cpu_facts().split()) else "float32"


def _cpu_facts() -> str:
    """What Linux knows about the processor; empty elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def check_device(device: str) -> None:
    """Raises InputError where torch cannot put a tensor on ``device``."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(f"device {device!r} cannot be used: {one_line(error, 160)}") from None


def device_name(device: str) -> str:
    """What the device calls itself, for the record."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    named = re.search(r"^model name\s*:\s*(.+)$", _cpu_facts(), re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of torch and ``packages``."""
    return {name: version(name) for name in ("torch", *packages)}


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of names, dtypes, shapes and bytes of all tensors, whatever file they came from.

    Tensors are hashed in threads (hashlib releases the GIL), then their digests in key order.
    """

    def digest(name: str) -> bytes:
        tensor = state[name].detach().cpu().contiguous()
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode()
        body = tensor.reshape(-1).view(torch.uint8).numpy()
        return hashlib.sha256(
            hashlib.sha256(head).digest() + hashlib.sha256(body.data).digest()
        ).digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(pool.map(digest, sorted(state)))).hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of ``value``'s canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of ``error`` on one line, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def offline_hint() -> str:
    """Why a hub was not asked, where the environment forbids it or its host does not answer."""
    names: Iterable[str] = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    found = [
        name for name in names if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
    ]
    if found:
        return f" ({found[0]} is set, so the hub was not asked)"
    host = UNREACHABLE.get()
    return f" ({host} cannot be reached)" if host else ""
