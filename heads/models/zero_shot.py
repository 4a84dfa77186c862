"""Cosine with the label texts of the backbone; nothing is trained.

Shapes: B samples, C labels, D values of the shared space.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmc.heads.models.base import Batch, Head, Stage
from mmc.store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """Settings of the zero-shot head."""

    scale: float = 100.0
    """Logits per unit of cosine, where no validation rows can fit it."""
    calibrate: bool = True
    """Fit the scale and a bias per label on the validation rows. A label's ranking of samples
    stays what it was; only probabilities and decisions change."""

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise InputError(f"head.scale must be above 0, got {self.scale}")


class ZeroShot(Head):
    """Logits = scale x cos(field, label text) + bias.

    The field is one of the space that the backbone's label texts lie in: ``image`` of a dual
    encoder, or ``text``. Where a backbone has both, ``image`` unless ``--features ALIAS/text``.
    """

    Config = ZeroShotConfig
    max_inputs = 1
    wants_label_text = True
    card = (
        "Nothing was trained: a label's score is the cosine of the field with the embedding of the "
        "label's text, by the same backbone."
    )
    label_text: Tensor
    log_scale: Tensor
    bias: Tensor

    def __init__(
        self,
        inputs: Mapping[str, tuple[int, ...]],
        num_labels: int,
        config: ZeroShotConfig,
        *,
        label_text: Tensor | None = None,
    ) -> None:
        super().__init__(inputs, num_labels, config, label_text=label_text)
        ((self.role, shape),) = inputs.items()
        if label_text is None:
            label_text = torch.zeros(num_labels, *shape)
        if label_text.shape[1:] != shape:
            raise InputError(
                f"zero_shot: the label texts have {label_text.shape[1]} values and "
                f"{self.role} {shape[0]}; choose a field of the space that they share"
            )
        self.register_buffer("label_text", F.normalize(label_text.float(), dim=-1))
        self.register_buffer("log_scale", torch.tensor(float(config.scale)).log())
        self.register_buffer("bias", torch.zeros(num_labels))

    def prepare(self, batch: Batch) -> Batch:
        x_BD = F.normalize(batch[self.role].to(self.label_text.dtype), dim=-1)
        return {"cosine": x_BD @ self.label_text.T}

    def score(self, prepared: Batch) -> Tensor:
        return prepared["cosine"] * self.log_scale.exp() + self.bias

    def stages(self) -> list[Stage]:
        return []

    @property
    def text_width(self) -> int:
        return self.label_text.shape[1]

    def for_labels(self, label_text: Tensor, same: Tensor) -> dict[str, Tensor]:
        bias = torch.where(same >= 0, self.bias[same.clamp(min=0)], self.bias.mean())
        text = F.normalize(label_text.to(self.label_text), dim=-1)
        return {**self.state_dict(), "label_text": text, "bias": bias}

    def fit_validation(
        self, blocks: Iterable[Batch], targets: Tensor, task: str, metric: str | None = None
    ) -> None:
        """Maximum likelihood of one scale and C biases, by L-BFGS from the label priors."""
        if not self.config.calibrate:
            return
        cosine = torch.cat([block["cosine"] for block in blocks]).double()
        known = targets >= 0
        truth = targets[known].double()
        log_scale = nn.Parameter(self.log_scale.double().clone())
        bias = nn.Parameter(-cosine.mean(0) * log_scale.detach().exp())
        optimizer = torch.optim.LBFGS(
            [log_scale, bias], max_iter=200, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            logits = cosine * log_scale.exp() + bias
            if task == "multilabel":
                loss = F.binary_cross_entropy_with_logits(logits[known], truth)
            else:
                loss = F.cross_entropy(logits, targets)
            # A weak pull keeps a label without positives, or a separable one, finite.
            loss = loss + 1e-4 * bias.square().mean() + 1e-4 * log_scale.square()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        self.log_scale.copy_(log_scale.detach())
        self.bias.copy_(bias.detach())
