"""nn.MultiheadAttention in backbones: no product with copies of its weights, the same features."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_hf_siglip, tiny_open_clip
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmc.extract.backbones import load_backbone
from mmc.extract.backbones.attention import lay_out_inputs
from mmc.extract.tuning.adapters import Adapters
from mmc.extract.tuning.options import LoraConfig
from mmc.extract.tuning.targets import find_targets
from mmc.extract.tuning.towers import load_towers

TEXTS = ["a red house", "two dogs under the tree", "one"]


class Products(TorchDispatchMode):
    """Counts products, and those of a batch with one and the same matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = self.repeated = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.plain += name in ("mm", "addmm")
        self.repeated += name == "bmm" and args[1].stride(0) == 0
        return func(*args, **(kwargs or {}))


def pixels(size: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("model", [tiny_open_clip, tiny_hf_siglip])
@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_extraction_copies_no_weights(model: Callable[[Path], str], precision: str, tmp_path: Path):
    backbone = load_backbone(model(tmp_path), device="cpu", precision=precision)
    assert backbone.image_transform is not None
    with Products() as products:
        backbone.encode_text(backbone.tokenize(TEXTS), ("text",))
        backbone.encode_image(pixels(backbone.image_transform.size), ("image",))
    assert products.plain
    assert not products.repeated


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_tuning_copies_no_weights(grad: bool, precision: str, tmp_path: Path):
    towers = load_towers(tiny_open_clip(tmp_path), torch.device("cpu"), precision)
    Adapters(towers.model, find_targets(towers.model, ("out",)), LoraConfig(rank=4), 0)
    assert towers.encoder.image_transform is not None
    with torch.set_grad_enabled(grad), Products() as products:
        text = towers.text(towers.encoder.tokenize(TEXTS))
        image = towers.image(pixels(towers.encoder.image_transform.size))
        if grad:
            (text.sum() + image.sum()).backward()
    assert products.plain
    assert not products.repeated


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", ["self", "cross", "three", "masked", "unbatched", "by name"])
def test_attention_is_what_it_was(batch_first: bool, grad: bool, case: str):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    laid_out = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    laid_out.load_state_dict(plain.state_dict())
    lay_out_inputs(laid_out)
    shape = (5, 8) if case == "unbatched" else (3, 5, 8)
    first, second, third = (torch.randn(shape) for _ in range(3))
    named: dict[str, Any] = {"need_weights": case == "three"}
    if case == "masked":
        length = 5 if batch_first else 3
        named["attn_mask"] = torch.full((length, length), -torch.inf).triu(1)
    inputs: tuple[torch.Tensor, ...] = (first, first, first)
    if case == "cross":
        inputs = (first, second, second)
    if case == "three":
        inputs = (first, second, third)
    if case == "by name":
        inputs, named = (), named | {"query": first, "key": second, "value": second}
    with torch.set_grad_enabled(grad):
        wanted, weights = plain(*inputs, **named)
        found, seen = laid_out(*inputs, **named)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert (weights is None) == (seen is None) == (case != "three")
    if weights is not None:
        torch.testing.assert_close(seen, weights, rtol=1e-6, atol=1e-6)
