"""What a tuning proves about itself, on a few made-up inputs, before and after it trains.

A LoRA adapter that is put in the wrong place trains without any error and changes nothing. So:
every adapter must get a gradient and change the features; at first it must change nothing; the
merged weights must give the features of the adapters; the model below must be what it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from mmc.extract.backbones.base import TokenBatch, weights_sha256
from mmc.extract.tuning.adapters import Adapters
from mmc.extract.tuning.options import Target as Kind
from mmc.extract.tuning.options import TuneConfig
from mmc.extract.tuning.targets import Target, find_targets, within_multihead
from mmc.extract.tuning.towers import Towers
from mmc.store.errors import InputError, MmcError

TOLERANCE = 1e-5
"""Largest difference of features, as a share of the largest feature."""
_TEXTS = ["a photo of a red house", "two dogs run under the tree in the rain, one sits", "x"]


@dataclass(frozen=True)
class Probe:
    """A few pictures and texts, the same for every call."""

    pixels: Tensor
    tokens: TokenBatch

    @classmethod
    def of(cls, towers: Towers) -> "Probe":
        """Noise in blocks, as large as the backbone takes pictures."""
        transform = towers.encoder.image_transform
        assert transform is not None
        random = torch.Generator().manual_seed(0)
        blocks = torch.randint(0, 256, (len(_TEXTS), 3, 8, 8), generator=random).float()
        pixels = torch.nn.functional.interpolate(blocks, size=transform.size)
        return cls(pixels.to(torch.uint8), towers.encoder.tokenize(_TEXTS))

    def features(self, towers: Towers) -> dict[str, Tensor]:
        """``image`` and ``text`` (B, D) in float32, with gradients where they are enabled."""
        encoder = towers.encoder
        return {
            "image": encoder.embed_image(self.pixels),
            "text": encoder.embed_text(self.tokens),
        }


def adapt(
    towers: Towers, config: TuneConfig, probe: Probe, report: Callable[[str], None]
) -> Adapters:
    """Put adapters on what the config names, and prove that they work.

    Raises:
        InputError: a tower has nothing of the kind, or weights that are no numbers.
        MmcError: an adapter without effect.
    """
    with torch.no_grad():
        before = probe.features(towers)
    for tower, features in before.items():
        if not bool(features.isfinite().all()):
            raise InputError(
                f"{config.backbone} gives {tower} features that are not finite: its weights are "
                "damaged"
            )
    found = find_targets(towers.model, config.targets)
    if config.backbone.startswith("hf:"):
        # peft's format: what peft would load without any effect has no place in it.
        left = [target for target in found if within_multihead(towers.model, target)]
        found = [target for target in found if target not in left]
        for target in left[:1]:
            report(f"{target.name} is left as it is: peft cannot adapt its kind of attention")
    targets = used_targets(towers, found, probe)
    adapters = Adapters(towers.model, targets, config.lora, config.seed)
    check_beginning(towers, adapters, probe, before)
    if config.optim.gradient_checkpointing and not towers.checkpoint_blocks(targets):
        raise InputError(f"{config.backbone}: no blocks to checkpoint were found")
    count = sum(parameter.numel() for parameter in adapters.parameters)
    whole = sum(parameter.numel() for parameter in towers.model.parameters()) - count
    report(
        f"{len(targets)} weights adapted: {count:,} numbers are trained, "
        f"{count / whole:.2%} of the {whole:,} of the backbone"
    )
    return adapters


def used_targets(towers: Towers, targets: Sequence[Target], probe: Probe) -> list[Target]:
    """Those of ``targets`` that the towers' features depend on (a decoder's, for one, are not).

    Raises:
        InputError: a tower has none.
    """
    used = _reached(towers, targets, probe)
    for tower, found in used.items():
        if not found:
            kinds = [
                kind
                for kind in get_args(Kind)
                if _reached(towers, find_targets(towers.model, (kind,)), probe)[tower]
            ]
            raise InputError(
                f"the {tower} tower has no layer of these --targets; "
                + (f"it has {', '.join(kinds)}: add one of them" if kinds else "it has none at all")
            )
    return [target for target in targets if any(target.key in some for some in used.values())]


def _reached(
    towers: Towers, targets: Sequence[Target], probe: Probe
) -> dict[str, set[tuple[int, str]]]:
    """Of each tower, the keys of the ``targets`` that its features depend on."""
    weights = {target.key: target.weight for target in targets}
    for weight in weights.values():
        weight.requires_grad_(True)
    used: dict[str, set[tuple[int, str]]] = {}
    try:
        for tower, features in probe.features(towers).items():
            grads: tuple[Tensor | None, ...] = ()
            if features.requires_grad:
                every = list(weights.values())
                grads = torch.autograd.grad(_mixed(features), every, allow_unused=True)
            used[tower] = {
                key
                for key, grad in zip(weights, grads, strict=False)
                if grad is not None and bool(grad.any())
            }
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    return used


def check_beginning(
    towers: Towers, adapters: Adapters, probe: Probe, before: dict[str, Tensor]
) -> None:
    """New adapters change nothing; each gets a gradient; together they change both towers.

    Args:
        before: features of ``probe`` without the adapters.

    Raises:
        MmcError: an adapter without effect.
    """
    with torch.no_grad():
        _compare(probe.features(towers), before, "new adapters change")
    features = probe.features(towers)
    ups = [part.B for _, part in adapters]
    reached = [_mixed(value) for value in features.values() if value.requires_grad]
    grads: tuple[Tensor | None, ...] = (None,) * len(ups)
    if reached:
        grads = torch.autograd.grad(torch.stack(reached).sum(), ups, allow_unused=True)
    dead = [
        name
        for (name, _), grad in zip(adapters, grads, strict=True)
        if grad is None or not bool(grad.any())
    ]
    if dead:
        raise MmcError(
            f"the adapters of {', '.join(dead[:3])}{' …' if len(dead) > 3 else ''} have no effect "
            "on the features, so they cannot be trained; choose other --targets"
        )
    with torch.no_grad():
        for up, grad in zip(ups, grads, strict=True):
            assert grad is not None
            up.copy_(grad / grad.norm())
        try:
            changed = probe.features(towers)
        finally:
            for up in ups:
                up.zero_()
    for tower, value in changed.items():
        if torch.equal(value, before[tower]):
            raise MmcError(f"the adapters do not change the {tower} features")


def check_end(
    towers: Towers, base_weights: str, probe: Probe, tuned: dict[str, Tensor], merge: Callable
) -> None:
    """The model is what it was, and with the saved adapter merged it gives the tuned features.

    Args:
        towers: without the adapters.
        base_weights: hash of the model's weights when it was loaded.
        tuned: features of ``probe`` with the adapters.
        merge: adds the saved adapter to the model.

    Raises:
        MmcError: something else than the adapters has moved, or they are not what was saved.
    """
    if weights_sha256(towers.model.state_dict()) != base_weights:
        raise MmcError("the model's own weights have changed in training; nothing was kept")
    merge()
    with torch.no_grad():
        _compare(probe.features(towers), tuned, "the merged adapter changes")


def _compare(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    for tower, value in found.items():
        difference = float((value - wanted[tower]).abs().max() / wanted[tower].abs().max())
        if not difference <= TOLERANCE:
            raise MmcError(f"{what} the {tower} features by {difference:.1e} of their size")


def _mixed(features: Tensor) -> Tensor:
    """A scalar that every feature of every row takes part in."""
    random = torch.Generator().manual_seed(1)
    weights = torch.randn(features.shape, generator=random).to(features.device)
    return (features * weights).sum()
