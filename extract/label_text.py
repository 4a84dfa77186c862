"""Embeddings of the label names, kept beside the features: what zero-shot and label heads read."""

import hashlib
import json
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from mmc.extract.backbones.base import Backbone
from mmc.extract.jobs import batch_tokens
from mmc.extract.plan import text_batches
from mmc.store import EmbeddingStore, Writer

BATCH_SIZE = 32


def update_label_text(
    store: EmbeddingStore,
    writer: Writer,
    backbone: Backbone,
    names: Mapping[str, str],
    prompt: str | None,
) -> bool:
    """Embed the prompts of a store's labels, unless the store has just those.

    Args:
        store: with the label set; its file says what is there.
        writer: of the backbone's alias.
        backbone: nothing happens when it gives no ``text``.
        names: words for labels; a label that is not in it speaks for itself.
        prompt: template with ``{label}``; None: the backbone's own.

    Returns:
        Whether they were computed.
    """
    labels = store.label_set
    if "text" not in backbone.fields or not labels:
        return False
    template = prompt or backbone.prompt_template
    recorded = _description(template, labels, names)
    there = store.label_text(writer.alias)
    if there and there[0] == labels and store.label_prompt(writer.alias) == recorded:
        return False
    texts = [template.replace("{label}", names.get(label, label)) for label in labels]
    writer.write_label_text(labels, embed_texts(backbone, texts), recorded)
    return True


def embed_texts(backbone: Backbone, texts: list[str]) -> NDArray[np.float32]:
    """The pooled text embedding (len(texts), D) of each text, in batches of a fixed shape."""
    tokens = backbone.tokenize(texts)
    rows = np.arange(len(texts), dtype=np.int64)
    array = np.empty((len(texts), *backbone.fields["text"].shape), np.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as everywhere in an extraction: the last bits depend on it
    try:
        for batch in text_batches(rows, tokens.buckets.numpy(), BATCH_SIZE):
            ready = batch_tokens(tokens, batch.rows, BATCH_SIZE)
            values = backbone.encode_text(ready, ["text"])["text"]
            array[batch.rows] = values[: len(batch.rows)].float().cpu().numpy()
    finally:
        torch.set_num_threads(before)
    return array


def _description(template: str, labels: tuple[str, ...], names: Mapping[str, str]) -> str:
    """The template, and which names were filled in where they are not the labels themselves."""
    words = [names.get(label, label) for label in labels]
    if words == list(labels):
        return template
    digest = hashlib.sha256(json.dumps(words).encode()).hexdigest()
    return f"{template} (label names {digest[:12]})"
