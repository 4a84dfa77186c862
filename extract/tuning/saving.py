"""What a tuning leaves: an adapter that backbones load, the whole tuned model, and the record."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from open_clip.factory import get_model_config
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from mmc.extract.backbones import parse_spec
from mmc.extract.backbones.hf_files import Files, quiet
from mmc.extract.backbones.lora import PREFIX
from mmc.extract.backbones.lora_files import CONFIG, WEIGHTS
from mmc.extract.backbones.openclip_weights import CONFIG as OPEN_CLIP_CONFIG
from mmc.extract.backbones.openclip_weights import find_source
from mmc.extract.training.checkpoints import CHECKPOINTS, write_atomic, write_json
from mmc.extract.tuning.options import RECORD

HISTORY, MERGED = "history.csv", "merged"
STORE, RUN = "store", "run"
"""With a head: embeddings of the source, and the head on them."""
FILES = (CONFIG, WEIGHTS, HISTORY, MERGED, STORE, RUN, CHECKPOINTS, RECORD)
"""All that a tuning writes into its folder; the record comes last."""
FORMAT = 1


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    base_model: str,
    base_weights: str,
) -> None:
    """Write the two files of an adapter, as peft has them; see :mod:`mmc.extract.backbones.lora`.

    Args:
        tensors: by their names in the file.
        base_model: what the backbone was called.
        base_weights: hash of the weights that the adapter belongs to.
    """
    modules = sorted(
        key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        for key in tensors
        if key.endswith(".lora_A.weight")
    )
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": modules,
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": base_model,
        "base_weights": base_weights,
    }
    plain = {key: value.contiguous() for key, value in tensors.items()}
    write_atomic(folder / WEIGHTS, save_tensors(plain, metadata={"format": "pt"}))
    write_json(folder / CONFIG, settings)


def write_merged(spec: str, model: nn.Module, folder: Path) -> str:
    """Write a model with its adapter merged, as its library saves it; its spec.

    Args:
        spec: of the backbone that was tuned.
        model: float32.
        folder: new; it appears whole.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    parsed = parse_spec(spec)
    if parsed.family == "hf":
        _save_hf(Files(parsed.name), model, partial)
    else:
        quick_gelu = parsed.options.get("quick_gelu", "").lower() in ("true", "1", "yes")
        _save_open_clip(parsed.name, model, partial, quick_gelu=quick_gelu)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    return f"{parsed.family}:{folder}"


def _save_hf(files: Files, model: Any, folder: Path) -> None:
    with quiet():
        model.save_pretrained(folder)
        for kind in (transformers.AutoTokenizer, transformers.AutoImageProcessor):
            kind.from_pretrained(files.source).save_pretrained(folder)


def _save_open_clip(name: str, model: Any, folder: Path, *, quick_gelu: bool) -> None:
    source = find_source(name)
    folder.mkdir(parents=True)
    if source.model.startswith("local-dir:"):  # tokenizers may lie there
        for file in Path(source.resolved).iterdir():
            if file.suffix in (".json", ".txt", ".model"):
                shutil.copy(file, folder)
    config = dict(get_model_config(source.model))
    if quick_gelu or source.quick_gelu:
        config["quick_gelu"] = True
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_atomic(folder / "open_clip_model.safetensors", save_tensors(state))
    settings = {"model_cfg": config, "preprocess_cfg": dict(model.visual.preprocess_cfg)}
    write_json(folder / OPEN_CLIP_CONFIG, settings)
