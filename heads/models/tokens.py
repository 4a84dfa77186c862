"""What heads of tokens read: fields of any number of vectors per sample, with their masks.

Shapes: B samples, N tokens of one field, D its width.

A role with a shape (D,) is one token, a role (N, D) is N tokens. Which of them are real says the
role of its mask, if there is one (`mmc.heads.needs.mask_of`); what lies behind a mask is zero from
`prepare` on, whatever it was.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmc.heads.models.base import Batch, Head
from mmc.heads.models.inputs import FieldNorm, Normalize
from mmc.heads.needs import EXTRA_OF, mask_of, sibling
from mmc.store.errors import InputError

NOT_TOKENS = ("boxes", "image_places", "region_scores", "region_classes", "text_ids")

PASS_FLOATS = 64 << 20
"""Numbers that a pass without gradients may hold at a time: 256 MiB in float32."""
PART_FLOATS = 16 << 20
"""Numbers of the part of a batch that a CPU computes at a time."""
STEP_FLOATS = 256 << 20
"""Numbers that a training step may hold, which bounds the default batch: about 1 GiB.

Heads count them from their shapes; ``docs/heads.md`` has what was measured with 10,000 labels, and
a test holds the count to between two thirds of that and twice as much.
"""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One role of tokens."""

    role: str
    tokens: int
    """Most per sample."""
    width: int
    pooled: bool
    """One vector per sample, without an axis of tokens."""
    mask: str | None
    """Role of its mask."""
    extras: Mapping[str, str]
    """Field that comes with it -> its role."""

    @property
    def field(self) -> str:
        """The role without its prefix."""
        return self.role.rpartition(".")[2]


def sources(inputs: Mapping[str, tuple[int, ...]]) -> tuple[Source, ...]:
    """The roles that hold tokens, in their order.

    Raises:
        InputError: a role of another shape, or none.
    """
    found = []
    for role, shape in inputs.items():
        field = role.rpartition(".")[2]
        if field in NOT_TOKENS or field.endswith("_mask"):
            continue
        if len(shape) not in (1, 2):
            dims = " x ".join(map(str, shape)) or "one value"
            raise InputError(f"{role} holds {dims} per sample, which is neither vectors nor tokens")
        mask = mask_of(role)
        extras = {
            extra: sibling(role, extra)
            for extra, of in EXTRA_OF.items()
            if of == field and sibling(role, extra) in inputs
        }
        found.append(
            Source(
                role=role,
                tokens=shape[0] if len(shape) == 2 else 1,
                width=shape[-1],
                pooled=len(shape) == 1,
                mask=mask if mask in inputs and len(shape) == 2 else None,
                extras=extras,
            )
        )
    if not found:
        raise InputError(f"there are no tokens among {', '.join(inputs)}")
    return tuple(found)


class TokenInputs(nn.Module):
    """All roles of a head on one scale: what does not train of reading them."""

    def __init__(self, inputs: Mapping[str, tuple[int, ...]], normalize: Normalize) -> None:
        super().__init__()
        self.sources = sources(inputs)
        self.others = tuple(role for role in inputs if role not in {s.role for s in self.sources})
        self.mode = normalize
        self.fields = nn.ModuleList(FieldNorm(s.width, normalize) for s in self.sources)

    def forward(self, batch: Batch) -> Batch:
        """Stored fields -> the same roles: tokens (B, N, D) normalised, masks bool, others as is.

        Boxes of regions that are not there are zero too.
        """
        prepared = {}
        for source, norm in zip(self.sources, self.fields, strict=True):
            x_BND = norm(_with_axis(source, batch[source.role]))
            if source.mask is not None:
                # Not a product: what is behind the mask may be NaN.
                x_BND = x_BND.masked_fill(~batch[source.mask].bool()[..., None], 0.0)
            prepared[source.role] = x_BND
        for role in self.others:
            values = batch[role]
            if role.endswith("_mask"):
                values = values.bool()
            prepared[role] = values.float() if values.is_floating_point() else values
        for source in self.sources:
            boxes = source.extras.get("boxes")
            if boxes is not None and source.mask is not None:
                real = prepared[source.mask][..., None]
                prepared[boxes] = prepared[boxes].masked_fill(~real, 0.0)
        return prepared

    def fit(self, blocks: Iterable[Batch]) -> None:
        """Set the scales from the real tokens of the training rows."""
        if self.mode in ("l2", "none"):
            return
        norms: list[FieldNorm] = list(self.fields)  # type: ignore[arg-type]
        anchors: list[Tensor] = []
        counts = [0] * len(norms)
        sums = [torch.zeros(2, len(norm.shift), dtype=torch.float64) for norm in norms]
        for block in blocks:
            real = [_real(s, n, block) for s, n in zip(self.sources, norms, strict=True)]
            # Moments about a point near the mean: no cancellation where the mean is large.
            anchors = anchors or [x.mean(0) if len(x) else x.new_zeros(x.shape[1]) for x in real]
            for i, (x, anchor) in enumerate(zip(real, anchors, strict=True)):
                x = x - anchor
                sums[i] += torch.stack([x.sum(0), x.square().sum(0)]).double().cpu()
                counts[i] += len(x)
        for norm, anchor, total, count in zip(norms, anchors, sums, counts, strict=True):
            mean = total[0] / max(count, 1)
            variance = (total[1] / max(count, 1) - mean.square()).clamp(min=0)
            norm.fit(anchor + mean.to(norm.shift), variance.to(norm.shift))


