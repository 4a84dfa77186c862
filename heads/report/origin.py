"""The part of a page on where a run comes from and how to make it again."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from mmc.heads.artifact import Run
from mmc.heads.losses import GROUP as LOSS_GROUP
from mmc.heads.losses import LOSSES
from mmc.heads.models import GROUP, HEADS
from mmc.heads.options import OptimConfig
from mmc.heads.report.markup import esc, folded, paragraph, row_head, section, table, text_cell
from mmc.store.registry import load, lookup

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore


def reproduce(run: Run, store: "EmbeddingStore", split: str) -> str:
    """Commands, data, features and their fingerprints, versions, the recipe where there is one."""
    features = [
        (row_head(esc(ref.feature)), text_cell(ref.context.get("spec", "not recorded")),
         f"<td><code>{esc(ref.fingerprint)}</code></td>")
        for ref in run.features.values()
    ]  # fmt: skip
    facts = [
        ("trained", run.created),
        ("task", f"{run.task}, {len(run.label_set):,} labels"),
        ("hash of the label set", run.label_set_hash),
        ("numbers in the head", f"{run.parameters:,}"),
        ("seed", str(run.seed)),
        ("versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())),
        ("source", str(run.source.get("spec", "not recorded"))),
        ("store", store.path),
    ]
    counts = run.source.get("counts", {})
    if "samples" in counts:
        facts.append(("samples of the source", f"{counts['samples']:,}"))
    record = {key: getattr(run, key) for key in ("head_config", "loss_config", "train_config")}
    settings = json.dumps(record, indent=1, ensure_ascii=False, default=str)
    return section(
        "reproduce",
        "How to make it again",
        _code(commands(run, store.path, split)),
        table("The run", ("", ""), [(row_head(esc(k)), text_cell(v)) for k, v in facts]),
        table(
            "Features that it reads", ("feature", "backbone", "fingerprint"), features, css="words"
        ),
        folded("All settings", _code(settings), printed=False),
        folded("The recipe", _code(run.recipe_text)) if run.recipe_text else "",
        paragraph("The same versions, device and seed give the same weights.", "soft"),
    )


def commands(run: Run, store: str, split: str) -> str:
    """The command lines from the source to this page."""
    path = str(run.path or "RUN")
    lines = [_extract(entry, run.source, store) for entry in run.recipe()]
    lines.append(_train(run, store, path))
    lines.append(_line("mmc", "evaluate", path, store, "--split", split))
    lines.append(_line("mmc", "report", path, "--store", store, "--out", "report.html"))
    return "\n".join(lines)


def _extract(entry: Mapping[str, Any], source: Mapping[str, Any], store: str) -> str:
    parts = ["mmc", "extract", str(source.get("spec", "SOURCE")), store]
    parts += ["--backbone", str(entry["context"].get("spec", "SPEC")), "--name", entry["alias"]]
    parts += ["--fields", ",".join(entry["context"].get("fields", entry["fields"]))]
    for name, value in source.get("options", {}).items():
        option = "--" + name.replace("_", "-")
        parts += [option] if value is True else [option, str(value)]
    return _line(*parts)


def _train(run: Run, store: str, path: str) -> str:
    if "options" in run.search:  # of a plain training of the head that a search has kept
        return _line("mmc", "train-head", store, path, *map(str, run.search["options"]))
    features = ",".join(f"{role}={ref.feature}" for role, ref in run.features.items())
    parts = ["mmc", "train-head", store, path, "--head", run.head, "--features", features]
    config = run.train_config
    if run.history:
        parts += ["--loss", run.loss]
    for name in ("batch_size", "epochs", "lr", "max_memory"):
        if config.get(name) is not None and run.history:
            parts += ["--" + name.replace("_", "-"), str(config[name])]
    parts += ["--seed", str(run.seed)]
    for key, value in changed(run).items():
        parts += ["--set", f"{key}={value}"]
    return _line(*parts)


def changed(run: Run) -> dict[str, str]:
    """Settings that are not the default, as ``--set`` takes them."""
    head: Any = load(lookup(HEADS, run.head, kind="head", group=GROUP))
    loss: Any = load(lookup(LOSSES, run.loss, kind="loss", group=LOSS_GROUP))
    recorded = run.train_config.get("settings", {})
    found = {}
    for group, config, given in (
        ("head", head.Config, run.head_config),
        ("loss", loss.Config, run.loss_config),
        ("optim", OptimConfig, recorded.get("optim", {})),
    ):
        for field in fields(config):
            value = given.get(field.name, field.default)
            plain = tuple(value) if isinstance(value, list) else value
            if plain != field.default:
                shown = ",".join(map(str, plain)) if isinstance(plain, tuple) else str(plain)
                found[f"{group}.{field.name}"] = shown
    return found


def _code(text: str) -> str:
    return f"<pre><code>{esc(text)}</code></pre>"


def _line(*parts: str) -> str:
    return " ".join(shlex.quote(part) for part in parts)
