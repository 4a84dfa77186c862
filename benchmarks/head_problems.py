"""What the benchmark of heads trains: synthetic samples, and a head with all that it reads."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from mmc.heads import metrics
from mmc.heads.batches import Data, ResidentData
from mmc.heads.devices import training_dtype
from mmc.heads.engine import Engine, OnRound, score_all
from mmc.heads.losses.bce import BCE
from mmc.heads.models import HEADS
from mmc.heads.models.base import Batch, Head
from mmc.heads.models.dropout import Dropout
from mmc.heads.options import OptimConfig
from mmc.heads.training import default_batch, default_lr
from mmc.store.registry import load, lookup

WIDTH, LABELS, LATENT = 512, 80, 64
VIEWS = {"image": (WIDTH,), "text": (WIDTH,)}
BOTH = {"image_tokens": (49, 256), "text_tokens": (16, 256), "text_mask": (16,)}
HEADS_OF_TOKENS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "ml_decoder": ("ml_decoder", BOTH),
    "fusion_tokens": ("fusion", BOTH),
    "dm_decoder": ("dm_decoder", {"image_tokens": (49, 256), "image": (256,)}),
    "vilbert": (
        "vilbert",
        {
            "regions": (36, 512),
            "boxes": (36, 5),
            "region_mask": (36,),
            "text_tokens": (16, 256),
            "text_mask": (16,),
        },
    ),
}
"""Name here -> head, and shapes of the fields that it reads."""
PLAIN_BATCH, PLAIN_LR = 256, 1e-3


def make_views(rows: int, seed: int = 0) -> tuple[Batch, Tensor]:
    """Two noisy views (n, 512) of a common cause, and labels (n, 80) that depend on it.

    Half of a label's evidence is linear in the cause and half is a product of two of its parts;
    20 % to 0.5 % of the rows have it.
    """
    g = torch.Generator().manual_seed(seed)
    cause = torch.randn(rows, LATENT, generator=g)
    evidence = cause @ torch.randn(LATENT, LABELS, generator=g) / LATENT**0.5
    first, second = (torch.randint(LATENT, (LABELS,), generator=g) for _ in range(2))
    evidence += 0.7 * cause[:, first] * cause[:, second]
    evidence += 0.5 * torch.randn(rows, LABELS, generator=g)
    share = torch.logspace(-0.7, -2.3, LABELS)
    cuts = [
        evidence[:, i].kthvalue(max(1, int(rows * (1 - float(share[i]))))).values
        for i in range(LABELS)
    ]
    views = {}
    for name in VIEWS:
        mix = torch.randn(LATENT, WIDTH, generator=g) / LATENT**0.5
        seen = (torch.rand(LATENT, 1, generator=g) < 0.75).float()
        common = torch.randn(WIDTH, generator=g)
        views[name] = cause @ (mix * seen) + 0.7 * torch.randn(rows, WIDTH, generator=g) + common
    return views, (evidence > torch.stack(cuts)).to(torch.int8)


def make_tokens(shapes: dict[str, tuple[int, ...]], rows: int) -> tuple[Batch, Tensor]:
    """Noise: only its shapes count. Three of four masked places are real."""
    g = torch.Generator().manual_seed(0)
    fields = {}
    for role, shape in shapes.items():
        values = torch.rand(rows, *shape, generator=g)
        fields[role] = values < 0.75 if role.endswith("_mask") else values
        if role.endswith("_mask"):
            fields[role][:, 0] = True
    return fields, (torch.rand(rows, LABELS, generator=g) < 0.05).to(torch.int8)


class Problem:
    """One head with training and validation rows in memory, prepared.

    Args:
        name: the head's.
        rows, val_rows: how many of each.
        batch: samples of a step; None: mmc's default.
        data: fields and targets of so many rows or more, made by `make_views`; None: made here.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        val_rows: int,
        device: torch.device,
        *,
        batch: int | None = None,
        data: tuple[Batch, Tensor] | None = None,
    ) -> None:
        head, self.shapes = HEADS_OF_TOKENS.get(name, (name, VIEWS))
        n = rows + val_rows
        if data is None:
            data = make_tokens(self.shapes, n) if name in HEADS_OF_TOKENS else make_views(n)
        fields, targets = {key: values[:n] for key, values in data[0].items()}, data[1][:n]
        self.name, self.device, self.rows = name, device, rows
        self.dtype = training_dtype("auto", device)
        self.cls: type[Head] = load(lookup(HEADS, head, kind="head", group="mmc.heads"))
        texts = self.cls.wants_label_text
        self.texts = torch.randn(LABELS, self.shapes["image"][0]) if texts else None
        fitted = self._new()
        self.batch = batch or default_batch(rows, device, fitted.largest_batch)
        self.floats = self.batch * int(getattr(fitted, "floats", 0))
        self.lr = default_lr(fitted.learning_rate, self.batch, rows)
        self.targets = targets.to(device)
        self.inputs: Batch = {}
        with torch.no_grad():
            fitted.fit_inputs([{key: values[:rows].to(device) for key, values in fields.items()}])
            yes = targets[:rows].nonzero()
            counts = torch.bincount(yes[:, 0], minlength=rows).cumsum(0)
            fitted.fit_labels(torch.cat([torch.zeros(1, dtype=torch.int64), counts]), yes[:, 1])
            self.inputs = fitted.prepare({k: values.to(device) for k, values in fields.items()})
        self.fitted = {key: value.clone() for key, value in fitted.named_buffers()}
        positives = self.targets[:rows].sum(0).double()
        self.loss = BCE(BCE.Config(), positives, torch.full_like(positives, rows)).to(device)

    def _new(self) -> Head:
        torch.manual_seed(0)
        head = self.cls(self.shapes, LABELS, self.cls.Config(), label_text=self.texts)
        return head.to(self.device)

    def head(self) -> Head:
        """A fresh head that knows the scale of its inputs and the graph of its labels."""
        head = self._new()
        for key, value in head.named_buffers():
            value.copy_(self.fitted[key])
        return head

    def train(self, rows: int | None = None) -> ResidentData:
        """The training rows, in the precision of training."""
        taken = slice(rows or self.rows)
        inputs = {
            key: values[taken].to(self.dtype if values.is_floating_point() else values.dtype)
            for key, values in self.inputs.items()
        }
        return ResidentData(inputs=inputs, targets=self.targets[taken])

    def val(self, rows: int | None = None, labels: Tensor | None = None) -> ResidentData:
        """The validation rows, or the first of them; targets of ``labels`` only, if given."""
        taken = slice(self.rows, None if rows is None else self.rows + rows)
        targets = self.targets[taken]
        if labels is not None:
            known = torch.full_like(targets, -1)
            known[:, labels] = targets[:, labels]
            targets = known
        return ResidentData(
            inputs={key: values[taken] for key, values in self.inputs.items()}, targets=targets
        )

    def engine(
        self,
        train: Data,
        val: ResidentData,
        epochs: int | None = None,
        on_round: OnRound | None = None,
    ) -> Engine:
        """mmc's engine with its defaults."""
        head = self.head()
        head.set_prior(self.loss.prior())
        return Engine(
            head,
            self.loss,
            train=train,
            val=val,
            task="multilabel",
            batch_size=self.batch,
            epochs=epochs,
            lr=self.lr,
            optim=OptimConfig(),
            seed=0,
            dtype=self.dtype,
            on_round=on_round,
        )

    def mean_ap(self, head: Head) -> float:
        """Validation mAP."""
        head.eval()
        val = self.val()
        with torch.no_grad():
            logits = score_all(head.score, val.blocks())
        head.train()
        return metrics.score(logits, val.targets, "multilabel")


def plain_loop(problem: Problem, rows: int, epochs: int) -> Iterator[tuple[float, Head]]:
    """A DataLoader over a TensorDataset, batch 256, no workers, float32, AdamW at 1e-3.

    Seconds of training so far and the head, after every epoch.
    """
    device = problem.device
    head = _with_torch_dropout(problem.head()).train()
    keys = list(problem.inputs)
    parts = [problem.inputs[key][:rows].cpu() for key in keys]
    data = torch.utils.data.TensorDataset(*parts, problem.targets[:rows].cpu().float())
    loader = torch.utils.data.DataLoader(data, PLAIN_BATCH, shuffle=True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=PLAIN_LR)
    seconds = 0.0
    for _ in range(epochs):
        started = time.perf_counter()
        for *values, targets in loader:
            batch = {k: v.to(device) for k, v in zip(keys, values, strict=True)}
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                head.score(batch), targets.to(device)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - started
        yield seconds, head


def _with_torch_dropout(head: Head) -> Head:
    """The head as a plain loop would have it: mmc's own dropout is part of what is compared."""
    for module in head.modules():
        for name, child in module.named_children():
            if isinstance(child, Dropout):
                setattr(module, name, torch.nn.Dropout(child.share))
    return head
