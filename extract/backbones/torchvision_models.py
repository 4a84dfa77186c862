"""torchvision classifiers: ``torchvision:MODEL``, ``torchvision:MODEL/TAG``, or a weights file.

Fields: ``image``, what enters the layer that scores the classes (for most networks the mean of the
last feature map: 2048 numbers of a ResNet-152); ``image_tokens``, the last feature map in reading
order, for ViTs the patches after the last norm with the class token apart in ``image_class``.
Networks with a feature map also give ``regions``: a 6 x 6 grid of means over it with ``boxes`` and
``region_mask``. Boxes are parts of what the model sees: with ``[resize=squash]`` that is the whole
picture, else its centre (torchvision crops; how much of a picture that is depends on its shape).
"""

import re
import threading
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision import models

from mmc.extract.backbones.base import cast, device_name, versions, weights_sha256
from mmc.extract.backbones.checkpoints import fit, read_state, without_counters
from mmc.extract.backbones.encoder import Encoder, ImageTower
from mmc.extract.backbones.folding import folded
from mmc.extract.backbones.regions import grid_fields
from mmc.extract.backbones.torchvision_weights import Source, find_source
from mmc.extract.transforms import ImageTransform
from mmc.store import config
from mmc.store.errors import InputError

STATES = {
    "AlexNet": "features",
    "ConvNeXt": "features",
    "DenseNet": "features",
    "EfficientNet": "features",
    "GoogLeNet": "inception5b",
    "Inception3": "Mixed_7c",
    "MNASNet": "layers",
    "MaxVit": "blocks.3",
    "MobileNetV2": "features",
    "MobileNetV3": "features",
    "RegNet": "trunk_output",
    "ResNet": "layer4",
    "ShuffleNetV2": "conv5",
    "SqueezeNet": "features",
    "SwinTransformer": "permute",
    "VGG": "features",
    "VisionTransformer": "encoder",
}
"""The module of each class that returns the last feature map, or the last tokens."""
_BUILT_WITH: dict[str, dict[str, Any]] = {
    name: {"transform_input": True, "aux_logits": True, "init_weights": False}
    for name in ("googlenet", "inception_v3")
}
"""What the builders of ported weights set beside them."""
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What goes in the brackets of a torchvision spec."""

    preprocessing: str | None = None
    """The tag whose preprocessing a weights file takes, such as IMAGENET1K_V1; default: that of
    the tag whose file it is by name, else of the model's default weights."""
    resize: Literal["crop", "squash"] = "crop"
    """crop: as the weights were made for; squash: the whole picture, its aspect ratio changed."""


def load(
    name: str, options: dict[str, str], *, device: str, precision: str, max_text_tokens: int | None
) -> Encoder:
    """The backbone that ``name`` (what follows ``torchvision:``) stands for.

    Raises:
        InputError: see :func:`mmc.extract.backbones.load_backbone`.
    """
    settings = config.build(Options, options, where=f"backbone torchvision:{name}")
    source = find_source(name, settings.preprocessing)
    model = load_model(source)
    digest = weights_sha256(without_counters(model.state_dict()))
    transform = image_transform(source, settings)
    with_norms = model
    if precision == "bf16":
        model = folded(model, torch.rand(1, *transform.shape))
    dtype = cast(model.to(device), precision)
    identity = {
        "architecture": f"torchvision {source.model}",
        "weights": digest,
        "preprocessing": transform.as_dict(),
        "pooling": "model",
        "precision": precision,
        "batch_norms": "apart" if model is with_norms else "folded",
    }
    context = {
        "name": source.resolved,
        "versions": versions("torchvision", "pillow"),
        "device": device_name(device),
    }
    return Encoder(
        image=ImageTower(transform=transform, forward=Forward(model, precision)),
        text=None,
        device=device,
        dtype=dtype,
        identity=identity,
        context=context,
    )


def image_transform(source: Source, settings: Options) -> ImageTransform:
    """The evaluation transform of the weights as numbers."""
    preset: Any = source.preprocessing.transforms()
    (size,), (resize_to,) = preset.crop_size, preset.resize_size
    transform = ImageTransform(
        size=(size, size),
        resize_to=(resize_to, resize_to),
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )
    if settings.resize == "squash":
        transform = replace(transform, resize="squash", resize_to=None)
    return transform


def load_model(source: Source) -> nn.Module:
    """The network with its weights, without its last layer, in evaluation mode on the CPU.

    Raises:
        InputError: weights that do not fit, or are not numbers.
    """
    where = f"torchvision:{source.name}"
    state = read_state(source.checkpoint, where)
    if source.model.startswith("densenet"):
        state = {_densenet_name(key): value for key, value in state.items()}
    model = models.get_model(source.model, weights=None, **_BUILT_WITH.get(source.model, {}))
    last = last_layer(model)
    spare = [key for key in model.state_dict() if key.startswith((f"{last}.", *_AUXILIARY))]
    fit(model, state, where, spare=spare)
    parent, _, child = last.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    for part in ("aux1", "aux2", "AuxLogits"):
        if hasattr(model, part):
            setattr(model, part, None)
    for key, value in model.named_parameters():
        if not value.isfinite().all():
            raise InputError(f"{where}: {key} in {source.checkpoint} is not all numbers")
    return model.eval().requires_grad_(False)


def last_layer(model: nn.Module) -> str:
    """The name of the layer that scores the classes: SqueezeNet's is a convolution."""
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith(_AUXILIARY)
    ]
    return layers[-1]


def _densenet_name(key: str) -> str:
    """Names in files from before a rename: ``denselayer1.norm.1`` is ``norm1`` now."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])", r"\1\2", key)


class Forward:
    """From normalised images to named arrays; for several threads at once."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        self._model = model
        # Convolutions of bfloat16 are about twice as fast in this layout; float32 keeps the
        # library's own, for its very rounding.
        self._layout = torch.channels_last if precision == "bf16" else torch.contiguous_format
        model.to(memory_format=self._layout)
        self._seen = threading.local()
        place = STATES.get(type(model).__name__)
        if place is not None:
            model.get_submodule(place).register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._seen.states = output

    def __call__(self, inputs: Tensor) -> dict[str, Tensor]:
        self._seen.states = None
        pooled = self._model(inputs.contiguous(memory_format=self._layout))
        states: Tensor | None = self._seen.states
        self._seen.states = None
        if states is None:
            return {"image": pooled}
        if states.ndim == 3:
            return {"image": pooled, "image_tokens": states[:, 1:], "image_class": states[:, 0]}
        return {"image": pooled, **grid_fields(states)}
