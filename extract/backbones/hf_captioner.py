"""Captions by BLIP (``BlipForConditionalGeneration`` of transformers), one picture after another.

The picture is encoded once and the decoder writes the most likely caption by beam search, or word
by word (greedy, one beam). Each caption begins with the prompt, which is taken off again. Nothing
is sampled: the same batch of pictures gives the same captions.
"""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from mmc.extract.backbones import parse_spec
from mmc.extract.backbones.base import (
    Normalizer,
    cast,
    check_device,
    sha256_json,
    weights_sha256,
)
from mmc.extract.backbones.hf_blip import CAPTIONING
from mmc.extract.backbones.hf_files import (
    Files,
    architecture,
    check_image_size,
    image_transform,
    load_config,
    load_model,
    load_tokenizer,
)
from mmc.extract.backbones.hf_text import TextRules, Tokens
from mmc.extract.backbones.hub import quick_when_offline
from mmc.extract.backbones.lora import add_adapter
from mmc.store import config as configs
from mmc.store.errors import InputError

EXAMPLE = "hf:Salesforce/blip-image-captioning-base"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What goes in the brackets of a captioning model's spec."""

    lora: str | None = None
    """Folder of a LoRA adapter that is merged into the weights."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How captions are searched for."""

    prompt: str
    """What every caption begins with."""
    beams: int
    max_tokens: int
    """New tokens at most, behind the prompt."""
    min_tokens: int


class Captioner:
    """A loaded captioning model; call it with pictures."""

    def __init__(
        self,
        model: Any,
        tokens: Tokens,
        decoding: Decoding,
        *,
        transform: Any,
        device: str,
        precision: str,
        identity: dict[str, Any],
    ) -> None:
        self._model = model
        self._tokens = tokens
        self._decoding = decoding
        self._device = torch.device(device)
        self._dtype = cast(model.eval().requires_grad_(False).to(device), precision)
        self._normalize = Normalizer(transform).to(self._device)
        self.image_transform = transform
        self.identity = identity
        """JSON-able; all that decides a caption beside the batch."""
        # Without its end token, and with the token that begins captions where [CLS] was.
        ids = tokens([decoding.prompt])
        self._prompt = ids.ids[:, : int(ids.lengths[0]) - 1].clone()
        self._prompt[:, 0] = model.config.text_config.bos_token_id

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> list[str]:
        """The caption of each picture, uint8 (B, 3, H, W)."""
        inputs = self._normalize(pixels.to(self._device), self._dtype)
        seen = self._model.vision_model(pixel_values=inputs).last_hidden_state
        prompt = self._prompt.to(self._device).repeat(len(seen), 1)
        text = self._model.config.text_config
        written = self._model.text_decoder.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            encoder_hidden_states=seen,
            encoder_attention_mask=seen.new_ones(seen.shape[:2], dtype=torch.int64),
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            num_beams=self._decoding.beams,
            max_new_tokens=self._decoding.max_tokens,
            min_new_tokens=self._decoding.min_tokens,
            do_sample=False,
        )
        return self._tokens.texts(written[:, prompt.shape[1] :])


def load_captioner(spec: str, decoding: Decoding, *, device: str, precision: str) -> Captioner:
    """The captioning model that ``spec`` names.

    Raises:
        InputError: no such model, one that writes no captions, or weights that do not fit.
    """
    parsed = parse_spec(spec)
    if parsed.family != "hf":
        raise InputError(
            f"{parsed} writes no captions here; models of transformers do, such as {EXAMPLE}"
        )
    where = f"hf:{parsed.name}"
    settings = configs.build(Options, parsed.options, where=f"captioning model {where}")
    check_device(device)
    files = Files(parsed.name)
    with quick_when_offline(parsed.name):
        config = load_config(files)
        _check_class(where, config)
        model = load_model(files, transformers.BlipForConditionalGeneration)
        rules = TextRules(
            context=config.text_config.max_position_embeddings, cut="exact", pooling="model"
        )
        tokens = Tokens(load_tokenizer(files), rules, None)
        transform = image_transform(files)
    check_image_size(files, transform, config.vision_config.image_size)
    longest = tokens.length - int(tokens([decoding.prompt]).lengths[0])
    if decoding.max_tokens > longest:
        raise InputError(
            f"{where}: it writes {longest} tokens at most behind that prompt, and "
            f"{decoding.max_tokens} are asked for"
        )
    digest = weights_sha256(model.state_dict())
    adapter = add_adapter(model, settings.lora, base_weights=digest, where=where)
    identity = {
        "architecture": f"transformers {type(model).__name__}",
        "config": sha256_json(architecture(config)),
        "weights": digest,
        "preprocessing": transform.as_dict(),
        "tokenizer": tokens.digest(),
        "precision": precision,
        "decoding": vars(decoding),
        **adapter.identity,
    }
    return Captioner(
        model,
        tokens,
        decoding,
        transform=transform,
        device=device,
        precision=precision,
        identity=identity,
    )


def _check_class(where: str, config: Any) -> None:
    """Raises InputError where the checkpoint is of a model that writes no captions."""
    if config.model_type != "blip":
        raise InputError(
            f"{where}: models of type {config.model_type!r} write no captions here; take a BLIP "
            f"captioning model, such as {EXAMPLE}"
        )
    kind = (getattr(config, "architectures", None) or [CAPTIONING])[0]
    if kind != CAPTIONING:
        raise InputError(
            f"{where} is a {kind}, which writes no captions; take a {CAPTIONING}, such as {EXAMPLE}"
        )