class TokenHead(Head):
    """Base of the heads of tokens; ``_score`` is theirs.

    Without gradients some samples are scored at a time, so that a pass of any batch takes bounded
    memory; with gradients the default batch is what a step has room for.
    """

    reads = "any"
    pass_floats: int
    """Numbers that a sample takes in a pass without gradients."""

    def __init__(
        self,
        inputs: Mapping[str, tuple[int, ...]],
        num_labels: int,
        config: Any,
        normalize: Normalize,
        label_text: Tensor | None = None,
    ) -> None:
        super().__init__(inputs, num_labels, config, label_text=label_text)
        self.tokens = TokenInputs(inputs, normalize)

    def set_memory(self, step_floats: int, pass_floats: int | None = None) -> None:
        """Numbers that a sample takes in a training step, and in a pass (None: as many)."""
        self.largest_batch = rows_at_once(step_floats, STEP_FLOATS)
        self.part_rows = min(self.part_rows, rows_at_once(step_floats, PART_FLOATS))
        self.pass_floats = step_floats if pass_floats is None else pass_floats

    def prepare(self, batch: Batch) -> Batch:
        prepared: Batch = self.tokens(batch)
        return prepared

    def score(self, prepared: Batch) -> Tensor:
        if torch.is_grad_enabled():
            return self._score(prepared)
        rows = rows_at_once(self.pass_floats, PASS_FLOATS)
        return torch.cat([self._score(part) for part in split(prepared, rows)])

    def fit_inputs(self, blocks: Iterable[Batch]) -> None:
        self.tokens.fit(blocks)

    def _score(self, prepared: Batch) -> Tensor:
        """Prepared batch -> logits (B, C), all samples at once."""
        raise NotImplementedError


def mask_for(source: Source, prepared: Batch) -> Tensor:
    """Bool (B, N): which tokens of the source are real."""
    if source.mask is not None:
        return prepared[source.mask]
    x_BND = prepared[source.role]
    return torch.ones(x_BND.shape[:2], dtype=torch.bool, device=x_BND.device)


def joined_masks(found: tuple[Source, ...], prepared: Batch) -> Tensor | None:
    """Bool (B, N) of all sources side by side; None: everything is real."""
    if all(source.mask is None for source in found):
        return None
    return never_empty(torch.cat([mask_for(source, prepared) for source in found], dim=1))


def never_empty(mask: Tensor) -> Tensor:
    """The mask, but a sample without any token gets them all (they are zeros): no 0 / 0."""
    return mask | ~mask.any(1, keepdim=True)


def rows_at_once(floats: int, limit: int) -> int:
    """Samples that fit in ``limit`` numbers at ``floats`` numbers each; 1 at least."""
    return max(1, limit // max(floats, 1))


def split(prepared: Batch, rows: int) -> list[Batch]:
    """The batch in pieces of ``rows`` samples; what is not per sample (``labels``) in each."""
    total = max(len(v) for key, v in prepared.items() if key != "labels")
    return [
        {k: v if k == "labels" else v[i : i + rows] for k, v in prepared.items()}
        for i in range(0, max(total, 1), rows)
    ]


def _with_axis(source: Source, values: Tensor) -> Tensor:
    return values[:, None] if source.pooled else values


def _real(source: Source, norm: FieldNorm, block: Batch) -> Tensor:
    """The real tokens (n, D) of a block, as the moments are taken of them."""
    x_BND = norm.unscaled(_with_axis(source, block[source.role]))
    if source.mask is None:
        return x_BND.flatten(0, 1)
    return x_BND[block[source.mask].bool()]
