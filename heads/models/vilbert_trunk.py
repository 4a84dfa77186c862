"""The network of ViLBERT under its official names: two streams and the layers that join them.

Shapes: B samples, T tokens of text, R regions, W width of a stream.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from mmc.heads.models.attention import attend
from mmc.heads.models.dropout import Dropout
from mmc.store.errors import InputError

EPS = 1e-12
PREFIXES = ("module.", "model.", "bert.")
"""What stands before the trunk's names in the known wrappings of the checkpoint."""
DROPPED = ("cls.", "vil_", "vision_logit", "linguisic_logit", "classifier.")
"""Starts of the names of pretraining heads."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Widths, layers and attention heads."""

    vocabulary: int = 30522
    start: int = 101
    """Id of [CLS], with which every text begins."""
    positions: int = 512
    segments: int = 2
    text_layers: int = 12
    text_width: int = 768
    text_heads: int = 12
    text_feedforward: int = 3072
    region_features: int = 2048
    region_layers: int = 6
    region_width: int = 1024
    region_heads: int = 8
    region_feedforward: int = 1024
    joint: int = 1024
    """Of the layers between the streams, and of what is pooled."""
    joint_heads: int = 8

    @property
    def exchanges(self) -> int:
        """Layers between the streams: the last ones of each stream have one before them."""
        return self.region_layers


OFFICIAL = Sizes()
SMALL = Sizes(
    text_layers=4,
    text_width=192,
    text_heads=3,
    text_feedforward=768,
    region_layers=2,
    region_width=256,
    region_heads=4,
    region_feedforward=256,
    joint=256,
    joint_heads=4,
)


