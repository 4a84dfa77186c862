"""What a training step of every head keeps with 10,000 labels: what the docs say, and no more."""

import re
from pathlib import Path

import pytest
import torch

from mmc.heads.models import HEADS
from mmc.heads.models.base import Head
from mmc.heads.models.tokens import STEP_FLOATS
from mmc.heads.needs import MASKED, mask_of
from mmc.store.registry import load

LABELS = 10_000
SHAPES = {
    "image": (768,),
    "text": (768,),
    "image_tokens": (50, 768),
    "image_class": (768,),
    "text_tokens": (77, 768),
    "regions": (36, 2048),
    "boxes": (36, 5),
}
READ = {
    "zero_shot": ("image",),
    "ml_decoder": ("image_tokens", "text_tokens"),
    "fusion": ("image_tokens", "text_tokens"),
    "dm_decoder": ("image_tokens", "image"),
    "vilbert": ("regions", "boxes", "text_tokens"),
}
"""Fields of heads that do not read image and text."""
DOCS = Path(__file__).parents[2] / "docs" / "heads.md"
MIB = 2**20


def stated() -> dict[str, tuple[float, float, float]]:
    """Head (and setting) -> MiB of parameters, of a step, and of each sample of it."""
    rows = re.findall(
        r"^\| `(.+?)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", DOCS.read_text(), re.M
    )
    return {name: (float(a), float(b), float(c)) for name, a, b, c in rows}


def make(name: str) -> Head:
    name, _, setting = name.partition(" ")
    key, _, value = setting.removeprefix("head.").partition("=")
    cls = load(next(entry for entry in HEADS if entry.name == name))
    inputs = {field: SHAPES[field] for field in READ.get(name, ("image", "text"))}
    inputs |= {mask_of(field): SHAPES[field][:1] for field in list(inputs) if field in MASKED}
    wants = cls.wants_label_text or cls.takes_label_text
    text = torch.randn(LABELS, 768) if wants and name != "gat" else None
    head: Head = cls(inputs, LABELS, cls.Config(**({key: value} if key else {})), label_text=text)
    if name == "gat":  # every label with as many neighbours as it may have
        head.neighbors.random_(LABELS)
        head.edge_weights.fill_(0.03)
    return head.train()


def kept(head: Head, rows: int) -> int:
    """Bytes that the backward pass of a step needs, besides parameters; logits among them."""
    batch = {
        role: torch.ones(rows, *shape, dtype=torch.bool if role.endswith("_mask") else None)
        for role, shape in head.inputs.items()
    }
    targets = torch.zeros(rows, LABELS)
    targets[:, :5] = 1
    prepared = head.prepare(batch)
    labels = head.select_labels(targets)
    if labels is not None:
        prepared["labels"] = labels
    own = {t.untyped_storage().data_ptr() for t in head.state_dict().values()}
    seen: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # The tensors stay alive, so no address is used twice.
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        keep(head.score(prepared))
    return sum(t.untyped_storage().nbytes() for place, t in seen.items() if place not in own)


def test_the_docs_speak_of_every_head():
    assert {name.split(" ")[0] for name in stated()} == {entry.name for entry in HEADS}


@pytest.mark.parametrize("name", list(stated()))
def test_ten_thousand_labels_take_the_memory_that_is_stated(name):
    parameters, step, sample = stated()[name]
    head = make(name)
    size = sum(p.numel() * p.element_size() for p in head.parameters()) / MIB
    assert size == pytest.approx(parameters, rel=0.02, abs=0.05)
    if not head.stages():
        return  # nothing is trained
    one, three = kept(head, 1) / MIB, kept(head, 3) / MIB
    assert (three - one) / 2 == pytest.approx(sample, rel=0.1, abs=0.005)
    assert one - sample == pytest.approx(step, rel=0.1, abs=0.2)
    if head.largest_batch is not None:
        counted = 4 * STEP_FLOATS / head.largest_batch / MIB
        assert counted / 2 < sample < 1.5 * counted  # so the default batch takes about a GiB
