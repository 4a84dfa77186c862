"""LoRA adapters, merged into a model's weights when it is loaded: W + scale * B A.

Low-Rank Adaptation, Hu et al. 2021 (arXiv:2106.09685). A folder holds ``adapter_config.json`` and
``adapter_model.safetensors``, as peft writes them; ``mmc tune`` writes the same for every family.

**adapter_config.json**: ``peft_type`` ("LORA"), ``r``, ``lora_alpha``; if wanted ``use_rslora``
(scale alpha / sqrt(r) instead of alpha / r), ``rank_pattern`` and ``alpha_pattern`` (other values
for modules whose name ends as the key says, a regular expression), and ``base_weights``, the
``weights`` hash of the model that it belongs to, which is then compared. Anything that would
compute other numbers (DoRA, PiSSA, …) is refused by name.

**adapter_model.safetensors**: for a module of the model ``base_model.model.<module>.lora_A.weight``
(r, in) and ``….lora_B.weight`` (out, r); convolutions (r, in, k, k) and (out, r, 1, 1); embeddings
``….lora_embedding_A`` (r, rows) and ``….lora_embedding_B`` (width, r). A parameter's own name
(``base_model.model.logit_scale``) gives its new value. Modules have their library's names. An
``nn.MultiheadAttention`` ``<attn>`` (open_clip's transformers), which keeps three projections in
one array, has these: ``<attn>.q_proj``, ``<attn>.k_proj``, ``<attn>.v_proj`` its thirds, ``<attn>``
(as peft says) or ``<attn>.in_proj`` all of it, ``<attn>.out_proj`` its output projection. A part
``base_layer`` in a name, which peft writes inside such modules, is skipped.

Every tensor of the file is used, exactly once, or the adapter is refused; those of a pooler alone
are left with the pooler, which backbones do without.

peft up to 0.21.2 adds the change of a MultiheadAttention's output projection twice, when it trains
as when it merges (huggingface/peft, pull request 3774). The features of such an adapter are those
of the model that was trained, so here it counts twice, too. Whether newer versions still do that is
not known, so theirs of this kind are refused; nothing else is concerned.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmc.extract.backbones.base import sha256_json, weights_sha256
from mmc.extract.backbones.lora_files import CONFIG, SCALING, read_config, read_tensors
from mmc.extract.backbones.lora_targets import find_weight
from mmc.store.errors import InputError

PREFIX = "base_model.model."

_MHA_OUT = ".base_layer.out_proj"
"""In peft's files and nowhere else: the output projection of an nn.MultiheadAttention."""
_COUNTS_TWICE = (0, 21, 2)
"""The newest version of peft that is known to."""
_KINDS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "embedding A",
    "lora_embedding_B": "embedding B",
}


@dataclass(frozen=True)
class Adapter:
    """What a merged adapter adds to a backbone's record; nothing where there is none."""

    identity: dict[str, Any] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)


def add_adapter(model: nn.Module, folder: str | None, *, base_weights: str, where: str) -> Adapter:
    """Merge the adapter in ``folder`` (None: nothing) into ``model``, in place, in float32.

    Args:
        model: with its weights, before they are cast.
        folder: of the adapter.
        base_weights: hash of the model's weights.
        where: the backbone as typed, for messages.

    Returns:
        The adapter's hash for the identity, its absolute path for the context.

    Raises:
        InputError: no adapter there, a kind that is not supported, or one of another model.
    """
    if folder is None:
        return Adapter()
    path = Path(folder).expanduser().absolute()
    where = f"{where}: the adapter {path}"
    if re.search(r"[,\[\]]", str(path)):
        raise InputError(f"{where}: a path with , [ or ] cannot stand in a spec; rename the folder")
    config = read_config(path, where)
    tensors = read_tensors(path, where)
    wanted = config.get("base_weights")
    if wanted is not None and wanted != base_weights:
        raise InputError(
            f"{where} was trained on other weights ({str(wanted)[:12]}…) than these "
            f"({base_weights[:12]}…)"
        )
    _merge(model, config, tensors, where)
    digest = sha256_json(
        [weights_sha256(tensors), {key: config[key] for key in SCALING if config.get(key)}]
    )
    return Adapter({"adapter": digest}, {"options": {"lora": str(path)}})


@dataclass
class _Pair:
    """The two factors of one module, and their names in the file."""

    pattern_name: str
    """The module's name as patterns see it."""
    times: int = 1
    """How often the change is added."""
    keys: list[str] = field(default_factory=list)
    factors: dict[str, Tensor] = field(default_factory=dict)