class Trunk(nn.Module):
    """Words and regions -> the pooled vector of each stream.

    Text layers up to the first exchange come before any vision; from then on every exchange is
    followed by one layer of each stream.
    """

    def __init__(self, sizes: Sizes, region_features: int, dropout: float, *, words: bool) -> None:
        super().__init__()
        self.sizes = sizes
        self.embeddings = TextEmbeddings(sizes, dropout, words=words)
        self.v_embeddings = RegionEmbeddings(sizes, region_features, dropout)
        self.encoder = Encoder(sizes, dropout)
        self.t_pooler = Pooler(sizes.text_width, sizes.joint)
        self.v_pooler = Pooler(sizes.region_width, sizes.joint)
        self.apply(_initial)

    def words(self, ids_BT: Tensor) -> Tensor:
        """The embeddings of token ids, (B, T, text width)."""
        assert self.embeddings.word_embeddings is not None
        out: Tensor = self.embeddings.word_embeddings(ids_BT)
        return out

    def forward(
        self,
        words_BTW: Tensor,
        text_mask_BT: Tensor,
        regions_BRD: Tensor,
        boxes_BRF: Tensor,
        region_mask_BR: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Pooled text and pooled regions, (B, joint) each."""
        text, regions = self.encoder(
            self.embeddings(words_BTW),
            text_mask_BT,
            self.v_embeddings(regions_BRD, boxes_BRF),
            region_mask_BR,
        )
        return self.t_pooler(text), self.v_pooler(regions)

    def floats(self, tokens: int, regions: int) -> int:
        """Numbers that a sample takes in a training step, about."""
        s = self.sizes
        text = tokens * (10 * s.text_width + 2 * s.text_feedforward)
        vision = regions * (10 * s.region_width + 2 * s.region_feedforward)
        between = text + vision + 6 * (tokens + regions) * s.joint
        return s.text_layers * text + s.region_layers * vision + s.exchanges * between


class TextEmbeddings(nn.Module):
    """Words + positions + first segment, normalised."""

    def __init__(self, sizes: Sizes, dropout: float, *, words: bool) -> None:
        super().__init__()
        width = sizes.text_width
        self.word_embeddings = nn.Embedding(sizes.vocabulary, width) if words else None
        self.position_embeddings = nn.Embedding(sizes.positions, width)
        self.token_type_embeddings = nn.Embedding(sizes.segments, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPS)
        self.dropout = Dropout(dropout)

    def forward(self, words_BTW: Tensor) -> Tensor:
        positions = self.position_embeddings.weight[: words_BTW.shape[1]]
        x = words_BTW + positions + self.token_type_embeddings.weight[0]
        out: Tensor = self.dropout(self.LayerNorm(x))
        return out


class RegionEmbeddings(nn.Module):
    """Region features + their boxes, normalised."""

    def __init__(self, sizes: Sizes, features: int, dropout: float) -> None:
        super().__init__()
        self.image_embeddings = nn.Linear(features, sizes.region_width)
        self.image_location_embeddings = nn.Linear(5, sizes.region_width)
        self.LayerNorm = nn.LayerNorm(sizes.region_width, eps=EPS)
        self.dropout = Dropout(dropout)

    def forward(self, regions_BRD: Tensor, boxes_BRF: Tensor) -> Tensor:
        x = self.image_embeddings(regions_BRD) + self.image_location_embeddings(boxes_BRF)
        out: Tensor = self.dropout(self.LayerNorm(x))
        return out


class Encoder(nn.Module):
    """The layers of both streams, in their order."""

    def __init__(self, sizes: Sizes, dropout: float) -> None:
        super().__init__()
        s = sizes
        self.layer = nn.ModuleList(
            StreamLayer(s.text_width, s.text_heads, s.text_feedforward, dropout)
            for _ in range(s.text_layers)
        )
        self.v_layer = nn.ModuleList(
            StreamLayer(s.region_width, s.region_heads, s.region_feedforward, dropout)
            for _ in range(s.region_layers)
        )
        self.c_layer = nn.ModuleList(Exchange(s, dropout) for _ in range(s.exchanges))

    def forward(
        self, t: Tensor, t_mask: Tensor, v: Tensor, v_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        first = len(self.layer) - len(self.c_layer)
        for layer in self.layer[:first]:
            t = layer(t, t_mask)
        for j, exchange in enumerate(self.c_layer):
            t, v = exchange(t, t_mask, v, v_mask)
            t = self.layer[first + j](t, t_mask)
            v = self.v_layer[j](v, v_mask)
        return t, v


class StreamLayer(nn.Module):
    """BERT's layer: self-attention, then the feed-forward part."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = Dropout(dropout)
        linear = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict(
            {"self": nn.ModuleDict(linear), "output": Residual(width, width, dropout)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, feedforward)})
        self.output = Residual(feedforward, width, dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, N, W) and bool (B, N) -> (B, N, W)."""
        read: nn.ModuleDict = self.attention["self"]  # type: ignore[assignment]
        q, k, v = (read[name](x) for name in ("query", "key", "value"))
        context = attend(q, k, v, mask, self.heads, self.dropout)
        x = self.attention["output"](context, x)
        out: Tensor = self.output(F.gelu(self.intermediate["dense"](x)), x)
        return out


class Residual(nn.Module):
    """LayerNorm(dropout(linear(x)) + residual)."""

    def __init__(self, inputs: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPS)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dropout(self.dense(x)) + residual)
        return out


class Exchange(nn.Module):
    """Each stream reads the other as both were before; then a feed-forward part each.

    1 is vision and 2 is text, as in the official names.
    """

    def __init__(self, sizes: Sizes, dropout: float) -> None:
        super().__init__()
        v, t, joint = sizes.region_width, sizes.text_width, sizes.joint
        self.heads = sizes.joint_heads
        linear = {f"{name}1": nn.Linear(v, joint) for name in ("query", "key", "value")}
        linear |= {f"{name}2": nn.Linear(t, joint) for name in ("query", "key", "value")}
        self.biattention = nn.ModuleDict(linear)
        self.biOutput = nn.ModuleDict(
            {
                "dense1": nn.Linear(joint, v),
                "LayerNorm1": nn.LayerNorm(v, eps=EPS),
                "dense2": nn.Linear(joint, t),
                "LayerNorm2": nn.LayerNorm(t, eps=EPS),
            }
        )
        self.v_intermediate = nn.ModuleDict({"dense": nn.Linear(v, sizes.region_feedforward)})
        self.v_output = Residual(sizes.region_feedforward, v, dropout)
        self.t_intermediate = nn.ModuleDict({"dense": nn.Linear(t, sizes.text_feedforward)})
        self.t_output = Residual(sizes.text_feedforward, t, dropout)
        self.dropout = Dropout(dropout)

    def forward(
        self, t: Tensor, t_mask: Tensor, v: Tensor, v_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        to = self.biattention
        q1, k1, v1 = (to[f"{name}1"](v) for name in ("query", "key", "value"))
        q2, k2, v2 = (to[f"{name}2"](t) for name in ("query", "key", "value"))
        read_by_text = attend(q2, k1, v1, v_mask, self.heads, self.dropout)
        read_by_vision = attend(q1, k2, v2, t_mask, self.heads, self.dropout)
        out = self.biOutput
        v = out["LayerNorm1"](self.dropout(out["dense1"](read_by_vision)) + v)
        t = out["LayerNorm2"](self.dropout(out["dense2"](read_by_text)) + t)
        v = self.v_output(F.gelu(self.v_intermediate["dense"](v)), v)
        t = self.t_output(F.gelu(self.t_intermediate["dense"](t)), t)
        return t, v


class Pooler(nn.Module):
    """ReLU of a linear layer on the first token."""

    def __init__(self, width: int, joint: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, joint)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x[:, 0]))


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the official trunk, without the prefix ``bert.``: 519.

    24 of them (``q_dense``) are in the file and used by nothing, in the official code neither.
    """
    s = sizes
    t, v, joint = s.text_width, s.region_width, s.joint
    found: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (s.vocabulary, t),
        "embeddings.position_embeddings.weight": (s.positions, t),
        "embeddings.token_type_embeddings.weight": (s.segments, t),
        **_norm("embeddings", t),
        **_linear("v_embeddings.image_embeddings", s.region_features, v),
        **_linear("v_embeddings.image_location_embeddings", 5, v),
        **_norm("v_embeddings", v),
        **_linear("t_pooler.dense", t, joint),
        **_linear("v_pooler.dense", v, joint),
    }
    for i in range(s.text_layers):
        found |= _layer_shapes(f"encoder.layer.{i}", t, s.text_feedforward)
    for i in range(s.region_layers):
        found |= _layer_shapes(f"encoder.v_layer.{i}", v, s.region_feedforward)
    for i in range(s.exchanges):
        name = f"encoder.c_layer.{i}"
        for stream, width in (("1", v), ("2", t)):
            for part in ("query", "key", "value"):
                found |= _linear(f"{name}.biattention.{part}{stream}", width, joint)
            found |= _linear(f"{name}.biOutput.dense{stream}", joint, width)
            found |= _linear(f"{name}.biOutput.q_dense{stream}", joint, width)
            found |= _norm(f"{name}.biOutput", width, stream)
        found |= _feedforward_shapes(f"{name}.v_", v, s.region_feedforward)
        found |= _feedforward_shapes(f"{name}.t_", t, s.text_feedforward)
    return found


