"""Settings of a pretraining that do nothing beside the others. Imports no torch."""

from dataclasses import fields
from typing import Any

from mmc.extract.pretraining.options import PretrainConfig


def without_effect(config: PretrainConfig) -> list[str]:
    """A line for each setting that is not its default and changes nothing in training."""
    loss = config.loss
    masked = loss.contrastive and loss.views == "masked"
    begun = config.vision.weights or config.text.weights
    unseen = {"image": "loss.image is 0", "text": "loss.text is 0"}
    if loss.contrastive:
        unseen = {side: f"{why} and loss.views=clean" for side, why in unseen.items()}
    rules = (
        (
            loss.contrastive,
            "loss.contrastive is 0",
            ("loss.views", "loss.temperature", "loss.learn_temperature"),
        ),
        (loss.image, "loss.image is 0", ("loss.pixels",)),
        (loss.image or masked, unseen["image"], ("mask.patches", "mask.shape", "mask.unit")),
        (loss.text or masked, unseen["text"], ("mask.tokens", "mask.replaced", "mask.random")),
        (config.mask.shape == "units", f"mask.shape={config.mask.shape}", ("mask.unit",)),
        (
            loss.contrastive or loss.image,
            "no loss looks at pictures",
            ("augment.crop", "augment.flip", "vision.dropout"),
        ),
        (loss.contrastive or loss.text, "no loss looks at texts", ("text.dropout",)),
        (begun, "no tower begins with weights", ("optim.pretrained",)),
    )
    said = {
        name: f"{name} is without effect on the training: {why}"
        for used, why, names in rules
        if not used
        for name in names
        if _changed(config, name)
    }
    return list(said.values())


def _changed(config: PretrainConfig, name: str) -> bool:
    """Whether a setting is neither its default nor the 0 that turns masking off."""
    group, key = name.split(".")
    part: Any = getattr(config, group)
    value = getattr(part, key)
    default = next(field.default for field in fields(part) if field.name == key)
    off = name in ("mask.patches", "mask.tokens") and not value
    return bool(value != default and not off)
