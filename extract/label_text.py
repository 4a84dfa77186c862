"""Embeddings of the label names, kept beside the features: what zero-shot and label heads read."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmc.extract.backbones import load_backbone
from mmc.extract.backbones.base import Backbone
from mmc.extract.jobs import batch_tokens
from mmc.extract.plan import text_batches
from mmc.extract.settings import pick_device
from mmc.store import EmbeddingStore, Writer
from mmc.store.errors import InputError
from mmc.store.schema import difference

BATCH_SIZE = 32


def update_label_text(
    store: EmbeddingStore,
    writer: Writer,
    backbone: Backbone,
    names: Mapping[str, str],
    templates: Sequence[str] | None,
) -> bool:
    """Embed the prompts of a store's labels, unless the store has just those.

    Args:
        store: with the label set; its file says what is there.
        writer: of the backbone's alias.
        backbone: nothing happens when it gives no ``text``.
        names: words for labels; a label that is not in it speaks for itself.
        templates: with ``{label}`` in each; None: the backbone's own.

    Returns:
        Whether they were computed.
    """
    labels = store.label_set
    if "text" not in backbone.fields or not labels:
        return False
    templates = templates or (backbone.prompt_template,)
    words = [names.get(label, label) for label in labels]
    recorded = _description(templates, labels, words)
    there = store.label_text(writer.alias)
    if there and there[0] == labels and store.label_prompt(writer.alias) == recorded:
        return False
    writer.write_label_text(labels, embed_labels(backbone, words, templates), recorded)
    return True


def embed_labels(
    backbone: Backbone, words: Sequence[str], templates: Sequence[str] | None = None
) -> NDArray[np.float32]:
    """The text embedding (C, D) of each label.

    Args:
        backbone: with the field ``text``.
        words: C labels, in the words that are filled in.
        templates: with ``{label}`` in each; None: the backbone's own. One alone is embedded as the
            backbone gives it. The embeddings of several are normalised to length 1 and averaged:
            the prompt ensembling of Radford et al. 2021 (arXiv:2103.00020, section 3.1.4).
    """
    templates = templates or (backbone.prompt_template,)
    texts = [template.replace("{label}", word) for template in templates for word in words]
    arrays = embed_texts(backbone, texts).reshape(len(templates), len(words), -1)
    if len(templates) == 1:
        return arrays[0]
    lengths = np.linalg.norm(arrays, axis=2, keepdims=True)
    mean: NDArray[np.float32] = (arrays / np.maximum(lengths, 1e-12)).mean(axis=0)
    return mean


def embed_labels_like(
    recipe: Mapping[str, Any],
    words: Sequence[str],
    templates: Sequence[str] | None = None,
    *,
    device: str,
) -> NDArray[np.float32]:
    """As `embed_labels`, with the backbone that made a run's features: labels that come later.

    Args:
        recipe: one entry of `Run.recipe`: identity and context of a backbone.
        words: see `embed_labels`.
        templates: see `embed_labels`.
        device: where the backbone runs, as ``--device`` takes it.

    Raises:
        InputError: the run does not name its backbone; it cannot be loaded, is not the one that
            made the features, or gives no ``text``.
    """
    backbone = load_like(recipe, device=device)
    if "text" not in backbone.fields:
        raise InputError(f"{spec_of(recipe)} has no text tower, so it cannot embed labels")
    return embed_labels(backbone, words, templates)


def load_like(recipe: Mapping[str, Any], *, device: str) -> Backbone:
    """The backbone that made some features, and no other.

    Args:
        recipe: alias, identity and context of the features.
        device: where it runs, as ``--device`` takes it.

    Raises:
        InputError: the recipe does not name its backbone; it cannot be loaded, or is not the one
            that made the features.
    """
    spec, identity = spec_of(recipe), recipe["identity"]
    if "precision" not in identity:
        raise InputError(
            f"{recipe['alias']!r} was not made by `mmc extract`: {spec} may not be what made it, "
            "so nothing new can be embedded alike"
        )
    backbone = load_backbone(
        spec,
        device=str(pick_device(device)),
        precision=identity["precision"],
        max_text_tokens=identity.get("max_text_tokens"),
    )
    before = {key: value for key, value in identity.items() if key != "batch_size"}
    lines = difference(before, json.loads(json.dumps(backbone.identity)))
    if lines:
        raise InputError(f"{spec} is not what made {recipe['alias']!r}: " + "; ".join(lines))
    return backbone


def spec_of(recipe: Mapping[str, Any]) -> str:
    """Spec of the backbone that made a run's features.

    Raises:
        InputError: the run does not say.
    """
    context = recipe["context"]
    if "spec" not in context:
        raise InputError(
            f"the run does not say which backbone made {recipe['alias']!r}; "
            "extract the data yourself and give the store"
        )
    return str(context.get("resolved_spec", context["spec"]))


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


def _description(templates: Sequence[str], labels: Sequence[str], words: Sequence[str]) -> str:
    """The templates, and which words were filled in where they are not the labels themselves."""
    text = templates[0] if len(templates) == 1 else json.dumps(list(templates), ensure_ascii=False)
    if list(words) == list(labels):
        return text
    digest = hashlib.sha256(json.dumps(list(words)).encode()).hexdigest()
    return f"{text} (label names {digest[:12]})"
