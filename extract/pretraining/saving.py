"""What a pretraining leaves: a folder of transformers that `mmc extract` reads, and the record."""

import shutil
from pathlib import Path
from typing import Any

from mmc.extract.backbones.hf_files import quiet
from mmc.extract.training.checkpoints import CHECKPOINTS
from mmc.extract.training.trackers import TENSORBOARD

RECORD, HISTORY = "pretrain.json", "history.csv"
MODEL = (
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)
"""What transformers writes; the last three for some tokenizers only."""
FILES = (*MODEL, HISTORY, TENSORBOARD, CHECKPOINTS, RECORD)
"""All that a pretraining writes into its folder; the record comes last."""
BEST = "best"
"""Checkpoint that stays: model with decoders, optimiser, epoch and losses of the epoch kept."""
FORMAT = 1
_BIGGEST = "1000GB"


def write_model(folder: Path, model: Any, tokenizer: Any, processor: Any) -> None:
    """Write a VisionTextDualEncoder with its tokenizer and image processor.

    Args:
        folder: there; each file appears whole.
        model: of transformers.
    """
    partial = folder / "model.partial"
    if partial.exists():
        shutil.rmtree(partial)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # what the last call cut at; how long a text may be has its own place
        backend.no_truncation()
        backend.no_padding()
    with quiet():
        model.save_pretrained(partial, max_shard_size=_BIGGEST)
        processor.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    for file in sorted(partial.iterdir()):
        if file.name in MODEL:
            file.replace(folder / file.name)
    shutil.rmtree(partial)