def _layer_shapes(name: str, width: int, feedforward: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for part in ("self.query", "self.key", "self.value", "output.dense"):
        found |= _linear(f"{name}.attention.{part}", width, width)
    found |= _norm(f"{name}.attention.output", width)
    return found | _feedforward_shapes(f"{name}.", width, feedforward)


def _feedforward_shapes(start: str, width: int, feedforward: int) -> dict[str, tuple[int, ...]]:
    return {
        **_linear(f"{start}intermediate.dense", width, feedforward),
        **_linear(f"{start}output.dense", feedforward, width),
        **_norm(f"{start}output", width),
    }


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int, stream: str = "") -> dict[str, tuple[int, ...]]:
    return {f"{name}.LayerNorm{stream}.{kind}": (width,) for kind in ("weight", "bias")}


def official_tensors(tensors: Mapping[str, Tensor], sizes: Sizes, path: str) -> dict[str, Tensor]:
    """The trunk's tensors in a checkpoint of any known wrapping, by the trunk's names.

    Raises:
        InputError: one is missing, or has another shape.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        if not name.startswith(DROPPED) and not name.endswith("position_ids"):
            name = name.replace(".gamma", ".weight").replace(".beta", ".bias")
            found[name] = tensor
    wanted = shapes(sizes)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(
            f"head.weights: {path} is not a whole ViLBERT: {len(missing)} of {len(wanted)} tensors "
            f"are missing, such as {missing[0]}"
        )
    for name, shape in wanted.items():
        if tuple(found[name].shape) != shape:
            raise InputError(
                f"head.weights: {name} of {path} is {tuple(found[name].shape)} and not {shape}: "
                "another ViLBERT than the one of Conceptual Captions"
            )
    return found


def _initial(module: nn.Module) -> None:
    """BERT's initialisation: normal with 0.02, biases zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