def _merge(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], where: str
) -> None:
    pairs, values = _sorted_out(config, tensors, where)
    faults: list[str] = []
    unknown: list[str] = []
    adapted: dict[tuple[int, int], list[str]] = defaultdict(list)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        # New values first: an embedding may be saved whole and have an adapter, too.
        for key, tensor in values.items():
            name = _own_name(model, _plain(key), parameters)
            if name is None:
                unknown.append(key)
            elif parameters[name].shape != tensor.shape:
                faults.append(_misfit(key, tensor.shape, parameters[name].shape))
            else:
                parameters[name].copy_(tensor)
        for name, pair in pairs.items():
            found = find_weight(model, name)
            if found is None:
                unknown += pair.keys
                continue
            adapted[found.data_ptr(), found.numel()] += pair.keys[:1]
            fault = _add(found, pair, config)
            faults += [fault] if fault else []
    unknown = [key for key in unknown if not _is_dropped_pooler(model, key)]
    if unknown:
        raise InputError(f"{where} is of another model: here is no module for {_listed(unknown)}")
    twice = [key for keys in adapted.values() if len(keys) > 1 for key in keys]
    if twice:
        raise InputError(f"{where} adapts one weight under two names: {_listed(twice)}")
    if faults:
        raise InputError(f"{where} does not fit the model: {_listed(faults, '; ')}")


def _sorted_out(
    config: dict[str, Any], tensors: dict[str, Tensor], where: str
) -> tuple[dict[str, _Pair], dict[str, Tensor]]:
    """The factors by module, and the tensors that are a parameter's new value, by key."""
    pairs: dict[str, _Pair] = {}
    values: dict[str, Tensor] = {}
    owners: dict[tuple[str, str], list[str]] = defaultdict(list)
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in _KINDS if key.endswith(f".{suffix}")), None)
        if suffix is None:
            if "lora_" in key:
                raise InputError(f"{where} holds {key}, a kind of adapter that is not supported")
            values[key] = tensor
            owners[_plain(key), "value"].append(key)
            continue
        module = key.removesuffix(f".{suffix}")
        times = 2 if module.endswith(_MHA_OUT) and _counts_twice(config, where) else 1
        pair = pairs.setdefault(_plain(module), _Pair(_pattern_name(module), times))
        pair.keys.append(key)
        pair.factors[_KINDS[suffix]] = tensor
        owners[_plain(module), _KINDS[suffix]].append(key)
    twice = [key for keys in owners.values() if len(keys) > 1 for key in keys]
    if twice:
        raise InputError(f"{where} adapts one module twice: {_listed(twice)}")
    alone = [
        key
        for pair in pairs.values()
        if set(pair.factors) not in ({"A", "B"}, {"embedding A", "embedding B"})
        for key in pair.keys
    ]
    if alone:
        raise InputError(f"{where} is incomplete: {_listed(alone)} without the other factor")
    return pairs, values


def _counts_twice(config: dict[str, Any], where: str) -> bool:
    """Whether the peft that wrote an adapter of an nn.MultiheadAttention is one that does."""
    written = config.get("peft_version") or "0"
    if tuple(int(part) for part in re.findall(r"\d+", written)[:3]) <= _COUNTS_TWICE:
        return True
    raise InputError(
        f"{where} adapts nn.MultiheadAttention and was written by peft {written}; how that counts "
        "the output projection is not known here, so merge it with peft and give the merged weights"
    )


def _is_dropped_pooler(model: nn.Module, key: str) -> bool:
    """Whether a tensor belongs to the pooler that was taken off the model."""
    name = _plain(key).removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
    return name.startswith("pooler.") and getattr(model, "pooler", False) is None


def _add(weight: Tensor, pair: _Pair, config: dict[str, Any]) -> str | None:
    """Add a module's adapter to its weight; what is wrong, where it does not fit."""
    embedding = "embedding A" in pair.factors
    down, up = (pair.factors[f"embedding {x}" if embedding else x].float() for x in "AB")
    rank = _patterned(config.get("rank_pattern"), pair.pattern_name, config["r"])
    alpha = _patterned(config.get("alpha_pattern"), pair.pattern_name, config["lora_alpha"])
    if down.ndim < 2 or up.ndim < 2 or not down.shape[0] == up.shape[1] == rank:
        return f"{pair.keys[0]} is of rank {len(down)}, {CONFIG} says {rank}"
    if down[0].numel() * len(up) != weight.numel():
        return _misfit(pair.keys[0], (len(up), *down.shape[1:]), weight.shape)
    delta = up.flatten(1) @ down.flatten(1)
    delta = delta.T if embedding else delta
    if len(delta) != len(weight):
        return _misfit(pair.keys[0], (len(up), *down.shape[1:]), weight.shape)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    weight += pair.times * scale * delta.reshape(weight.shape)
    return None


def _patterned(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that ``name`` ends with, as peft matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _plain(key: str) -> str:
    """A name in the file as a name in the model."""
    return ".".join(part for part in key.removeprefix(PREFIX).split(".") if part != "base_layer")


def _pattern_name(module: str) -> str:
    """What patterns are matched with: peft adapts what is inside a module by the module's name."""
    return module.removeprefix(PREFIX).partition(".base_layer")[0]


def _own_name(model: nn.Module, name: str, known: dict[str, Any]) -> str | None:
    trunk = f"{getattr(model, 'base_model_prefix', '')}."
    return next((each for each in (name, name.removeprefix(trunk)) if each in known), None)


def _misfit(key: str, found: Any, wanted: Any) -> str:
    return f"{key} is for {list(found)}, the model has {list(wanted)}"


def _listed(names: list[str], separator: str = ", ") -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return separator.join(names[:3]) + more
