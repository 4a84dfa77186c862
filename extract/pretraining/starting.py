"""What a pretraining begins with: the sizes of its towers, and weights of other models.

Weights come from a ViT, a BERT, or a model of both (VisionTextDualEncoder: what a pretraining
leaves), and are known by the names that `PairModel` has for them. What they lack is drawn.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn

from mmc.extract.backbones import parse_spec
from mmc.extract.backbones.hf_files import (
    Files,
    load_config,
    load_model,
    load_partly,
    load_processor,
)
from mmc.extract.backbones.hf_vision_text import VISION_TEXT
from mmc.extract.pretraining.options import PretrainConfig, TextConfig, VisionConfig
from mmc.extract.pretraining.saving import BEST
from mmc.extract.training.checkpoints import CHECKPOINTS, part, read_checkpoint
from mmc.store.errors import InputError

_TOKENS = 64
_PROJECTION = 256
_KINDS = {"vision": ("vit", "a ViT"), "text": ("bert", "a BERT")}
_SPACE = ("visual_projection.", "text_projection.", "logit_scale")
"""What joins the towers of a VisionTextDualEncoder."""
_TOLD = {
    "vision": ("model.dual.vision_model.embeddings.mask_token", "model.pixels."),
    "text": ("model.words.",),
}
"""What only a pretraining's own checkpoint has of each tower."""


@dataclass
class Start:
    """A model before its first step."""

    vision: Any
    """ViTConfig."""
    processor: Any
    """Image processor of transformers."""
    text: Any
    """BertConfig."""
    projection: int
    """Features of the shared space."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """Weights that are not drawn, float32, by their names in `PairModel`."""
    notes: list[str] = field(default_factory=list)
    """Lines for the user."""


class _Source:
    """A folder or a hub repository that weights come from."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.files = Files(parse_spec(spec).name)
        self.config = load_config(self.files)
        self.both = self.config.model_type == VISION_TEXT

    @property
    def place(self) -> str:
        """The same for the same repository, however it was written."""
        return str(Path(self.files.source).resolve()) if self.files.is_folder else self.files.name

    @cached_property
    def model(self) -> Any:
        """The model of both towers."""
        return load_model(self.files)

    def tower(self, side: str) -> Any:
        """The config of a tower.

        Raises:
            InputError: it is of a kind that cannot be pretrained.
        """
        found = getattr(self.config, f"{side}_config") if self.both else self.config
        kind, what = _KINDS[side]
        if found.model_type != kind:
            raise InputError(
                f"{side}.weights={self.spec} is a model of type {found.model_type!r}; {what} is "
                f"needed, or what mmc pretrain left"
            )
        return found

    @cached_property
    def checkpoint(self) -> Path | None:
        """That of the pretraining which left this folder."""
        path = Path(self.files.source) / CHECKPOINTS / f"{BEST}.safetensors"
        return path if self.files.is_folder and path.is_file() else None


def context(config: TextConfig) -> int:
    """Tokens that a text is cut to.

    Raises:
        InputError: more than the tower's weights take.
    """
    if config.weights is None:
        return config.tokens or _TOKENS
    most: int = _Source(config.weights).tower("text").max_position_embeddings
    if config.tokens is not None and config.tokens > most:
        raise InputError(
            f"text.tokens={config.tokens} is more than the {most} that {config.weights} takes"
        )
    return config.tokens or min(_TOKENS, most)


def beginning(config: PretrainConfig, vocabulary: int, padding: int) -> Start:
    """What the model of a config begins with.

    Args:
        config: of the pretraining.
        vocabulary: tokens of the text tower.
        padding: id of the padding token.

    Raises:
        InputError: weights that cannot be loaded or are of another kind, or a setting that is
            theirs to decide.
    """
    sources: dict[str, _Source] = {}
    sides: dict[str, _Source] = {}
    for side, spec in (("vision", config.vision.weights), ("text", config.text.weights)):
        if spec is not None:
            source = _Source(spec)
            sides[side] = sources.setdefault(source.place, source)
    vision = sides["vision"].tower("vision") if "vision" in sides else _vit(config.vision)
    text = sides["text"].tower("text") if "text" in sides else _bert(config.text, padding)
    if "text" not in sides:
        text.vocab_size, text.max_position_embeddings = vocabulary, context(config.text)
    elif vocabulary > text.vocab_size:
        raise InputError(
            f"{config.text.weights} has {text.vocab_size:,} tokens, its tokenizer {vocabulary:,}"
        )
    start = Start(
        vision=vision,
        processor=load_processor(sides["vision"].files)
        if "vision" in sides
        else _processor(config.vision),
        text=text,
        projection=config.projection or _PROJECTION,
    )
    for side, source in sides.items():
        if source.both:
            start.state |= _named(source.model, f"{side}_model.", f"dual.{side}_model.")
            _decoders(start, source, side, config)
        else:
            _tower(start, source, side, shared=bool(config.loss.contrastive))
    _space(start, sides, config)
    return start


