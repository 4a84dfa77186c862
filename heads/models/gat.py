"""Graph attention over the labels: a label's classifier learns from those of its neighbours.

Brody et al. 2022 (GATv2) over a graph of the labels as in Chen et al. 2019 (ML-GCN). Every label is
a node; its classifier is one of its own, which starts at zero, plus what attention to its
neighbours makes of the nodes. It is multiplied with the projected inputs. Labels that occur
together, or whose texts are near, share what they learn: those with few samples gain most.

Without classifiers of their own the labels had test mAP .583 on movies, with them .593 (mlp .592).

Shapes: B samples, C labels, K neighbours, N values of a node, H hidden values.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmc.heads.models import graph
from mmc.heads.models.base import Batch, check_least, check_shares
from mmc.heads.models.dropout import InputDropoutLinear
from mmc.heads.models.inputs import PooledConfig, PooledHead
from mmc.store.errors import InputError

with warnings.catch_warnings():
    # Of torch.jit.script, which the package still uses while it is imported.
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch_geometric.nn.conv import GATv2Conv


@dataclass(frozen=True, kw_only=True)
class GATConfig(PooledConfig):
    """Settings of the graph attention head."""

    nodes: Literal["auto", "text", "learned"] = "auto"
    """What a node starts from: the label's text, or random numbers; auto = texts where an alias
    that is read has them. Either way it is trained."""
    width: int = 32
    """Values of a node."""
    layers: int = 1
    """Layers of attention."""
    attention_heads: int = 4
    """Attention heads; they divide ``width`` among them."""
    hidden: int = 512
    """Width of the projected inputs, and of a label's classifier."""
    input_dropout: float = 0.4
    """Share of the inputs ignored in a training step, the same for the whole batch."""
    threshold: float = 0.4
    """A label hears from those that at least this share of its training rows have, too."""
    text_neighbors: int = 3
    """A label hears from the labels with the nearest texts, so many; 0 = none."""
    neighbors: int = 8
    """Most neighbours of a label, the strongest."""
    neighbor_share: float = 0.25
    """How much of a label's edge weights its neighbours have together."""

    def __post_init__(self) -> None:
        check_least(self, 1, "width", "layers", "attention_heads", "hidden", "neighbors")
        check_least(self, 0, "text_neighbors")
        check_shares(self, "input_dropout", "neighbor_share")
        if self.width % self.attention_heads:
            raise InputError(
                f"head.width ({self.width}) must be a multiple of head.attention_heads "
                f"({self.attention_heads})"
            )
        if not 0 < self.threshold <= 1:
            raise InputError(f"head.threshold must be in (0, 1], got {self.threshold}")


class GAT(PooledHead):
    """Logits = projected inputs x (own + attended classifiers) + bias.

    Memory of a training step beside the batch, measured with 10,000 labels of 8 neighbours each:
    110 MB by default settings; it grows with labels x neighbours x ``width`` and labels x
    ``hidden``.
    """

    Config = GATConfig
    takes_label_text = True
    card = (
        "Labels that occur together in the training rows, or whose texts are near, share what they "
        "learn: their classifiers come out of attention over a graph of the labels."
    )
    learning_rate = 7e-4
    bias: nn.Parameter
    neighbors: Tensor
    edge_weights: Tensor

    def __init__(
        self,
        inputs: Mapping[str, tuple[int, ...]],
        num_labels: int,
        config: GATConfig,
        *,
        label_text: Tensor | None = None,
    ) -> None:
        super().__init__(inputs, num_labels, config, label_text=label_text)
        self.project = InputDropoutLinear(self.width, config.hidden, config.input_dropout)
        self.label_text = None if config.nodes == "learned" else label_text
        nodes = torch.randn(num_labels, config.width)
        if self.label_text is not None:
            nodes = graph.text_nodes(self.label_text, config.width)
        self.nodes = nn.Parameter(nodes)
        self.attention = nn.ModuleList(_layer(config) for _ in range(config.layers))
        # Both start at zero, so the head starts as the constant answer.
        self.classifiers = nn.Linear(config.width, config.hidden, bias=False)
        nn.init.zeros_(self.classifiers.weight)
        self.own = nn.Parameter(torch.zeros(num_labels, config.hidden))
        self.bias = nn.Parameter(torch.zeros(num_labels))
        shape = (num_labels, config.neighbors)
        self.register_buffer("neighbors", torch.full(shape, -1))
        self.register_buffer("edge_weights", torch.zeros(shape))

    def score(self, prepared: Batch) -> Tensor:
        hidden_BH = F.gelu(self.project(prepared["inputs"]))
        return F.linear(hidden_BH, self.label_states().to(hidden_BH.dtype), self.bias)

    def label_states(self) -> Tensor:
        """The labels' classifiers (C, H); in float32, since the graph is small and they count."""
        with torch.autocast(self.nodes.device.type, enabled=False):
            pairs, weights = graph.edges(self.neighbors, self.edge_weights)
            states_CN: Tensor = self.nodes
            for layer in self.attention:
                states_CN = states_CN + F.elu(layer(states_CN, pairs, weights))
            states_CH: Tensor = self.own + self.classifiers(F.normalize(states_CN, dim=-1))
            return states_CH

    def fit_labels(
        self, indptr: Tensor, indices: Tensor, unknown: tuple[Tensor, Tensor] | None = None
    ) -> None:
        config: GATConfig = self.config
        if config.nodes == "text" and self.label_text is None:
            raise InputError(
                "head.nodes=text: no alias that is read has label texts; extract with a backbone "
                "that reads texts, or leave it out"
            )
        found = graph.build(
            graph.conditional(indptr, indices, self.num_labels, unknown),
            None if self.label_text is None else self.label_text.cpu().float().numpy(),
            self.num_labels,
            neighbors=config.neighbors,
            text_neighbors=config.text_neighbors,
            threshold=config.threshold,
            share=config.neighbor_share,
        )
        self.neighbors.copy_(found.neighbors)
        self.edge_weights.copy_(found.weights)

    def set_prior(self, logits: Tensor) -> None:
        with torch.no_grad():
            self.bias.copy_(logits)


def _layer(config: GATConfig) -> GATv2Conv:
    """Attention from ``width`` to ``width`` values; the graph brings its own edges to itself."""
    return GATv2Conv(
        config.width,
        config.width // config.attention_heads,
        heads=config.attention_heads,
        edge_dim=1,
        add_self_loops=False,
    )