def _vit(config: VisionConfig) -> Any:
    sizes = config.sizes
    return transformers.ViTConfig(
        image_size=sizes["image_size"], patch_size=sizes["patch_size"], **_sizes(sizes)
    )


def _processor(config: VisionConfig) -> Any:
    side = config.sizes["image_size"]
    return transformers.ViTImageProcessor(size={"height": side, "width": side}, resample=3)


def _bert(config: TextConfig, padding: int) -> Any:
    return transformers.BertConfig(pad_token_id=padding, **_sizes(config.sizes))


def _sizes(sizes: dict[str, int]) -> dict[str, Any]:
    return {
        # As CLIP's towers begin. With the 0.02 of towers 768 wide, narrow ones hardly mix their
        # tokens: all texts then have one feature, and the contrastive loss stays where it is.
        "initializer_range": sizes["width"] ** -0.5,
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "intermediate_size": sizes["mlp"],
    }


def _tower(start: Start, source: _Source, side: str, *, shared: bool) -> None:
    """Take a ViT or a BERT.

    Args:
        shared: its pooled state will be looked at.
    """
    if side == "vision":
        parts: tuple[str, ...] = ("embeddings.mask_token", "pooler.")
        model, lacking = load_partly(
            source.files, transformers.ViTModel, parts, use_mask_token=True
        )
        names = {"": "dual.vision_model."}
    else:
        parts = ("cls.seq_relationship.", "cls.predictions.", "bert.pooler.")
        model, lacking = load_partly(source.files, transformers.BertForPreTraining, parts)
        names = {"bert.": "dual.text_model.", "cls.predictions.": "words.predictions."}
    for old, new in names.items():
        start.state |= _named(model, old, new, but=lacking)
    if not shared:
        return
    said = source.files.json("1_Pooling/config.json")
    if said and not (said.get("pooling_mode_cls_token") or said.get("pooling_mode") == "cls"):
        start.notes.append(
            f"warning: {side}.weights={source.spec} was made to be pooled over all its tokens; "
            "here its first token is read, as BERT's pooler does, and has yet to learn it"
        )
    elif parts[-1] in lacking:
        start.notes.append(
            f"{side}.weights={source.spec} has no pooler over its first token: one is drawn"
        )


def _named(model: nn.Module, old: str, new: str, but: Iterable[str] = ()) -> dict[str, Tensor]:
    """Parameters whose name begins with ``old``, which becomes ``new``."""
    return {
        new + name.removeprefix(old): value.detach()
        for name, value in model.named_parameters()
        if name.startswith(old) and not name.startswith(tuple(but))
    }


def _decoders(start: Start, source: _Source, side: str, config: PretrainConfig) -> None:
    """Take mask token and decoder of a tower from the checkpoint of its pretraining."""
    what = {"vision": "mask token and decoder of patches", "text": "decoder of tokens"}[side]
    weight = config.loss.image if side == "vision" else config.loss.text
    if source.checkpoint is None:
        if weight:
            start.notes.append(f"{what} begin anew: {source.spec} has no checkpoint with them")
        return
    hint = f"remove it to begin with a new {what}"
    tensors, saved = read_checkpoint(source.checkpoint, hint, _TOLD[side])
    try:
        told = saved["identity"]["config"]["loss"]["pixels"]
    except (KeyError, TypeError):
        raise InputError(f"{source.checkpoint} is not of a pretraining; {hint}") from None
    if side == "vision" and told != config.loss.pixels:
        tensors = {name: value for name, value in tensors.items() if "pixels" not in name}
        if weight:
            start.notes.append(
                f"the decoder of patches begins anew: {source.spec} learnt to tell loss.pixels="
                f"{told}, not {config.loss.pixels}"
            )
    start.state |= part(tensors, "model")


def _space(start: Start, sides: dict[str, _Source], config: PretrainConfig) -> None:
    """Take projections and temperature, where both towers are of one model.

    Raises:
        InputError: the shared space is to be of another width.
    """
    pairs = {source.place: source for source in sides.values() if source.both}
    if not pairs:
        return
    source = next(iter(pairs.values()))
    if len(sides) < 2 or len({one.place for one in sides.values()}) > 1:
        if config.loss.contrastive:
            start.notes.append(
                f"the shared space begins anew: only one tower is of {source.spec}; name it in "
                "vision.weights and text.weights to keep its space"
            )
        return
    width = source.config.projection_dim
    if config.projection not in (None, width):
        raise InputError(
            f"projection={config.projection}: the shared space of {source.spec} has {width} "
            "features; leave projection out"
        )
    start.projection = width
    for name in _SPACE:
        start.state |= _named(source.model, name, f"dual.{name}")
    if config.loss.temperature is not None:
        del start.state["dual.logit_scale"]
    start.notes.append(f"both towers, their shared space and its temperature are of {source.spec}")
